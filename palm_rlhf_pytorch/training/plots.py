"""Plots of what was measured, as files: needs the extra [plot].

Figures are drawn without pyplot, so that no window opens and no global state is left.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from palm_rlhf_pytorch.training.atomic import check_target, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


class Confidences(Protocol):
    """Predictions of about one confidence: bounds, how many, their mean, and how often they were right."""

    @property
    def low(self) -> float:
        """Lower bound."""

    @property
    def high(self) -> float:
        """Upper bound."""

    @property
    def count(self) -> int:
        """Predictions."""

    @property
    def confidence(self) -> float | None:
        """Their mean; None where there is none."""

    @property
    def accuracy(self) -> float | None:
        """Share of right ones; None likewise."""


def reliability_plot(bins: Sequence[Confidences], path: str | Path, *, title: str = "") -> None:
    """Draw accuracy against confidence, over the number of predictions of each bin.

    A calibrated judge's points lie on the diagonal; below it, it is surer than it may be. Areas follow the counts.

    Args:
        bins: with at least one prediction (`PairReport.bins`).
        path: of the file, which ends with one of FORMATS; an earlier one is replaced.
        title: above the plot.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the path has another ending or is no file's, or there is no prediction.
        OSError: if the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path ({path}) must end with one of {', '.join(FORMATS)}")
    check_target(path)
    points = [
        (part.confidence, part.accuracy, part.count)
        for part in bins
        if part.confidence is not None and part.accuracy is not None
    ]
    if not points:
        raise ValueError(f"bins ({len(bins)}) hold no prediction; there is nothing to plot")
    figure = _figure(4.6, 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    start, end = bins[0].low, bins[-1].high
    upper.plot([start, end], [start, end], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    confidences, accuracies, counts = zip(*points, strict=True)
    sizes = [12 + 100 * count / max(counts) for count in counts]
    upper.plot(confidences, accuracies, color="tab:blue", linewidth=1)
    upper.scatter(confidences, accuracies, s=sizes, color="tab:blue", label="judge", zorder=3)
    upper.set(ylabel="share preferred by people", ylim=(min(0.4, *accuracies) - 0.05, 1.05), title=title)
    upper.legend(loc="upper left", frameon=False)
    edges = [part.low for part in bins]
    widths = [part.high - part.low for part in bins]
    lower.bar(edges, [part.count for part in bins], width=widths, align="edge", color="0.75", edgecolor="white")
    lower.set(xlabel="confidence in the higher score, sigmoid(|difference|)", ylabel="pairs", xlim=(start, end))
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=150)


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'palm-rlhf-pytorch[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
