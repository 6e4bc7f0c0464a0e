"""`palm-rlhf ppo`: improve a byte-level PaLM against a reward model, in a folder that a stopped run goes on from."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.preflight import PreflightError
from palm_rlhf_pytorch.policy.settings import PPOSettings
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.metrics import read_metrics

TOKENIZER = ByteTokenizer()
DEFAULTS = PPOSettings()
IMPROVED = "improved_palm.pt"
METRICS = "metrics.jsonl"  # where the trainer writes them in its run_dir
HEADLINE = (
    ("reward-model score", "reward/score"),
    ("KL to the reference (nats per response)", "objective/kl"),
    ("response length (bytes)", "response/length_mean"),
    ("EOS rate", "response/eos_rate"),
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "ppo",
        help="improve a model against a reward model",
        description=(
            "Improve a byte-level PaLM against a reward model with PPO. What a run needs to go on stands in its folder;"
            f" at the end so does the improved model, {IMPROVED}. Ctrl-C and SIGTERM save before they stop."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_run_arguments(parser)
    for option, meaning in (
        ("--resume", "go on with the run that --run-dir holds; begin one if it holds none"),
        ("--no-preflight", "leave out the checks before the first step"),
    ):
        parser.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=meaning)  # shows no default
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, save, say what changed; 2 if a check before the run fails, once it is said which and why.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, the folder holds a run already, an option is out of range, or
            training had to stop: scores or gradients were not finite.
    """
    out, resume = args.run_dir / IMPROVED, hasattr(args, "resume")
    check_target(out)
    if not resume:
        refuse_run(args.run_dir)
    trainer = trainer_of(args, run_dir=args.run_dir)
    say = trainer.accelerator.print
    try:
        trainer.train(
            args.episodes, update_timesteps=args.update_timesteps, resume="auto" if resume else None,
            preflight=not hasattr(args, "no_preflight"), **sampling_of(args),
        )  # fmt: skip
    except PreflightError as error:  # a list, which one line would make unreadable
        print(f"palm-rlhf ppo: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # the run's own fault: no traceback
        checkpoints = trainer.run.checkpoints
        kept = checkpoints is not None and checkpoints.steps()
        raise ValueError(f"{error}; {args.run_dir} keeps {'the last' if kept else 'no'} checkpoint") from error
    if trainer.stopped is not None:
        say(f"stopped by {trainer.stopped}, saved in {args.run_dir}; the same command with --resume goes on from there")
        return 0
    improved = trainer.export_palm()
    if trainer.accelerator.is_main_process:
        improved.save(out)
        say(changes(args.run_dir / METRICS))
        say(f"saved {out}, metrics in {args.run_dir / METRICS}")
    return 0


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a run: `ppo`, `check` and `plan` share them."""
    parser.add_argument("palm", metavar="PALM", help="file of the model, as `palm-rlhf pretrain` saves it")
    for option, meaning in (
        ("--reward-model", "file of the judge, as RewardModel.save and `palm-rlhf demo` write it"),
        ("--prompts", "UTF-8 text, one prompt a line"),
    ):
        parser.add_argument(option, required=True, metavar="FILE", default=argparse.SUPPRESS, help=meaning)
    parser.add_argument("--run-dir", type=Path, default=Path("palm-run"), metavar="DIR", help="folder of the run")
    counts = parser.add_argument_group("size of the run")
    counts.add_argument("--episodes", type=int, default=4096, metavar="N", help="responses to learn from")
    counts.add_argument("--update-timesteps", type=int, default=64, metavar="N", help="responses between two updates")
    counts.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="bytes of a response at most")
    counts.add_argument("--max-seq-len", type=int, default=2048, metavar="N", help="bytes of both, prompt and response")
    counts.add_argument(
        "--save-every", type=int, default=DEFAULTS.save_every, metavar="N", help="updates between saves"
    )
    _add_learning_arguments(parser.add_argument_group("learning"))
    add_device_argument(parser)


def _add_learning_arguments(learning: "argparse._ArgumentGroup") -> None:
    learning.add_argument(
        "--actor-lr", type=float, default=DEFAULTS.actor_lr, metavar="LR",
        help="the policy's peak learning rate; 1e-3 suits dim 64, 3e-4 dim 128, 1e-4 dim 512",
    )  # fmt: skip
    learning.add_argument(
        "--critic-lr", type=float, default=DEFAULTS.critic_lr, metavar="LR", help="the critic's; 1 to 3 times that"
    )
    learning.add_argument(
        "--kl-coef",
        type=float,
        default=DEFAULTS.kl_coef,
        metavar="BETA",
        help="price of straying from the model, reward per nat of KL",
    )
    learning.add_argument("--epochs", type=int, default=DEFAULTS.epochs, metavar="N", help="passes over each rollout")
    learning.add_argument(
        "--minibatch-size",
        type=int,
        default=DEFAULTS.minibatch_size,
        metavar="N",
        help="responses in an optimizer step",
    )
    learning.add_argument(
        "--lora-r", type=int, default=DEFAULTS.actor_lora_r, metavar="R", help="rank of both adapters, actor and critic"
    )
    learning.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling, above 0")
    learning.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")


def trainer_of(args: argparse.Namespace, *, run_dir: Path | None = None) -> RLHFTrainer:
    """The trainer that the options describe; without run_dir it leaves no files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    device = device_of(args)
    palm, reward_model = PaLM.from_checkpoint(args.palm), RewardModel.from_checkpoint(args.reward_model)
    for path, model in ((args.palm, palm), (args.reward_model, reward_model.palm)):
        if model.num_tokens != TOKENIZER.num_tokens:
            raise ValueError(
                f"{path} has num_tokens={model.num_tokens}, not the byte tokenizer's {TOKENIZER.num_tokens}; train one"
                " with `palm-rlhf pretrain`"
            )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the present one
    return RLHFTrainer(
        palm=palm,
        reward_model=reward_model.eval(),
        prompts_path=args.prompts,
        tokenizer=TOKENIZER,
        seed=args.seed,
        run_dir=run_dir,
        accelerate_kwargs={"cpu": device.type == "cpu"},
        actor_lr=args.actor_lr,
        critic_lr=args.critic_lr,
        kl_coef=args.kl_coef,
        epochs=args.epochs,
        minibatch_size=args.minibatch_size,
        actor_lora_r=args.lora_r,
        critic_lora_r=args.lora_r,
        save_every=args.save_every,
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say how responses are sampled, as the trainer's methods take them."""
    return {
        "max_seq_len": args.max_seq_len,
        "max_new_tokens": args.max_new_tokens,
        "eos_token": TOKENIZER.eos_token,
        "temperature": args.temperature,
    }


def refuse_run(run_dir: Path) -> None:
    """Raise a ValueError if a folder holds a run already, which a new one would write over."""
    if (run_dir / METRICS).exists() or any(run_dir.glob("checkpoints/step-*")):
        raise ValueError(f"--run-dir {run_dir} holds a run already: add --resume to go on with it, or name another")


def changes(path: Path) -> str:
    """A small table of the first and the last update in a metrics file."""
    records = read_metrics(path)
    first, last = records[0], records[-1]
    head = f"{'mean over the responses of an update':<42}{'first':>9}{'last':>9}"
    rows = [f"{label:<42}{first[name]:>9.3f}{last[name]:>9.3f}" for label, name in HEADLINE]
    return "\n".join([head, *rows])
