"""Charts as SVG: bars, stacked bars, shares with their intervals. Knows no Django; colours are classes of the style.

Every chart is WIDTH units wide, so that its words have the size of the text around it on a phone and on a desk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH, HEIGHT = 380, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 8, 14, 26  # around the plot
COLOURS = 6  # classes c1 to c6
_GAP = 0.22  # of a column that stays free


@dataclass(frozen=True)
class Column:
    """A column of a chart: its name, the heights stacked in it from below, and what it says when pointed at."""

    name: str
    values: tuple[float, ...]
    title: str = ""


@dataclass(frozen=True)
class Point:
    """A share between 0 and 1 and its interval; None where there is no case."""

    name: str
    share: float | None
    low: float | None
    high: float | None
    title: str = ""


def bars(columns: Sequence[Column], *, label: str, classes: Sequence[str] = (), shown: bool = False) -> str:
    """Columns from 0 up.

    Args:
        columns: one or more.
        label: what the chart shows, for those who do not see it.
        classes: of the columns where each has one value, of the layers where they are stacked; c1, c2 ... otherwise.
        shown: write each column's sum above it.
    """
    svg = _svg(label)
    stacked = max(len(column.values) for column in columns) > 1
    top, step = _scale(max(sum(column.values) for column in columns))
    _grid(svg, [number * step for number in range(round(top / step) + 1)], top)
    every = _every(columns)
    for number, column in enumerate(columns):
        left, width = _place(number, len(columns))
        group = ElementTree.SubElement(svg, "g")
        ElementTree.SubElement(group, "title").text = column.title or f"{column.name}: {_number(sum(column.values))}"
        base = 0.0
        for layer, value in enumerate(column.values):
            colour = layer if stacked else number if classes else 0
            name = classes[colour] if classes else f"c{colour % COLOURS + 1}"
            _rectangle(group, left, width, _y(base + value, top), _y(base, top), name)
            base += value
        if shown:
            _text(group, left + width / 2, _y(base, top) - 4, _number(base), "middle")
        if number % every == (len(columns) - 1) % every:
            _text(svg, left + width / 2, HEIGHT - BOTTOM + 16, column.name, "middle")
    return _done(svg)


def shares(points: Sequence[Point], *, label: str, even: float | None = 0.5) -> str:
    """Shares as dots with their intervals, side by side; a dashed line where there would be no preference."""
    svg = _svg(label)
    _grid(svg, [0, 0.25, 0.5, 0.75, 1], 1, percent=True)
    if even is not None:
        _line(svg, LEFT, _y(even, 1), WIDTH - RIGHT, _y(even, 1), "even")
    for number, point in enumerate(points):
        left, width = _place(number, len(points))
        middle = left + width / 2
        group = ElementTree.SubElement(svg, "g")
        ElementTree.SubElement(group, "title").text = point.title or point.name
        if point.share is not None and point.low is not None and point.high is not None:
            _line(group, middle, _y(point.low, 1), middle, _y(point.high, 1), "interval")
            circle = {"cx": _short(middle), "cy": _short(_y(point.share, 1)), "r": "5", "class": "c1"}
            ElementTree.SubElement(group, "circle", circle)
            _text(group, middle + 9, _y(point.share, 1) + 4, f"{point.share:.0%}", "start")
        _text(svg, middle, HEIGHT - BOTTOM + 16, point.name, "middle")
    return _done(svg)


def _svg(label: str) -> ElementTree.Element:
    about = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": label, "class": "chart"}
    return ElementTree.Element("svg", {"xmlns": "http://www.w3.org/2000/svg"} | about)


def _done(svg: ElementTree.Element) -> str:
    return ElementTree.tostring(svg, encoding="unicode")


def _grid(svg: ElementTree.Element, marks: Sequence[float], top: float, *, percent: bool = False) -> None:
    for mark in marks:
        _line(svg, LEFT, _y(mark, top), WIDTH - RIGHT, _y(mark, top), "axis" if mark == 0 else "grid")
        _text(svg, LEFT - 6, _y(mark, top) + 4, f"{mark:.0%}" if percent else _number(mark), "end")


def _place(number: int, of: int) -> tuple[float, float]:
    """Left edge and width of a column."""
    width = (WIDTH - LEFT - RIGHT) / of
    return LEFT + width * (number + _GAP / 2), width * (1 - _GAP)


def _y(value: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top)


def _scale(highest: float) -> tuple[float, float]:
    """The end of an axis and the distance of its marks: 1, 2 or 5 times a power of ten, about four marks."""
    power = 1.0
    while power * 50 < highest:
        power *= 10
    step = next(step * power for step in (1, 2, 5, 10, 20) if step * power * 4 >= highest)
    return max(-(-highest // step), 1) * step, step


def _every(columns: Sequence[Column]) -> int:
    """Of so many columns one is named, where their names would run into each other."""
    widest = max(len(column.name) for column in columns) * 7.0 + 8
    return max(1, -(-int(widest * len(columns)) // (WIDTH - LEFT - RIGHT)))


def _rectangle(group: ElementTree.Element, left: float, width: float, high: float, low: float, name: str) -> None:
    if low > high:
        box = {"x": _short(left), "y": _short(high), "width": _short(width), "height": _short(low - high)}
        ElementTree.SubElement(group, "rect", box | {"class": name})


def _line(group: ElementTree.Element, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
    ends = {"x1": _short(x1), "y1": _short(y1), "x2": _short(x2), "y2": _short(y2)}
    ElementTree.SubElement(group, "line", ends | {"class": name})


def _text(group: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    place = {"x": _short(x), "y": _short(y), "text-anchor": anchor}
    ElementTree.SubElement(group, "text", place).text = text


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.2g}"
