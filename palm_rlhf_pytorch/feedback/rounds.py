"""Rounds of the loop: what a model wrote goes into the queue, and how it stands with people's votes.

A round is there whole or not at all; the log's line "sample" says what its models and its reward model were called.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from typing import Any

from django.db import transaction
from django.db.models import Max

from palm_rlhf_pytorch.feedback import events
from palm_rlhf_pytorch.feedback.agreement import agreement
from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.exports import judged
from palm_rlhf_pytorch.feedback.formats import NewItem
from palm_rlhf_pytorch.feedback.imports import add_items
from palm_rlhf_pytorch.feedback.models import Event, Project
from palm_rlhf_pytorch.feedback.records import Judged
from palm_rlhf_pytorch.feedback.statistics import Progress, progress
from palm_rlhf_pytorch.reward.agreement import Agreement

VERB = "sample"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One person's word on two responses: `value` 1 for the first, 0 for the second, 0.5 where they are equal.

    `prompt` is the text of their prompt: outcomes of one prompt are alike.
    """

    prompt: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round and what people said in it; items with a known answer are left out.

    Args:
        number: from 1; 0 for what was imported.
        at: when its responses were written; None of imports.
        new: name of the model that is asked about; "" of imports.
        old: name of the one it is compared with; "" for none.
        reward_model: name of the one that scored the responses; "" for none.
        progress: of its items.
        annotators: how many people judged.
        agreement: alpha; None where nobody shares an item.
        accuracy: of each two responses that a person did not find equal and that have different scores, 1 where the
            higher-scored one is better. The scores were given before anybody judged.
        wins: of each two responses by the new and the old model, 1 where the new one's is better; ties and both bad
            are 0.5.
    """

    number: int
    at: datetime | None
    new: str
    old: str
    reward_model: str
    progress: Progress
    annotators: int
    agreement: Agreement | None
    accuracy: tuple[Outcome, ...]
    wins: tuple[Outcome, ...]


def add_round(project: Project, items: Sequence[NewItem], *, new: str, old: str = "", reward_model: str = "") -> int:
    """Put a round of items into a project's queue; those that are there already are passed over.

    Args:
        project: whose queue.
        items: of which `source` of each completion is `new` or `old`.
        new: name of the model that is asked about.
        old: of the one it is compared with.
        reward_model: of the one that scored them.

    Returns:
        Its number, from 1.

    Raises:
        ValueError: if no item is new.
    """
    with transaction.atomic():
        Project.objects.select_for_update(no_key=True).get(pk=project.pk)  # one round at a time has a number
        number = last_round(project) + 1
        added = add_items(project, items, round=number)
        if added.new == 0:
            raise ValueError(f"all {added.known:,} items are in project {project.name!r} already: take another seed")
        payload = {"new": new, "old": old, "reward_model": reward_model, "items": added.new, "known": added.known}
        events.record(VERB, subject=project.name, project=project.pk, round=number, **payload)
    return number


def last_round(project: Project) -> int:
    """Number of the newest round, 0 where nothing was sampled."""
    return int(project.items.aggregate(last=Max("round"))["last"] or 0)


def round_of(project: Project, number: int) -> Round:
    """A round, and how it stands.

    Raises:
        ValueError: if there is none of that number.
    """
    if not project.items.exists():
        raise ValueError(f"project {project.name!r} holds nothing yet: sample or import something")
    if not project.items.filter(round=number).exists():
        raise ValueError(f"project {project.name!r} has no round {number}; its newest is {last_round(project)}")
    event = next((event for event in _sampled(project) if event.payload.get("round") == number), None)
    names: dict[str, Any] = {} if event is None else event.payload
    said = list(judged(project, round=number))
    new, old = str(names.get("new", "")), str(names.get("old", ""))
    return Round(
        number=number,
        at=None if event is None else event.at,
        new=new,
        old=old,
        reward_model=str(names.get("reward_model", "")),
        progress=progress(project, round=number),
        annotators=len({one.annotator for one in said}),
        agreement=agreement(said),
        accuracy=tuple(outcome for one in said for outcome in _right_scores(one)),
        wins=tuple(outcome for one in said for outcome in _wins(one, new, old)) if old else (),
    )


def comparisons(one: Judged) -> Iterator[tuple[int, int, float]]:
    """Places of each two responses that a judgement compares, and 1 where it finds the first better, 0 the second.

    Equal are a tie, two that are both bad, and two with as many stars.
    """
    if one.kind == Kind.RATING:
        for first, second in combinations(range(len(one.ratings)), 2):
            yield first, second, _sign(one.ratings[first] - one.ratings[second])
    elif one.both_bad:
        yield 0, 1, 0.5
    for better, worse, steps in one.pairs():
        yield better, worse, 0.5 if steps == 0 else 1.0


def _sampled(project: Project) -> Iterator[Event]:
    return Event.objects.filter(verb=VERB, subject=project.name, payload__project=project.pk).order_by("-at").iterator()


def _right_scores(one: Judged) -> Iterator[Outcome]:
    for first, second, value in comparisons(one):
        scores = one.scores[first], one.scores[second]
        if value != 0.5 and scores[0] is not None and scores[1] is not None and scores[0] != scores[1]:
            yield Outcome(prompt=_prompt(one), value=float((scores[0] > scores[1]) == (value == 1.0)))


def _wins(one: Judged, new: str, old: str) -> Iterator[Outcome]:
    for first, second, value in comparisons(one):
        if (one.sources[first], one.sources[second]) == (new, old):
            yield Outcome(prompt=_prompt(one), value=value)
        elif (one.sources[first], one.sources[second]) == (old, new):
            yield Outcome(prompt=_prompt(one), value=1.0 - value)


def _prompt(one: Judged) -> str:
    return one.prompt if isinstance(one.prompt, str) else json.dumps(one.prompt)


def _sign(difference: int) -> float:
    """1 above zero, 0 below, 0.5 at zero."""
    return 0.5 + 0.5 * ((difference > 0) - (difference < 0))
