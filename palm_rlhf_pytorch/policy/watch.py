"""The watch against reward hacking: the score/KL frontier, and a rule that ends a run and says where to go back to.

A policy that is pushed on finds what a judge gets wrong: its score goes on rising while what it stood for falls (Gao et
al., "Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760). A judge that is never learnt
from shows the turn; without one there are signs of it. Pure functions of metrics, named as in training/metrics.py.
Knows no model, no trainer and no file; `doctor.py` tells of the same fault, and stops nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from palm_rlhf_pytorch.policy.doctor import HIGH_LENGTH_CORR, MAX_KL, MAX_LENGTH_FACTOR

SCORE, HELD_OUT, KL = "reward/score", "reward/held_out_score", "objective/kl"
LENGTH, LENGTH_CORR, DISTINCT = "response/length_mean", "score/length_corr", "rollout/distinct_2"
WATCHED = (SCORE, HELD_OUT, KL, LENGTH, LENGTH_CORR, DISTINCT)
ENOUGH = 2  # terms of a noise estimate: four windows; before them nothing is decided

Record = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """When a run is ended.

    Attributes:
        patience: updates in a row that must show the fault.
        window: updates that a mean is taken over before anything is compared.
        noise: standard errors by which a mean must have moved to count, beyond what the highest of as many means of
            noise alone would stand out by.
        max_kl: nats a response from the reference; without a held-out judge only, as are those below.
        min_distinct: share of the first updates' rollout/distinct_2 that must be left.
        max_length_factor: how much longer or shorter than at first responses may get where the judge pays for that.
        length_corr: correlation of score and length from which on it does.
    """

    patience: int = 5
    window: int = 5
    noise: float = 3.0
    max_kl: float = MAX_KL
    min_distinct: float = 0.5
    max_length_factor: float = MAX_LENGTH_FACTOR
    length_corr: float = HIGH_LENGTH_CORR

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the setting and its value.
        """
        if self.patience < 1 or self.window < 1:
            raise ValueError(f"patience ({self.patience}) and window ({self.window}) count updates: at least 1")
        if not (0 <= self.noise < math.inf and self.max_kl > 0):
            raise ValueError(f"noise ({self.noise}) must be 0 or more, and max_kl ({self.max_kl}) above 0")
        if not (0 <= self.min_distinct < 1 < self.max_length_factor and 0 < self.length_corr <= 1):
            raise ValueError(
                f"min_distinct ({self.min_distinct}) must be below 1, max_length_factor ({self.max_length_factor})"
                f" above 1, and length_corr ({self.length_corr}) above 0 and at most 1"
            )


class Verdict(NamedTuple):
    """What the watch has decided.

    stop: whether the run should end.
    best_step: how many updates the policy had had that did best: the checkpoint to go back to.
    reason: what was seen, with the numbers.
    """

    stop: bool
    best_step: int
    reason: str


class Mark(NamedTuple):
    """Means over a window of updates, and the update in its middle."""

    step: int
    means: Record


@dataclass
class Spread:
    """Noise of a series, told by how far means over blocks are off the middle of their neighbours.

    A straight trend leaves no mark on it, a bend a small one. Long blocks see noise that lasts over several updates.
    """

    length: int  # updates of a block
    block: list[float] = field(default_factory=list)  # the one that is being filled
    means: list[float] = field(default_factory=list)  # of the last two blocks
    squares: float = 0.0
    terms: int = 0

    def add(self, value: float) -> None:
        """One more value."""
        self.block.append(value)
        if len(self.block) < self.length:
            return
        self.means.append(fmean(self.block))
        self.block = []
        if len(self.means) > 2:
            first, middle, last = self.means
            self.squares += (first - 2 * middle + last) ** 2
            self.terms += 1
            self.means = [middle, last]

    @property
    def variance(self) -> float:
        """Variance of a value by that of the blocks' means: 6 times this is that of first - 2 middle + last."""
        return self.length * self.squares / (6 * self.terms) if self.terms >= ENOUGH else 0.0


@dataclass
class _Memory:
    """All that `state` keeps."""

    updates: int = 0
    recent: list[Record] = field(default_factory=list)  # a window, with "step"
    spreads: dict[str, list[Spread]] = field(default_factory=dict)
    first: Mark | None = None
    best: Mark | None = None  # where the held-out score was highest; without one, the last that showed no sign
    rows: int = 0  # updates in a row that show the fault
    held_out: bool = False


class Watch:
    """Reads the metrics of each update and says when to stop, and which policy to go back to."""

    def __init__(self, settings: WatchSettings | None = None) -> None:
        """Begin with an empty memory.

        Args:
            settings: None takes the defaults.
        """
        self.settings = settings or WatchSettings()
        self._memory = _Memory()

    def examine(self, metrics: Mapping[str, float], step: int) -> Verdict | None:
        """A verdict once `patience` updates in a row have shown the fault; call it once an update.

        With reward/held_out_score: its mean lies below its highest by more than noise, and that of reward/score above
        what it was there. Without: KL, length or distinct_2 is out of bounds, and reward/score above what it was when
        none was. An update without a finite score (or held-out score, once there was one) is left out.

        Args:
            metrics: of one update, all of them.
            step: updates done, this one included. What is measured is the policy before it, of step - 1 updates.

        Returns:
            None while nothing is wrong; after a verdict, until as many updates have shown the fault again.
        """
        memory, window = self._memory, self.settings.window
        record = {name: float(metrics[name]) for name in WATCHED if math.isfinite(metrics.get(name, math.nan))}
        memory.held_out = memory.held_out or HELD_OUT in record
        if SCORE not in record or (memory.held_out and HELD_OUT not in record):
            return None
        memory.updates += 1
        memory.recent = [*memory.recent, record | {"step": step}][-window:]
        for name in (SCORE, HELD_OUT) if memory.held_out else (SCORE,):
            lengths = sorted({1, window, 2 * window})
            for spread in memory.spreads.setdefault(name, [Spread(length) for length in lengths]):
                spread.add(record[name])
        if len(memory.recent) < window:
            return None
        now = _mark(memory.recent)
        memory.first = memory.first or now
        fault = self._held_out_fault(now) if memory.held_out else self._sign(now)
        memory.rows = memory.rows + 1 if fault else 0
        if fault is None or memory.rows < self.settings.patience:
            return None
        assert memory.best is not None, "a fault is told against the best"
        memory.rows = 0
        return Verdict(True, max(0, memory.best.step - 1), fault)

    @property
    def best_step(self) -> int | None:
        """How many updates the policy had had that did best so far; None before that is known."""
        best = self._memory.best
        return None if best is None else max(0, best.step - 1)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        marks = {"first": self._memory.first, "best": self._memory.best}
        kept = asdict(self._memory)
        return kept | {name: None if mark is None else [mark.step, dict(mark.means)] for name, mark in marks.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave: from here on it says what the other would have said."""
        kept = deepcopy(dict(state))
        marks = {name: None if kept[name] is None else Mark(*kept[name]) for name in ("first", "best")}
        spreads = {name: [Spread(**one) for one in found] for name, found in kept["spreads"].items()}
        self._memory = _Memory(**kept | marks | {"spreads": spreads})

    def _held_out_fault(self, now: Mark) -> str | None:
        best = self._memory.best
        if best is None or HELD_OUT not in best.means or now.means[HELD_OUT] > best.means[HELD_OUT]:
            self._memory.best = now
            return None
        fallen, least = best.means[HELD_OUT] - now.means[HELD_OUT], self._noise(HELD_OUT, picked=True)
        if not self._knows_noise or fallen <= least or not self._score_rose(best, now):
            return None
        return (
            f"the held-out judge's score fell from {best.means[HELD_OUT]:.4g} around update {best.step} to"
            f" {now.means[HELD_OUT]:.4g}, by more than noise ({least:.2g}), while the score learnt from rose from"
            f" {best.means[SCORE]:.4g} to {now.means[SCORE]:.4g}"
        )

    def _sign(self, now: Mark) -> str | None:
        """What is out of bounds, without a judge to hold against the score."""
        first = self._memory.first
        assert first is not None, "it is set before"
        found = next((said for sign in SIGNS if (said := sign(first.means, now.means, self.settings))), None)
        if found is None or self._memory.best is None:
            self._memory.best = now
            return None
        best = self._memory.best
        if not self._knows_noise or not self._score_rose(first, now):
            return None
        return f"{found}, while the score rose from {first.means[SCORE]:.4g}; it was in bounds around {best.step}"

    def _score_rose(self, before: Mark, now: Mark) -> bool:
        return now.means[SCORE] - before.means[SCORE] > self._noise(SCORE)

    def _noise(self, name: str, *, picked: bool = False) -> float:
        """By how much two means over windows must differ; `picked`: the first is the highest of all there were.

        The highest of k means of noise stands about sqrt(2 log k) deviations above their own mean.
        """
        memory, window = self._memory, self.settings.window
        deviation = math.sqrt(max(spread.variance for spread in memory.spreads[name]) / window)
        highest = math.sqrt(2 * math.log(max(1.0, memory.updates / window))) if picked else 0.0
        rounding = 1e-9 * max(abs(record.get(name, 0.0)) for record in memory.recent)
        return (self.settings.noise * math.sqrt(2) + highest) * deviation + rounding

    @property
    def _knows_noise(self) -> bool:
        """Whether there were windows enough."""
        spreads = [spread for found in self._memory.spreads.values() for spread in found]
        return all(spread.terms >= ENOUGH for spread in spreads if spread.length <= self.settings.window)


def nearest_step(best_step: int, steps: Sequence[int]) -> int | None:
    """Of the updates that checkpoints were saved after, the nearest; of two, the earlier; None if there is none."""
    return min(sorted(steps), key=lambda step: abs(step - best_step), default=None)


# signs, where no judge is held out: what is out of bounds, or None


def _far(first: Record, now: Record, settings: WatchSettings) -> str | None:
    if now.get(KL, 0.0) <= settings.max_kl:
        return None
    return f"KL to the reference is {now[KL]:.4g} nats a response, above {settings.max_kl:g}"


def _long(first: Record, now: Record, settings: WatchSettings) -> str | None:
    if not first.get(LENGTH, 0.0) or LENGTH not in now:
        return None
    factor, paid = now[LENGTH] / first[LENGTH], now.get(LENGTH_CORR, 0.0)
    beyond = factor > settings.max_length_factor or factor < 1 / settings.max_length_factor
    if not beyond or (paid if factor > 1 else -paid) < settings.length_corr:
        return None
    return (
        f"responses went from {first[LENGTH]:.4g} to {now[LENGTH]:.4g} tokens, and the judge pays for that (correlation"
        f" of score and length {paid:.2f})"
    )


def _alike(first: Record, now: Record, settings: WatchSettings) -> str | None:
    if DISTINCT not in first or now.get(DISTINCT, math.inf) >= settings.min_distinct * first[DISTINCT]:
        return None
    return f"responses became alike: rollout/distinct_2 went from {first[DISTINCT]:.3g} to {now[DISTINCT]:.3g}"


SIGNS: tuple[Callable[[Record, Record, WatchSettings], str | None], ...] = (_far, _long, _alike)


# the frontier


class Point(NamedTuple):
    """The highest score reached at this KL or less: mean over the updates up to `step`."""

    step: int
    kl: float
    score: float
    held_out_score: float  # NaN without one


def frontier(records: Sequence[Mapping[str, float]], *, window: int = 1) -> list[Point]:
    """What score each KL has bought: updates that none with less KL outscores, by rising KL.

    A score that rises along it while the held-out one turns down is overoptimisation. The highest of many noisy
    scores is too high: `window` takes means first.

    Args:
        records: lines of metrics, as `read_metrics` gives them; those without finite score and KL are left out.
        window: updates that each point is a mean of.

    Raises:
        ValueError: if window is below 1.
    """
    if window < 1:
        raise ValueError(f"window ({window}) must be at least 1 update")
    known = [
        {name: record[name] for name in (*WATCHED, "step") if math.isfinite(record.get(name, math.nan))}
        for record in records
    ]
    known = [record for record in known if SCORE in record and KL in record]
    points = []
    for end in range(window, len(known) + 1):
        part = known[end - window : end]
        means = _mark(part).means
        points.append(Point(int(part[-1].get("step", end)), means[KL], means[SCORE], means.get(HELD_OUT, math.nan)))
    reached: list[Point] = []
    for point in sorted(points, key=lambda point: (point.kl, -point.score, point.step)):
        if not reached or point.score > reached[-1].score:
            reached.append(point)
    return reached


def frontier_table(points: Sequence[Point]) -> str:
    """The frontier for a terminal, a line a point."""
    lines = [f"{'update':>8}{'KL (nats)':>12}{'score':>12}{'held out':>12}"]
    for step, kl, score, held_out in points:
        shown = "-" if math.isnan(held_out) else f"{held_out:.4g}"
        lines.append(f"{step:>8}{kl:>12.4g}{score:>12.4g}{shown:>12}")
    return "\n".join(lines)


def _mark(records: Sequence[Record]) -> Mark:
    """Means of what all records have, marked by the update in their middle."""
    shared = [name for name in WATCHED if all(name in record for record in records)]
    middle = records[(len(records) - 1) // 2]
    return Mark(int(middle.get("step", 0)), {name: fmean(record[name] for record in records) for name in shared})
