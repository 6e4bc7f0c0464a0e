"""Root of the addresses when the app is served by itself; a project of the user's own includes urls.py instead."""

from django.urls import include, path

urlpatterns = [path("", include("palm_rlhf_pytorch.feedback.urls"))]
