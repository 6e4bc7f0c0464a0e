"""Rows of results, the table they make, and the JSON line; medians with their spread, never a mean.

Times are in seconds and memory in bytes here; the table prints ms and MB.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

SCALES = {"s": (1e3, "ms"), "bytes": (1e-6, "MB"), "%": (1, "%"), "count": (1, ""), "x": (1, "x")}


class Spread(NamedTuple):
    """Median, smallest and largest of some samples, and how many there were."""

    median: float
    low: float
    high: float
    rounds: int


class Ceilings(NamedTuple):
    """What the machine can do: bytes read a second, and operations a second on large matrices of a dtype."""

    bandwidth: float
    matrix_rate: float


class Work(NamedTuple):
    """What must be done in one measured time: bytes read, floating-point operations, tokens made; None if uncounted."""

    bytes: float | None = None
    flops: float | None = None
    tokens: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured quantity of one competitor.

    Attributes:
        case: what was run.
        measure: which of its quantities.
        who: competitor.
        unit: a key of SCALES.
        spread: of the samples.
        ratio: median by that of the case's first competitor.
        work: what was counted.
        mbu: bytes / time / bandwidth, the share of the memory's speed used on what must be read.
        mfu: flops / time / matrix rate.
        note: what else a reader must know.
    """

    case: str
    measure: str
    who: str
    unit: str
    spread: Spread
    ratio: float | None = None
    work: Work = Work()
    mbu: float | None = None
    mfu: float | None = None
    note: str = ""

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens made in a second, where both are known."""
        known = self.unit == "s" and self.work.tokens is not None and self.spread.median > 0
        return self.work.tokens / self.spread.median if known else None


def spread_of(samples: Sequence[float]) -> Spread:
    """Median, low and high of at least one sample."""
    return Spread(median(samples), min(samples), max(samples), len(samples))


def timed_rows(
    case: str,
    measure: str,
    samples: dict[str, list[float]],
    *,
    ceilings: Ceilings | None = None,
    work: Work | dict[str, Work] | None = None,
    note: str = "",
) -> list[Row]:
    """A row for each competitor, from its samples in seconds.

    Args:
        case: what was run.
        measure: which quantity these are.
        samples: of each competitor; the first is what the others are compared with.
        ceilings: of the dtype that was run.
        work: in one sample; of each competitor where they differ.
        note: printed beside each.
    """
    rows, first = [], None
    for who, values in samples.items():
        spread = spread_of(values)
        first = first or spread.median
        counted = (work.get(who) if isinstance(work, dict) else work) or Work()
        drowned = "; a difference that is lost in noise" if spread.low <= 0 else ""
        rows.append(
            Row(
                case=case, measure=measure, who=who, unit="s", spread=spread, ratio=spread.median / first, work=counted,
                mbu=_share(counted.bytes, spread.median, ceilings.bandwidth if ceilings else None),
                mfu=_share(counted.flops, spread.median, ceilings.matrix_rate if ceilings else None),
                note=f"{note}{drowned}".removeprefix("; "),
            )
        )  # fmt: skip
    return rows


def counted_rows(
    case: str, measure: str, counts: dict[str, float], *, unit: str, note: str = "", compare: bool = True
) -> list[Row]:
    """A row for each competitor, from one number that is counted, not timed."""
    first = next(iter(counts.values()))
    return [
        Row(
            case=case, measure=measure, who=who, unit=unit, spread=spread_of([count]), note=note,
            ratio=count / first if compare and first else None,
        )
        for who, count in counts.items()
    ]  # fmt: skip


def _share(amount: float | None, seconds: float, ceiling: float | None) -> float | None:
    """The share of a ceiling (a rate) that doing an amount in so many seconds reaches."""
    return None if amount is None or ceiling is None or seconds <= 0 else amount / seconds / ceiling


HEADER = ("case", "measure", "who", "median", "spread", "ratio", "tokens/s", "MBU", "MFU", "GB", "GFLOP", "note")


def table(rows: Iterable[Row]) -> str:
    """All rows under one header, columns aligned; what repeats the line above is left out."""
    cells = [HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADER))]
    lines, above = [], ("", "")
    for line in cells:
        shown = ["" if line[:2] == above and column < 2 else cell for column, cell in enumerate(line)]
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(shown, widths, strict=True)).rstrip())
        above = line[:2]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    scale, unit = SCALES[row.unit]
    middle, low, high = (_number(scale * value) for value in row.spread[:3])
    several = row.spread.rounds > 1
    return (
        row.case, row.measure, row.who, f"{middle} {unit}".rstrip(), f"{low}..{high}" if several else "",
        "" if row.ratio is None else f"{row.ratio:.2f}x", _number(row.tokens_per_second), _percent(row.mbu),
        _percent(row.mfu), _number(row.work.bytes, 1e-9), _number(row.work.flops, 1e-9), row.note,
    )  # fmt: skip


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:,.4g}" if abs(value * scale) < 1e4 else f"{value * scale:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def json_line(rows: Iterable[Row], facts: dict[str, Any]) -> str:
    """Everything on one line; Spread and Work become objects with named fields."""
    listed = [
        asdict(row)
        | {"spread": row.spread._asdict(), "work": row.work._asdict(), "tokens_per_second": row.tokens_per_second}
        for row in rows
    ]
    return json.dumps({**facts, "rows": listed})
