"""Plots of what was measured, as files: needs the extra [plot].

Figures are drawn without pyplot, so that no window opens and no global state is left.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.training.atomic import check_target, replacing
from palm_rlhf_pytorch.training.charts import LIGHT, Line, thinned, value_range
from palm_rlhf_pytorch.training.curves import Panel, RunCurves, smoothed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
EXACT = ("policy/lr", "value/lr", "train/lr", "objective/kl_coef")  # nothing in them is noise


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
    path = _checked(path)
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


def curves_plot(
    runs: Sequence[RunCurves], panels: Sequence[Panel], path: str | Path, *, weight: float = 0.6, title: str = ""
) -> None:
    """Draw metrics of runs: a panel each, a colour for each run, raw values faint and smoothed ones on top.

    Args:
        runs: at least one, see `read_runs`.
        panels: what to draw, see `panels_of`.
        path: of the file, which ends with one of FORMATS; an earlier one is replaced.
        weight: of what came before in the smoothing, see `smoothed`; 0 for none.
        title: above all panels.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the path has another ending or is no file's, there is no panel, or weight is out of range.
        OSError: if the disk refuses.
    """
    path = _checked(path)
    if not panels:
        raise ValueError("panels (none): there is nothing to plot")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure(4.2 * columns, 2.75 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for place, (axis, panel) in enumerate(zip(axes, panels, strict=False)):
        lines = lines_of(runs, panel, weight)
        _draw(axis, lines)
        axis.set_title(panel.title, fontsize=10, loc="left")
        dashes = len({line.dashed for line in lines}) > 1
        note = f"  (dashed: {', '.join(panel.names[1:])})" if dashes else ""
        axis.set_xlabel((unit_of(runs, panel) if place >= len(panels) - columns else "") + note, fontsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles = [axes[0].plot([], [], color=_colour(place), linewidth=2)[0] for place in range(len(runs))]
    figure.legend(
        handles,
        [run.name for run in runs],
        loc="outside upper left",
        ncols=min(4, len(runs)),
        frameon=False,
        title=title,
    )
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=150)


def lines_of(runs: Sequence[RunCurves], panel: Panel, weight: float) -> list[Line]:
    """The lines of a panel: those of runs that have a number for its first metric."""
    lines = []
    for place, run in enumerate(runs):
        if run.last(panel.names[0]) is None:
            continue
        for dashed, name in enumerate(panel.names):
            steps, values = run.curve(name)
            if any(map(math.isfinite, values)):
                told = f"{run.name}, {name}" if len(panel.names) > 1 else run.name
                smooth = smoothed(values, 0.0 if name in EXACT else weight)
                lines.append(Line(told, place, dashed > 0, steps, values, smooth))
    return lines


def unit_of(runs: Sequence[RunCurves], panel: Panel) -> str:
    """What a step is, of the runs that a panel shows."""
    return "/".join(sorted({run.unit for run in runs if run.last(panel.names[0]) is not None}))


def _draw(axis: "Axes", lines: Sequence[Line]) -> None:
    """One panel."""
    for line in lines:
        style: dict[str, Any] = {"color": _colour(line.colour), "linestyle": "--" if line.dashed else "-"}
        if line.raw != line.smooth:
            axis.plot(*thinned(line.steps, line.raw), linewidth=0.8, alpha=0.28, **style)
        axis.plot(
            *thinned(line.steps, line.smooth), linewidth=1.7, marker="o" if len(line.steps) == 1 else None, **style
        )
    axis.set_ylim(*value_range(lines))
    axis.grid(axis="y", color="0.9", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    axis.locator_params(axis="x", integer=True)


def _colour(place: int) -> str:
    return LIGHT[place % len(LIGHT)]


def _checked(path: str | Path) -> Path:
    """The path, if a plot can be put there."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"path ({path}) must end with one of {', '.join(FORMATS)}")
    check_target(path)
    return path


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(needs("a plot", "matplotlib", extra="plot")) from error
    return Figure(figsize=(width, height), layout="constrained")
