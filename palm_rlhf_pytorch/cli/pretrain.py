"""`palm-rlhf pretrain`: train a PaLM on the user's own text, from its first step or from another model."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.cli.config import config_beside, save_config
from palm_rlhf_pytorch.cli.models import load_model
from palm_rlhf_pytorch.cli.text_runs import (
    accelerator_of,
    add_bad_record_argument,
    add_learning_arguments,
    begin,
    beginning,
    check_apart,
    finish,
    loop_of,
    metrics_path,
    say_bad,
    size_of,
    told_of_bad_records,
)
from palm_rlhf_pytorch.cli.trackers import tracked
from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.pretraining import bits_per_byte, held_out_windows, pretrain
from palm_rlhf_pytorch.palm.text_training import Samples, TextLoss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.corpus import Corpus, open_or_write
from palm_rlhf_pytorch.text.datasets import BadRecord
from palm_rlhf_pytorch.text.excerpts import Excerpt, split_corpus, whole_corpus
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import load_tokenizer
from palm_rlhf_pytorch.training.ranks import Ranks

__all__ = ["add_parser", "bits_per_byte", "metrics_path", "run"]

PROMPT_TOKENS = 32
SHAPE = {"dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "ff_mult": 4}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a PaLM on text files",
        description=(
            "Train a PaLM on UTF-8 text: files, and folders of them (.txt, .md, source code ..., .jsonl with a column"
            " `text`, all also with .gz). It is judged on the end of each file, which is held out. Text is tokenised"
            " once, into a folder beside the model, and read from there: it may be larger than memory."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="text file, or folder of text files")
    parser.add_argument(
        "--out", type=Path, default=Path("palm.pt"), metavar="FILE", help="the model; what belongs to it goes beside"
    )
    _add_text_arguments(parser)
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--from", dest="begin_from", metavar="PALM", default=argparse.SUPPRESS,
        help="go on from this model: a file, a folder, or a name on the Hugging Face Hub",
    )  # fmt: skip
    model.add_argument(
        "--tokenizer", metavar="NAME_OR_PATH", default=argparse.SUPPRESS,
        help="bytes, a tokenizer.json, a folder, or a name on the Hugging Face Hub; by default --from's, or bytes",
    )  # fmt: skip
    for name, meaning in (
        ("dim", "features of a token"),
        ("depth", "layers"),
        ("heads", "query heads"),
        ("dim_head", "features of a head, even"),
        ("ff_mult", "features of the feedforward, in dims"),
    ):
        model.add_argument(f"--{name.replace('_', '-')}", type=int, default=SHAPE[name], metavar="N", help=meaning)
    model.add_argument("--dropout", type=float, default=0.0, metavar="P", help="probability, while training")
    add_learning_arguments(parser, lr=3e-3, lr_meaning="3e-3 suits dim 128, 3e-4 some 100M parameters")
    parser.set_defaults(run=run)


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("text")
    text.add_argument("--length", type=int, default=256, metavar="N", help="tokens the model sees at once")
    text.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows of a batch, in each process")
    text.add_argument("--steps", type=int, default=1000, metavar="N", help="optimizer steps")
    text.add_argument("--held-out", type=float, default=0.05, metavar="SHARE", help="of each file, not trained on")
    text.add_argument(
        "--validation", nargs="+", metavar="TEXT", default=argparse.SUPPRESS,
        help="judge by these files or folders instead, and train on all of the others",
    )  # fmt: skip
    text.add_argument("--column", default="text", metavar="NAME", help="of .jsonl rows, holds the text")
    add_bad_record_argument(text)
    text.add_argument(
        "--tokens", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="folder of the tokenised text, used again while files and tokenizer stay as they are; by default beside"
        " --out (palm.tokens)",
    )  # fmt: skip
    text.add_argument("--join-documents", action="store_true", help="let a document see those before it in its window")


def run(args: argparse.Namespace) -> int:
    """Read, train, judge, sample, save.

    Raises:
        FileNotFoundError: if a text is missing.
        ValueError: if a text is not UTF-8, there is too little of it, or an option is out of range.
    """
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    accelerator = accelerator_of(args)
    begin(args, accelerator)
    folder = getattr(args, "tokens", args.out.with_name(f"{args.out.stem}.tokens"))
    check_apart(args.out, folder, holds="the tokenised text")
    palm, tokenizer = _model(args)
    check_length(args.length, palm.max_length, name="length")
    train, held_out = _texts(args, tokenizer, folder, accelerator)
    palm.to(accelerator.device)
    tokens = args.steps * args.accumulate * args.batch_size * args.length * accelerator.num_processes
    accelerator.print(
        f"{len(train):,} tokens to train on, {len(held_out):,} held out; {size_of(palm, accelerator)}; {args.steps:,}"
        f" steps of {tokens // args.steps:,} tokens go over the text {tokens / len(train):.1f} times"
    )
    documents = not args.join_documents
    judged = held_out_windows(held_out, tokenizer, length=args.length, batch_size=args.batch_size, documents=documents)
    before = judged.evaluate(TextLoss(palm), accelerator=accelerator)["eval/bits_per_byte"]
    accelerator.print(f"held-out bits per byte before: {before:.3f}")
    prompts = _prompts(held_out, args.samples)
    with beginning(args, accelerator):
        loop = loop_of(args, accelerator, Samples(prompts, tokenizer, end_token=tokenizer.eos_token))
        if accelerator.is_main_process:
            save_config(args, config_beside(args.out))
        with tracked(args, accelerator, args.out):
            found = pretrain(
                palm, train, tokenizer, num_steps=args.steps, held_out=held_out, length=args.length,
                batch_size=args.batch_size, documents=documents, seed=args.seed, loop=loop,
            )  # fmt: skip
    return finish(args, accelerator, palm, tokenizer, found)


def _model(args: argparse.Namespace) -> tuple[PaLM, Tokenizer]:
    """The model to begin from, on the CPU, and its tokenizer."""
    named = getattr(args, "tokenizer", None)
    torch.manual_seed(args.seed)
    if hasattr(args, "begin_from"):
        for name, usual in SHAPE.items():
            if getattr(args, name) != usual:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(args, name)}: the model of --from has its shape already"
                )
        palm, tokenizer = load_model(args.begin_from, "cpu", tokenizer=named)
        palm.set_dropout(args.dropout)
        return palm, tokenizer
    tokenizer = load_tokenizer(named or "bytes")
    if tokenizer.eos_token is None:
        raise ValueError(f"--tokenizer {named}: it has no token that ends a text (eos_token); name one in its folder")
    shape = {name: getattr(args, name) for name in SHAPE}
    return PaLM(num_tokens=tokenizer.num_tokens, attn_dropout=args.dropout, ff_dropout=args.dropout, **shape), tokenizer


def _texts(
    args: argparse.Namespace, tokenizer: Tokenizer, folder: Path, accelerator: Accelerator
) -> tuple[Excerpt, Excerpt]:
    """Tokens to train on, and tokens to judge by."""
    corpus = _corpus(args, args.texts, tokenizer, folder, accelerator)
    if not hasattr(args, "validation"):
        return split_corpus(corpus, args.held_out)
    judged_by = folder.with_name(f"{folder.name}.validation")
    return whole_corpus(corpus), whole_corpus(_corpus(args, args.validation, tokenizer, judged_by, accelerator))


def _corpus(
    args: argparse.Namespace, texts: list[str], tokenizer: Tokenizer, folder: Path, accelerator: Accelerator
) -> Corpus:
    """The main process tokenises what is not tokenised yet; all read it."""
    bad: list[BadRecord] = []
    with Ranks(accelerator).together():
        if accelerator.is_main_process:
            open_or_write(
                texts, tokenizer, folder, column=args.column, on_bad_record=told_of_bad_records(bad, args.on_bad_record)
            )
    corpus = Corpus.open(folder)
    say_bad(accelerator.print, [*corpus.left_out, *map(str, bad)], "files and rows")
    return corpus


def _prompts(held_out: Excerpt, count: int) -> list[torch.Tensor]:
    """Beginnings to continue, at even distances in the held-out text, none across documents."""
    length = min(PROMPT_TOKENS, len(held_out) - 1)
    places = torch.linspace(0, len(held_out) - length, count).long().tolist() if length > 0 else []
    prompts = []
    for place in places:
        ids, begins = held_out.read(place, length)
        end = int(begins[1:].argmax()) + 1 if begins[1:].any() else length
        prompts.append(torch.from_numpy(ids[:end]))
    return prompts
