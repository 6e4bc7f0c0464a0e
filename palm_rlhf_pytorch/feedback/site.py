"""Root of the addresses when the app is served by itself; a project of the user's own includes urls.py instead."""

from django.urls import include, path

urlpatterns = [path("", include("palm_rlhf_pytorch.feedback.urls"))]
handler400 = "palm_rlhf_pytorch.feedback.errors.bad_request"
handler404 = "palm_rlhf_pytorch.feedback.errors.not_found"
handler500 = "palm_rlhf_pytorch.feedback.errors.server_error"
