"""`palm-rlhf reward`: a reward model from what people said, a report of how well it follows them, and what to ask next.

`palm-rlhf reward DATA...` trains and reports; `palm-rlhf reward ask PAIRS` lists the pairs most worth a person's time.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.cli.config import config_beside, save_config
from palm_rlhf_pytorch.cli.device import add_device_argument, training_device
from palm_rlhf_pytorch.cli.models import (
    add_chat_argument,
    add_tokenizer_argument,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.cli.outcomes import left_as_found
from palm_rlhf_pytorch.cli.reward_ask import ON_BAD_RECORD, add_ask_options
from palm_rlhf_pytorch.cli.text_runs import check_run_folder, metrics_path, run_folder
from palm_rlhf_pytorch.cli.trackers import accelerator_of, add_tracker_arguments, tracked
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.agreement import annotator_weights, measure_agreement, merge_annotators
from palm_rlhf_pytorch.reward.assessment import assess
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, bootstrap
from palm_rlhf_pytorch.reward.labels import EncodedLabels
from palm_rlhf_pytorch.reward.learning import RewardTraining, train_reward_model
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.report import RewardReport
from palm_rlhf_pytorch.text.chats import ChatTokenizer
from palm_rlhf_pytorch.text.datasets import Labels, read_labels, split_by_group
from palm_rlhf_pytorch.text.records import Label, Pair
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer
from palm_rlhf_pytorch.training.atomic import replacing
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.plots import reliability_plot
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import clear, strangers

Judge = RewardModel | RewardEnsemble


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command, its options, and `ask`, which has options of its own."""
    parser = subparsers.add_parser(
        "reward",
        help="train a reward model on what people said, and report how well it follows them",
        usage="palm-rlhf reward DATA [DATA ...] --palm PALM [options]\n       palm-rlhf reward ask PAIRS --reward-model"
        " FILE [options]",
        description=(
            "Train a reward model on pairs, rankings, ratings and thumbs, in any mix, and judge it on groups"
            " of them that are held out. The report is printed, and written beside the model."
        ),
        epilog="`palm-rlhf reward ask --help` is about the pairs to ask a person about next.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", nargs="+", metavar="DATA", help="labels: .jsonl, .json, .csv or .tsv, also with .gz")
    parser.add_argument(
        "--palm",
        required=True,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="model: a file, a folder, or a Hub name",
    )
    add_tokenizer_argument(parser)
    parser.add_argument("--out", type=Path, default=Path("reward_model.pt"), metavar="FILE", help="the reward model")
    _add_options(parser)
    asking = argparse.ArgumentParser(
        prog="palm-rlhf reward ask",
        description=(
            "List the pairs of responses whose judgement would teach an ensemble of reward models most: those that its"
            " members are sure of in opposite ways. A person writes a, b or tie for `choice`; then they are labels."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_ask_options(asking)
    parser.parse_known_args = partial(_parse, parser.parse_known_args, asking)  # type: ignore[method-assign]
    parser.set_defaults(run=run)


def _parse(
    train: Callable[..., Any], asking: argparse.ArgumentParser, args: Sequence[str] | None = None, *others: Any
) -> Any:
    """Arguments that begin with `ask` are its own, others those of training; a file of that name is `./ask`."""
    if args and args[0] == "ask":
        return asking.parse_known_args(list(args[1:]), *others)
    return train(args, *others)


def _add_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("the model")
    model.add_argument("--bins", type=int, default=0, metavar="N", help="ratings are N bins; 0 for plain numbers")
    model.add_argument("--label-offset", type=int, default=0, metavar="N", help="the lowest bin")
    model.add_argument("--lora-r", type=int, default=8, metavar="R", help="rank of the adapter")
    model.add_argument("--whole-trunk", action="store_true", help="train a copy of all weights, not an adapter")
    model.add_argument("--members", type=int, default=1, metavar="N", help="reward models of an ensemble, on one trunk")
    labels = parser.add_argument_group("labels")
    add_reading_arguments(labels)
    add_chat_argument(labels)
    labels.add_argument("--held-out", type=float, default=0.1, metavar="SHARE", help="of the groups, to judge by")
    labels.add_argument(
        "--max-length", type=int, default=1024, metavar="N", help="tokens; longer prompts lose the start"
    )
    labels.add_argument(
        "--weigh-annotators", action="store_true", help="who agrees more with the others counts for more"
    )
    learning = parser.add_argument_group("learning")
    learning.add_argument("--epochs", type=int, default=2, metavar="N", help="passes over the labels, at most")
    learning.add_argument("--lr", type=float, default=1e-3, help="peak learning rate; 1e-3 suits dim 128")
    learning.add_argument("--batch-tokens", type=int, default=8192, metavar="N", help="tokens of a batch")
    learning.add_argument("--centering", type=float, default=0.0, metavar="C", help="pull of pairs' scores to mean 0")
    learning.add_argument(
        "--patience", type=int, default=4, metavar="N", help="evaluations, four an epoch, without a better one"
    )
    learning.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random")
    learning.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS, help="go on where the same command was interrupted"
    )
    add_tracker_arguments(parser)
    add_device_argument(parser)


def add_reading_arguments(labels: "argparse._ArgumentGroup") -> None:
    """Add the options of `read`."""
    labels.add_argument(
        "--on-bad-record", choices=tuple(ON_BAD_RECORD), default="stop", help="what a row that cannot be read does"
    )
    labels.add_argument(
        "--column", action="append", metavar="NAME=NEW", default=argparse.SUPPRESS,
        help="a column's new name, sentence=text; NAME= leaves it out; may be given again",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Read, train, report, save.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    device = training_device(args)
    palm, tokenizer = load_model(args.palm, tokenizer=tokenizer_name(args))
    accelerator = accelerator_of(args, cpu=device.type == "cpu")
    say = accelerator.print
    with Ranks(accelerator).together():  # all look before one of them writes
        folders = _folders(args)
    labels = read(args)
    say(labels.summary())
    train, held_out = split_by_group(labels.records, held_out=args.held_out, seed=args.seed)
    weights = annotator_weights(train) if args.weigh_annotators else None
    train, held_out = merge_annotators(train, weights=weights), merge_annotators(held_out)
    say(f"{len(train):,} labels to learn from, {len(held_out):,} held out, whole groups of them")
    judge = _new_judge(palm.to(accelerator.device), args)
    members = judge.models if isinstance(judge, RewardEnsemble) else [judge]
    names = _names(args)
    with left_as_found(accelerator, [metrics_path(name) for name in names], [config_beside(args.out)]):
        if accelerator.is_main_process:
            save_config(args, config_beside(args.out))
        for number, (member, folder, name) in enumerate(zip(members, folders, names, strict=True)):
            own = train if len(members) == 1 else bootstrap(train, seed=args.seed + number)
            asking = prompt_tokenizer(args, tokenizer)
            with tracked(args, accelerator, name):
                found = _train(member, own, held_out, args, asking, folder, number, accelerator)
            if found.stopped is not None:
                say(f"stopped by {found.stopped}, with all state saved: the same command with --resume goes on")
                return 0
            say(_told(found, number if len(members) > 1 else None))
    if accelerator.is_main_process:
        save_tokenizer(tokenizer, args.out)
        _finish(judge, found, labels, args, folders)
    return 0


def _finish(judge: Judge, found: RewardTraining, labels: Labels, args: argparse.Namespace, folders: list[Path]) -> None:
    """Save the judge, judge it on what was held out, and clear the run's checkpoints away."""
    judge.save(args.out)
    assert found.held_out is not None, "split_by_group leaves no side empty"
    notes = [f"{len(found.held_out.labels):,} held-out labels of {', '.join(Path(path).name for path in args.data)}"]
    notes += [f"{len(labels.bad):,} bad records left out"] if labels.bad else []
    agreement = measure_agreement(labels.records)
    report = assess(judge, found.held_out, max_tokens_per_batch=args.batch_tokens, agreement=agreement, notes=notes)
    _write_report(report, args.out)
    for folder in folders:
        clear(Checkpoints(folder))
    with suppress(OSError):  # it is not empty
        folders[0].parent.rmdir()
    print(f"saved {args.out}")


def read(args: argparse.Namespace) -> Labels:
    """The labels of `args.data`, read as the options say; a ValueError if they cannot be."""
    given = getattr(args, "column", [])
    for text in given:
        if not text.partition("=")[0] or "=" not in text:
            raise ValueError(f"--column {text}: write NAME=NEW, or NAME= to leave it out")
    columns = {text.partition("=")[0]: text.partition("=")[2] or None for text in given}
    return read_labels(args.data, on_bad_record=ON_BAD_RECORD[args.on_bad_record], columns=columns)


def _folders(args: argparse.Namespace) -> list[Path]:
    """A folder for each member's checkpoints; a wrong path is refused here, before the work."""
    parent = run_folder(args.out)
    if args.members < 1:
        raise ValueError(f"--members {args.members}: must be at least 1")
    folders = [parent / f"member-{number}" for number in range(args.members)]
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    foreign = [path for path in found if path not in folders] + [path for own in folders for path in strangers(own)]
    check_run_folder(args, parent, foreign=foreign, begun=bool(found))
    return folders


def _names(args: argparse.Namespace) -> list[Path]:
    """What the files of each member are called after: --out, with a number where there are several."""
    if args.members == 1:
        return [args.out]
    return [args.out.with_stem(f"{args.out.stem}.{number}") for number in range(args.members)]


def _new_judge(palm: PaLM, args: argparse.Namespace) -> Judge:
    settings = {
        "num_binned_output": args.bins, "label_offset": args.label_offset, "lora_r": args.lora_r,
        "use_lora": not args.whole_trunk,
    }  # fmt: skip
    if args.members > 1:
        return RewardEnsemble.of(palm, args.members, seed=args.seed, **settings)
    torch.manual_seed(args.seed)
    return RewardModel(palm, **settings)


def _train(
    member: RewardModel, train: Sequence[Label], held_out: Sequence[Label], args: argparse.Namespace,
    tokenizer: Tokenizer | ChatTokenizer, folder: Path, number: int, accelerator: Accelerator,
) -> RewardTraining:  # fmt: skip
    """Train one member; its metrics go beside the model."""
    resume, path = hasattr(args, "resume"), metrics_path(_names(args)[number])
    if not resume and accelerator.is_main_process:
        path.unlink(missing_ok=True)  # of an earlier run that wrote the same model
    return train_reward_model(
        member, train, tokenizer, eos_token=tokenizer.eos_token, held_out=held_out, epochs=args.epochs, lr=args.lr,
        max_length=args.max_length, max_tokens_per_batch=args.batch_tokens, centering=args.centering,
        patience=args.patience, seed=args.seed + number, run_dir=folder, resume=resume, accelerator=accelerator,
        metrics=MetricsLog(path, accelerator=accelerator),
        description="reward model" if args.members == 1 else f"member {number + 1} of {args.members}",
    )  # fmt: skip


def _told(found: RewardTraining, number: int | None) -> str:
    """A run in a line or two."""
    lines = [] if number is None else [f"member {number + 1}:"]
    assert found.held_out is not None, "the command always holds labels out"
    lines += _cuts(found.train, found.held_out)
    accuracy = found.metrics.get("eval/accuracy")
    lines.append(
        f"  best after {found.best_step:,} of {found.num_steps:,} steps: held-out loss {found.metrics['eval/loss']:.4f}"
        + (" with its margins" if any(_has_margin(label) for label in found.held_out.labels) else "")
        + ("" if accuracy is None else f", accuracy {accuracy:.3f}")
    )
    return "\n".join(lines)


def _has_margin(label: Label) -> bool:
    return isinstance(label, Pair) and bool(label.margin)


def _cuts(*parts: EncodedLabels) -> list[str]:
    """What was cut off, and left out; a line each, none where there is nothing to say."""
    told = (
        ("texts lost the beginning of their prompt (--max-length)", sum(part.cut_prompts for part in parts)),
        (
            "responses are longer than --max-length: cut, without their prompt",
            sum(part.cut_responses for part in parts),
        ),
        ("labels have no weight and are left out", sum(part.weightless for part in parts)),
    )
    return [f"  {count:,} {what}" for what, count in told if count]


def _write_report(report: RewardReport, out: Path) -> None:
    """Print it, and write it beside the model: .json, .md, and a plot where there are pairs."""
    print(report.table())
    plot = out.with_name(f"{out.stem}.reliability.png")
    plot.unlink(missing_ok=True)  # of an earlier run
    if report.pairs is not None:
        try:
            reliability_plot(report.pairs.bins, plot, title=f"{out.name} on held-out pairs")
        except ImportError as error:
            print(f"no reliability plot: {error}")
    shown = f"\n![reliability]({plot.name})\n" if plot.exists() else ""
    texts = {"json": report.to_json() + "\n", "md": f"# {out.name}\n\n```\n{report.table()}\n```\n{shown}"}
    for suffix, text in texts.items():
        path = out.with_name(f"{out.stem}.report.{suffix}")
        with replacing(path) as file:
            file.write(text.encode())
        print(f"report: {path}")
    if plot.exists():
        print(f"report: {plot}")
