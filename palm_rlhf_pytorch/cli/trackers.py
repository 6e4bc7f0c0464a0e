"""Options of commands that train: which trackers get the metrics beside the JSONL."""

import argparse
from typing import Any

from palm_rlhf_pytorch.training.trackers import PROJECT, Tracking, check_trackers


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
        ValueError: if there is no such tracker, or it is not installed.
    """
    names: list[Any] | None = getattr(args, "log_with", None)
    try:
        check_trackers(names)
    except ImportError as error:
        raise ValueError(str(error)) from error
    return None if names is None else Tracking(log_with=names, project=args.project, name=name)
