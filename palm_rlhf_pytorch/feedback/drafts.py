"""What the form of an item holds: read from what a browser sent, checked, turned into an answer. Knows no request.

Names of the fields: choice (-3 to 3, or bad), rating-PLACE, ranking and left (places, again and again), confirmed,
rule-PLACE-NUMBER, note. Places count the responses as they are shown, from 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.events import last_undone
from palm_rlhf_pytorch.feedback.judgements import RULE_ANSWERS, STARS, Answer, AnswerError
from palm_rlhf_pytorch.feedback.models import Assignment

BOTH_BAD = "bad"
MOVES = ("up", "down", "out", "in")
MIN_RANKED = 2
_HASTE = 3  # responses from which an order that was never touched is asked about


class Fields(Protocol):
    """A form as it was sent: Django's QueryDict."""

    def get(self, name: str, default: str = "") -> str:
        """The last value of a field."""

    def getlist(self, name: str) -> list[str]:
        """All values of a field."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An answer as far as it goes; what makes no sense is left out.

    Args:
        choice: of a pair, a step or BOTH_BAD; None where none is picked.
        ratings: by place, those that are given.
        ranking: places, best first.
        left: places that are not ranked.
        confirmed: an order that is the one shown is meant so.
        rules: by place and number of the rule, "yes", "no" or "unsure".
        note: as it was typed.
    """

    choice: int | str | None = None
    ratings: Mapping[int, int] = field(default_factory=dict)
    ranking: Sequence[int] = ()
    left: Sequence[int] = ()
    confirmed: bool = False
    rules: Mapping[tuple[int, int], str] = field(default_factory=dict)
    note: str = ""

    def moved(self, place: int, move: str) -> "Draft":
        """The draft with one response moved in the order; a move that cannot be made changes nothing.

        Args:
            place: of the response, as shown.
            move: one of MOVES: "out" leaves it unranked, "in" puts it last.
        """
        ranking, left = list(self.ranking), list(self.left)
        if move in ("up", "down") and place in ranking:
            here = ranking.index(place)
            there = min(max(here + (1 if move == "down" else -1), 0), len(ranking) - 1)
            ranking[here], ranking[there] = ranking[there], ranking[here]
        elif move == "out" and place in ranking and len(ranking) > MIN_RANKED:
            ranking.remove(place)
            left.append(place)
        elif move == "in" and place in left:
            left.remove(place)
            ranking.append(place)
        return replace(self, ranking=tuple(ranking), left=tuple(left), confirmed=True)


def first_draft(assignment: Assignment) -> Draft:
    """An empty draft, in the order shown; of an item that was taken back, what had been said of it."""
    number = len(assignment.order)
    said = last_undone(assignment) if assignment.undone else None
    if not said or said.get("was") != "done":
        return Draft(ranking=tuple(range(number)))
    place = {pk: place for place, pk in enumerate(assignment.order)}
    kind, rules = assignment.item.project.kind, assignment.item.project.rules
    ranking = tuple(place[pk] for pk in said["ranking"]) or tuple(range(number))
    return Draft(
        choice=(BOTH_BAD if said["choice"] is None else said["choice"]) if kind == Kind.PAIR else None,
        ratings={place[int(pk)]: stars for pk, stars in said["ratings"].items()},
        ranking=ranking,
        left=tuple(other for other in range(number) if other not in ranking),
        confirmed=True,
        rules={
            (place[int(pk)], rules.index(rule)): word
            for pk, words in said["rules"].items()
            for rule, word in words.items()
            if rule in rules
        },
        note=said["note"],
    )


def read_draft(fields: Fields, assignment: Assignment) -> Draft:
    """The draft that a form holds."""
    number = len(assignment.order)
    choice = fields.get("choice", "")
    ratings = {place: stars for place in range(number) if (stars := _whole(fields.get(f"rating-{place}"))) in STARS}
    ranking, left = _order(fields, number)
    rules = {
        (place, rule): word
        for place in range(number)
        for rule in range(len(assignment.item.project.rules))
        if (word := fields.get(f"rule-{place}-{rule}")) in RULE_ANSWERS
    }
    return Draft(
        choice=choice if choice == BOTH_BAD else _whole(choice),
        ratings={place: stars for place, stars in ratings.items() if stars is not None},
        ranking=ranking,
        left=left,
        confirmed=bool(fields.get("confirmed")),
        rules=rules,
        note=fields.get("note", "").replace("\r\n", "\n"),
    )


def answer_of(draft: Draft, assignment: Assignment) -> Answer:
    """The answer that a draft gives.

    Raises:
        AnswerError: if a response is not rated, or an order was not looked at; judgements.submit finds the rest.
    """
    kind, number = assignment.item.project.kind, len(assignment.order)
    asked: dict[str, Any] = {}
    if kind == Kind.PAIR:
        both_bad = draft.choice == BOTH_BAD
        asked = {"choice": None if isinstance(draft.choice, str) else draft.choice, "both_bad": both_bad}
    elif kind == Kind.RATING:
        missing = [letter(place) for place in range(number) if place not in draft.ratings]
        if missing:
            raise AnswerError("rating", f"is missing: {', '.join(missing)}")
        asked = {"ratings": [draft.ratings[place] for place in range(number)]}
    else:
        if not draft.confirmed and number >= _HASTE and list(draft.ranking) == list(range(number)):
            raise AnswerError("order", "is the one in which they were shown; if it is what you mean, submit again")
        asked = {"ranking": draft.ranking}
    texts = assignment.item.project.rules
    rules: list[dict[str, str]] = [{} for _ in range(number)]
    for (place, rule), word in draft.rules.items():
        rules[place][texts[rule]] = word
    return Answer(**asked, rules=rules, note=draft.note)


def letter(place: int) -> str:
    """Name of a response as shown: A, B, ... Z, then A1, B1."""
    return chr(ord("A") + place % 26) + (str(place // 26) if place >= 26 else "")


def _order(fields: Fields, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranked and unranked places; those that the form does not name are ranked last."""
    named = [_whole(value) for value in fields.getlist("ranking")]
    unranked = [_whole(value) for value in fields.getlist("left")]
    left = tuple(place for place in dict.fromkeys(unranked) if place is not None and place in range(number))
    known = [place for place in dict.fromkeys(named) if place is not None and place in range(number)]
    rest = [place for place in range(number) if place not in known]
    return tuple(place for place in known + rest if place not in left), left


def _whole(text: str | None) -> int | None:
    """A small whole number, None for anything else."""
    try:
        return int(text) if text and len(text) < 4 else None
    except ValueError:
        return None
