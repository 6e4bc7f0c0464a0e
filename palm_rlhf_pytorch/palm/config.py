"""What a PaLM can be built as: its constructor's arguments checked, and compared with those of a checkpoint.

Pure functions of plain values. Knows no module and no file format.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "num_tokens", "dim", "depth", "causal", "dim_head", "heads", "ff_mult", "attn_dropout", "ff_dropout", "qk_rmsnorm",
    "qk_scale", "lora_r", "rotary_xpos_scale_base", "flash_attn", "cross_entropy_ignore_index",
)  # fmt: skip
SIZES = ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "lora_r")  # counts, at least 1
SHAPING = ("num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "qk_rmsnorm")  # which tensors there are
BEHAVIOUR = ("causal", "qk_scale", "rotary_xpos_scale_base")  # the same tensors, another function


def checked_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of PaLM from which the same model can be built again, refused where none can.

    Args:
        arguments: of the constructor, by name; others among them are left out.

    Raises:
        ValueError: if a size is not positive, dim_head is odd, a dropout is outside [0, 1), or a scale is not positive.
    """
    config = {name: arguments[name] for name in ARGUMENTS}
    for name in SIZES:
        if config[name] < 1:
            raise ValueError(f"{name} ({config[name]}) must be at least 1")
    if config["dim_head"] % 2:
        raise ValueError(f"dim_head ({config['dim_head']}) must be even: rotary positions turn features in pairs")
    for name in ("attn_dropout", "ff_dropout"):
        check_dropout(config[name], name=name)
    if not 0 < config["qk_scale"] < float("inf"):
        raise ValueError(f"qk_scale ({config['qk_scale']}) must be above 0, and finite")
    base = config["rotary_xpos_scale_base"]
    if base is not None and base < 1:
        raise ValueError(f"rotary_xpos_scale_base ({base}) must be at least 1, or None for no decay")
    return config


def check_dropout(dropout: float, *, name: str) -> None:
    """Raise a ValueError unless the probability is in [0, 1)."""
    if not 0 <= dropout < 1:
        raise ValueError(f"{name} ({dropout}) is a probability: it must be at least 0 and below 1")


def compare_configs(own: Mapping[str, Any], found: Mapping[str, Any], *, path: str | Path) -> None:
    """Compare the arguments that a model and a file's model were built with, as far as the file holds any.

    Equal tensors do not make equal models: other heads, or another decay, turn the same weights into another function.

    Raises:
        ValueError: if sizes differ, naming them.

    Warns:
        UserWarning: if the model computes another function with the file's weights (causal or not, say). That can be
            meant, so it is no error.
    """
    differing = {name: (found[name], own[name]) for name in own if name in found and found[name] != own[name]}
    listed = ", ".join(f"{name}: file {file!r}, model {model!r}" for name, (file, model) in differing.items())
    if any(name in differing for name in SHAPING):
        raise ValueError(f"{path} is of another model ({listed}); build the model as the file's was")
    if any(name in differing for name in BEHAVIOUR):
        warnings.warn(f"{path} was saved by a model of another behaviour ({listed})", stacklevel=3)
