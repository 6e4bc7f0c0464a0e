"""What `pretrain` and `finetune` share: options of learning, the files beside the model, and how a run ends."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from tqdm import tqdm

from palm_rlhf_pytorch.cli.config import config_beside
from palm_rlhf_pytorch.cli.device import add_device_argument, training_device
from palm_rlhf_pytorch.cli.generate import printable
from palm_rlhf_pytorch.cli.outcomes import left_as_found
from palm_rlhf_pytorch.cli.trackers import accelerator_of as tracked_accelerator_of
from palm_rlhf_pytorch.cli.trackers import add_tracker_arguments
from palm_rlhf_pytorch.palm.text_training import Samples, TextLoop, TextTraining
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.datasets import BadRecord
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer, tokenizer_path
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import clear, strangers

PRECISIONS = ("float32", "bf16")
# options that count something; checked before files of an earlier run are removed
COUNTS = ("accumulate", "sample_tokens", "save_every", "batch_size", "eval_every", "patience", "epochs", "lora_r")


def add_learning_arguments(parser: argparse.ArgumentParser, *, lr: float, lr_meaning: str) -> None:
    """Add the options of a `TextLoop`, and those of precision and device."""
    learning = parser.add_argument_group("learning")
    learning.add_argument("--lr", type=float, default=lr, help=f"peak learning rate; {lr_meaning}")
    learning.add_argument("--weight-decay", type=float, default=0.1, metavar="W", help="of matrices")
    learning.add_argument(
        "--warmup-steps", type=int, metavar="N", default=argparse.SUPPRESS,
        help="steps until the peak, from which a cosine falls to a tenth; by default a tenth of all, 100 at most",
    )  # fmt: skip
    learning.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches of an optimizer step, in each process"
    )
    learning.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the products")
    learning.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")
    watching = parser.add_argument_group("watching and stopping")
    watching.add_argument(
        "--eval-every", type=int, metavar="N", default=argparse.SUPPRESS,
        help="steps between two evaluations; by default ten in all, but at least 50 steps apart",
    )  # fmt: skip
    watching.add_argument(
        "--patience", type=int, metavar="N", default=argparse.SUPPRESS,
        help="stop after so many evaluations without a better one, and keep the best weights",
    )  # fmt: skip
    watching.add_argument("--samples", type=int, default=2, metavar="N", help="prompts answered at each evaluation")
    watching.add_argument("--sample-tokens", type=int, default=80, metavar="N", help="tokens of a sample at most")
    watching.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between two checkpoints")
    watching.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS, help="go on where the same command was interrupted"
    )
    add_tracker_arguments(watching)
    add_device_argument(parser)


def accelerator_of(args: argparse.Namespace) -> Accelerator:
    """The processes, the device and the precision that the options ask for.

    Raises:
        ValueError: if there is no such device, or an option of `add_learning_arguments` is out of range.
    """
    device = training_device(args)
    if not args.lr > 0:
        raise ValueError(f"--lr {args.lr} must be above 0")
    for name in COUNTS:
        if getattr(args, name, 1) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: {name} ({getattr(args, name)}) must be at least 1"
            )
    if getattr(args, "warmup_steps", 0) < 0:
        raise ValueError(f"--warmup-steps {args.warmup_steps}: must be at least 0")
    if hasattr(args, "patience") and args.held_out == 0 and not hasattr(args, "validation"):
        raise ValueError(f"--patience {args.patience} counts evaluations, and --held-out 0 leaves nothing to judge by")
    if args.samples < 0:
        raise ValueError(f"--samples {args.samples}: must be at least 0")
    precision = {} if args.precision == "float32" else {"mixed_precision": args.precision}
    return tracked_accelerator_of(args, cpu=device.type == "cpu", **precision)


def metrics_path(out: Path) -> Path:
    """Where the metrics of a checkpoint stand: palm.metrics.jsonl beside palm.pt."""
    return out.with_name(f"{out.stem}.metrics.jsonl")


def samples_path(out: Path) -> Path:
    """Where the samples of a run stand: palm.samples.jsonl beside palm.pt."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def begin(args: argparse.Namespace, accelerator: Accelerator) -> Path:
    """The folder of a run's checkpoints; a wrong path is refused here, before the work, on all processes.

    Raises:
        ValueError: if a file cannot go where it should, or the folder holds something else, or a run that is not
            resumed.
    """
    folder = run_folder(args.out)
    with Ranks(accelerator).together():
        for path in (args.out, tokenizer_path(args.out), samples_path(args.out)):
            check_target(path)
        check_run_folder(args, folder, foreign=strangers(folder), begun=bool(Checkpoints(folder).steps()))
    return folder


def run_folder(out: Path) -> Path:
    """Where the checkpoints of a run stand: in palm.run beside palm.pt.

    Raises:
        ValueError: if no file can be put at `out`, or that is the folder itself.
    """
    check_target(out)  # before a name beside it is made
    folder = out.with_name(f"{out.stem}.run")
    check_apart(out, folder, holds="the run's checkpoints")
    return folder


def check_apart(out: Path, folder: Path, *, holds: str) -> None:
    """Raise a ValueError if the result has the name of a folder that the run makes."""
    if folder.absolute() == out.absolute():
        raise ValueError(f"--out {out}: a folder of that name is to hold {holds}; choose another name")


def check_run_folder(args: argparse.Namespace, folder: Path, *, foreign: Sequence[Path], begun: bool) -> None:
    """Refuse what stands in the way of a run, before any work.

    Args:
        args: with `out`, and `resume` where it is asked for.
        folder: of the checkpoints.
        foreign: what it holds that is not the run's.
        begun: whether it holds some of a run.

    Raises:
        ValueError: if the folder is something else or holds that, or a run that is not resumed, or there is none to
            resume.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} must be a folder, for the run's checkpoints; move it away, or choose another --out")
    if foreign:
        raise ValueError(f"{foreign[0]} is not of this run, whose checkpoints go to that folder; move it away")
    if begun and not hasattr(args, "resume"):
        raise ValueError(f"{folder} holds an interrupted run: --resume goes on with it; remove it to begin anew")
    if not begun and hasattr(args, "resume") and args.out.exists():
        raise ValueError(
            f"{args.out} is complete: --resume has nothing to go on with; leave it out to train another in its place"
        )


def beginning(args: argparse.Namespace, accelerator: Accelerator) -> AbstractContextManager[None]:
    """A block that begins to learn: where it is refused, what an earlier run wrote beside --out stays."""
    return left_as_found(
        accelerator, metrics=[metrics_path(args.out)], others=[samples_path(args.out), config_beside(args.out)]
    )


def loop_of(args: argparse.Namespace, accelerator: Accelerator, samples: Samples) -> TextLoop:
    """How the options want the model to learn; files of an earlier run that wrote the same model are removed."""
    resume = hasattr(args, "resume")
    if accelerator.is_main_process and not resume:
        for path in (metrics_path(args.out), samples_path(args.out)):
            path.unlink(missing_ok=True)
    told = replace(samples, path=samples_path(args.out), tell=_tell, seed=args.seed, max_new_tokens=args.sample_tokens)
    given = {name: getattr(args, name) for name in ("warmup_steps", "eval_every", "patience") if hasattr(args, name)}
    return TextLoop(
        lr=args.lr, weight_decay=args.weight_decay, accumulate=args.accumulate, samples=told if told.prompts else None,
        run_dir=run_folder(args.out), resume=resume, save_every=args.save_every,
        metrics=MetricsLog(metrics_path(args.out), accelerator=accelerator), accelerator=accelerator,
        description=args.command, **given,
    )  # fmt: skip


def finish(
    args: argparse.Namespace, accelerator: Accelerator, palm: PaLM, tokenizer: Tokenizer, found: TextTraining
) -> int:
    """Save the model and its tokenizer, clear the checkpoints away, and say how it went."""
    say = accelerator.print
    if found.stopped is not None:
        say(f"stopped by {found.stopped}, with all state saved: the same command with --resume goes on")
        return 0
    if accelerator.is_main_process:
        save_tokenizer(tokenizer, args.out)
        palm.save(args.out)
        clear(Checkpoints(run_folder(args.out)))
    if found.best_step < found.num_steps:
        say(f"the weights are those of step {found.best_step:,} of {found.num_steps:,}, the best evaluation")
    if "eval/bits_per_byte" in found.metrics:
        say(f"held-out bits per byte after: {found.metrics['eval/bits_per_byte']:.3f}")
    sampled = f", samples in {samples_path(args.out)}" if samples_path(args.out).exists() else ""
    say(f"saved {args.out}, metrics in {metrics_path(args.out)}{sampled}")
    return 0


def size_of(palm: PaLM, accelerator: Accelerator) -> str:
    """A model and where it is, in words."""
    count = sum(weight.numel() for weight in palm.palm_parameters())
    processes = f", {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
    return f"{count:,} parameters on {accelerator.device}{processes}"


def told_of_bad_records(bad: list[BadRecord], choice: str) -> Callable[[BadRecord], None]:
    """What `--on-bad-record` asks for: stop, or go on and list them."""
    return bad.append if choice == "skip" else stop_at_bad_record


def add_bad_record_argument(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add --on-bad-record."""
    parser.add_argument(
        "--on-bad-record", choices=("stop", "skip"), default="stop", help="what a row that cannot be read does"
    )


def say_bad(say: Callable[..., Any], messages: list[str], what: str) -> None:
    """Name the first of what was left out, and how many there are."""
    for message in messages[:5]:
        say(f"left out: {message}")
    if len(messages) > 5:
        say(f"left out: {len(messages) - 5:,} {what} more")


def stop_at_bad_record(bad: BadRecord) -> NoReturn:
    """Raise a ValueError that names file, line and field, and the option that goes on."""
    raise ValueError(f"{bad}; mend it, or leave such records out: --on-bad-record skip")


def _tell(step: int, prompt: str, sample: str) -> None:
    shown = (printable(text).replace("\n", "\\n") for text in (prompt, sample))
    tqdm.write(f"step {step:,} sample: {' >> '.join(shown)}", file=sys.stdout)
