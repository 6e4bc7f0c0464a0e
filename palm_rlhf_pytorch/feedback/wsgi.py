"""The WSGI application, for waitress and other servers: `gunicorn palm_rlhf_pytorch.feedback.wsgi`."""

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "palm_rlhf_pytorch.feedback.settings")
application = get_wsgi_application()
