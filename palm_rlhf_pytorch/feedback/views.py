"""Pages: requests in, templates out. What happens to judgements is in claims.py and judgements.py."""

from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from palm_rlhf_pytorch.feedback.models import Project


def home(request: HttpRequest) -> HttpResponse:
    """The projects there are."""
    return render(request, "palm_feedback/home.html", {"projects": Project.objects.order_by("name")})
