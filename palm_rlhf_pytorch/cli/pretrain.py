"""`palm-rlhf pretrain`: train a byte-level PaLM on the user's own UTF-8 files."""

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf_pytorch.cli.config import config_beside, save_config
from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.cli.generate import printable, sample_texts
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.datasets import TokenStream, read_texts
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.saves import Saves, clear, strangers
from palm_rlhf_pytorch.training.supervised import fit

PROMPT_BYTES = 32
SAMPLE_BYTES = 200
NUM_EVALUATIONS = 10
EVAL_EVERY = 50  # at least; an evaluation costs as much as some ten steps


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a byte-level PaLM on text files",
        description="Train a byte-level PaLM on UTF-8 text files, and judge it on the end of each, which is held out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="UTF-8 text file")
    parser.add_argument("--out", type=Path, default=Path("palm.pt"), help="checkpoint; its metrics go beside it")
    parser.add_argument("--dim", type=int, default=128, help="features of a token")
    parser.add_argument("--depth", type=int, default=4, help="layers")
    parser.add_argument("--heads", type=int, default=4, help="query heads")
    parser.add_argument("--dim-head", type=int, default=32, help="features of a head, even")
    parser.add_argument("--length", type=int, default=256, help="bytes the model sees at once")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of a step")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the windows and the sample")
    parser.add_argument("--held-out", type=float, default=0.05, help="share of each file that is not trained on")
    parser.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between two checkpoints")
    parser.add_argument(
        "--resume", action="store_true", default=argparse.SUPPRESS, help="go on where the same command was interrupted"
    )
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, train, judge, sample, save.

    Raises:
        FileNotFoundError: if a text is missing.
        ValueError: if a text is not UTF-8, there is too little of it, or an option is out of range.
    """
    device = device_of(args)
    if args.steps < 1 or not args.lr > 0:
        raise ValueError(f"--steps {args.steps} must be at least 1, and --lr {args.lr} above 0")
    texts = read_texts(args.texts)
    for path, text in zip(args.texts, texts, strict=True):
        if not text:
            raise ValueError(f"{path} is empty: leave it out")
    train, held_out = held_out_tails(texts, args.held_out)
    stream = TokenStream(train, length=args.length, batch_size=args.batch_size, seed=args.seed)
    metrics, saves = _files_beside(args, stream)
    save_config(args, config_beside(args.out))
    palm = _new_palm(args).to(device)
    num_parameters = sum(parameter.numel() for parameter in palm.parameters())
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out; {num_parameters:,} parameters on {device}")

    def evaluate() -> dict[str, float]:
        bits = bits_per_byte(palm, held_out, length=args.length, batch_size=args.batch_size)
        return {"eval/loss": bits * math.log(2), "eval/bits_per_byte": bits}

    print(f"held-out bits per byte before: {evaluate()['eval/bits_per_byte']:.3f}")
    final = fit(
        palm,
        ({**batch, "return_loss": True} for batch in stream),
        num_steps=args.steps,
        lr=args.lr,
        weight_decay=0.1,
        warmup_steps=min(100, args.steps // 10),
        evaluate=evaluate,
        eval_every=max(EVAL_EVERY, args.steps // NUM_EVALUATIONS),
        metrics=metrics,
        description="pretrain",
        saves=saves,
    )
    if saves.stopped is not None:
        print(f"stopped by {saves.stopped}, with all state saved: the same command with --resume goes on")
        return 0
    palm.save(args.out)
    clear(saves.checkpoints)
    print(f"held-out bits per byte after: {final['eval/bits_per_byte']:.3f}")
    prompt = ByteTokenizer().decode(held_out[:PROMPT_BYTES])
    sample = sample_texts(palm, prompt, max_new_tokens=SAMPLE_BYTES, seed=args.seed)[0]
    print(f"sample: {printable(sample)}")
    print(f"saved {args.out}, metrics in {metrics_path(args.out)}")
    return 0


def _files_beside(args: argparse.Namespace, stream: TokenStream) -> tuple[MetricsLog, Saves]:
    """Metrics and checkpoints of the run; a wrong path is refused here, before the work."""
    check_target(args.out)
    resume, path, folder = hasattr(args, "resume"), metrics_path(args.out), args.out.with_name(f"{args.out.stem}.run")
    if args.save_every < 1:
        raise ValueError(f"--save-every {args.save_every}: must be at least 1")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} must be a folder, for the run's checkpoints; move it away, or choose another --out")
    checkpoints = Checkpoints(folder, keep_last=1)
    foreign = strangers(folder)
    if foreign:
        raise ValueError(f"{foreign[0]} is not of this run, whose checkpoints go to that folder; move it away")
    if checkpoints.steps() and not resume:
        raise ValueError(f"{folder} holds an interrupted run: --resume goes on with it; remove it to begin anew")
    if not resume:
        path.unlink(missing_ok=True)  # of an earlier run that wrote the same checkpoint
    return MetricsLog(path), Saves(checkpoints, every=args.save_every, resume=resume, data=data_digest(stream))


def data_digest(stream: TokenStream) -> str:
    """SHA-256 over what decides the batches of a stream: its tokens, and how windows are drawn from them."""
    digest = hashlib.sha256(json.dumps([stream.seed, stream.length, stream.batch_size]).encode())
    digest.update(stream.tokens.astype("<i8").data)
    return digest.hexdigest()


def metrics_path(out: Path) -> Path:
    """Where the metrics of a checkpoint stand: palm.metrics.jsonl beside palm.pt."""
    return out.with_name(f"{out.stem}.metrics.jsonl")


def _new_palm(args: argparse.Namespace) -> PaLM:
    torch.manual_seed(args.seed)
    return PaLM(
        num_tokens=ByteTokenizer.num_tokens,
        dim=args.dim,
        depth=args.depth,
        heads=args.heads,
        dim_head=args.dim_head,
    )


def held_out_tails(texts: Sequence[str], held_out: float) -> tuple[Tensor, Tensor]:
    """Byte ids of the texts, each ended by eos_token: all but the end of each (n,), and these ends (m,).

    Raises:
        ValueError: if held_out is not between 0 and 1, or so little text is given that nothing is held out.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out ({held_out}) must lie between 0 and 1")
    encoded = [ByteTokenizer().encode(text, eos=True) for text in texts]
    cuts = [round(len(ids) * (1 - held_out)) for ids in encoded]
    train = torch.cat([ids[:cut] for ids, cut in zip(encoded, cuts, strict=True)])
    tails = torch.cat([ids[cut:] for ids, cut in zip(encoded, cuts, strict=True)])
    if len(tails) < 2:
        raise ValueError(
            f"held_out ({held_out}) of {len(train) + len(tails)} bytes leaves nothing to judge by; add text"
        )
    return train, tails


@torch.no_grad()
def bits_per_byte(palm: PaLM, tokens: Tensor, *, length: int, batch_size: int = 16, max_windows: int = 256) -> float:
    """Mean loss of a byte-level model over a text, in bits for each byte predicted.

    Windows follow one another, each beginning with the last token of the one before; of more than max_windows, that
    many are taken at even distances. A last window that would be shorter is left out.

    Args:
        palm: the model; its mode is left as it was.
        tokens: ids of the text, (n,), at least two.
        length: tokens of a window, at least two.
        batch_size: windows at once.
        max_windows: windows at most.

    Raises:
        ValueError: if length or the number of tokens is below two.
    """
    if length < 2 or len(tokens) < 2:
        raise ValueError(f"length ({length}) and the number of tokens ({len(tokens)}) must be at least 2")
    length = min(length, len(tokens))
    windows = tokens.unfold(0, length, length - 1)
    windows = windows[torch.linspace(0, len(windows) - 1, min(len(windows), max_windows)).round().long()]
    was_training = palm.training
    palm.eval()
    try:
        device = palm.token_emb.weight.device
        total = sum(float(palm(batch.to(device), return_loss=True)) * len(batch) for batch in windows.split(batch_size))
    finally:
        palm.train(was_training)
    return total / len(windows) / math.log(2)
