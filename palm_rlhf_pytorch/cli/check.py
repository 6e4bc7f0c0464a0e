"""`palm-rlhf check`: proves on the user's own models, prompts and settings what a run of `ppo` rests on."""

import argparse

from palm_rlhf_pytorch.cli.ppo import add_ppo_arguments, trainer_of
from palm_rlhf_pytorch.cli.runs import sampling_of


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "check",
        help="check models, prompts and settings before a run",
        description=(
            "Check that what PPO rests on holds for these models, prompts and settings, in a second or two. Takes the"
            " options of `palm-rlhf ppo`, learns and writes nothing; exits with 1 if a check fails."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_ppo_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table of checks.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    trainer = trainer_of(args)
    report = trainer.preflight(**sampling_of(args, trainer))
    trainer.accelerator.print(report.table())
    return 0 if report.ok else 1
