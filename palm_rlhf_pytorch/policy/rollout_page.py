"""Kept rollouts as a page of HTML: each token coloured by its advantage or KL, all its numbers in a table below.

Without a script: what colours is chosen by radio buttons, a token that is pointed at or reached by Tab tells its
numbers, and leads to its line of the table.
"""

from collections.abc import Sequence
from html import escape

from palm_rlhf_pytorch.policy.inspection import Inspected, InspectedUpdate, column, shown, summed_kl, token_text
from palm_rlhf_pytorch.training.page import document

# column, head, what it means
COLUMNS = (
    ("logprobs", "logprob", "log-probability of the token when it was sampled, nats"),
    ("ref_logprobs", "reference", "the same under the reference"),
    ("kl", "KL", "logprob - reference, nats"),
    ("values", "value", "what the critic expected before the token, in units of the reward"),
    ("rewards", "reward", "KL penalty, and on the last token the score as it is learnt from"),
    ("advantages", "advantage", "what the token was learnt with: how much better than expected it was, whitened"),
    ("returns", "return", "advantage + value before whitening"),
    ("ratios", "ratio", "probability after the update over that before"),
    ("clipped", "clipped", "the ratio has left the trust region on the side that earns: it teaches no more"),
)
COLOURS = (("advantages", "advantage"), ("kl", "KL"), ("logprobs", "log-probability"))  # what tokens are coloured by
HIGH, LOW = "var(--high)", "var(--low)"
STYLE = f"""
/* blue and vermilion: told apart with any kind of colour vision */
:root {{ --high: 0, 114, 178; --low: 213, 94, 0; }}
@media (prefers-color-scheme: dark) {{ :root {{ --high: 60, 160, 235; --low: 255, 120, 40; }} }}
fieldset {{ border: 0; padding: 0; margin: 12px 0; display: inline-block; }} label {{ margin-right: 14px; }}
.by {{ margin: 0 4px 0 0; }} .legend {{ display: none; color: var(--muted); }}
.legend i {{ display: inline-block; width: 160px; height: 11px; margin: 0 8px; vertical-align: -1px; border-radius: 3px;
  background: linear-gradient(90deg, rgba({LOW}, .75), rgba({LOW}, 0), rgba({HIGH}, 0), rgba({HIGH}, .75)); }}
section {{ border: 1px solid var(--line); border-radius: 8px; padding: 14px 18px; margin: 18px 0; }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: 15px; line-height: 1.9; margin: 10px 0; }}
.prompt {{ color: var(--muted); }} .dim {{ opacity: .55; }}
.t {{ position: relative; color: inherit; text-decoration: none; border-radius: 3px; padding: 2px 0; }}
.t.clipped {{ box-shadow: inset 0 -2px 0 var(--ink); }}
.t:hover, .t:focus {{ outline: 2px solid var(--focus); }}
.t:hover::after, .t:focus::after {{ content: attr(data-told); position: absolute; left: 0; top: 1.9em; z-index: 2;
  white-space: pre; background: var(--panel); color: var(--ink); border: 1px solid var(--line); border-radius: 6px;
  padding: 6px 10px; font-size: 12px; line-height: 1.45; box-shadow: 0 4px 14px rgba(0, 0, 0, .25); }}
tr:target td {{ background: var(--panel); box-shadow: inset 0 2px 0 var(--focus), inset 0 -2px 0 var(--focus); }}
""" + "".join(
    f"#by-{name}:checked ~ * .legend-{name}, #by-{name}:checked ~ .legend-{name} {{ display: inline; }}\n"
    f"#by-{name}:checked ~ main .t {{ background: var(--{name}); }}\n"
    for name, _ in COLOURS
)


def rollout_page(update: InspectedUpdate, *, rows: Sequence[int] | None = None, name: str = "") -> str:
    """A page of the rollouts of an update.

    Args:
        update: what was kept.
        rows: which of them; None for all.
        name: of the run.
    """
    chosen = range(len(update.rows)) if rows is None else rows
    title = f"{name + ', ' if name else ''}update {update.step}"
    spread = {
        key: max((abs(v) for r in chosen for v in column(update.rows[r], key) or ()), default=0) for key, _ in COLOURS
    }
    head = (
        f"<h1>{escape(title)}</h1>\n<p class='muted'>{escape(update.trainer)}: responses that scored best and worst, "
    )
    head += "token by token. Point at a token, or go to it with Tab, for its numbers.</p>\n"
    radios = "".join(
        f'<input class="by" type="radio" name="by" id="by-{key}"{" checked" if not place else ""}>'
        f'<label for="by-{key}">{told}</label>'
        for place, (key, told) in enumerate(COLOURS)
    )
    legends = "".join(
        f'<span class="legend legend-{key}">{-spread[key]:.2g}<i></i>{spread[key]:.2g}; underlined: clipped</span>'
        for key, _ in COLOURS
    )
    sections = "\n".join(_section(update, row, spread, first=row == chosen[0]) for row in chosen)
    return document(title, f"{head}<span>Coloured by</span> {radios} {legends}\n<main>{sections}</main>", style=STYLE)


def _section(update: InspectedUpdate, number: int, spread: dict[str, float], *, first: bool) -> str:
    """One rollout: what is said of it, its text, its table."""
    row = update.rows[number]
    prompt = "".join(_text(shown(token_text(update, token))) for token in row.prompt)
    tokens = "".join(_token(update, number, place, spread) for place in range(len(row.response)))
    kinds = [(key, head, meaning) for key, head, meaning in COLUMNS if column(row, key) is not None]
    heads = "".join(f'<th class="number" title="{escape(meaning)}">{head}</th>' for _, head, meaning in kinds)
    columns = [column(row, key) or () for key, _, _ in kinds]
    lines = []
    for place, token in enumerate(row.response):
        cells = "".join(_number(key, values[place]) for (key, _, _), values in zip(kinds, columns, strict=True))
        text = escape(shown(token_text(update, token), alone=True))
        lines.append(
            f'<tr id="r{number}t{place}"><td class="number">{place}</td><td class="mono">{text}</td>{cells}</tr>'
        )
    table = f'<div class="wide"><table><thead><tr><th class="number">#</th><th>token</th>{heads}</tr></thead>'
    table += f"<tbody>{chr(10).join(lines)}</tbody></table></div>"
    opened = " open" if first else ""
    return (
        f'<section id="r{number}"><h3>{escape(summary(row, number))}</h3>'
        f'<div class="text mono"><span class="prompt">{prompt}</span>{tokens}</div>'
        f"<details{opened}><summary>numbers of each token</summary>{table}</details></section>"
    )


def summary(row: Inspected, number: int) -> str:
    """A rollout in a line."""
    parts = [f"row {number}, {'best' if row.best else 'worst'}: score {row.score:.4g}"]
    parts += [] if row.held_out_score is None else [f"held-out score {row.held_out_score:.4g}"]
    parts += [f"KL {summed_kl(row):.3g} nats", f"{len(row.response)} tokens"]
    return ", ".join([*parts, "ended" if row.ended else "cut at the limit"])


def _token(update: InspectedUpdate, number: int, place: int, spread: dict[str, float]) -> str:
    """A token of the response, with its colours and what it tells."""
    row = update.rows[number]
    known = {key: values[place] for key, _, _ in COLUMNS if (values := column(row, key)) is not None}
    told = "\n".join(f"{head}  {known[key]:.4g}" for key, head, _ in COLUMNS if key in known and key != "clipped")
    text = shown(token_text(update, row.response[place]))
    colours = ";".join(f"--{key}:{_colour(known[key], spread[key])}" for key, _ in COLOURS)
    clipped = " clipped" if known.get("clipped") else ""
    label = escape(f"{shown(text, alone=True)}  #{place}\n{told}{chr(10) + 'clipped' if clipped else ''}", quote=True)
    return f'<a class="t{clipped}" href="#r{number}t{place}" style="{colours}" data-told="{label}">{_text(text)}</a>'


def _text(text: str) -> str:
    """A token among others: a line ends where it says so."""
    return escape(text).replace("↵", '<span class="dim">↵</span>\n')


def _colour(value: float, spread: float) -> str:
    strength = min(abs(value) / spread, 1.0) if spread else 0.0
    return f"rgba({HIGH if value > 0 else LOW},{0.75 * strength:.3f})"


def _number(name: str, value: float) -> str:
    text = ("clipped" if value else "") if name == "clipped" else f"{value:.4f}"
    return f'<td class="number">{text}</td>'
