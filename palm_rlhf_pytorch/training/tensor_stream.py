"""Tensors as a safetensors file (https://github.com/huggingface/safetensors), written a tensor at a time.

The library wants all of them in memory at once, on the CPU, and hides the disk's errors; reading is left to it.
Knows no files' names and no checksums.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from palm_rlhf_pytorch.training.manifest import CheckpointError
from palm_rlhf_pytorch.training.tensor_file import _stored

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def chunks_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of the file in pieces: the header, then each tensor, copied to the CPU when its turn comes.

    Tensors that share a storage are written one by one.

    Raises:
        TypeError: as `check_tensor` does.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # the widest first: all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield len(encoded).to_bytes(8, "little") + encoded
    for name in order:
        yield _stored(tensors[name], name).reshape(-1).view(torch.uint8).numpy().data


def check_tensor(tensor: Any, where: str) -> None:
    """Refuse what the format cannot hold.

    Raises:
        TypeError: if it is no dense tensor of a known dtype, naming where.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        raise TypeError(f"{where} ({tensor.dtype}, {tensor.layout}, {tensor.device}) does not fit the format")


def read_copies(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; safetensors compares the header with the file's size before it gives one out.

    Raises:
        CheckpointError: if it is no such file.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            # copies: what get_tensor gives is the file itself in memory, and would change with it
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (safetensors.SafetensorError, RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
        raise CheckpointError(f"{path} is no safetensors file as this package writes them ({error})") from error
