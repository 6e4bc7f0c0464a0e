"""Runs as one page of HTML: curves side by side, what differs between them, and texts to read. Needs no extra.

Knows no trainer: samples come as plain mappings.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from palm_rlhf_pytorch.training import charts
from palm_rlhf_pytorch.training.curves import Panel, RunCurves, caption, differing_settings, summary
from palm_rlhf_pytorch.training.page import document, table
from palm_rlhf_pytorch.training.plots import lines_of, unit_of

SAMPLE = ("update", "kind", "score", "held_out_score", "kl", "length", "prompt", "response")
STYLE = (
    charts.STYLE
    + """.legend { position: sticky; top: 0; background: var(--paper); padding: 8px 0; z-index: 1; }
.legend span { margin-right: 18px; white-space: nowrap; } .legend i { display: inline-block; width: 22px; height: 3px;
  border-radius: 2px; margin-right: 6px; vertical-align: 3px; }
.grid-of-charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 18px; }
figure { margin: 0; padding: 12px 14px; border: 1px solid var(--line); border-radius: 8px; break-inside: avoid; }
figcaption { font-size: 12px; line-height: 1.4; margin-top: 6px; }
"""
)


def runs_page(
    runs: Sequence[RunCurves],
    panels: Sequence[Panel],
    *,
    weight: float = 0.6,
    samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> str:
    """A page that needs nothing beside itself.

    Args:
        runs: at least one, see `read_runs`.
        panels: what to draw, see `panels_of`.
        weight: of what came before in the smoothing, see `smoothed`.
        samples: of each run, by its name, the lines of samples.jsonl.
    """
    names = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(names)}</h1>", table(*summary(runs))]
    columns, rows = differing_settings(runs)
    if rows:
        body.append(f"<h2>Settings that differ</h2>{table(columns, rows)}")
    smoothing = f"faint: as measured; strong: smoothed with weight {weight:g}. " if weight else ""
    body.append(f'<h2>Curves</h2><p class="muted">{smoothing}Point at a line for its numbers.</p>{_legend(runs)}')
    for prefix, group in groupby(panels, key=_heading):
        head = f"<h3>{escape(prefix)}</h3>" if prefix else ""
        figures = "\n".join(_figure(runs, panel, weight) for panel in group)
        body.append(f'{head}<div class="grid-of-charts">{figures}</div>')
    for run in runs:
        body += _samples(run, (samples or {}).get(run.name, ()))
    return document(names, "\n".join(body), style=STYLE)


def _heading(panel: Panel) -> str:
    """Panels of single metrics stand under the first part of their names; chosen ones need no heading."""
    return panel.title.partition("/")[0] if panel.title == panel.names[0] else ""


def _legend(runs: Sequence[RunCurves]) -> str:
    marks = (
        f'<span><i style="background: var(--run{place % len(charts.LIGHT)})"></i>{escape(run.name)}</span>'
        for place, run in enumerate(runs)
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def _figure(runs: Sequence[RunCurves], panel: Panel, weight: float) -> str:
    chart = charts.svg_chart(lines_of(runs, panel, weight), title=panel.title, unit=unit_of(runs, panel))
    return f"<figure><h3>{escape(panel.title)}</h3>{chart}<figcaption>{escape(caption(panel))}</figcaption></figure>"


def _samples(run: RunCurves, samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """The best and the worst responses of the last update, and the best of the whole run."""
    if not samples:
        return []
    last = max(sample.get("step", 0) for sample in samples)
    scored = [sample for sample in samples if isinstance(sample.get("score"), int | float)]
    best = sorted(scored, key=lambda sample: -sample["score"])[:3]
    parts = [f"<h2>Responses of {escape(run.name)}</h2>"]
    tables = (
        (f"the best and the worst of update {last}", [sample for sample in samples if sample.get("step") == last]),
        ("the best of the whole run", best),
    )
    for told, chosen in tables:
        rows = [[sample.get("step"), *(sample.get(name) for name in SAMPLE[1:])] for sample in chosen]
        parts.append(table(SAMPLE, rows, caption=told))
    return parts
