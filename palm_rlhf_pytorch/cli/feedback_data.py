"""`palm-rlhf feedback import | export | stats | check`: what goes in, what comes out, and how it stands."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.text.datasets import BadRecord, read_texts, skip_bad_record

KINDS = {"pairs": 1, "ratings": 2, "rankings": 3}  # as feedback/codes.py, which is Django's side
FORMATS = ("preferences", "conversational", "unpaired", "ratings", "rankings", "judgements")
Add = Callable[..., argparse.ArgumentParser]


def stop_at_bad_record(bad: BadRecord) -> None:
    """Raise a ValueError that names file, line and field, and the option that goes on."""
    raise ValueError(f"{bad}; nothing was imported: mend it, or leave such rows out: --on-bad-record skip")


def add_data_actions(add: Add) -> None:
    """Add the commands.

    Args:
        add: makes a parser out of a name, what it runs and what it is for.
    """
    parser = add("import", run_import, "put prompts and responses into a project's queue")
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .csv, .tsv, also .gz; .txt: prompts")
    add_project(parser)
    add_settings(parser)
    parser.add_argument(
        "--on-bad-record", choices=("stop", "skip"), default="stop", help="what a row that cannot be read does"
    )
    parser = add("export", run_export, "write what people said as records that trainers read")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", default=argparse.SUPPRESS, help=".jsonl, .csv"
    )
    add_project(parser)
    parser.add_argument(
        "--format", choices=FORMATS, default=argparse.SUPPRESS, help="what was asked, unless another is named"
    )
    parser.add_argument("--ties", action="store_true", help="also tied pairs, with a column `tie`")
    parser.add_argument("--gold", action="store_true", help="also items whose answer was known")
    parser.add_argument("--round", type=int, metavar="N", default=argparse.SUPPRESS, help="of sampling; else all")
    parser = add("stats", run_stats, "figures of a project: progress, people, agreement, biases")
    add_project(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser = add("check", run_check, "look whether database, counts, secret and settings are in order")
    parser.add_argument("--behind-tls", action="store_true", help="as `serve` is run")


def add_project(parser: argparse.ArgumentParser) -> None:
    """Add --project."""
    parser.add_argument("--project", default="feedback", metavar="NAME", help="made by the first import")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what a project asks, and how often; `project_asked_for` makes it so."""
    settings = parser.add_argument_group("the project")
    settings.add_argument(
        "--kind", choices=tuple(KINDS), default=argparse.SUPPRESS,
        help="what is asked; of a new project pairs, and never changed",
    )  # fmt: skip
    for option, kind, metavar, meaning in (
        ("--required", int, "K", "people that judge each item; 1 at first"),
        ("--lease-seconds", int, "S", "time for one item until others may have it; 1800 at first"),
        ("--gold-every", int, "N", "one item in N is one whose answer is known; 10 at first, 0 never"),
        ("--instructions", Path, "TEXT", "file of what people are told"),
        ("--rules", Path, "TEXT", "file of rules, one a line, each answered yes, no or unsure"),
    ):
        settings.add_argument(option, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=meaning)


def run_import(args: argparse.Namespace) -> int:
    """Read all files, then fill the queue.

    Raises:
        FileNotFoundError, ValueError: if a file or a setting is not what it should be; nothing is imported then.
    """
    from palm_rlhf_pytorch.feedback.imports import add_items, read_items

    asked = asked_kind(args)
    on_bad_record: Any = stop_at_bad_record if args.on_bad_record == "stop" else skip_bad_record
    read = [read_items(path, asked, on_bad_record=on_bad_record) for path in args.files]
    project = project_asked_for(args)
    added = add_items(project, [item for items, _ in read for item in items])
    bad = [record for _, records in read for record in records]
    print(
        f"project {project.name}: {added.new:,} items added, {added.known:,} were there already, {len(bad):,} bad rows"
    )
    for record in bad[:20]:
        print(f"  bad: {record}")
    if len(bad) > 20:
        print(f"  and {len(bad) - 20:,} bad ones more")
    return 0


def asked_kind(args: argparse.Namespace) -> int:
    """The kind of question of the project that the options name, also where it is yet to be made."""
    from palm_rlhf_pytorch.feedback.models import Project

    there = Project.objects.filter(name=args.project).first()
    return KINDS[args.kind] if hasattr(args, "kind") else KINDS["pairs"] if there is None else int(there.kind)


def project_asked_for(args: argparse.Namespace) -> Any:
    """The project that the options name, made if need be, with the settings that they give.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a setting is not what it should be.
    """
    from palm_rlhf_pytorch.feedback.imports import make_project

    settings = {
        name: getattr(args, name) for name in ("required", "lease_seconds", "gold_every") if hasattr(args, name)
    }
    if hasattr(args, "instructions"):
        settings["instructions"] = read_texts([args.instructions])[0].strip()
    if hasattr(args, "rules"):
        lines = read_texts([args.rules])[0].split("\n")
        settings["rules"] = [line.strip() for line in lines if line.strip()]
    return make_project(args.project, KINDS[args.kind] if hasattr(args, "kind") else None, **settings)


def run_export(args: argparse.Namespace) -> int:
    """Write the records.

    Raises:
        ValueError: if there is no such project, nothing was judged, or the format does not suit.
    """
    from palm_rlhf_pytorch.feedback.exports import write

    project = project_of(args.project)
    options = {"ties": args.ties, "gold": args.gold, "round": getattr(args, "round", None)}
    number = write(project, args.out, getattr(args, "format", None), **options)
    print(f"wrote {number:,} records to {args.out}")
    return 0


def run_stats(args: argparse.Namespace) -> int:
    """Print the figures.

    Raises:
        ValueError: if there is no such project.
    """
    from palm_rlhf_pytorch.feedback.statistics import statistics

    found = statistics(project_of(args.project))
    if args.json:
        print(json.dumps(plain(dataclasses.asdict(found)), indent=2))
        return 0
    there = found.progress
    print(f"{there.judgements:,} of {there.wanted:,} judgements, {there.finished:,} of {there.items:,} items finished")
    alpha = found.agreement
    if alpha is not None:
        alphas = (("names", alpha.nominal), ("order", alpha.ordinal), ("steps", alpha.interval))
        print(f"agreement (alpha) on {alpha.items:,} shared: " + ", ".join(f"{n} {figure(a)}" for n, a in alphas))
    for label, share in (
        ("the longer response is better", found.longer),
        ("the first one shown is better", found.left),
        ("the higher-scored one is better", found.scores),
    ):
        print(f"{label}: {figure(share.share)} of {share.of:,}")
    if found.annotators:
        print(f"{'person':<20}{'judged':>8}{'skipped':>9}{'seconds':>9}{'as others':>11}{'known right':>13}")
    for one in found.annotators:
        shares = f"{figure(one.rest.share):>11}{figure(one.gold.share):>13}"
        print(f"{one.name[:19]:<20}{one.judged:>8,}{one.skipped:>9,}{figure(one.seconds):>9}{shares}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print the findings; 1 if something is wrong."""
    from palm_rlhf_pytorch.feedback.checks import findings

    found = findings()
    for one in found:
        print(f"{ {True: 'ok', None: 'note', False: 'WRONG'}[one.ok]:<7}{one.name}: {one.detail}")
    return 1 if any(one.ok is False for one in found) else 0


def project_of(name: str) -> Any:
    """The project of a name.

    Raises:
        ValueError: if there is none, naming those there are.
    """
    from palm_rlhf_pytorch.feedback.models import Project

    project = Project.objects.filter(name=name).first()
    if project is None:
        names = ", ".join(Project.objects.order_by("name").values_list("name", flat=True))
        raise ValueError(f"--project {name} is not there; " + (f"there are {names}" if names else "import one first"))
    return project


def figure(value: float | None) -> str:
    """Two digits, or a dash where there is nothing."""
    return "-" if value is None else f"{value:.2f}"


def plain(value: Any) -> Any:
    """What JSON takes: names in place of dates and numbers as keys."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
