"""One self-contained page of HTML: no script, nothing fetched, light and dark as the reader's system is.

Its Content-Security-Policy holds browsers to that, whatever texts of models stand on it.
Knows nothing of what stands on it.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.training.atomic import check_target, replacing

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --muted: #5b6470; --line: #d8dde3;
  --panel: #f6f8fa; --focus: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ed; --muted: #9aa4b0; --line: #333a43;
  --panel: #1c2127; --focus: #6cb8f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 24px 28px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 32px 0 8px; } h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0 12px; } .muted, caption, figcaption { color: var(--muted); }
code, pre, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; } caption { text-align: left; padding: 10px 0 6px; }
th, td { padding: 3px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 12em; }
details { margin: 8px 0; } summary { cursor: pointer; }
:focus-visible { outline: 2px solid var(--focus); outline-offset: 1px; }
"""


def document(title: str, body: str, *, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML; texts in it escaped, see `html.escape`.
        style: CSS beside STYLE.
    """
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">\n'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    head += f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>"
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all; what UTF-8 cannot write becomes a question mark.

    Raises:
        ValueError: if path is no file's.
        OSError: if the disk refuses.
    """
    check_target(path)
    with replacing(path) as file:
        file.write(page.encode("utf-8", errors="replace"))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> str:
    r"""A table: numbers on the right, floats with four digits that count, None empty; control characters as \xNN.

    Args:
        columns: heads, plain text.
        rows: a cell for each column.
        caption: plain text.
    """
    numeric = [any(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))]
    classes = [' class="number"' if number else "" for number in numeric]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(columns, classes, strict=True))
    lines = [
        "<tr>" + "".join(_cell(value, number) for value, number in zip(row, numeric, strict=True)) + "</tr>"
        for row in rows
    ]
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    content = f"{told}<thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(lines)}</tbody>"
    return f'<div class="wide"><table>{content}</table></div>'


def _cell(value: Any, number: bool) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02X}" for c in text)
    return f'<td class="{"number" if number else "text"}">{escape(text)}</td>'
