"""Small statistics of reports: shares with their intervals, calibration, correlations.

Pure functions of arrays; what is undefined is None, never NaN.
Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", https://doi.org/10.2307/2276774;
calibration error: Guo et al., "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

MAX_ROWS = 5  # of a table by value; more different values are cut at quantiles


@dataclass(frozen=True)
class Share:
    """A share of cases that are right, and its 95 % interval; all None where there is no case.

    Args:
        name: what the cases have in common.
        count: cases.
        share: right ones over all, a half one counting half.
        low: lower end of the interval.
        high: upper end.
    """

    name: str
    count: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Bin:
    """Predictions of about one confidence, a point of the reliability plot.

    Args:
        low: lower edge of the confidences.
        high: upper edge.
        count: predictions.
        confidence: their mean; None where there is none.
        accuracy: how often they were right; None where there is none.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


def share_of(name: str, right: np.ndarray) -> Share:
    """Share of right ones among cases, (n,), 1 where right, 0 where wrong; there may be none."""
    if not len(right):
        return Share(name, 0, None, None, None)
    return Share(name, len(right), float(right.mean()), *wilson(float(right.sum()), len(right)))


def shares_by(values: np.ndarray, right: np.ndarray) -> tuple[Share, ...]:
    """Share of right ones by value, (n,) each: of each value, or of parts of equal size where they are many."""
    different = np.unique(values)
    if len(different) <= MAX_ROWS:
        return tuple(share_of(f"{value:g}", right[values == value]) for value in different)
    # an edge belongs to the row below it; equal quantiles leave fewer rows
    edges = np.unique(np.quantile(values, np.linspace(0, 1, MAX_ROWS + 1)[1:-1], method="inverted_cdf"))
    place = np.searchsorted(edges, values)
    rows = []
    for number in range(len(edges) + 1):
        here = place == number
        if here.any():
            low, high = values[here].min(), values[here].max()
            rows.append(share_of(f"{low:g}" if low == high else f"{low:g} to {high:g}", right[here]))
    return tuple(rows)


def reliability(difference: np.ndarray, likely: np.ndarray, *, num_bins: int) -> tuple[Bin, ...]:
    """The confidences sigmoid(|difference|) in bins, and how often the higher-scored text was preferred.

    Args:
        difference: scores of chosen minus rejected, (n,).
        likely: probability that chosen is preferred, (n,); a tie is right half of the time.
        num_bins: equal parts of 0.5 to 1.
    """
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    right = np.where(difference > 0, likely, np.where(difference < 0, 1 - likely, 0.5))
    place = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    edges = np.linspace(0.5, 1.0, num_bins + 1).tolist()
    found = []
    for number in range(num_bins):
        here = place == number
        means = (float(confidence[here].mean()), float(right[here].mean())) if here.any() else (None, None)
        found.append(Bin(edges[number], edges[number + 1], int(here.sum()), *means))
    return tuple(found)


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: mean |accuracy - confidence| over the bins, weighted by count."""
    gaps = [
        part.count * abs(part.accuracy - part.confidence)
        for part in bins
        if part.accuracy is not None and part.confidence is not None
    ]
    return sum(gaps) / sum(part.count for part in bins)


def wilson(right: float, count: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of `right` out of `count` independent cases.

    Raises:
        ValueError: if count is not positive, or right is not between 0 and count.
    """
    if count < 1 or not 0 <= right <= count:
        raise ValueError(f"right ({right}) must lie between 0 and count ({count}), and count be positive")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = right / count
    middle = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    # rounding must not push an end past 0 or 1
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of x and y, (n,) each; None if either is constant."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def spearman(x: np.ndarray, y: np.ndarray) -> float | None:
    """Correlation of the ranks of x and y, (n,) each, equal values at their mean rank; None if either is constant."""
    return pearson(_ranks(x), _ranks(y))


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Chance that a positive case has a higher score than a negative one, equal scores half; None without both.

    Args:
        scores: (n,).
        positive: bool, (n,).
    """
    ups = int(positive.sum())
    downs = len(positive) - ups
    if not ups or not downs:
        return None
    return float((_ranks(scores)[positive].sum() - ups * (ups + 1) / 2) / (ups * downs))


def _ranks(x: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]
