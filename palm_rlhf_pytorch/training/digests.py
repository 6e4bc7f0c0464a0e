"""What tells tensors apart: one SHA-256 over many of them. Its bits are in checkpoints and files: they never change."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], *, told: str = "") -> str:
    """SHA-256 over texts and the bytes of tensors, in hex; to read all weights of a model takes seconds a gigabyte.

    Args:
        tensors: each with what is told of it, such as its name; "" for nothing. One is held at a time.
        told: of all of them, before the first.
    """
    found = hashlib.sha256(told.encode())
    for name, tensor in tensors:
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
