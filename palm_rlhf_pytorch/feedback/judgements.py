"""What a person says about the item they hold: submit, skip, and undo of the last. One transaction each, logged in it.

A submit counts once: repeated, it changes nothing. Knows no request.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from palm_rlhf_pytorch.feedback import events
from palm_rlhf_pytorch.feedback.claims import has_room, lock_user
from palm_rlhf_pytorch.feedback.codes import Kind, State
from palm_rlhf_pytorch.feedback.formats import fault_of
from palm_rlhf_pytorch.feedback.models import Assignment, Item, Judgement, Project

STEPS = 3  # of preference on each side of a tie
STARS = (1, 2, 3, 4, 5)
RULE_ANSWERS = ("yes", "no", "unsure")
MAX_NOTE = 4000  # characters
MAX_REASON = 500


class AnswerError(ValueError):
    """What is wrong with an answer, and in which of its fields."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason


class NotYoursError(LookupError):
    """There is no such assignment, or it is another person's."""


class GoneError(Exception):
    """The lease ran out, and others have taken the item's last place."""


class ClosedError(Exception):
    """The person has skipped this item."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a person said. Completions are named by their place as shown, from 0; of the kinds of question one is asked.

    Args:
        choice: of a pair, -3 the first is much better, 0 a tie, 3 the second is much better.
        both_bad: of a pair, in place of a choice.
        ratings: 1 to 5 for each completion as shown.
        ranking: places, best first; two or more, those left out are unranked.
        rules: for each completion as shown {rule: "yes", "no" or "unsure"}; rules may be left unanswered.
        note: up to MAX_NOTE characters.
    """

    choice: int | None = None
    both_bad: bool = False
    ratings: Sequence[int] = ()
    ranking: Sequence[int] = ()
    rules: Sequence[Mapping[str, str]] = field(default=())
    note: str = ""


class Submitted(NamedTuple):
    """The judgement that counts; `again` where it had been submitted before."""

    judgement: Judgement
    again: bool


@transaction.atomic
def submit(assignment_id: int, user: Any, answer: Answer) -> Submitted:
    """Store an answer; of one assignment the first counts.

    Raises:
        NotYoursError: if the assignment is not this person's.
        AnswerError: if the answer is not one to the question, naming the field.
        GoneError: if the lease ran out and there is no room any more.
        ClosedError: if the item was skipped.
        events.ThrottledError: if the person has submitted too many in a short time.
    """
    assignment, item = _locked(assignment_id, user)
    if assignment.state == State.DONE:
        return Submitted(assignment.judgement, again=True)
    if assignment.state == State.SKIPPED:
        raise ClosedError("you have skipped this item")
    if not item.ready:
        raise AnswerError("the responses", "are still being written")
    stored = stored_answer(answer, assignment.order, item.project)
    now = timezone.now()
    if assignment.expires <= now and not has_room(item, item.project.required, besides=user, now=now):
        raise GoneError("your time for this item ran out, and others have judged it meanwhile")
    events.check("submit", events.JUDGEMENTS, user=user)
    ms = max(0, int((now - assignment.started) / timedelta(milliseconds=1)))
    judgement = Judgement.objects.create(assignment=assignment, ms=ms, at=now, **stored)
    _close(assignment, State.DONE, now)
    Item.objects.filter(pk=item.pk).update(done=F("done") + 1)
    events.record("submit", user, assignment=assignment.pk, item=item.pk, ms=ms, order=assignment.order, **stored)
    return Submitted(judgement, again=False)


@transaction.atomic
def skip(assignment_id: int, user: Any, reason: str = "") -> None:
    """Leave an item to others; the person does not see it again. Skipped twice, it is skipped once.

    Raises:
        NotYoursError: if the assignment is not this person's.
        AnswerError: if the reason is longer than MAX_REASON.
        ClosedError: if the item was judged.
    """
    assignment, item = _locked(assignment_id, user)
    if assignment.state == State.DONE:
        raise ClosedError("you have judged this item; undo that first")
    reason = checked_text("reason", reason, MAX_REASON)
    if assignment.state == State.SKIPPED:
        return
    assignment.reason = reason
    _close(assignment, State.SKIPPED, timezone.now())
    events.record("skip", user, assignment=assignment.pk, item=item.pk, reason=reason)


@transaction.atomic
def undo(project: Project, user: Any) -> Assignment | None:
    """Take back a person's last judgement or skip in a project: they hold the item again, and no other.

    What was taken back stays in the log. One step goes back; the next one only after the item is judged again.

    Returns:
        The assignment, leased anew; None where there is nothing to take back.
    """
    lock_user(user)
    own = Assignment.objects.filter(user=user, item__project=project)
    now = timezone.now()
    leased = own.filter(state=State.LEASED)
    if leased.filter(undone=True, expires__gt=now).exists():
        return None
    last = own.filter(state__in=(State.DONE, State.SKIPPED)).order_by("-submitted", "-pk").first()
    if last is None:
        return None
    assignment, item = _locked(last.pk, user)
    payload: dict[str, Any] = {
        "assignment": assignment.pk,
        "item": item.pk,
        "was": State(assignment.state).name.lower(),
    }
    if assignment.state == State.DONE:
        judgement = assignment.judgement
        payload |= {name: getattr(judgement, name) for name in ("choice", "ratings", "ranking", "rules", "note", "ms")}
        judgement.delete()
        Item.objects.filter(pk=item.pk).update(done=F("done") - 1)
    leased.delete()
    assignment.state, assignment.submitted, assignment.reason, assignment.undone = State.LEASED, None, "", True
    assignment.started, assignment.expires = now, now + timedelta(seconds=project.lease_seconds)
    assignment.save()
    events.record("undo", user, **payload)
    return assignment


def stored_answer(answer: Answer, order: Sequence[int], project: Project) -> dict[str, Any]:
    """Fields of a judgement: the answer by completion, once it is checked.

    Args:
        answer: by place as shown.
        order: ids of the completions as shown.
        project: whose kind and rules say what is asked.

    Raises:
        AnswerError: if something is missing, or was not asked.
    """
    _check_asked(answer, project.kind)
    stored: dict[str, Any] = {"choice": None, "ratings": {}, "ranking": []}
    if project.kind == Kind.PAIR:
        stored["choice"] = _checked_choice(answer)
    elif project.kind == Kind.RATING:
        stored["ratings"] = dict(zip(map(str, order), _checked_ratings(answer.ratings, len(order)), strict=True))
    else:
        stored["ranking"] = [order[place] for place in _checked_ranking(answer.ranking, len(order))]
    rules = _checked_rules(answer.rules, project.rules, len(order))
    stored["rules"] = {str(pk): dict(said) for pk, said in zip(order, rules, strict=False) if said}
    stored["note"] = checked_text("note", answer.note, MAX_NOTE)
    return stored


def checked_text(field: str, text: str, limit: int) -> str:
    """A text without space around it.

    Raises:
        AnswerError: if it is longer than the limit, or holds a character that no database takes.
    """
    text = text.strip()
    if len(text) > limit:
        raise AnswerError(field, f"is {len(text):,} characters long; {limit:,} fit")
    if fault := fault_of(text):
        raise AnswerError(field, fault)
    return text


def _locked(assignment_id: int, user: Any) -> tuple[Assignment, Item]:
    """A person's assignment and its item, both kept from others until the transaction ends.

    Raises:
        NotYoursError: if there is none of this id, or it is another's.
    """
    lock_user(user)
    assignment = Assignment.objects.select_for_update(no_key=True).filter(pk=assignment_id, user=user).first()
    if assignment is None:
        raise NotYoursError("you hold no such item; it may have been given back")
    item = (
        Item.objects.select_for_update(no_key=True, of=("self",)).select_related("project").get(pk=assignment.item_id)
    )
    return assignment, item


def _close(assignment: Assignment, state: State, now: Any) -> None:
    assignment.state, assignment.submitted, assignment.undone = state, now, False
    assignment.save(update_fields=["state", "submitted", "undone", "reason"])


def _check_asked(answer: Answer, kind: int) -> None:
    given = {
        "choice": (Kind.PAIR, answer.choice is not None or answer.both_bad),
        "ratings": (Kind.RATING, bool(answer.ratings)),
        "ranking": (Kind.RANKING, bool(answer.ranking)),
    }
    for name, (asked_in, is_given) in given.items():
        if is_given and asked_in != kind:
            raise AnswerError(name, "is not asked in this project")


def _checked_choice(answer: Answer) -> int | None:
    if answer.both_bad:
        if answer.choice is not None:
            raise AnswerError("choice", "and both bad cannot both be said")
        return None
    if answer.choice is None or abs(answer.choice) > STEPS:
        raise AnswerError("choice", "is missing: pick one of the seven steps, or both bad")
    return answer.choice


def _checked_ratings(ratings: Sequence[int], number: int) -> Sequence[int]:
    if len(ratings) != number:
        raise AnswerError("ratings", f"({len(ratings)}) must be as many as there are responses ({number})")
    if not set(ratings) <= set(STARS):
        raise AnswerError("ratings", "must be whole numbers from 1 to 5")
    return ratings


def _checked_ranking(ranking: Sequence[int], number: int) -> Sequence[int]:
    if len(ranking) < 2:
        raise AnswerError("ranking", "must hold two responses or more, best first")
    if len(set(ranking)) != len(ranking) or not set(ranking) <= set(range(number)):
        raise AnswerError("ranking", f"must name each of the {number} responses at most once")
    return ranking


def _checked_rules(
    rules: Sequence[Mapping[str, str]], asked: Sequence[str], number: int
) -> Sequence[Mapping[str, str]]:
    if len(rules) > number:
        raise AnswerError("rules", f"are answered of {len(rules)} responses; there are {number}")
    for said in rules:
        for rule, word in said.items():
            if rule not in asked:
                raise AnswerError("rules", f"({rule[:40]!r}) is no rule of this project")
            if word not in RULE_ANSWERS:
                raise AnswerError("rules", f"are answered yes, no or unsure, not {word[:40]!r}")
    return rules
