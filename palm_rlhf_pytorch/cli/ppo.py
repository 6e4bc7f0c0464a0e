"""`palm-rlhf ppo`: improve a PaLM against a reward model, in a folder that a stopped run goes on from."""

import argparse
from pathlib import Path

from palm_rlhf_pytorch.cli.runs import (
    IMPROVED,
    add_going_on_arguments,
    add_run_arguments,
    begin_run,
    common_of,
    run_trainer,
)
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings

DEFAULTS = PPOSettings()


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "ppo",
        help="improve a model against a reward model",
        description=(
            "Improve a PaLM against a reward model with PPO. What a run needs to go on stands in its folder;"
            f" at the end so does the improved model, {IMPROVED}. Ctrl-C and SIGTERM save before they stop."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_ppo_arguments(parser)
    add_going_on_arguments(parser)
    parser.set_defaults(run=run)


def add_ppo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `ppo`, `check` and `plan` share."""
    learning = add_run_arguments(parser, DEFAULTS)
    for option, default, metavar, meaning in (
        ("--critic-lr", DEFAULTS.critic_lr, "LR", "the critic's learning rate; 1 to 3 times the policy's"),
        ("--kl-coef", DEFAULTS.kl_coef, "BETA", "price of straying from the model, reward per nat of KL"),
    ):
        learning.add_argument(option, type=float, default=default, metavar=metavar, help=meaning)
    learning.add_argument(
        "--critic-warmup", type=int, default=DEFAULTS.critic_warmup, metavar="N",
        help="updates in the beginning in which the critic alone learns",
    )  # fmt: skip
    learning.add_argument(
        "--critic-from-reward-model", action="store_true", default=argparse.SUPPRESS,
        help="start the critic as the reward model, which must be one of the same PaLM",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, save, say what changed; 2 if a check before the run fails, once it is said which and why.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, the folder holds a run already, an option is out of range, or
            training had to stop: scores or gradients were not finite.
    """
    begin_run(args)
    return run_trainer(args, trainer_of(args, run_dir=args.run_dir))


def trainer_of(args: argparse.Namespace, *, run_dir: Path | None = None) -> RLHFTrainer:
    """The trainer that the options describe; see `common_of`."""
    return RLHFTrainer(
        **common_of(args, run_dir=run_dir), critic_lr=args.critic_lr, kl_coef=args.kl_coef, critic_lora_r=args.lora_r,
        critic_warmup=args.critic_warmup, critic_from_reward_model=hasattr(args, "critic_from_reward_model"),
    )  # fmt: skip
