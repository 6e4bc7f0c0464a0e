"""Where a model is, and in which numbers: the options `--device` and `--dtype`."""

import argparse

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--dtype`, for commands that only read a model; `DTYPES` has the values."""
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32",
        help="of the weights (float32); the others take half the memory, and float16 at most 3,115 tokens",
    )  # fmt: skip


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device`: cuda where there is one, else cpu."""
    parser.add_argument(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="cpu, cuda, cuda:1, mps; auto is cuda where there is one, else cpu",
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """The device that the arguments ask for.

    Raises:
        ValueError: if it is none that models run on, or this machine has none.
    """
    if args.device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f"--device {args.device}: no device of torch; use cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {args.device}: models do not run there; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {args.device}: torch sees {torch.cuda.device_count()} CUDA devices; use cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {args.device}: torch sees no Apple GPU; use cpu")
    return device


def training_device(args: argparse.Namespace) -> torch.device:
    """The same for a command that trains: of several GPUs the one asked for is made the present one.

    Raises:
        ValueError: see `device_of`.
    """
    device = device_of(args)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the present one
    return device
