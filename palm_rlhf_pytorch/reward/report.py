"""How well scores follow what people said, in figures: accuracy, calibration, what length has to do with it.

Held-out scores and labels come in, a report goes out; nothing here knows a model or a file. An interval takes the
pairs for independent ones; where several come from one dialogue it is too narrow.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from palm_rlhf_pytorch.reward.agreement import Agreement
from palm_rlhf_pytorch.reward.figures import (
    Bin,
    Share,
    area_under_curve,
    calibration_error,
    pearson,
    reliability,
    share_of,
    shares_by,
    spearman,
)

WIDTH = 44  # of a table's first column


@dataclass(frozen=True)
class PairReport:
    """Figures of pairs.

    Args:
        accuracy: share of pairs whose likelier text has the higher score; equal scores count half, ties are left out.
        ties: pairs left out of it.
        mean_difference: mean score difference, in favour of the likelier text, without ties.
        loss: -log-likelihood of the labels under sigmoid(difference), nats a pair, ties included.
        ece: mean distance between confidence and accuracy over `bins`, weighted by their counts.
        bins: of the confidence sigmoid(|difference|) that the higher-scored text is preferred, from 0.5 to 1.
        by_margin: accuracy by margin, where margins are given.
        by_length: accuracy by length of the preferred text minus that of the other.
        shorter_preferred: accuracy where the preferred text is the shorter one.
        longer_preferred: accuracy where it is the longer one.
        length_only: accuracy of preferring the longer text without reading; equal lengths count half.
        length_correlation: Pearson correlation of score difference and length difference; None if either is constant.
        score_length_correlation: the same of the scores and lengths of all texts.
    """

    accuracy: Share
    ties: int
    mean_difference: float | None
    loss: float
    ece: float
    bins: tuple[Bin, ...]
    by_margin: tuple[Share, ...]
    by_length: tuple[Share, ...]
    shorter_preferred: Share
    longer_preferred: Share
    length_only: Share
    length_correlation: float | None
    score_length_correlation: float | None


@dataclass(frozen=True)
class RatingReport:
    """Figures of ratings.

    Args:
        count: texts.
        accuracy: share of scores that round to the rating, halves upward; None unless all ratings are whole numbers.
        mean_absolute_error: of the scores, in units of the rating.
        spearman: rank correlation of score and rating; None if either is constant.
        pearson: correlation of score and rating; None likewise.
        baseline_accuracy: that of giving all the commonest rating; None likewise.
        baseline_error: mean absolute error of giving all the median rating.
        length_correlation: Pearson correlation of score and length; None without lengths, or likewise.
    """

    count: int
    accuracy: Share | None
    mean_absolute_error: float
    spearman: float | None
    pearson: float | None
    baseline_accuracy: float | None
    baseline_error: float
    length_correlation: float | None


@dataclass(frozen=True)
class VoteReport:
    """Figures of votes.

    Args:
        up: share of thumbs up.
        accuracy: share of texts whose score is above 0 for a thumb up, below 0 for one down; 0 counts half.
        auc: chance that a text with a thumb up has a higher score than one with a thumb down; None without both.
    """

    up: float
    accuracy: Share
    auc: float | None


@dataclass(frozen=True)
class RewardReport:
    """All that is known about a judge on held-out labels.

    Args:
        pairs: figures of pairs, or None.
        ratings: figures of ratings, or None.
        votes: figures of votes, or None.
        agreement: between annotators, by kind of judgement (`measure_agreement`).
        notes: lines to be shown above the figures: where the data are from, what was left out.
    """

    pairs: PairReport | None = None
    ratings: RatingReport | None = None
    votes: VoteReport | None = None
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def to_json(self) -> str:
        """The figures as JSON, null where one is undefined."""
        return json.dumps(asdict(self), indent=2, allow_nan=False)

    def table(self) -> str:
        """The figures for a terminal, a line each."""
        lines = list(self.notes)
        lines += _pair_lines(self.pairs) if self.pairs else []
        lines += _rating_lines(self.ratings) if self.ratings else []
        if self.votes:
            lines += _table("votes", (self.votes.accuracy,))
            lines.append(f"  up {_number(self.votes.up)}, area under the curve {_number(self.votes.auc)}")
        for kind, found in self.agreement.items():
            alphas = f"nominal {_number(found.nominal)}, ordinal {_number(found.ordinal)}, interval"
            alphas += f" {_number(found.interval)}"
            lines.append(f"agreement of annotators on {kind}: Krippendorff's alpha {alphas}")
            lines.append(f"  from {found.judgements:,} judgements of {found.items:,} things judged twice or more")
        return "\n".join(lines)


def report_pairs(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    *,
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    preferences: Sequence[float] | None = None,
    margins: Sequence[float | None] | None = None,
    num_bins: int = 10,
) -> PairReport:
    """Figures of held-out pairs.

    Args:
        chosen_scores: of the chosen texts, (n,); arrays and tensors on the CPU do as well, here and below.
        rejected_scores: of the rejected ones, (n,).
        chosen_lengths: of the responses, in tokens or in characters, (n,).
        rejected_lengths: likewise, (n,).
        preferences: probability that the chosen text is preferred, (n,); below 0.5 the other one counts as preferred,
            0.5 is a tie. None for 1.
        margins: by how much it is better, (n,), None where nobody says.
        num_bins: equal parts of the confidences from 0.5 to 1.

    Raises:
        ValueError: if there is no pair, lengths of the arguments differ, a number is not finite, or num_bins is not
            positive.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins ({num_bins}) must be 1 or more")
    given = {"chosen_scores": chosen_scores, "rejected_scores": rejected_scores}
    given |= {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    chosen, rejected, chosen_long, rejected_long = _arrays(given)
    likely = np.ones(len(chosen))
    if preferences is not None:
        (likely,) = _arrays({"preferences": preferences}, count=len(chosen))
    difference, longer = chosen - rejected, chosen_long - rejected_long
    decided, toward = likely != 0.5, np.where(likely < 0.5, -1.0, 1.0)
    right = _halves(difference * toward)[decided]
    length = (longer * toward)[decided]
    bins = reliability(difference, likely, num_bins=num_bins)
    return PairReport(
        accuracy=share_of("all", right),
        ties=int((~decided).sum()),
        mean_difference=float((difference * toward)[decided].mean()) if decided.any() else None,
        loss=float((likely * np.logaddexp(0, -difference) + (1 - likely) * np.logaddexp(0, difference)).mean()),
        ece=calibration_error(bins),
        bins=bins,
        by_margin=_by_margin(margins, decided, right),
        by_length=shares_by(length, right),
        shorter_preferred=share_of("the shorter one preferred", right[length < 0]),
        longer_preferred=share_of("the longer one preferred", right[length > 0]),
        length_only=share_of("the longer one taken", _halves(length)),
        length_correlation=pearson(difference, longer),
        score_length_correlation=pearson(
            np.concatenate([chosen, rejected]), np.concatenate([chosen_long, rejected_long])
        ),
    )


def report_ratings(
    scores: Sequence[float], ratings: Sequence[float], *, lengths: Sequence[int] | None = None
) -> RatingReport:
    """Figures of held-out ratings.

    Args:
        scores: of the texts, in units of the rating, (n,).
        ratings: of the texts, (n,).
        lengths: of the responses, (n,).

    Raises:
        ValueError: if there is no rating, lengths of the arguments differ, or a number is not finite.
    """
    given, rated = _arrays({"scores": scores, "ratings": ratings})
    long = None if lengths is None else _arrays({"lengths": lengths}, count=len(rated))[0]
    whole = bool((rated == np.floor(rated)).all())
    counts = np.unique(rated, return_counts=True)[1]
    right = (np.floor(given + 0.5) == rated).astype(float)
    return RatingReport(
        count=len(rated),
        accuracy=share_of("all", right) if whole else None,
        mean_absolute_error=float(np.abs(given - rated).mean()),
        spearman=spearman(given, rated),
        pearson=pearson(given, rated),
        baseline_accuracy=float(counts.max() / len(rated)) if whole else None,
        baseline_error=float(np.abs(rated - np.median(rated)).mean()),
        length_correlation=None if long is None else pearson(given, long),
    )


def report_votes(scores: Sequence[float], up: Sequence[bool]) -> VoteReport:
    """Figures of held-out votes.

    Args:
        scores: of the texts, (n,).
        up: True where the thumb was up, (n,).

    Raises:
        ValueError: if there is no vote, lengths of the arguments differ, or a score is not finite.
    """
    given, liked = _arrays({"scores": scores, "up": up})
    right = _halves(given * np.where(liked > 0, 1.0, -1.0))
    return VoteReport(up=float(liked.mean()), accuracy=share_of("all", right), auc=area_under_curve(given, liked > 0))


def _arrays(given: Mapping[str, object], *, count: int | None = None) -> list[np.ndarray]:
    """Arguments as arrays (count,) of float64; by default as many as the first has."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    count = len(next(iter(arrays.values()))) if count is None else count
    for name, array in arrays.items():
        if array.shape != (count,) or not count:
            raise ValueError(f"{name} has shape {array.shape}: it must be ({count},), with at least one number")
        wrong = np.flatnonzero(~np.isfinite(array))
        if len(wrong):
            raise ValueError(f"{name} ({array[wrong[0]]} in place {wrong[0]}, {len(wrong)} in all) must be finite")
    return list(arrays.values())


def _halves(x: np.ndarray) -> np.ndarray:
    """1 where x is above 0, 0 where below, a half where it is 0."""
    return (np.sign(x) + 1) / 2


def _by_margin(margins: Sequence[float | None] | None, decided: np.ndarray, right: np.ndarray) -> tuple[Share, ...]:
    if margins is None or all(margin is None for margin in margins):
        return ()
    if len(margins) != len(decided):
        raise ValueError(f"margins ({len(margins)}) must be as many as the pairs ({len(decided)})")
    given = np.array([np.nan if margin is None else margin for margin in margins], dtype=np.float64)[decided]
    return shares_by(given[~np.isnan(given)], right[~np.isnan(given)])


def _pair_lines(found: PairReport) -> list[str]:
    by_length = (found.shorter_preferred, found.longer_preferred, found.length_only)
    lines = _table("accuracy on pairs", (found.accuracy, *by_length))
    lines += _table("accuracy by margin", found.by_margin)
    lines += _table("accuracy by length, preferred minus other", found.by_length)
    if found.ties:
        lines.append(f"ties, left out of the accuracy: {found.ties:,}")
    lines.append(f"loss {found.loss:.4f} nats a pair, mean score difference {_number(found.mean_difference)}")
    lines.append(
        f"correlation of scores and lengths {_number(found.score_length_correlation)},"
        f" of their differences {_number(found.length_correlation)}"
    )
    lines.append(f"calibration error (ECE) {found.ece:.3f}")
    lines.append(f"  {'confidence':<{WIDTH - 2}}{'count':>7}{'mean':>8}{'right':>8}")
    lines += [
        f"  {f'{part.low:.2f} to {part.high:.2f}':<{WIDTH - 2}}{part.count:>7,}{_number(part.confidence):>8}"
        f"{_number(part.accuracy):>8}"
        for part in found.bins
        if part.count
    ]
    return lines


def _rating_lines(found: RatingReport) -> list[str]:
    lines = _table("accuracy on ratings", (found.accuracy,)) if found.accuracy else [f"{found.count:,} ratings"]
    if found.accuracy:
        lines.append(f"  of the commonest rating alone {_number(found.baseline_accuracy)}")
    error, baseline = f"{found.mean_absolute_error:.3f}", f"{found.baseline_error:.3f}"
    lines.append(f"mean absolute error {error}, of the median rating alone {baseline}")
    lines.append(f"correlation with the ratings {_number(found.pearson)}, of the ranks {_number(found.spearman)}")
    if found.length_correlation is not None:
        lines.append(f"correlation of scores and lengths {_number(found.length_correlation)}")
    return lines


def _table(title: str, rows: Sequence[Share]) -> list[str]:
    if not rows:
        return []
    lines = [f"{title:<{WIDTH}}{'count':>7}{'share':>8}   95 % interval"]
    for row in rows:
        ends = "" if row.low is None else f"   {row.low:.3f} to {row.high:.3f}"
        lines.append(f"{'  ' + row.name:<{WIDTH}}{row.count:>7,}{_number(row.share):>8}{ends}")
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
