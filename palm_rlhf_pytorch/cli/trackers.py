"""Options of commands that train: which trackers get the metrics beside the JSONL."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from palm_rlhf_pytorch.training.trackers import PROJECT, Trackers, Tracking, check_trackers, tracked_accelerator


def add_tracker_arguments(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add `--log-with` and `--project`."""
    parser.add_argument(
        "--log-with", nargs="+", default=argparse.SUPPRESS, metavar="NAME",
        help="send metrics to trackers too: wandb, tensorboard, or others that accelerate knows",
    )  # fmt: skip
    parser.add_argument("--project", default=PROJECT, metavar="NAME", help="what trackers gather the run under")


def tracking_of(args: argparse.Namespace, *, name: str | None = None) -> Tracking | None:
    """What the options say, as trainers take it for `log_with`; None where they name no tracker.

    Args:
        args: parsed.
        name: of the run; None takes its folder's.

    Raises:
        ImportError: if a tracker is not installed.
        ValueError: if there is no such tracker.
    """
    names: list[Any] | None = getattr(args, "log_with", None)
    check_trackers(names)
    return None if names is None else Tracking(log_with=names, project=args.project, name=name)


def accelerator_of(args: argparse.Namespace, *, cpu: bool, **more: Any) -> Accelerator:
    """An accelerator with the trackers that the options name, for commands that train without a trainer."""
    tracking = tracking_of(args)
    return tracked_accelerator({"cpu": cpu, **more}, tracking, folder=Path.cwd() if tracking else None)[0]


def tracked(args: argparse.Namespace, accelerator: Accelerator, out: Path) -> AbstractContextManager[None]:
    """A block in which these trackers run, told of all options; what they write goes to `palm.trackers` beside palm.pt.

    Args:
        args: parsed.
        accelerator: of `accelerator_of`.
        out: the result, whose name the run has.
    """
    accelerator.project_configuration.logging_dir = str(out.with_name(f"{out.stem}.trackers").resolve())
    config = {name: value for name, value in vars(args).items() if not callable(value)}
    return Trackers(accelerator, tracking_of(args, name=out.stem)).running(config)
