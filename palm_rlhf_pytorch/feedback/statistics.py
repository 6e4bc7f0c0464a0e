"""Figures of a project: progress, who judged how much and how, agreement, length bias, sides, scores against votes.

Numbers alone; the pages draw them and the command prints them.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import permutations
from statistics import median
from typing import Any

from django.db.models import Count, F, Q, Sum
from django.db.models.functions import Coalesce, Least

from palm_rlhf_pytorch.feedback.agreement import WithRest, agreement, with_rest
from palm_rlhf_pytorch.feedback.codes import Kind, State
from palm_rlhf_pytorch.feedback.exports import judged
from palm_rlhf_pytorch.feedback.gold import Accuracy, accuracies
from palm_rlhf_pytorch.feedback.models import Assignment, Project
from palm_rlhf_pytorch.feedback.records import Judged
from palm_rlhf_pytorch.reward.agreement import Agreement

NOBODY, NOTHING = WithRest(0, 0), Accuracy(0, 0)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a project is; items with a known answer are not counted.

    Args:
        items: in the queue.
        finished: judged as often as required.
        judgements: that count, at most `required` of an item.
        wanted: items x required.
        waiting: items whose completions are still to be written.
    """

    items: int
    finished: int
    judgements: int
    wanted: int
    waiting: int

    @property
    def share(self) -> float:
        """Judgements / wanted, 0 for an empty queue."""
        return self.judgements / self.wanted if self.wanted else 0.0


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """What one person did; see `WithRest` and `Accuracy`. `seconds` is the median time of a judgement."""

    name: str
    judged: int
    skipped: int
    seconds: float | None
    rest: WithRest
    gold: Accuracy


@dataclass(frozen=True, kw_only=True)
class Share:
    """`first` of `of` decisions went one way; ties are in neither."""

    first: int
    of: int

    @property
    def share(self) -> float | None:
        """First / of; None where there is none."""
        return self.first / self.of if self.of else None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Everything about a project.

    Args:
        progress: of the queue.
        annotators: who judged or skipped something, by name.
        days: judgements of each person on each day (UTC), in order.
        agreement: alpha; None where nobody shares an item.
        longer: of decided pairs whose lengths differ, how often the longer response was the better one; two responses
            that one person rated differently are such a pair, here and in `left`, `scores` and `margins`.
        lengths: characters of the better one over those of the worse one, of each of these.
        sides: of a pair, how often each step was chosen as shown, from -3 to 3, and None for both bad.
        left: of decided pairs, how often the one shown first was the better one.
        scores: of decided pairs with different scores, how often the higher-scored response was the better one.
        margins: (score of the better one minus that of the worse one) of each of these.
        stars: how often each rating was given.
        best: of rankings, how often the best one stood in each place as shown, from 0.
        rules: how often each word was said of each rule.
    """

    progress: Progress
    annotators: tuple[Annotator, ...]
    days: dict[date, Counter[str]]
    agreement: Agreement | None
    longer: Share
    lengths: tuple[float, ...]
    sides: Counter[int | None]
    left: Share
    scores: Share
    margins: tuple[float, ...]
    stars: Counter[int]
    best: Counter[int]
    rules: dict[str, Counter[str]]


def progress(project: Project, *, round: int | None = None) -> Progress:
    """How far the project is, or one round of sampling in it, counted in the database."""
    of_round = {} if round is None else {"round": round}
    counted = project.items.filter(gold__isnull=True, **of_round).aggregate(
        items=Count("done"),
        finished=Count("done", filter=Q(done__gte=project.required)),
        judgements=Coalesce(Sum(Least(F("done"), project.required)), 0),
        waiting=Count("done", filter=Q(ready=False)),
    )
    return Progress(**counted, wanted=counted["items"] * project.required)


def own_progress(project: Project, user: Any) -> tuple[int, int]:
    """How many items a person has judged and skipped, those with a known answer included: they look like others."""
    own = Assignment.objects.filter(item__project=project, user=user).aggregate(
        judged=Count("pk", filter=Q(state=State.DONE)), skipped=Count("pk", filter=Q(state=State.SKIPPED))
    )
    return own["judged"], own["skipped"]


def statistics(project: Project) -> Statistics:
    """All figures of a project, from all its judgements."""
    everything = list(judged(project, gold=None))
    counted = [one for one in everything if one.gold is None]
    days: dict[date, Counter[str]] = defaultdict(Counter)
    for one in everything:
        days[one.at.date()][one.annotator] += 1
    margins, lengths = tuple(_margins(counted)), tuple(_lengths(counted))
    rules: dict[str, Counter[str]] = {rule: Counter() for rule in project.rules}
    for rule, word in (pair for one in counted for words in one.rules for pair in words.items()):
        rules.setdefault(rule, Counter())[word] += 1
    return Statistics(
        progress=progress(project),
        annotators=_annotators(project, everything, counted),
        days=dict(sorted(days.items())),
        agreement=agreement(counted),
        longer=Share(first=sum(ratio > 1 for ratio in lengths), of=len(lengths)),
        lengths=lengths,
        sides=Counter(shown_choice(one) for one in counted if one.kind == Kind.PAIR),
        left=_left(counted),
        scores=Share(first=sum(margin > 0 for margin in margins), of=len(margins)),
        margins=margins,
        stars=Counter(stars for one in counted for stars in one.ratings),
        best=Counter(one.order.index(one.ranking[0]) for one in counted if one.ranking),
        rules=rules,
    )


def shown_choice(one: Judged) -> int | None:
    """The choice as it was shown: below 0 where the first one shown is better."""
    return one.choice if one.choice is None or one.order[0] == 0 else -one.choice


def _annotators(project: Project, everything: Sequence[Judged], counted: Sequence[Judged]) -> tuple[Annotator, ...]:
    skips = Assignment.objects.filter(item__project=project, state=State.SKIPPED)
    skipped = Counter(skips.values_list("user__username", flat=True))
    times: dict[str, list[int]] = defaultdict(list)
    for one in everything:
        times[one.annotator].append(one.ms)
    rest, right = with_rest(counted), accuracies(everything)
    return tuple(
        Annotator(
            name=name, judged=len(times[name]), skipped=skipped[name], rest=rest.get(name, NOBODY),
            gold=right.get(name, NOTHING), seconds=median(times[name]) / 1000 if times[name] else None,
        )
        for name in sorted({*times, *skipped})
    )  # fmt: skip


def _decided(judged: Iterable[Judged]) -> Iterable[tuple[Judged, int, int]]:
    """Judgements with places of a better and a worse completion, ties left out."""
    for one in judged:
        for better, worse, steps in one.pairs():
            if steps != 0:
                yield one, better, worse
        for better, worse in permutations(range(len(one.ratings)), 2):
            if one.ratings[better] > one.ratings[worse]:
                yield one, better, worse


def _lengths(judged: Iterable[Judged]) -> Iterable[float]:
    """Characters of the better over those of the worse, where they differ; an empty text counts as one character."""
    for one, better, worse in _decided(judged):
        ratio = max(len(one.texts[better]), 1) / max(len(one.texts[worse]), 1)
        if ratio != 1:
            yield ratio


def _left(judged: Iterable[Judged]) -> Share:
    first = [one.order.index(better) < one.order.index(worse) for one, better, worse in _decided(judged)]
    return Share(first=sum(first), of=len(first))


def _margins(judged: Iterable[Judged]) -> Iterable[float]:
    for one, better, worse in _decided(judged):
        high, low = one.scores[better], one.scores[worse]
        if high is not None and low is not None and high != low:
            yield high - low
