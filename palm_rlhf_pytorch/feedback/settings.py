"""Django's settings for `palm-rlhf feedback`: read from PALM_FEEDBACK_* variables alone (environment.py).

In a Django project of the user's own none of these apply.
"""

from palm_rlhf_pytorch.feedback import environment

DATA_DIR = environment.data_dir()
BEHIND_TLS = environment.behind_tls()

DEBUG = False
SECRET_KEY = environment.secret_key(DATA_DIR)
ALLOWED_HOSTS = environment.hosts()
ROOT_URLCONF = "palm_rlhf_pytorch.feedback.site"
WSGI_APPLICATION = "palm_rlhf_pytorch.feedback.wsgi.application"
DATABASES = {"default": environment.database(DATA_DIR)}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django_htmx",
    "palm_rlhf_pytorch.feedback.apps.FeedbackConfig",
]
MIDDLEWARE = [
    "palm_rlhf_pytorch.feedback.security.check_host",
    "palm_rlhf_pytorch.feedback.security.content_security_policy",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

STATIC_URL = "static/"
WHITENOISE_USE_FINDERS = True  # serves from the installed package: no collectstatic
WHITENOISE_AUTOREFRESH = False

LOGIN_URL = "palm_feedback:login"
LOGIN_REDIRECT_URL = "palm_feedback:home"
LOGOUT_REDIRECT_URL = "palm_feedback:login"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]

USE_TZ = True
TIME_ZONE = "UTC"
USE_I18N = False
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_000_000  # bytes of a form; a note is far shorter

SESSION_COOKIE_NAME = "palm_feedback_session"  # cookies know no ports: beside another app on this machine
CSRF_COOKIE_NAME = "palm_feedback_csrf"
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_HTTPONLY = True  # the token stands in every form
CSRF_FAILURE_VIEW = "palm_rlhf_pytorch.feedback.errors.csrf_failure"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = BEHIND_TLS
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if BEHIND_TLS else None
SECURE_HSTS_SECONDS = 31_536_000 if BEHIND_TLS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = BEHIND_TLS
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"stderr": {"class": "logging.StreamHandler"}, "none": {"class": "logging.NullHandler"}},
    "loggers": {
        "django": {"handlers": ["stderr"], "level": "ERROR", "propagate": False},
        "waitress.queue": {"handlers": ["none"], "level": "ERROR", "propagate": False},  # a line for each that waits
        "django.security": {"handlers": ["none"], "level": "ERROR", "propagate": False},  # foreign hosts, by the dozen
    },
}
