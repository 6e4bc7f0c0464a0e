"""`palm-rlhf dpo`: improve a PaLM straight from preferences, without a reward model and without sampling."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.cli.config import CONFIG, save_config
from palm_rlhf_pytorch.cli.device import add_device_argument, training_device
from palm_rlhf_pytorch.cli.models import (
    add_chat_argument,
    add_model_argument,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.cli.outcomes import left_as_found
from palm_rlhf_pytorch.cli.reward import add_reading_arguments, read
from palm_rlhf_pytorch.cli.trackers import add_tracker_arguments, tracking_of
from palm_rlhf_pytorch.objectives.direct import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    with_nll,
)
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.direct import DirectTrainer
from palm_rlhf_pytorch.policy.direct_records import sorted_out
from palm_rlhf_pytorch.policy.direct_settings import DirectSettings
from palm_rlhf_pytorch.policy.dpo import DPOTrainer
from palm_rlhf_pytorch.policy.kto import KTOTrainer
from palm_rlhf_pytorch.policy.preflight import PreflightError
from palm_rlhf_pytorch.text.chats import ChatTokenizer
from palm_rlhf_pytorch.text.datasets import split_by_group
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Vote
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer, tokenizer_path
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.checkpoint import Checkpoints

DEFAULTS = DirectSettings()
IMPROVED = "improved_palm.pt"
# each takes --beta under the name `beta`, and says in its own defaults what suits it
LOSSES: dict[str, Callable[..., Any]] = {
    "dpo": dpo_loss,
    "cdpo": partial(dpo_loss, label_smoothing=0.1),
    "robust": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "length-normalised": length_normalised_dpo_loss,
    "simpo": simpo_loss,
}
KTO = "kto"
FLIPPED = {"cdpo": "label_smoothing", "robust": "flip_rate"}  # what --flip-rate is called
HEADLINE = (("loss", "eval/loss"), ("accuracy", "eval/accuracy"), ("margin of rewards", "eval/margin"))


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "dpo",
        help="improve a model straight from preferences",
        description=(
            "Improve a PaLM straight from pairs (or votes) in files: DPO and its kin. What a run needs to go"
            f" on stands in its folder; at the end so does the improved model, {IMPROVED}. Ctrl-C and SIGTERM save"
            " before they stop."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_model_argument(parser)
    parser.add_argument(
        "--data", required=True, nargs="+", type=Path, metavar="FILE", default=argparse.SUPPRESS,
        help="JSON lines, a JSON array, CSV or TSV, plain or .gz: prompt/chosen/rejected and the like",
    )  # fmt: skip
    parser.add_argument("--run-dir", type=Path, default=Path("palm-run"), metavar="DIR", help="folder of the run")
    _add_loss_arguments(parser.add_argument_group("loss"))
    _add_learning_arguments(parser.add_argument_group("learning"))
    records = parser.add_argument_group("records")
    add_reading_arguments(records)
    add_chat_argument(records)
    for option, meaning in (
        ("--resume", "go on with the run that --run-dir holds; begin one if it holds none"),
        ("--no-preflight", "leave out the checks before the first step"),
    ):
        parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=meaning)  # shows no default
    add_tracker_arguments(parser)
    add_device_argument(parser)
    parser.set_defaults(run=run)


def _add_loss_arguments(loss: "argparse._ArgumentGroup") -> None:
    loss.add_argument("--loss", choices=[*LOSSES, KTO], default="dpo", help="what is minimised; kto learns from votes")
    hidden: dict[str, Any] = {"type": float, "default": argparse.SUPPRESS}
    loss.add_argument(
        "--beta", metavar="BETA", help="price of straying; by default 0.1, length-normalised 5, simpo 2", **hidden
    )
    loss.add_argument("--gamma", metavar="GAMMA", help="simpo's margin; by default 1", **hidden)
    loss.add_argument("--flip-rate", metavar="E", help="share of wrong labels (cdpo, robust); by default 0.1", **hidden)
    loss.add_argument("--nll", type=float, default=0.0, metavar="COEF", help="weight of the preferred texts' own loss")


def _add_learning_arguments(learning: "argparse._ArgumentGroup") -> None:
    learning.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over all records")
    learning.add_argument(
        "--lr", type=float, default=DEFAULTS.lr, metavar="LR",
        help="peak learning rate; 1e-3 suits dim 64, 3e-4 dim 128, 1e-4 dim 512",
    )  # fmt: skip
    learning.add_argument("--lora-r", type=int, default=DEFAULTS.lora_r, metavar="R", help="rank of the adapter")
    learning.add_argument(
        "--minibatch-size", type=int, default=DEFAULTS.minibatch_size, metavar="N", help="records in an optimizer step"
    )
    learning.add_argument(
        "--max-batch-tokens", type=int, default=DEFAULTS.max_batch_tokens, metavar="N", help="tokens in one pass"
    )
    learning.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens of prompt and response")
    learning.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="share of the groups to look at only; 0: none",
    )
    learning.add_argument(
        "--save-every", type=int, default=DEFAULTS.save_every, metavar="N", help="steps between two checkpoints"
    )
    learning.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")


def run(args: argparse.Namespace) -> int:
    """Train, save, say what changed; 2 if a check before the run fails, once it is said which and why.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, the folder holds a run already, an option is out of range, or
            training had to stop.
    """
    out, resume = args.run_dir / IMPROVED, hasattr(args, "resume")
    check_target(out)
    if not resume and Checkpoints(args.run_dir / "checkpoints").steps():
        raise ValueError(f"--run-dir {args.run_dir} holds a run already: --resume goes on with it; or name another")
    labels = read(args)
    kinds = (Vote, Pair, Ranking) if args.loss == "kto" else (Pair, Ranking)
    records, others = sorted_out(labels.records, kinds)
    if not records:
        raise ValueError(f"--data holds no record that --loss {args.loss} learns from: {labels.summary()}")
    palm, tokenizer = load_model(args.palm, tokenizer=tokenizer_name(args))
    train, held_out = records, list[Label]()
    if args.held_out:
        train, held_out = split_by_group(records, held_out=args.held_out, seed=args.seed)
    trainer = trainer_of(args, palm, prompt_tokenizer(args, tokenizer), train, held_out)
    say = trainer.accelerator.print
    say(labels.summary())
    if others:
        say(f"{others:,} records of other kinds are left out: --loss {args.loss} does not learn from them")
    say(f"{len(train):,} records to learn from, {len(held_out):,} held out; {trainer.cuts}")
    begin = {"num_epochs": args.epochs, "resume": "auto" if resume else None}
    trainer.check_call(**begin)
    return _learn(args, trainer, tokenizer, begin, with_held_out=bool(held_out))


def _learn(
    args: argparse.Namespace, trainer: DirectTrainer, tokenizer: Tokenizer, begin: dict[str, Any], *,
    with_held_out: bool,
) -> int:  # fmt: skip
    """Train as `begin` says, and save; the command's exit code."""
    out, say = args.run_dir / IMPROVED, trainer.accelerator.print
    files = {"metrics": [args.run_dir / "metrics.jsonl"], "others": [args.run_dir / CONFIG, tokenizer_path(out)]}
    before = trainer.evaluate() if with_held_out else {}
    try:
        with left_as_found(trainer.accelerator, **files):
            if trainer.accelerator.is_main_process:
                save_config(args, args.run_dir / CONFIG)
                save_tokenizer(tokenizer, out)
            trainer.train(**begin, preflight=not hasattr(args, "no_preflight"))
    except PreflightError as error:  # a list, which one line would make unreadable
        print(f"palm-rlhf dpo: error: {error}", file=sys.stderr)
        return 2
    if trainer.stopped is not None:
        say(f"stopped by {trainer.stopped}, saved in {args.run_dir}; the same command with --resume goes on from there")
        return 0
    after = trainer.evaluate() if with_held_out else {}
    improved = trainer.export_palm()
    if trainer.accelerator.is_main_process:
        improved.save(out)
        if with_held_out:
            say(changes(before, after))
        say(f"saved {out}, metrics in {args.run_dir / 'metrics.jsonl'}")
    return 0


def trainer_of(
    args: argparse.Namespace, palm: PaLM, tokenizer: Tokenizer | ChatTokenizer, train: Sequence[Label],
    held_out: Sequence[Label],
) -> DirectTrainer:  # fmt: skip
    """The trainer that the options describe.

    Raises:
        ValueError: if an option is out of range or of another loss.
    """
    device = training_device(args)
    common: dict[str, Any] = {
        "palm": palm, "tokenizer": tokenizer, "eos_token": tokenizer.eos_token,
        "held_out": held_out or None, "max_length": args.max_length,
        "seed": args.seed, "run_dir": args.run_dir, "accelerate_kwargs": {"cpu": device.type == "cpu"}, "lr": args.lr,
        "log_with": tracking_of(args),
        "lora_r": args.lora_r, "minibatch_size": args.minibatch_size, "max_batch_tokens": args.max_batch_tokens,
        "save_every": args.save_every,
    }  # fmt: skip
    numbers = loss_numbers(args)
    if args.loss == KTO:
        return KTOTrainer(votes=train, **numbers, **common)
    loss: Any = partial(LOSSES[args.loss], **numbers)
    if args.nll:
        loss = partial(with_nll, loss=loss, coef=args.nll)
    return DPOTrainer(pairs=train, loss=loss, **common)


def loss_numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers given for the loss, under its own names.

    Raises:
        ValueError: if one is given that the loss does not have.
    """
    numbers: dict[str, Any] = {"beta": args.beta} if hasattr(args, "beta") else {}
    given = {"--gamma": hasattr(args, "gamma"), "--flip-rate": hasattr(args, "flip_rate"), "--nll": args.nll != 0}
    takes = {"--gamma": args.loss == "simpo", "--flip-rate": args.loss in FLIPPED, "--nll": args.loss != KTO}
    for option in given:
        if given[option] and not takes[option]:
            raise ValueError(f"{option} is no number of --loss {args.loss}: leave it out, or choose another loss")
    if given["--gamma"]:
        numbers["gamma"] = args.gamma
    if given["--flip-rate"]:
        numbers[FLIPPED[args.loss]] = args.flip_rate
    return numbers


def changes(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """A small table of the held-out records before and after."""
    head = f"{'held-out records':<42}{'before':>9}{'after':>9}"
    rows = [f"{label:<42}{before[name]:>9.3f}{after[name]:>9.3f}" for label, name in HEADLINE if name in after]
    return "\n".join([head, *rows])
