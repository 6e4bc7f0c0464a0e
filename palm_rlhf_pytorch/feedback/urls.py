"""Addresses of the app's pages, in the namespace `palm_feedback`."""

from django.contrib.auth.views import LoginView, LogoutView
from django.urls import path

from palm_rlhf_pytorch.feedback import views

app_name = "palm_feedback"
urlpatterns = [
    path("", views.home, name="home"),
    path("login/", LoginView.as_view(template_name="palm_feedback/login.html"), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
]
