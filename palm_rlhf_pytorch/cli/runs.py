"""What the commands that sample and learn share: `ppo` and `grpo`, and `check` and `plan` before them.

Options of a run, the models they name, and the run itself in a folder that a stopped one goes on from.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.cli.config import CONFIG, save_config
from palm_rlhf_pytorch.cli.device import add_device_argument, training_device
from palm_rlhf_pytorch.cli.models import (
    PROMPTS,
    add_chat_argument,
    add_model_argument,
    load_judge_for,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.cli.outcomes import left_as_found
from palm_rlhf_pytorch.cli.trackers import add_tracker_arguments, tracking_of
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.preflight import PreflightError
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.watch import WatchSettings
from palm_rlhf_pytorch.text.chats import ChatTokenizer
from palm_rlhf_pytorch.text.datasets import read_texts
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer, tokenizer_path
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.metrics import read_metrics

IMPROVED = "improved_palm.pt"
METRICS = "metrics.jsonl"  # where the trainer writes them in its run_dir
HEADLINE = (
    ("reward-model score", "reward/score"),
    ("held-out judge's score", "reward/held_out_score"),
    ("KL to the reference (nats per response)", "objective/kl"),
    ("response length (tokens)", "response/length_mean"),
    ("EOS rate", "response/eos_rate"),
)


def add_run_arguments(parser: argparse.ArgumentParser, defaults: PolicySettings) -> "argparse._ArgumentGroup":
    """Add the options that describe a run; gives the group of those that shape learning, for what a method adds."""
    add_model_argument(parser)
    for option, meaning in (
        ("--reward-model", "file of the judge, as `palm-rlhf reward` and `palm-rlhf demo` write it"),
        (
            "--prompts",
            PROMPTS,
        ),
    ):
        parser.add_argument(option, required=True, metavar="FILE", default=argparse.SUPPRESS, help=meaning)
    add_chat_argument(parser)
    parser.add_argument(
        "--held-out-judge",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a second reward model, whose scores are logged and never learnt from",
    )
    parser.add_argument(
        "--pretraining",
        nargs="+",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="UTF-8 text that the model is to go on knowing; see --ptx-coef",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("palm-run"), metavar="DIR", help="folder of the run")
    counts = parser.add_argument_group("size of the run")
    counts.add_argument("--episodes", type=int, default=4096, metavar="N", help="responses to learn from")
    counts.add_argument("--update-timesteps", type=int, default=64, metavar="N", help="responses between two updates")
    counts.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens of a response at most")
    counts.add_argument("--max-seq-len", type=int, default=2048, metavar="N", help="tokens of prompt and response")
    counts.add_argument(
        "--save-every", type=int, default=defaults.save_every, metavar="N", help="updates between saves"
    )
    learning = parser.add_argument_group("learning")
    _add_learning_arguments(learning, defaults)
    add_tracker_arguments(parser)
    add_device_argument(parser)
    return learning


def _add_learning_arguments(learning: "argparse._ArgumentGroup", defaults: PolicySettings) -> None:
    learning.add_argument(
        "--actor-lr", "--lr", type=float, default=defaults.actor_lr, metavar="LR",
        help="the policy's peak learning rate; 1e-3 suits dim 64, 3e-4 dim 128, 1e-4 dim 512",
    )  # fmt: skip
    learning.add_argument("--epochs", type=int, default=defaults.epochs, metavar="N", help="passes over each rollout")
    learning.add_argument(
        "--minibatch-size",
        type=int,
        default=defaults.minibatch_size,
        metavar="N",
        help="responses in an optimizer step",
    )
    learning.add_argument("--lora-r", type=int, default=defaults.actor_lora_r, metavar="R", help="rank of adapters")
    for option, kind, metavar, meaning in (
        (
            "--max-approx-kl",
            float,
            "KL",
            "end an update's learning once the policy has moved so far, nats a token; 0.02 is usual, the default none",
        ),
        ("--ptx-coef", float, "W", "weight of a language-modelling loss on --pretraining, mixed into each step"),
        ("--top-k", int, "K", "sample from the K likeliest tokens alone, and learn that policy"),
        ("--top-p", float, "P", "the same with the likeliest tokens of probability P"),
    ):
        learning.add_argument(option, type=kind, default=argparse.SUPPRESS, metavar=metavar, help=meaning)
    learning.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling, above 0")
    learning.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")


def add_going_on_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a run begins."""
    for option, meaning in (
        ("--resume", "go on with the run that --run-dir holds, by the same options; begin one if it holds none"),
        ("--watch", "end the run and go back to its best policy where the judge is being fooled; see --held-out-judge"),
        ("--no-preflight", "leave out the checks before the first step"),
    ):
        parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=meaning)  # shows no default


def common_of(args: argparse.Namespace, *, run_dir: Path | None) -> dict[str, Any]:
    """What the options say to any trainer; without run_dir it leaves no files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    device = training_device(args)
    palm, tokenizer = load_model(args.palm, tokenizer=tokenizer_name(args))
    paths = [args.reward_model, *([args.held_out_judge] if hasattr(args, "held_out_judge") else [])]
    judges = [load_judge_for(path, palm, tokenizer, palm_name=args.palm).eval() for path in paths]
    return {
        "palm": palm,
        "reward_model": judges[0],
        "held_out_judge": judges[1] if len(judges) > 1 else None,
        "prompts_path": args.prompts,
        "tokenizer": prompt_tokenizer(args, tokenizer),
        "seed": args.seed,
        "run_dir": run_dir,
        "accelerate_kwargs": {"cpu": device.type == "cpu"},
        "log_with": None if run_dir is None else tracking_of(args),
        "actor_lr": args.actor_lr,
        "epochs": args.epochs,
        "minibatch_size": args.minibatch_size,
        "actor_lora_r": args.lora_r,
        "save_every": args.save_every,
        "pretraining": text_tokens(args.pretraining, tokenizer) if hasattr(args, "pretraining") else None,
        "watch": WatchSettings() if hasattr(args, "watch") else None,
        **{
            name: getattr(args, name) for name in ("max_approx_kl", "ptx_coef", "top_k", "top_p") if hasattr(args, name)
        },
    }


def text_tokens(paths: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """Texts of files as one run of ids (n,), an end after each."""
    return torch.cat([tokenizer.encode(text, eos=True) for text in read_texts(paths)])


def begin_run(args: argparse.Namespace) -> None:
    """Refuse a folder where nothing can be written, or which holds a run that is not resumed, before any work."""
    check_target(args.run_dir / IMPROVED)
    if not hasattr(args, "resume"):
        refuse_run(args.run_dir)


def run_trainer(args: argparse.Namespace, trainer: RLHFTrainer | GRPOTrainer) -> int:
    """Train, save, say what changed; 2 if a check before the run fails, once it is said which and why.

    Raises:
        ValueError: if training had to stop: scores or gradients were not finite.
    """
    out, say = args.run_dir / IMPROVED, trainer.accelerator.print
    files = {"metrics": [args.run_dir / METRICS], "others": [args.run_dir / CONFIG, tokenizer_path(out)]}
    try:
        with left_as_found(trainer.accelerator, **files):
            if trainer.accelerator.is_main_process:
                save_config(args, args.run_dir / CONFIG)
                save_tokenizer(model_tokenizer(trainer), out)
            resume = "auto" if hasattr(args, "resume") else None
            trainer.train(
                args.episodes, update_timesteps=args.update_timesteps, resume=resume,
                preflight=not hasattr(args, "no_preflight"), **sampling_of(args, trainer),
            )  # fmt: skip
    except PreflightError as error:  # a list, which one line would make unreadable
        print(f"palm-rlhf {args.command}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the run's own fault: no traceback
        checkpoints = trainer.run.checkpoints
        kept = checkpoints is not None and checkpoints.steps()
        raise ValueError(f"{error}; {args.run_dir} keeps {'the last' if kept else 'no'} checkpoint") from error
    if trainer.stopped not in (None, "watch"):
        say(f"stopped by {trainer.stopped}, saved in {args.run_dir}; the same command with --resume goes on from there")
        return 0
    improved = trainer.export_palm()
    if trainer.accelerator.is_main_process:
        improved.save(out)
        say(changes(args.run_dir / METRICS))
        say(f"saved {out}, metrics in {args.run_dir / METRICS}")
    return 0


def sampling_of(args: argparse.Namespace, trainer: RLHFTrainer | GRPOTrainer) -> dict[str, Any]:
    """The options that say how responses are sampled, as the trainer's methods take them."""
    return {
        "max_seq_len": args.max_seq_len,
        "max_new_tokens": args.max_new_tokens,
        "eos_token": getattr(trainer.tokenizer, "eos_token", None),
        "temperature": args.temperature,
    }


def model_tokenizer(trainer: RLHFTrainer | GRPOTrainer) -> Tokenizer:
    """The tokenizer that goes with the trainer's model, --chat or not."""
    found: Any = trainer.tokenizer
    return found.tokenizer if isinstance(found, ChatTokenizer) else found


def refuse_run(run_dir: Path) -> None:
    """Raise a ValueError if a folder holds a run already, which a new one would write over."""
    if (run_dir / METRICS).exists() or any(run_dir.glob("checkpoints/step-*")):
        raise ValueError(f"--run-dir {run_dir} holds a run already: add --resume to go on with it, or name another")


def changes(path: Path) -> str:
    """A small table of the first and the last update in a metrics file; of a single one its own figures."""
    records = read_metrics(path)
    shown = {"first": records[0], "last": records[-1]} if len(records) > 1 else {"only": records[0]}
    lines = [f"{'mean over the responses of an update':<42}" + "".join(f"{name:>9}" for name in shown)]
    for label, name in HEADLINE:
        values = [record[name] for record in shown.values() if name in record]
        lines += [f"{label:<42}" + "".join(f"{value:>9.3f}" for value in values)] if values else []
    return "\n".join(lines)
