"""The pages on which people judge: an item, its answer, skip, undo. Requests in, templates out.

What is sent by htmx is answered by the next page, of which the browser takes `main`; a plain form is answered by a
redirect to it, so that a reload sends nothing twice. What is wrong with an answer is said beside it, and nothing typed
is lost.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from django.contrib import messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_http_methods

from palm_rlhf_pytorch.feedback import claims, judgements, live
from palm_rlhf_pytorch.feedback.codes import Kind, State
from palm_rlhf_pytorch.feedback.drafts import MOVES, Draft, answer_of, first_draft, letter, read_draft
from palm_rlhf_pytorch.feedback.errors import error_page
from palm_rlhf_pytorch.feedback.events import ThrottledError
from palm_rlhf_pytorch.feedback.models import Assignment, Project
from palm_rlhf_pytorch.feedback.statistics import own_progress, progress

QUESTIONS = {
    Kind.PAIR: "Which response is better?",
    Kind.RATING: "How good is each response?",
    Kind.RANKING: "Put the best response first",
}
# value, side, how much: the steps of a pair from left to right, on the keys 1 to 7
STEPS = (
    (-3, "A", "much better"), (-2, "A", "better"), (-1, "A", "slightly better"), (0, "Tie", "equally good"),
    (1, "B", "slightly better"), (2, "B", "better"), (3, "B", "much better"),
)  # fmt: skip
STARS = ((1, "very bad"), (2, "bad"), (3, "fair"), (4, "good"), (5, "very good"))
REASONS = ("I cannot tell", "Not my field", "Unclear prompt", "Nobody should read this")
_Act = Callable[[HttpRequest, Project], HttpResponse]


@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def judge(request: HttpRequest, slug: str) -> HttpResponse:
    """The item that a person holds, or the next one."""
    if request.method == "POST":
        return submit(request, slug)
    return _next_page(request, get_object_or_404(Project, slug=slug))


@never_cache
def written(request: HttpRequest, slug: str) -> HttpResponse:
    """What a page that waits asks again and again: nothing (204) until they are written, then the next page."""
    project = get_object_or_404(Project, slug=slug)
    if not request.headers.get("HX-Request"):
        return redirect("palm_feedback:judge", slug)
    return _next_page(request, project, polled=True)


def _on_post(act: _Act) -> Callable[[HttpRequest, str], HttpResponse]:
    """A view that acts on a POST; anything else, such as a login on the way, goes back to the item."""

    @never_cache
    def view(request: HttpRequest, slug: str) -> HttpResponse:
        project = get_object_or_404(Project, slug=slug)
        if request.method != "POST":
            return redirect("palm_feedback:judge", slug)
        try:
            return act(request, project)
        except judgements.NotYoursError:
            return error_page(404, "You do not hold this item: it was given back, or is another person's.")

    return view


@_on_post
def submit(request: HttpRequest, project: Project) -> HttpResponse:
    """Judge the item."""
    assignment = _assignment(request, project)
    draft = read_draft(request.POST, assignment)
    try:
        done = judgements.submit(assignment.pk, request.user, answer_of(draft, assignment))
    except judgements.AnswerError as error:
        if assignment.state != State.LEASED:  # judged long ago: what this form says no longer matters
            return _go_on(request, project, "You have closed this item before; nothing was changed.")
        if not assignment.order:  # there is nothing to show it beside
            return _go_on(request, project, _sentence(error))
        return _page(request, assignment, replace(draft, confirmed=True), error=_sentence(error), status=422)
    except ThrottledError as error:
        response = _page(request, assignment, draft, error=_sentence(error), status=429)
        response.headers["Retry-After"] = str(error.seconds)
        return response
    except (judgements.GoneError, judgements.ClosedError) as error:
        return _go_on(request, project, f"{_sentence(error)} Nothing was stored; here is another item.")
    return _go_on(request, project, "You had judged that item already: the first answer counts." if done.again else "")


@_on_post
def skip(request: HttpRequest, project: Project) -> HttpResponse:
    """Leave the item to others."""
    assignment = _assignment(request, project)
    try:
        judgements.skip(assignment.pk, request.user, request.POST.get("preset") or request.POST.get("reason", ""))
    except judgements.AnswerError as error:
        return _page(request, assignment, first_draft(assignment), error=_sentence(error), status=422)
    except judgements.ClosedError as error:
        return _go_on(request, project, _sentence(error))
    return _go_on(request, project, "Skipped; others are asked.")


@_on_post
def undo(request: HttpRequest, project: Project) -> HttpResponse:
    """Take back the last judgement or skip."""
    if judgements.undo(project, request.user) is None:
        return _go_on(request, project, "There is nothing to take back, or it is open already.")
    return _go_on(request, project, "Taken back: judge it again.")


@_on_post
def order(request: HttpRequest, project: Project) -> HttpResponse:
    """Show the item with one response moved; nothing is stored."""
    assignment = _assignment(request, project)
    place, _, move = request.POST.get("move", "").partition(" ")
    draft = read_draft(request.POST, assignment)
    if move not in MOVES or not place.isdecimal() or len(place) > 3:
        return _page(request, assignment, draft)
    moved = draft.moved(int(place), move)
    return _page(request, assignment, moved, focus=_next_button(draft, moved, int(place), move))


def _next_button(before: Draft, after: Draft, place: int, move: str) -> str:
    """The button that has the focus after a move: the same one, or where it is gone the nearest."""
    if move == "in":
        return f"{place} up"
    if move == "out" and place in before.ranking and place not in after.ranking:
        return f"{after.ranking[min(before.ranking.index(place), len(after.ranking) - 1)]} out"
    return f"{place} {move}"


def _assignment(request: HttpRequest, project: Project) -> Assignment:
    """The assignment that a form names, if it is the person's own.

    Raises:
        judgements.NotYoursError: if there is none.
    """
    named = request.POST.get("assignment", "")
    own = Assignment.objects.filter(user=request.user, item__project=project).select_related("item__project")
    found = own.filter(pk=int(named)).first() if named.isdecimal() and len(named) < 19 else None
    if found is None:
        raise judgements.NotYoursError(named)
    return found


def _go_on(request: HttpRequest, project: Project, message: str = "") -> HttpResponse:
    """The next item, and what there is to say about the last."""
    if message:
        messages.info(request, message)
    if request.headers.get("HX-Request"):
        return _next_page(request, project)
    return redirect("palm_feedback:judge", project.slug)


def _next_page(request: HttpRequest, project: Project, *, polled: bool = False) -> HttpResponse:
    """The item that a person holds, or the next one; where it is still being written, a page that waits for it.

    One that waits asks again (`polled`), and is told nothing until there is something else to show.
    """
    writer = live.current_writer()
    while True:
        try:
            assignment = claims.claim(project, request.user, live=writer is not None)
        except claims.BusyError:
            return error_page(503, "Many people are being given items at this moment. Please try again.", retry=2)
        if assignment is None:
            return render(request, "palm_feedback/done.html", _about(request, project))
        if assignment.item.ready:
            return _page(request, assignment, first_draft(assignment))
        if writer is None:  # it was given out before the server was started anew
            claims.release(assignment.pk, request.user)
            continue
        failure = writer.ask(assignment.item.pk)
        if failure is None:
            waits = {**_about(request, project), "turns": assignment.item.turns}
            return HttpResponse(status=204) if polled else render(request, "palm_feedback/writing.html", waits)
        judgements.skip(assignment.pk, request.user, f"not written: {failure}"[: judgements.MAX_REASON])
        messages.info(request, "The model had no answers to that prompt, which was skipped.")


def _page(
    request: HttpRequest, assignment: Assignment, draft: Draft, *, error: str = "", focus: str = "", status: int = 200
) -> HttpResponse:
    """The page of an item, with what is filled in already."""
    project = assignment.item.project
    responses = [_response(draft, place, project.rules, one.text) for place, one in enumerate(assignment.shown)]
    context = {
        **_about(request, project),
        "assignment": assignment,
        "turns": assignment.item.turns,
        "question": QUESTIONS[Kind(project.kind)],
        "kind": Kind(project.kind).name.lower(),
        "draft": draft,
        "responses": responses,
        "ranked": [responses[place] for place in draft.ranking],
        "left": [responses[place] for place in draft.left],
        "steps": STEPS,
        "stars": STARS,
        "reasons": REASONS,
        "max_note": judgements.MAX_NOTE,
        "max_reason": judgements.MAX_REASON,
        "error": error,
        "focus": focus,
    }
    return render(request, "palm_feedback/judge.html", context, status=status)


def _about(request: HttpRequest, project: Project) -> dict[str, Any]:
    judged, skipped = own_progress(project, request.user)
    return {
        "project": project,
        "progress": progress(project),
        "judged": judged,
        "skipped": skipped,
        "can_undo": judged + skipped > 0,
    }


def _response(draft: Draft, place: int, rules: list[str], text: str) -> dict[str, Any]:
    """A response as the template shows it."""
    asked = [(number, rule, draft.rules.get((place, number), "")) for number, rule in enumerate(rules)]
    name = letter(place)
    return {"place": place, "letter": name, "text": text.strip(), "rating": draft.ratings.get(place), "rules": asked}


def _sentence(error: Exception) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
