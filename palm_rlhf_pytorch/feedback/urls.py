"""Addresses of the app's pages, in the namespace `palm_feedback`."""

from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LogoutView
from django.urls import path

from palm_rlhf_pytorch.feedback import judging, views

app_name = "palm_feedback"
urlpatterns = [
    path("", login_required(views.home), name="home"),
    path("login/", views.Login.as_view(), name="login"),
    path("logout/", LogoutView.as_view(next_page="palm_feedback:login"), name="logout"),
    path("projects/<slug:slug>/", login_required(judging.judge), name="judge"),
    path("projects/<slug:slug>/written/", login_required(judging.written), name="written"),
    path("projects/<slug:slug>/order/", login_required(judging.order), name="order"),
    path("projects/<slug:slug>/skip/", login_required(judging.skip), name="skip"),
    path("projects/<slug:slug>/undo/", login_required(judging.undo), name="undo"),
    path("projects/<slug:slug>/instructions/", login_required(views.instructions), name="instructions"),
    path("projects/<slug:slug>/statistics/", login_required(views.statistics), name="statistics"),
]
