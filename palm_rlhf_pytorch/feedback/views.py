"""Pages around the judging: login, projects, instructions, statistics. Requests in, templates out."""

from typing import Any

from django.contrib.auth.views import LoginView
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, render
from django.views.decorators.http import require_safe

from palm_rlhf_pytorch.feedback import accounts
from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.events import ThrottledError
from palm_rlhf_pytorch.feedback.models import Project
from palm_rlhf_pytorch.feedback.pictures import pictures
from palm_rlhf_pytorch.feedback.statistics import own_progress, progress

ASKED = {Kind.PAIR: "which of two is better", Kind.RATING: "1 to 5 for each", Kind.RANKING: "an order, best first"}


class Login(LoginView):
    """Login by name and password; after too many tries that failed nobody is let in for a while."""

    template_name = "palm_feedback/login.html"
    redirect_authenticated_user = True
    next_page = "palm_feedback:home"

    def post(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        """Let somebody in."""
        try:
            accounts.check_login(*self._who())
        except ThrottledError as error:
            form = self.get_form_class()(request, initial={"username": self._who()[0]})  # checks no password
            context = self.get_context_data(form=form, error=f"{str(error).capitalize()}.")
            response = self.render_to_response(context, status=429)
            response.headers["Retry-After"] = str(error.seconds)
            return response
        return super().post(request, *args, **kwargs)

    def form_invalid(self, form: Any) -> HttpResponse:
        """Count the try."""
        accounts.login_failed(*self._who())
        error = "This name and password do not go together."
        return self.render_to_response(self.get_context_data(form=form, error=error), status=422)

    def _who(self) -> tuple[str, str]:
        return self.request.POST.get("username", ""), self.request.META.get("REMOTE_ADDR", "")


@require_safe
def home(request: HttpRequest) -> HttpResponse:
    """The projects there are, and how far each is."""
    projects = [
        {
            "project": project,
            "asked": ASKED[Kind(project.kind)],
            "progress": progress(project),
            "judged": own_progress(project, request.user)[0],
        }
        for project in Project.objects.order_by("name")
    ]
    return render(request, "palm_feedback/home.html", {"projects": projects})


@require_safe
def instructions(request: HttpRequest, slug: str) -> HttpResponse:
    """What a project asks of people, and the keys."""
    project = get_object_or_404(Project, slug=slug)
    context = {
        "project": project,
        "kind": Kind(project.kind).name.lower(),
        "minutes": max(1, project.lease_seconds // 60),
    }
    return render(request, "palm_feedback/instructions.html", context)


@require_safe
def statistics(request: HttpRequest, slug: str) -> HttpResponse:
    """What has been judged, drawn."""
    project = get_object_or_404(Project, slug=slug)
    return render(request, "palm_feedback/statistics.html", {"project": project, **pictures(project)})
