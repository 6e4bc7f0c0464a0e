"""`palm-rlhf generate`: continue prompts with a model."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TextIO

import torch
from torch import Tensor

from palm_rlhf_pytorch.cli.device import DTYPES, add_device_argument, add_dtype_argument, device_of
from palm_rlhf_pytorch.cli.models import (
    PROMPTS,
    add_chat_argument,
    add_model_argument,
    load_model,
    prompt_tokenizer,
    tokenizer_name,
)
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.chats import ChatTokenizer, stop_strings
from palm_rlhf_pytorch.text.datasets import read_prompts
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, Tokenizer

STDIN = "-"
ROWS = 64  # texts that are continued in one batch
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue one prompt, or a file of them; each is printed with its continuations.",
    )
    add_model_argument(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="?",
        help=f"text to continue; {STDIN} reads it from standard input (without its last line end); an empty one"
        " begins from the tokenizer's BOS",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help=f"continue each of these instead: {PROMPTS}")
    add_chat_argument(parser)
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)"
    )
    parser.add_argument("--stream", action="store_true", help="print each text as it is written, one after the other")
    add_sampling_arguments(parser, temperature=1.0, max_new_tokens=256)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the samples (default: 0)")
    add_device_argument(parser)
    add_dtype_argument(parser)
    parser.set_defaults(run=run)


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """Add how tokens are drawn and what ends a text."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"tokens at most (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T",
        help=f"0 is greedy, 1 the model's own distribution (default: {temperature})",
    )  # fmt: skip
    parser.add_argument("--top-k", type=int, metavar="K", help="draw among the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw among the most likely tokens of this mass")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="STRING",
        help=r"end before this text, which is not printed; \n is a line end, \\ a backslash; may be given again",
    )  # fmt: skip


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments` asked for, as `PaLM.stream` takes it; without the stop strings."""
    return {
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
        "top_p": args.top_p,
    }  # fmt: skip


def stops_of(args: argparse.Namespace) -> tuple[str, ...]:
    r"""Stop strings, with \n, \t, \r and \\ as the characters they stand for."""
    return tuple(re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found[0]], text) for text in args.stop)


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuations.

    Raises:
        FileNotFoundError: if there is no such model or file of prompts.
        ValueError: if there is not one source of prompts, or a setting is out of range.
    """
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError(f"give either a PROMPT ({STDIN} for standard input) or --prompts FILE")
    if args.num_samples < 1:
        raise ValueError(f"--num-samples {args.num_samples}: must be at least 1")
    prompts = _prompts(args)
    device = device_of(args)
    palm, tokenizer = load_model(
        args.palm, device, tokenizer=tokenizer_name(args), ends=False, dtype=DTYPES[args.dtype]
    )
    options = {
        "tokenizer": tokenizer, "stop": stops_of(args), "generator": torch.Generator(device).manual_seed(args.seed),
        **sampling_of(args),
    }  # fmt: skip
    read: Sequence[str | Tensor] = prompts
    chat = prompt_tokenizer(args, tokenizer)
    if isinstance(chat, ChatTokenizer):
        read = [chat(prompt) for prompt in prompts]
        options |= {"stop": (*stop_strings(tokenizer), *stops_of(args)), "eos_token": chat.eos_token}
    heads = [
        _head(index, len(prompts), sample, args.num_samples) + prompt
        for index, prompt in enumerate(prompts)
        for sample in range(args.num_samples)
    ]
    rows = [ids for ids in read for _ in range(args.num_samples)]
    size = 1 if args.stream else ROWS
    for first in range(0, len(rows), size):
        texts: Iterable[Iterable[str]]
        if args.stream:
            texts = [palm.stream(rows[first], **options)]
        else:
            texts = ([text] for text in palm.generate_text(rows[first : first + size], **options))
        for head, text in zip(heads[first : first + size], texts, strict=True):
            _print(chain((f"{head}\n",), unindented(text)) if chat is not tokenizer else chain((head,), text))
            _print("\n")
    return 0


def printable(text: str) -> str:
    """The text with control characters, which a model may write and a terminal obeys, made visible; not line ends."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def unindented(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces of a text without the blanks that it begins with."""
    begun = False
    for piece in pieces:
        shown = piece if begun else piece.lstrip()
        begun = begun or bool(shown)
        if shown:
            yield shown


def encodable(text: str, out: TextIO) -> str:
    """The text with what the encoding of `out` does not have replaced, so that no print fails."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding, "replace")


def sample_texts(
    palm: PaLM, prompt: str, *, max_new_tokens: int, tokenizer: Tokenizer | None = None, temperature: float = 1.0,
    num_samples: int = 1, seed: int = 0,
) -> list[str]:  # fmt: skip
    """A prompt with each of its continuations; tokenizer None is the byte tokenizer.

    Raises:
        ValueError: as `PaLM.generate_text`.
    """
    texts = palm.generate_text(
        prompt, tokenizer=ByteTokenizer() if tokenizer is None else tokenizer, max_new_tokens=max_new_tokens,
        temperature=temperature, num_samples=num_samples, generator=torch.Generator(palm.device).manual_seed(seed),
    )  # fmt: skip
    return [prompt + text for text in texts]


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is not None:
        return read_prompts(args.prompts)
    return [sys.stdin.read().removesuffix("\n") if args.prompt == STDIN else args.prompt]


def _head(index: int, num_prompts: int, sample: int, num_samples: int) -> str:
    """What stands above a text where there are several."""
    names = [
        f"{name} {number + 1} of {count}"
        for name, number, count in (("prompt", index, num_prompts), ("sample", sample, num_samples))
        if count > 1
    ]
    return f"--- {', '.join(names)}\n" if names else ""


def _print(pieces: Iterable[str]) -> None:
    for piece in pieces:
        sys.stdout.write(encodable(printable(piece), sys.stdout))
        sys.stdout.flush()
