"""`palm-rlhf convert`: a checkpoint of any layout this package reads, written in its own."""

import argparse
from pathlib import Path

import torch
from torch import nn

from palm_rlhf_pytorch.cli.device import DTYPES
from palm_rlhf_pytorch.palm.hub import SUFFIXES, WEIGHTS, locate
from palm_rlhf_pytorch.palm.pretrained import PUBLISHED, layout_of, published_name
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer_files import FILE, save_tokenizer, tokenizer_of, tokenizer_path
from palm_rlhf_pytorch.training.atomic import check_target
from palm_rlhf_pytorch.training.tensor_reader import TensorReader

KINDS: dict[str, type[PaLM] | type[RewardModel] | type[RewardEnsemble]] = {
    "PaLM": PaLM, "RewardModel": RewardModel, "RewardEnsemble": RewardEnsemble,
}  # fmt: skip
NAMES = {"palm": "PaLM", "reward": "RewardModel"}
OWN_SUFFIXES = (".safetensors", ".pt")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "convert",
        help="write a checkpoint of any known layout in this package's own",
        description=(
            "Read a language model or a judge (a file, a folder or a name on the Hugging Face Hub; this package's"
            f" layout or that of the published PaLMs: {', '.join(PUBLISHED)}), say what it is, and write it in this"
            " package's layout. Runs no code from the file."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder or name on the Hub")
    parser.add_argument("out", metavar="OUT", help="a .pt or .safetensors file, else a folder as the Hub keeps models")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default=argparse.SUPPRESS, help="of the trunk's weights; else the file's"
    )  # fmt: skip
    parser.add_argument(
        "--kind", choices=list(NAMES), default=argparse.SUPPRESS, help="what SOURCE must be; else what it says it is"
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="load OUT again, and compare it to the bit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was found.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is none, or of another kind, or OUT cannot be written.
    """
    out = Path(args.out)
    _check_out(out)
    weights = locate(args.source).weights
    folder = Path(args.source).is_dir() or weights.name == WEIGHTS
    tokenizer = tokenizer_path(weights.parent if folder else weights)
    layout = layout_of(TensorReader(weights))
    kind = layout.kind or NAMES[getattr(args, "kind", "palm")]
    if NAMES.get(getattr(args, "kind", ""), kind) != kind:
        raise ValueError(f"{args.source} holds a {kind}, not a {NAMES[args.kind]} (--kind {args.kind})")
    if kind not in KINDS:
        raise ValueError(f"{args.source} holds a {kind}, which is no model; known are {', '.join(KINDS)}")
    model = KINDS[kind].from_pretrained(weights, dtype=DTYPES.get(getattr(args, "dtype", "")))
    print(f"found    {kind}, layout of {layout.name}: {weights}")
    print(f"         {_described(model)}")
    if tokenizer.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        _save_tokenizer(model, tokenizer, out)
    _save(model, out)
    print(f"written  {out}{'' if out.is_file() else ' (folder)'}")
    if args.check:
        _check_same(model, KINDS[kind].from_pretrained(out), out)
        print("checked  read again, it is the same to the bit")
    return 0


def _check_out(out: Path) -> None:
    """Raise before anything is loaded where nothing can be written."""
    if out.suffix in OWN_SUFFIXES:
        check_target(out)
    elif out.suffix in SUFFIXES:
        raise ValueError(f"OUT ({out}) must end in {' or '.join(OWN_SUFFIXES)}, or name a folder")
    elif out.exists() and not out.is_dir():
        raise ValueError(f"OUT ({out}) is a file; name a folder, or a file ending in {' or '.join(OWN_SUFFIXES)}")


def _save(model: PaLM | RewardModel | RewardEnsemble, out: Path) -> None:
    to_file = out.suffix in OWN_SUFFIXES
    if isinstance(model, PaLM):
        scopes = bool(model.finetune_modules)
        (model.save if to_file else model.save_pretrained)(out, with_scopes=scopes)
    else:
        (model.save if to_file else model.save_pretrained)(out)


def _save_tokenizer(model: PaLM | RewardModel | RewardEnsemble, path: Path, out: Path) -> None:
    """The tokenizer saved with SOURCE goes with the model."""
    palm = model if isinstance(model, PaLM) else model.palm
    beside = path.parent if path.name == FILE else path.with_name(path.name.replace(".tokenizer.json", ".pt"))
    if out.suffix not in OWN_SUFFIXES:
        out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer_of(beside, num_tokens=palm.num_tokens), out)
    print(f"         with its tokenizer {path}")


def _described(model: PaLM | RewardModel | RewardEnsemble) -> str:
    """Sizes, parameters and dtype, and which public checkpoint has them."""
    palm = model if isinstance(model, PaLM) else model.palm
    config = palm.config
    sizes = ", ".join(f"{name} {config[name]:,}" for name in ("num_tokens", "dim", "depth", "heads", "dim_head"))
    count = sum(parameter.numel() for parameter in model.parameters())
    scopes = f", scopes {', '.join(palm.finetune_modules)}" if palm.finetune_modules else ""
    known = published_name(config)
    dtype = str(palm.token_emb.weight.dtype).removeprefix("torch.")
    return f"{sizes}{scopes}; {count:,} parameters, {dtype}" + (f"; the sizes of {known}" if known else "")


def _check_same(model: nn.Module, again: nn.Module, out: Path) -> None:
    """Raise unless two models are the same, to the bit."""
    first, second = model.state_dict(), again.state_dict()
    differing = [name for name in first.keys() | second.keys() if name not in first or name not in second]
    differing += [name for name in first.keys() & second.keys() if not _identical(first[name], second[name])]
    if differing:
        raise ValueError(f"{out} is not what was written: {', '.join(sorted(differing)[:5])} differ")


def _identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """To the bit: a nan is itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
