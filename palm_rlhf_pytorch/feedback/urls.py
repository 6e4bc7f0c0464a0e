"""Addresses of the app's pages, in the namespace `palm_feedback`."""

from django.contrib.auth.views import LogoutView
from django.urls import path

from palm_rlhf_pytorch.feedback import judging, views

app_name = "palm_feedback"
urlpatterns = [
    path("", views.home, name="home"),
    path("login/", views.Login.as_view(), name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("projects/<slug:slug>/", judging.judge, name="judge"),
    path("projects/<slug:slug>/written/", judging.written, name="written"),
    path("projects/<slug:slug>/order/", judging.order, name="order"),
    path("projects/<slug:slug>/skip/", judging.skip, name="skip"),
    path("projects/<slug:slug>/undo/", judging.undo, name="undo"),
    path("projects/<slug:slug>/instructions/", views.instructions, name="instructions"),
    path("projects/<slug:slug>/statistics/", views.statistics, name="statistics"),
]
