"""`palm-rlhf evaluate`: two PaLMs on the same prompts, compared by judges, side by side."""

import argparse
import html
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.cli.generate import printable
from palm_rlhf_pytorch.cli.models import (
    PROMPTS,
    add_chat_argument,
    add_tokenizer_argument,
    check_same,
    load_judge_for,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.cli.pretrain import bits_per_byte
from palm_rlhf_pytorch.policy.comparison import Contest
from palm_rlhf_pytorch.policy.evaluation import Evaluation, Side, evaluate
from palm_rlhf_pytorch.text.datasets import read_prompts, read_texts
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.atomic import check_target, replacing
from palm_rlhf_pytorch.training.page import document, write_page

FIGURES, SAMPLES, PAGE = "evaluation.json", "samples.jsonl", "report.html"
TEXT_WINDOW = 256  # tokens a model sees at once in --text: what `palm-rlhf pretrain` trains on
COLUMN = 48  # characters of one side in the terminal

STYLE = """
:root { --ahead: #eef7ee; }
@media (prefers-color-scheme: dark) { :root { --ahead: #1d2b22; } }
.wide { margin: 16px 0; } .samples { width: 100%; table-layout: fixed; }
pre { white-space: pre-wrap; margin: 0; font-size: 13px; line-height: 1.4; }
.prompt { color: var(--muted); } .note { color: var(--muted); font-size: 13px; } .ahead { background: var(--ahead); }
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "evaluate",
        help="compare two models by judges, on the same prompts",
        description=(
            "Sample from two PaLMs, on the same prompts and with the same random numbers, and compare: win"
            " rate of B over A by each judge with a 95 % interval over prompts, scores, KL between the two, lengths,"
            " diversity, and samples side by side."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help=f"model {name}: a file, a folder, or a name on the Hub")
    add_tokenizer_argument(parser)
    for option, meaning in (
        (
            "--prompts",
            PROMPTS,
        ),
        ("--judge", "file of a reward model, as `palm-rlhf reward` writes it; may be given several times"),
    ):
        action = "append" if option == "--judge" else "store"
        parser.add_argument(
            option, required=True, metavar="FILE", default=argparse.SUPPRESS, action=action, help=meaning
        )
    add_chat_argument(parser)
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="responses of each model to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens of a response at most")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling; 0 is greedy")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples")
    parser.add_argument(
        "--show", type=int, default=3, metavar="N",
        help="samples to show of each kind: first prompts, B most ahead, B most behind (by the first judge)",
    )  # fmt: skip
    for option, metavar, meaning in (
        ("--text", "FILE", "UTF-8 text on which to measure bits per byte of both models: what alignment has cost"),
        ("--out", "DIR", f"folder for {FIGURES}, {SAMPLES} (all responses) and {PAGE}, a page to read"),
    ):
        parser.add_argument(option, type=Path, metavar=metavar, default=argparse.SUPPRESS, help=meaning)
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sample, judge, compare, print, write.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    device = device_of(args)
    out: Path | None = getattr(args, "out", None)
    if args.show < 0:
        raise ValueError(f"--show {args.show}: must be 0 or more")
    if out is not None:
        check_folder(out)
    prompts, tokenizer_option = read_prompts(args.prompts), tokenizer_name(args)
    loaded = [load_model(path, device, tokenizer=tokenizer_option) for path in (args.a, args.b)]
    (a, tokenizer), (b, other) = loaded
    check_same(other, tokenizer, name=f"the model {args.b}", other_name=f"the model {args.a}")
    text = text_of(args, tokenizer)
    judges = {
        name: load_judge_for(path, a, tokenizer, palm_name=args.a) for name, path in judge_names(args.judge).items()
    }
    for judge in judges.values():
        judge.to(device).eval()
    asking = prompt_tokenizer(args, tokenizer)
    found = evaluate(
        a.eval(), b.eval(), prompts, judges, asking, num_samples=args.samples, max_new_tokens=args.max_new_tokens,
        temperature=args.temperature, eos_token=asking.eos_token, seed=args.seed, use_tqdm=True,
    )  # fmt: skip
    if text is not None:
        bits = [bits_per_byte(model, text.ids, length=TEXT_WINDOW) * text.tokens_per_byte for model in (a, b)]
        found = replace(found, bits_per_byte=(bits[0], bits[1]))
    print(f"A {args.a}\nB {args.b}\n{len(prompts)} prompts of {args.prompts}, samples of each: {args.samples}\n")
    print(found.table())
    print("\n" + side_by_side(found, args.show))
    if out is not None:
        write_report(found, out, names=(str(args.a), str(args.b)), count=args.show)
        print(f"saved {out / FIGURES}, {out / SAMPLES} and {out / PAGE}")
    return 0


def check_folder(out: Path) -> None:
    """Raise a ValueError unless the report can be put there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    for name in (FIGURES, SAMPLES, PAGE):
        check_target(out / name)


class MeasuredText(NamedTuple):
    """Ids (n,) of a text, and how many there are to one of its UTF-8 bytes."""

    ids: torch.Tensor
    tokens_per_byte: float


def text_of(args: argparse.Namespace, tokenizer: Tokenizer) -> MeasuredText | None:
    """The text of --text, if that is given.

    Raises:
        ValueError: if there is nothing in it to predict.
    """
    path = getattr(args, "text", None)
    if path is None:
        return None
    content = read_texts([path])[0]
    ids = tokenizer.encode(content)
    if len(ids) < 2:
        raise ValueError(f"--text {path} holds less than two tokens: there is nothing to predict")
    return MeasuredText(ids, len(ids) / len(content.encode()))


def judge_names(paths: list[str]) -> dict[str, str]:
    """A name for each judge's file: its stem, or the path where stems are alike.

    Raises:
        ValueError: if a file is given twice.
    """
    stems = [Path(path).stem for path in paths]
    names = {path if stems.count(stem) > 1 else stem: path for path, stem in zip(paths, stems, strict=True)}
    if len(names) < len(paths):
        raise ValueError(f"--judge: a file is given twice ({', '.join(paths)})")
    return names


def side_by_side(found: Evaluation, count: int) -> str:
    """The chosen samples in two columns, for a terminal."""
    lines = []
    for kind, rows in found.chosen(count).items():
        lines += [f"--- {kind}"] * bool(rows)
        for row in rows:
            lines.append(f"[{printable(found.prompts[int(found.prompt_rows[row])])}]")
            columns = [_column(name, side, row) for name, side in (("A", found.a), ("B", found.b))]
            for at in range(max(map(len, columns))):
                left, right = (column[at] if at < len(column) else "" for column in columns)
                lines.append(f"{left:<{COLUMN + 4}}{right}".rstrip())
            lines.append("")
    return "\n".join(lines)


def _column(name: str, side: Side, row: int) -> list[str]:
    """A response for a terminal: what it is worth, then its text in lines of COLUMN characters."""
    text = f"{name}: {_told(side, row)}\n{printable(side.responses[row]).expandtabs(4)}"
    return [part for line in text.split("\n") for part in textwrap.wrap(line, COLUMN) or [""]]


def write_report(found: Evaluation, out: Path, *, names: tuple[str, str], count: int) -> None:
    """Write figures, all samples and the page into a folder, each file whole or not at all."""
    found.to_jsonl(out / SAMPLES)
    with replacing(out / FIGURES) as file:
        file.write((found.to_json() + "\n").encode())
    write_page(out / PAGE, page(found, names=names, count=count))


def page(found: Evaluation, *, names: tuple[str, str], count: int) -> str:
    """A page of HTML that needs nothing else: figures, and the chosen samples; what models wrote is text there."""
    body = [
        "<h1>B against A</h1>",
        *(f"<p>{label}: <code>{_text(name)}</code></p>" for label, name in zip("AB", names, strict=True)),
        f"<p class=note>{len(found.prompts)} prompts, {len(found.prompt_rows)} pairs of responses; "
        f"{_text(', '.join(f'{name} {value}' for name, value in found.sampling.items()))}. Intervals are of 95 %, over"
        " prompts; a tie is half a win.</p>",
        *_figures(found),
        *_samples(found, count),
    ]
    return document("B against A", "\n".join(body), style=STYLE)


def _figures(found: Evaluation) -> Iterator[str]:
    """Tables of the judges, then of what does not depend on them."""
    heads = ("judge", "B wins", "95 %", "score of A", "of B", "B - A", "95 %", "pairs left out", "turned by a swap")
    yield from _table(heads, {name: _cells(contest) for name, contest in found.contests.items()})
    rows = {}
    for name, figure in found.figures().items():
        gap = figure.difference
        cells = [f"{figure.a:.3f}", f"{figure.b:.3f}"]
        cells += ["", ""] if gap is None else [f"{gap.value:+.3f}", gap.interval(signed=True)]
        rows[name] = cells
    yield from _table(("", "A", "B", "B - A", "95 %"), rows)


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A table of numbers that are written out already, each row with its name."""
    first, *others = heads
    columns = "".join(f'<th scope="col" class="number">{head}</th>' for head in others)
    yield f'<div class="wide"><table><tr><th scope="col">{first}</th>{columns}</tr>'
    for name, cells in rows.items():
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        yield f'<tr><th scope="row">{_text(name)}</th>{numbers}</tr>'
    yield "</table></div>"


def _cells(contest: Contest) -> list[str]:
    scores = ["", "", "", ""]
    if contest.scores is not None and contest.difference is not None:
        scores = [f"{estimate.value:.3f}" for estimate in contest.scores]
        scores += [f"{contest.difference.value:+.3f}", contest.difference.interval(signed=True)]
    turned = "" if contest.inconsistent is None else f"{contest.inconsistent}"
    return [f"{contest.win_rate.value:.3f}", contest.win_rate.interval(), *scores, f"{contest.unscored}", turned]


def _samples(found: Evaluation, count: int) -> Iterator[str]:
    first = next(iter(found.contests.values()), None)
    for kind, rows in found.chosen(count).items():
        if not rows:
            continue
        yield f"<h2>{_text(kind)}</h2>\n<table class=samples><tr><th>A</th><th>B</th></tr>"
        for row in rows:
            prompt, ahead = (
                found.prompts[int(found.prompt_rows[row])],
                0.0 if first is None else float(first.margins[row]),
            )
            yield "<tr>"
            for side, sign in ((found.a, -1), (found.b, 1)):
                mark = " ahead" if sign * ahead > 0 else ""
                yield (
                    f'<td class="text{mark}"><pre><span class=prompt>{_text(prompt)}</span>{_text(side.responses[row])}'
                    f"</pre><p class=note>{_text(_told(side, row))}</p></td>"
                )
            yield "</tr>"
        yield "</table>"


def _told(side: Side, row: int) -> str:
    """A response's scores, length and end, in a line."""
    scores = [f"{name} {float(found[row]):.3f}" for name, found in side.scores.items()]
    return ", ".join([*scores, f"{int(side.lengths[row])} tokens{'' if side.ended[row] else ', cut'}"])


def _text(text: str) -> str:
    """Any text as HTML text: markup and control characters mean nothing in it."""
    return html.escape(printable(text))
