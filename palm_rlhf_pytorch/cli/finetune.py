"""`palm-rlhf finetune`: a PaLM learns to answer as dialogues do."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from palm_rlhf_pytorch.cli.config import config_beside, save_config
from palm_rlhf_pytorch.cli.models import add_tokenizer_argument, load_model, tokenizer_name
from palm_rlhf_pytorch.cli.text_runs import (
    accelerator_of,
    add_bad_record_argument,
    add_learning_arguments,
    begin,
    beginning,
    finish,
    loop_of,
    say_bad,
    size_of,
    told_of_bad_records,
)
from palm_rlhf_pytorch.cli.trackers import tracked
from palm_rlhf_pytorch.palm.finetuning import finetune, pack_dialogues, samples_of
from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.text_training import Samples
from palm_rlhf_pytorch.text.datasets import BadRecord, split_by_group
from palm_rlhf_pytorch.text.demonstrations import Demonstration, Demonstrations, read_demonstrations
from palm_rlhf_pytorch.text.packing import Packed


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "finetune",
        help="train a PaLM on dialogues: to answer as the assistant in them",
        description=(
            "Train a PaLM on what the assistant says in dialogues: rows with `messages` (role and content),"
            " `conversations` (from and value), `prompt` and `completion` or `response`, or `text` written out"
            " (Human:, Assistant:). Prompts are read, not learnt. It is judged on dialogues that are held out."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("dialogues", nargs="+", metavar="DIALOGUES", help=".jsonl, .json, .csv or .tsv, also with .gz")
    parser.add_argument(
        "--palm", required=True, metavar="PALM", default=argparse.SUPPRESS,
        help="the model to begin from: a file, a folder, or a name on the Hugging Face Hub",
    )  # fmt: skip
    add_tokenizer_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("finetuned.pt"), metavar="FILE", help="the model; its metrics go beside it"
    )
    text = parser.add_argument_group("dialogues")
    text.add_argument("--length", type=int, default=1024, metavar="N", help="tokens of a row; longer dialogues are cut")
    text.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of a batch, in each process")
    text.add_argument("--epochs", type=int, default=1, metavar="N", help="passes over the dialogues")
    text.add_argument("--no-packing", action="store_true", help="give each dialogue a row of its own")
    text.add_argument(
        "--held-out", type=float, default=0.05, metavar="SHARE",
        help="of the dialogues' groups, not trained on; 0 for none",
    )  # fmt: skip
    text.add_argument(
        "--validation", nargs="+", metavar="DIALOGUES", default=argparse.SUPPRESS,
        help="judge by these files instead, and train on all of the others",
    )  # fmt: skip
    add_bad_record_argument(text)
    parser.add_argument(
        "--lora-r", type=int, metavar="R", default=argparse.SUPPRESS,
        help="train an adapter of this rank, and merge it in the end; by default all weights are trained",
    )  # fmt: skip
    add_learning_arguments(
        parser, lr=1e-4, lr_meaning="1e-3 suits dim 128, 1e-4 some 100M parameters or an adapter, 1e-5 billions"
    )
    parser.set_defaults(run=run, weight_decay=0.0)


def run(args: argparse.Namespace) -> int:
    """Read, train, judge, sample, save.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not what it should be, or an option is out of range.
    """
    accelerator = accelerator_of(args)
    begin(args, accelerator)
    torch.manual_seed(args.seed)
    palm, tokenizer = load_model(args.palm, "cpu", tokenizer=tokenizer_name(args))
    check_length(args.length, palm.max_length, name="length")
    say, bad = accelerator.print, list[BadRecord]()
    train, held_out = _split(args, bad)
    say_bad(say, [str(record) for record in bad], "rows")
    palm.to(accelerator.device)
    options = {"length": args.length, "packing": not args.no_packing}
    packed = pack_dialogues(train, tokenizer, **options)
    held = pack_dialogues(held_out, tokenizer, **options) if held_out else None
    say(f"to train on: {_packing(packed, args.length)}")
    say(f"held out: {'nothing' if held is None else _packing(held, args.length)}")
    say(f"{size_of(palm, accelerator)}; {args.epochs:,} epochs, {args.batch_size:,} rows of {args.length:,} a batch")
    samples = Samples([], tokenizer)
    if args.samples:
        samples = samples_of(
            held_out or train, tokenizer, count=args.samples, length=args.length, max_new_tokens=args.sample_tokens
        )
    with beginning(args, accelerator):
        loop = loop_of(args, accelerator, samples)
        if accelerator.is_main_process:
            save_config(args, config_beside(args.out))
        with tracked(args, accelerator, args.out):
            found = finetune(
                palm, packed, tokenizer, held_out=held or (), length=args.length, batch_size=args.batch_size,
                epochs=args.epochs, lora_r=getattr(args, "lora_r", None), seed=args.seed, loop=loop,
            )  # fmt: skip
    return finish(args, accelerator, palm, tokenizer, found)


def _split(args: argparse.Namespace, bad: list[BadRecord]) -> tuple[Sequence[Demonstration], Sequence[Demonstration]]:
    """Dialogues to train on, and dialogues to judge by."""

    def read(paths: Sequence[str]) -> Demonstrations:
        return read_demonstrations(paths, on_bad_record=told_of_bad_records(bad, args.on_bad_record))

    dialogues = read(args.dialogues).records
    if hasattr(args, "validation"):
        return dialogues, read(args.validation).records
    if args.held_out == 0:
        return dialogues, ()
    return split_by_group(dialogues, held_out=args.held_out, seed=args.seed)


def _packing(packed: Packed, length: int) -> str:
    """What became of dialogues, in a line."""
    told = (
        f"{len(packed.examples):,} dialogues in {len(packed.rows):,} rows, {packed.num_tokens:,} tokens,"
        f" {packed.num_targets:,} of them to be learnt"
    )
    if packed.cut:
        told += f"; {packed.cut:,} longer than {length:,} lost their ends, {packed.cut_tokens:,} tokens"
    return told + (f"; {packed.dropped:,} had nothing to learn from" if packed.dropped else "")
