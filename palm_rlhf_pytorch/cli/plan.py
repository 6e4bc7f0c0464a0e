"""`palm-rlhf plan`: memory and time that a run of `ppo` will take, told before it."""

import argparse

from palm_rlhf_pytorch.cli.ppo import add_ppo_arguments, trainer_of
from palm_rlhf_pytorch.cli.runs import sampling_of


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "plan",
        help="memory and time of a run, before it",
        description=(
            "Tell the memory and the time that a run will take, from one real piece of each phase, responses taken to"
            " be as long as they may be. Takes the options of `palm-rlhf ppo`, learns and writes nothing."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_ppo_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    trainer = trainer_of(args)
    plan = trainer.plan(args.episodes, update_timesteps=args.update_timesteps, **sampling_of(args, trainer))
    trainer.accelerator.print(plan.table())
    return 0
