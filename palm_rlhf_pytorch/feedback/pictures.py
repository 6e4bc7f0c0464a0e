"""The statistics page: what is to be seen of a project's figures, each drawn, with its finding in a sentence."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import floor, log10
from statistics import median
from typing import Any

from django.core.cache import cache
from django.db.models import Count, Max
from django.utils import timezone
from django.utils.safestring import SafeString, mark_safe

from palm_rlhf_pytorch.feedback.charts import COLOURS, Column, Point, bars, shares
from palm_rlhf_pytorch.feedback.codes import Kind, State
from palm_rlhf_pytorch.feedback.drafts import letter
from palm_rlhf_pytorch.feedback.models import Assignment, Judgement, Project
from palm_rlhf_pytorch.feedback.statistics import Share, Statistics, progress, statistics
from palm_rlhf_pytorch.reward.figures import wilson

DAYS = 14
SHOWN = 8  # people in a chart
STEPS = ("A+++", "A++", "A+", "tie", "B+", "B++", "B+++", "bad")
STEP_NAMES = ("A much better", "A better", "A slightly better", "tie", "B slightly better", "B better",
              "B much better", "both bad")  # fmt: skip
STEP_CLASSES = ("a", "a", "a", "tie", "b", "b", "b", "c6")
LENGTHS = ((1.0, 1.25, "up to 1.25×"), (1.25, 2.0, "up to 2×"), (2.0, float("inf"), "more than 2×"))
LONG, PATIENCE = 1.0, 20  # seconds of counting from which figures stay for so many times as long
FEW = 20  # cases under which a share says little


@dataclass(frozen=True)
class Picture:
    """A chart with its title, its finding, and the names of its colours."""

    title: str
    finding: str
    svg: SafeString
    legend: tuple[str, ...] = ()


def pictures(project: Project) -> dict[str, Any]:
    """What the page shows: figures, when they were counted, and what is drawn of them; times in seconds, by medians."""
    found, at = _kept(project)
    found = replace(found, progress=progress(project))
    times = [person.seconds for person in found.annotators if person.seconds is not None]
    drawn = [*_days(found), *_choices(project.kind, found), *_agreement(found), *_longer(found)]
    return {
        "statistics": found,
        "at": f"{at:%H:%M:%S}",
        "skips": sum(person.skipped for person in found.annotators),
        "seconds": median(times) if times else None,
        "rules": list(found.rules.items()),
        "pictures": [*drawn, *_scores(found)],
    }


def _kept(project: Project) -> tuple[Statistics, Any]:
    """The figures, and when they were counted: anew when something was judged, taken back or skipped since.

    Where counting takes long, figures stay for a multiple of that time: looking at them must not slow judging down.
    """
    own = Judgement.objects.filter(assignment__item__project=project)
    state = own.aggregate(number=Count("pk"), last=Max("at"))
    skipped = Assignment.objects.filter(item__project=project, state=State.SKIPPED).count()
    version = (state["number"], state["last"], skipped, project.rules)
    key = f"palm_feedback.statistics.{project.pk}"
    kept = cache.get(key)
    if kept is not None:
        found, of, at, seconds = kept
        if of == version or seconds > LONG and timezone.now() - at < timedelta(seconds=PATIENCE * seconds):
            return found, at
    at = timezone.now()
    found = statistics(project)
    cache.set(key, (found, version, at, (timezone.now() - at).total_seconds()), 3600)
    return found, at


def _days(found: Statistics) -> Iterator[Picture]:
    if not found.days:
        return
    total: Counter[str] = sum(found.days.values(), Counter())
    first_few = sorted(name for name, _ in total.most_common(COLOURS - (len(total) > COLOURS)))
    today = timezone.now().date()
    columns = []
    for back in range(DAYS - 1, -1, -1):
        day = today - timedelta(days=back)
        counts = found.days.get(day, Counter())
        parts = [counts[name] for name in first_few]
        rest = sum(counts.values()) - sum(parts)
        layers = (*parts, rest) if len(total) > COLOURS else tuple(parts)
        said = ", ".join(f"{name} {number}" for name, number in sorted(counts.items())) or "nothing"
        columns.append(Column(f"{day.day} {day:%b}", layers, f"{day:%d %B}: {said}"))
    week = sum(sum(column.values) for column in columns[-7:])
    legend = (*first_few, "others") if len(total) > COLOURS else tuple(first_few)
    svg = bars(columns, label=f"Judgements per day in the last {DAYS} days")
    yield Picture("Judgements per day", f"{week:,.0f} in the last seven days (UTC).", mark_safe(svg), legend)


def _choices(kind: int, found: Statistics) -> Iterator[Picture]:
    """Steps and places as shown, or stars."""
    first = _against("The one shown first is the better one", found.left) if found.left.of else ""
    if kind == Kind.PAIR and found.sides:
        values = [found.sides[step] for step in (*range(-3, 4), None)]
        said = zip(STEPS, STEP_NAMES, values, strict=True)
        columns = [Column(name, (value,), f"{whole}: {value:,}") for name, whole, value in said]
        svg = bars(columns, label="How often each step was chosen, as shown", classes=STEP_CLASSES, shown=True)
        ties, bad = found.sides[0] / found.sides.total(), found.sides[None] / found.sides.total()
        yield Picture("Choices as shown", f"{ties:.0%} ties, {bad:.0%} both bad. {first}".strip(), mark_safe(svg))
    if kind == Kind.RATING and found.stars:
        columns = [Column(str(star), (found.stars[star],)) for star in range(1, 6)]
        mean = sum(star * number for star, number in found.stars.items()) / found.stars.total()
        svg = bars(columns, label="How often each rating was given", shown=True)
        yield Picture("Ratings", f"{mean:.1f} on average. {first}".strip(), mark_safe(svg))
    if kind == Kind.RANKING and found.best:
        columns = [Column(letter(place), (found.best[place],)) for place in range(max(found.best) + 1)]
        svg = bars(columns, label="How often the best one stood in each place as shown", shown=True)
        yield Picture("Where the best one stood", f"A was shown first. {first}".strip(), mark_safe(svg))


def _agreement(found: Statistics) -> Iterator[Picture]:
    """How often each person says what the others say, and alpha in words."""
    measured = found.agreement
    people = [person for person in found.annotators if person.rest.compared][:SHOWN]
    if measured is None or not people:
        return
    points = [_point(person.name[:10], Share(first=person.rest.same, of=person.rest.compared)) for person in people]
    alphas = [("as names", measured.nominal), ("in order", measured.ordinal)]
    said = ", ".join(f"{value:.2f} {how}" for how, value in alphas if value is not None) or "not defined yet"
    finding = f"Krippendorff's alpha {said}, over {measured.items:,} things that two or more people judged."
    svg = shares(points, label="How often each person says what the others say", even=None)
    yield Picture("Agreement with the others", finding, mark_safe(svg))


def _longer(found: Statistics) -> Iterator[Picture]:
    """How often the longer one wins, by how much longer it is."""
    if not found.longer.of:
        return
    points = []
    for low, high, name in LENGTHS:
        here = [ratio > 1 for ratio in found.lengths if low < max(ratio, 1 / ratio) <= high]
        points.append(_point(name, Share(first=sum(here), of=len(here))))
    finding = _against("The longer response is the better one", found.longer)
    svg = shares(points, label="How often the longer response wins, by how much longer it is")
    yield Picture("Length", finding, mark_safe(svg))


def _scores(found: Statistics) -> Iterator[Picture]:
    """How often people prefer what the reward model scores higher, by the distance of the scores."""
    if not found.scores.of:
        return
    points = []
    margins = sorted(found.margins, key=abs)
    decimals = max(0, 1 - floor(log10(abs(margins[-1]))))
    for part in _parts(margins, max(1, min(4, found.scores.of // FEW))):
        name = f"{abs(part[0]):.{decimals}f} to {abs(part[-1]):.{decimals}f}"
        points.append(_point(name, Share(first=sum(margin > 0 for margin in part), of=len(part))))
    finding = _against("The higher-scored response is the better one", found.scores)
    svg = shares(points, label="How often the higher-scored response wins, by the distance of the scores")
    yield Picture("Scores against votes", f"{finding} Groups by the distance of the scores.", mark_safe(svg))


def _point(name: str, share: Share) -> Point:
    if not share.of:
        return Point(name, None, None, None, f"{name}: no case")
    low, high = wilson(share.first, share.of)
    title = f"{name}: {share.first:,} of {share.of:,}, 95 % interval {low:.0%} to {high:.0%}"
    return Point(name, share.share, low, high, title)


def _against(what: str, share: Share) -> str:
    """A sentence on a share: how often, of how many, and whether it differs from a half."""
    low, high = wilson(share.first, share.of)
    if share.of < FEW:
        verdict = "too few to tell"
    else:
        verdict = f"95 % interval {low:.0%} to {high:.0%}{', which may be chance' if low <= 0.5 <= high else ''}"
    return f"{what} in {share.share:.0%} of {share.of:,} decided pairs ({verdict})."


def _parts(values: Sequence[float], number: int) -> Iterator[Sequence[float]]:
    """Values in so many parts of about equal size."""
    for part in range(number):
        yield values[len(values) * part // number : len(values) * (part + 1) // number]
