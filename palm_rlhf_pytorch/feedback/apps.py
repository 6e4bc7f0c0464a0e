"""The Django app: also fits into a project of the user's own, as `INSTALLED_APPS += [this module's path]`."""

from typing import Any

from django.apps import AppConfig


class FeedbackConfig(AppConfig):
    """Label and name of the app; the label is the prefix of its tables."""

    name = "palm_rlhf_pytorch.feedback"
    label = "palm_feedback"
    verbose_name = "PaLM feedback"
    default_auto_field = "django.db.models.BigAutoField"
    writer: Any = None  # of this server: a Writer of live.py
