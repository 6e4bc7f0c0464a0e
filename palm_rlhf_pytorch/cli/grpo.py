"""`palm-rlhf grpo`: improve a PaLM by comparing its responses to one prompt, without a critic."""

import argparse
from dataclasses import replace

from palm_rlhf_pytorch.cli.runs import (
    IMPROVED,
    add_going_on_arguments,
    add_run_arguments,
    begin_run,
    common_of,
    run_trainer,
)
from palm_rlhf_pytorch.objectives.group import DAPO, DR_GRPO, GRPO, GSPO, RLOO, GroupObjective
from palm_rlhf_pytorch.policy.group_settings import GroupSettings
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer

DEFAULTS = GroupSettings()
OBJECTIVES = {"grpo": GRPO, "dr-grpo": DR_GRPO, "dapo": DAPO, "rloo": RLOO, "gspo": GSPO}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "grpo",
        help="improve a model by comparing its answers: GRPO, Dr. GRPO, DAPO, RLOO, GSPO",
        description=(
            "Improve a PaLM against a reward model without a critic: several responses to each prompt are"
            f" compared with one another. Files, and how a run stops and goes on, are as in `palm-rlhf ppo`; at the end"
            f" {IMPROVED} stands in the folder of the run."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    learning = add_run_arguments(parser, DEFAULTS)
    learning.add_argument("--objective", choices=OBJECTIVES, default="grpo", help="which of the group methods")
    learning.add_argument(
        "--group-size", type=int, default=DEFAULTS.group_size, metavar="G", help="responses to each prompt"
    )
    learning.add_argument(
        "--max-rounds", type=int, default=DEFAULTS.max_rounds, metavar="N",
        help="dynamic sampling: sample up to so many times in place of groups that teach nothing; 10 with dapo",
    )  # fmt: skip
    learning.add_argument(
        "--overlong-buffer",
        type=int,
        default=argparse.SUPPRESS,
        metavar="N",
        help="tokens before the limit over which a penalty grows to -1",
    )
    for option, meaning in (
        ("--kl-coef", "price of straying from the model, reward per nat of KL; default: the objective's own"),
        ("--kl-loss-coef", "the same as a part of the loss; default: the objective's own"),
    ):
        learning.add_argument(option, type=float, default=argparse.SUPPRESS, metavar="BETA", help=meaning)
    add_going_on_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """As `ppo.run`."""
    begin_run(args)
    trainer = GRPOTrainer(
        **common_of(args, run_dir=args.run_dir), objective=objective_of(args), group_size=args.group_size,
        max_rounds=args.max_rounds, overlong_buffer=getattr(args, "overlong_buffer", None),
    )  # fmt: skip
    return run_trainer(args, trainer)


def objective_of(args: argparse.Namespace) -> GroupObjective:
    """The objective that the options name."""
    changed = {name: getattr(args, name) for name in ("kl_coef", "kl_loss_coef") if hasattr(args, name)}
    return replace(OBJECTIVES[args.objective], **changed)
