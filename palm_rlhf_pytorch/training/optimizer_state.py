"""What an optimizer keeps of each parameter, as tensors for a checkpoint, and back; AdamW's is checked to its shapes.

Knows no file: names and tensors only.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from palm_rlhf_pytorch.training.tensor_file import check_state

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter
NUMBER = "#"  # ends the name of a state that is a plain number, kept as a tensor of no dimension


def kept_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """One parameter's state as tensors by name; None is left out.

    Raises:
        TypeError: if the optimizer keeps something else than tensors and numbers.
    """
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            kept[name] = value
        elif isinstance(value, int | float):
            kept[name + NUMBER] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
        elif value is not None:
            raise TypeError(
                f"optimizer keeps a {type(value).__name__} named {name}: only tensors and numbers are saved"
            )
    return kept


def given_state(kept: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `kept_state` made tensors of."""
    return {name.removesuffix(NUMBER): value.item() if name.endswith(NUMBER) else value for name, value in kept.items()}


def check_optimizer_state(
    optimizer: Optimizer,
    begun: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    *,
    key: Callable[[str, str], str],
    path: Path,
) -> None:
    """Refuse AdamW's state where it does not fit: fused, it reads beyond a moment smaller than its parameter.

    Args:
        optimizer: that is to take the state over; what another than AdamW keeps is not known, and passes.
        begun: the parameters that have a state, by name.
        tensors: the state, by names that `key` makes.
        key: called as key(name of a parameter, name of a moment).
        path: where it was read from, for messages.

    Raises:
        ValueError: naming what is missing, unexpected, of another shape, or not of a floating dtype.
    """
    if not is_adamw(optimizer):
        return
    expected = {
        key(name, moment): torch.zeros(()) if moment == "step" else parameter
        for name, parameter in begun.items()
        for moment in MOMENTS
    }
    check_state(expected, tensors, path=path)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path} does not fit: {name} is {tensor.dtype}, expected a floating dtype")


def is_adamw(optimizer: Optimizer) -> bool:
    """Whether it is AdamW, in accelerate's wrapper or not."""
    return isinstance(getattr(optimizer, "optimizer", optimizer), AdamW)
