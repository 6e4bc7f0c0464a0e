"""`palm-rlhf generate`: continue a prompt with a byte-level PaLM from a checkpoint."""

import argparse

import torch
from einops import repeat

from palm_rlhf_pytorch.cli.device import add_device_argument, device_of
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue a prompt with a byte-level PaLM, as `palm-rlhf pretrain` saves it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file of the model")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="bytes to add at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy, 1 the model's own distribution")
    parser.add_argument(
        "--top-k", type=int, metavar="K", default=argparse.SUPPRESS, help="sample among the k most likely bytes"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        default=argparse.SUPPRESS,
        help="sample among the most likely bytes of this mass",
    )
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="continuations to print")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the prompt with each continuation.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is no byte-level PaLM, the prompt is empty, or a setting is out of range.
    """
    if args.num_samples < 1:
        raise ValueError(f"--num-samples {args.num_samples}: must be at least 1")
    device = device_of(args)
    palm = PaLM.from_checkpoint(args.checkpoint).to(device).eval()
    texts = sample_texts(
        palm,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=getattr(args, "top_k", None),
        top_p=getattr(args, "top_p", None),
        num_samples=args.num_samples,
        seed=args.seed,
    )
    for index, text in enumerate(texts, start=1):
        if args.num_samples > 1:
            print(f"--- sample {index} of {args.num_samples}")
        print(printable(text))
    return 0


def printable(text: str) -> str:
    """The text with control characters, which a model may write and a terminal obeys, made visible; not line ends."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def sample_texts(
    palm: PaLM,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """A prompt with each of its continuations by a byte-level PaLM.

    Raises:
        ValueError: if the model's vocabulary is not the byte tokenizer's, the prompt is empty, or max_new_tokens is
            not positive.
    """
    tokenizer = ByteTokenizer()
    if palm.num_tokens != tokenizer.num_tokens:
        raise ValueError(
            f"the model has num_tokens={palm.num_tokens}, not the byte tokenizer's {tokenizer.num_tokens};"
            " train one with `palm-rlhf pretrain`"
        )
    if not prompt:
        raise ValueError("the prompt is empty; give at least one character")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    device = palm.token_emb.weight.device
    ids = tokenizer.encode(prompt).to(device)
    new = palm.generate(
        len(ids) + max_new_tokens,
        repeat(ids, "n -> b n", b=num_samples),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_token=tokenizer.eos_token,
        pad_value=tokenizer.pad_token,
        generator=torch.Generator(device).manual_seed(seed),
    )
    return [prompt + tokenizer.decode(row) for row in new]
