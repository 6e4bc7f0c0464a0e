"""Line charts as SVG that stands in a page: raw values faint, smoothed ones on top, numbers where one points.

Colours are CSS variables, so that a chart is light or dark as its page is.
Okabe and Ito, "Color Universal Design", https://jfly.uni-koeln.de/color/
"""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b38600", "#56b4e9")  # told apart with any kind of colour vision
DARK = ("#4ca9ea", "#ff8a3d", "#2ecc9f", "#e6a3c9", "#e6b93c", "#9bd6ff")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 236, 54, 10, 10, 34
MAX_POINTS = 500  # of a line; of more, the lowest and the highest of each stretch
STYLE = (
    ":root { " + " ".join(f"--run{place}: {colour};" for place, colour in enumerate(LIGHT)) + " }\n"
    "@media (prefers-color-scheme: dark) { :root { "
    + " ".join(f"--run{place}: {colour};" for place, colour in enumerate(DARK))
    + " } }\n"
    """svg.chart { width: 100%; height: auto; display: block; }
svg.chart text { font-size: 11px; fill: var(--muted); } svg.chart .grid { stroke: var(--line); stroke-width: 1; }
svg.chart path { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg.chart .raw { stroke-width: 1; opacity: .28; } svg.chart .main { stroke-width: 2; }
svg.chart .dashed { stroke-dasharray: 5 4; } svg.chart circle { opacity: 0; } svg.chart circle:hover { opacity: 1; }
"""
)

Scale = Callable[[float], float]  # from a value to its place


class Line(NamedTuple):
    """A line of a chart: whose it is, its colour's number, and its points, (n,) each; nan is a gap."""

    name: str
    colour: int
    dashed: bool
    steps: Sequence[float]
    raw: Sequence[float]
    smooth: Sequence[float]


def svg_chart(lines: Sequence[Line], *, title: str, unit: str) -> str:
    """A chart.

    Args:
        lines: with at least one finite number among them.
        title: read out by screen readers; the page shows its own.
        unit: of a step.
    """
    low, high = value_range(lines)
    steps = [step for line in lines for step in line.steps]
    start, end = min(steps), max(steps)
    if start == end:
        start, end = start - 1, end + 1

    def x(step: float) -> float:
        return LEFT + (step - start) / (end - start) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_axes(x, y, (start, end), (low, high), unit)]
    inside = f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    inside += f' viewBox="{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}">'  # which clips
    for line in lines:
        style = f'style="stroke: var(--run{line.colour % len(LIGHT)})"'
        dashed = " dashed" if line.dashed else ""
        if list(line.raw) != list(line.smooth):
            inside += f'<path class="raw{dashed}" {style} d="{_path(line.steps, line.raw, x, y)}"/>'
        inside += f'<path class="main{dashed}" {style} d="{_path(line.steps, line.smooth, x, y)}"/>'
    parts.append(inside + "</svg>")
    parts += [_points(line, x, y, unit) for line in lines]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def value_range(lines: Sequence[Line]) -> tuple[float, float]:
    """From where to where a chart shows values: all smoothed ones, and 98 % of the raw ones: single spikes leave it."""
    smooth = [value for line in lines for value in line.smooth if math.isfinite(value)]
    raw = sorted(value for line in lines for value in line.raw if math.isfinite(value))
    cut = len(raw) // 100
    low, high = min(smooth + raw[cut : cut + 1]), max(smooth + raw[len(raw) - 1 - cut :][:1])
    room = 0.06 * (high - low) or 0.06 * abs(high) or 0.05
    return low - room, high + room


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many round numbers in a range: steps are 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points of a long line: of each stretch the lowest and the highest, gaps kept, so that no spike is lost."""
    size = -(-2 * len(values) // MAX_POINTS)
    if size < 2:
        return list(steps), list(values)
    kept: set[int] = {0, len(values) - 1}
    for start in range(0, len(values), size):
        places = range(start, min(start + size, len(values)))
        finite = [place for place in places if math.isfinite(values[place])]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else {start}
    order = sorted(kept)
    return [steps[place] for place in order], [values[place] for place in order]


def number(value: float) -> str:
    """A number as short as it may be, for an axis."""
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e") if 0 < abs(value) < 1e-3 else f"{value:.6g}"


def _axes(x: Scale, y: Scale, steps: tuple[float, float], values: tuple[float, float], unit: str) -> str:
    parts = []
    for value in ticks(*values):
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="0.33em" text-anchor="end">{number(value)}</text>')
    bottom = HEIGHT - BOTTOM
    for step in ticks(*steps):
        if step == int(step):
            parts.append(f'<text x="{x(step):.1f}" y="{bottom + 15}" text-anchor="middle">{int(step):,}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(unit)}</text>')
    return "".join(parts)


def _path(steps: Sequence[float], values: Sequence[float], x: Scale, y: Scale) -> str:
    """A line through finite points; gaps break it, a point between two gaps is a dot."""
    found = []
    pairs = zip(*thinned(steps, values), strict=True)
    for finite, group in groupby(pairs, key=lambda pair: math.isfinite(pair[1])):
        if finite:
            points = [f"{x(step):.1f},{y(value):.1f}" for step, value in group]
            found.append("M" + "L".join(points if len(points) > 1 else points * 2))
    return "".join(found)


def _points(line: Line, x: Scale, y: Scale, unit: str) -> str:
    """Places to point at, which tell their numbers; at most about a hundred and fifty of a line."""
    parts, every = [], -(-len(line.steps) // 150)
    for place in range(len(line.steps) - 1, -1, -every):
        step, raw, smooth = line.steps[place], line.raw[place], line.smooth[place]
        if math.isfinite(smooth):
            told = f"{line.name}, {unit} {int(step):,}: {raw:.4g}"
            told += f" (smoothed {smooth:.4g})" if raw != smooth else ""
            place_of = f'cx="{x(step):.1f}" cy="{y(smooth):.1f}" r="4"'
            style = f'style="fill: var(--run{line.colour % len(LIGHT)})"'
            parts.append(f"<circle {place_of} {style}><title>{escape(told)}</title></circle>")
    return "".join(parts)
