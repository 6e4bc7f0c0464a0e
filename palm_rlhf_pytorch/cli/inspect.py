"""`palm-rlhf inspect`: one rollout of a run token by token, in the terminal and as a page of HTML."""

import argparse
import os
import sys
import unicodedata
from pathlib import Path

from palm_rlhf_pytorch.policy.inspection import (
    Inspected,
    InspectedUpdate,
    column,
    find_rollouts,
    read_rollouts,
    shown,
    token_text,
)
from palm_rlhf_pytorch.policy.rollout_page import COLUMNS, rollout_page, summary
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.page import write_page

BLUE, RED, BOLD, FAINT, PLAIN = "\033[34m", "\033[31m", "\033[1m", "\033[2m", "\033[0m"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "inspect",
        help="show a rollout of a run token by token",
        description=(
            "Show a response that a run has sampled and learnt from, token by token: log-probabilities of policy and"
            " reference, KL, value, reward, advantage, return, and what the update has made of its probability. A run"
            " keeps the best and the worst responses of its last update; the best is shown, unless an option says"
            " which."
        ),
    )
    parser.add_argument("rollouts", metavar="RUN", type=Path, help="folder of a run, or a file of its rollouts")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--row", type=int, metavar="N", help="the row of this number, from 0: first the best, then the worst"
    )
    which.add_argument("--best", action="store_true", help="the rows that scored best, all that are kept")
    which.add_argument("--worst", action="store_true", help="the rows that scored worst")
    parser.add_argument("--update", type=int, metavar="N", help="of this update, where the run keeps several")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with all rows, or those chosen, instead of printing"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print rollouts, or write them to a page.

    Raises:
        FileNotFoundError: if there is no such run.
        ValueError: if it keeps no such rollout.
    """
    if args.html is not None:
        check_target(args.html)
    path = find_rollouts(args.rollouts, args.update)
    update = read_rollouts(path)
    if args.update not in (None, update.step):
        raise ValueError(f"{path} holds the rollouts of update {update.step}, not of {args.update}")
    rows = chosen_rows(update, row=args.row, best=args.best, worst=args.worst)
    if args.html is not None:
        name = args.rollouts.resolve().name if args.rollouts.is_dir() else ""
        write_page(args.html, rollout_page(update, rows=rows, name=name))
        print(f"saved {args.html}")
        return 0
    best = sum(row.best for row in update.rows)
    told = [f"{path}: {update.trainer}, update {update.step}; {len(update.rows)} rows, the first {best} are the best"]
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    told += [f"\n{rollout_text(update, number, colours=colours)}" for number in ([0] if rows is None else rows)]
    print("\n".join(told))
    return 0


def chosen_rows(update: InspectedUpdate, *, row: int | None, best: bool, worst: bool) -> list[int] | None:
    """Numbers of the rows that the options name; None where they name none."""
    count = len(update.rows)
    if not count:
        raise ValueError(f"update {update.step} has no response with a score: there is nothing to show")
    if row is not None:
        if not 0 <= row < count:
            raise ValueError(f"--row {row}: rows are numbered from 0 to {count - 1}")
        return [row]
    found = [number for number in range(count) if update.rows[number].best == best]
    if (best or worst) and not found:
        raise ValueError(f"update {update.step} keeps {'no best' if best else 'no worst'} rows")
    return found if best or worst else None


def rollout_text(update: InspectedUpdate, number: int, *, colours: bool = False) -> str:
    """A rollout as aligned text: a line for each token of the response.

    Args:
        update: what was kept.
        number: of the row.
        colours: whether signs of advantages are coloured, for a terminal.
    """
    row = update.rows[number]
    lines = [_styled(summary(row, number), BOLD, colours)]
    for label, ids in (("prompt", row.prompt), ("response", row.response)):
        text = "".join(shown(token_text(update, token)) for token in ids)
        parts = [text[start : start + 100] for start in range(0, len(text), 100)] or [""]
        lines += [
            f"{'' if place else label:<10}|{part}|" for place, part in enumerate(parts)
        ]  # spaces may be the point
    kinds = [(name, head) for name, head, _ in COLUMNS if column(row, name) is not None]
    texts = [shown(token_text(update, token), alone=True) for token in row.response]
    width = max([len("token"), *map(_width, texts)])
    head = f"{'#':>5}  {'token':<{width}}" + "".join(f"{name:>11}" for _, name in kinds)
    lines += ["", _styled(head, FAINT, colours)]
    lines += [_line(row, place, texts[place], width, kinds, colours) for place in range(len(texts))]
    return "\n".join(lines)


def _line(row: Inspected, place: int, text: str, width: int, kinds: list[tuple[str, str]], colours: bool) -> str:
    cells = []
    for name, _ in kinds:
        value = (column(row, name) or ())[place]
        cell = ("clipped" if value else "") if name == "clipped" else f"{value:.4f}"
        sign = BLUE if value > 0 else RED
        cells.append(_styled(f"{cell:>11}", sign, colours and name == "advantages" and value != 0))
    return f"{place:>5}  {text}{' ' * (width - _width(text))}{''.join(cells)}".rstrip()


def _styled(text: str, style: str, on: bool) -> str:
    return f"{style}{text}{PLAIN}" if on else text


def _width(text: str) -> int:
    """Columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
