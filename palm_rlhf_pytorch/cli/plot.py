"""`palm-rlhf plot`: learning curves of runs, as a picture and as a page of HTML."""

import argparse
from pathlib import Path

from palm_rlhf_pytorch.policy.samples import Sample, read_samples
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.curves import panels_of, read_runs
from palm_rlhf_pytorch.training.page import write_page
from palm_rlhf_pytorch.training.plots import FORMATS, curves_plot
from palm_rlhf_pytorch.training.runs_page import runs_page

PAGES = (".html", ".htm")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "plot",
        help="draw learning curves of runs",
        description=(
            "Draw score, KL, length, losses, entropy and what else a run has measured, of one or several runs: as a"
            " picture, which needs matplotlib, and as one page of HTML that needs nothing and holds the best and worst"
            " responses too. Runs that are still going may be drawn."
        ),
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or a metrics file (palm.metrics.jsonl of pretrain)"
    )
    parser.add_argument(
        "--out", nargs="+", type=Path, default=argparse.SUPPRESS, metavar="FILE",
        help="what to write, by its ending: .html, or .png, .svg, .pdf (default: runs.html, and runs.png where"
        " matplotlib is installed)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME",
        help="draw these instead: names as in metrics.jsonl, or patterns: 'policy/*'",
    )  # fmt: skip
    parser.add_argument(
        "--smooth", type=float, default=0.6, metavar="W",
        help="weight of what came before in the smoothed lines, from 0 (none) to below 1 (default: 0.6)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, draw, say where.

    Raises:
        FileNotFoundError: if a run has no metrics file.
        ValueError: if a file is none of metrics, an option is out of range, or matplotlib is missing.
    """
    out = getattr(args, "out", [Path("runs.html"), Path("runs.png")])
    for path in out:
        if path.suffix.lower() not in (*PAGES, *FORMATS):
            raise ValueError(f"--out {path}: its ending must be one of {', '.join((*PAGES[:1], *FORMATS))}")
        check_target(path)
    if not 0 <= args.smooth < 1:
        raise ValueError(f"--smooth {args.smooth}: must be at least 0 and below 1")
    runs = read_runs(args.runs)
    panels = panels_of(runs, args.metrics)
    samples = {run.name: _samples(run.path) for run in runs}
    for path in out:
        if path.suffix.lower() in PAGES:
            write_page(path, runs_page(runs, panels, weight=args.smooth, samples=samples))
        else:
            try:
                curves_plot(runs, panels, path, weight=args.smooth)
            except ImportError as error:
                if not hasattr(args, "out"):  # nobody asked for the picture by name
                    print(f"no {path}: {error}")
                    continue
                raise ValueError(f"{error}; --out runs.html needs nothing") from error
        print(f"saved {path}")
    return 0


def _samples(metrics: Path) -> list[Sample]:
    """What stands beside a metrics file, if anything does."""
    path = metrics.with_name("samples.jsonl")
    return read_samples(path) if metrics.name == "metrics.jsonl" and path.is_file() else []
