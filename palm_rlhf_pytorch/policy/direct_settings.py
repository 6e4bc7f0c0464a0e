"""Settings of the trainers that learn straight from texts: each described, checked, and with its default's reason."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import partial
from typing import Any

from palm_rlhf_pytorch.typecheck import typecheck


@typecheck
@dataclass(frozen=True, kw_only=True)
class DirectSettings:
    """The keywords that trainers take beside models and examples.

    Attributes:
        lr: learning rate at the peak. 1e-4 suits adapters and dim 256 to 512, 1e-3 dim 64; 1e-6 a model of 1B
            parameters trained whole.
        weight_decay: of matrices.
        warmup: share of the steps until the peak; the rate then falls to 10 % along a cosine.
        max_norm: the gradient's norm is clipped to it; None for no clipping.
        lora: train a low-rank adapter on the frozen trunk; False trains a copy of the weights.
        lora_r: rank of the adapter.
        lora_alpha: its scale is alpha / r; None means r.
        last_layers: train only so many layers, counted from the output; None all.
        minibatch_size: examples in an optimizer step, over all processes.
        max_batch_tokens: tokens, padding included, in one pass; memory follows it, results do not.
        activation_checkpointing: compute layers again in the backward pass: less memory, more time, the same gradients.
        save_every: steps between two checkpoints of a run with a `run_dir`.
        keep_last: newest checkpoints that are kept.
        eval_every: steps between two looks at held-out examples; None for the last step alone.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    max_norm: float | None = 1.0
    lora: bool = True
    lora_r: int = 8
    lora_alpha: float | None = None
    last_layers: int | None = None
    minibatch_size: int = 16
    max_batch_tokens: int = 4096
    activation_checkpointing: bool = False
    save_every: int = 100
    keep_last: int = 2
    eval_every: int | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing; `fit` and the adapters look at the others."""
        for name in ("lora_r", "minibatch_size", "max_batch_tokens", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr ({self.lr}) must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup ({self.warmup}), a share of the steps, must be at least 0 and below 1")

    def hat(self) -> dict[str, Any]:
        """The part that shapes the policy."""
        names = ("lora", "lora_r", "lora_alpha", "last_layers", "activation_checkpointing")
        return {name: getattr(self, name) for name in names}


def settings_from(given: Mapping[str, Any], *, trainer: str) -> DirectSettings:
    """The settings that keywords of a trainer name.

    Raises:
        TypeError: if a keyword is unknown (with what it may have meant), or of the wrong type.
        ValueError: if a number is out of range.
    """
    known = [field.name for field in fields(DirectSettings)]
    for name in given:
        if name not in known:
            meant = next(iter(get_close_matches(name, known, n=1)), None)
            hint = f"did you mean {meant}?" if meant else "policy/direct.py lists all; beta and its like are the loss's"
            raise TypeError(f"{trainer} has no argument {name!r}; {hint}")
    return DirectSettings(**given)


def described(function: Callable[..., Any]) -> str:
    """A function by its name, with the arguments that a `partial` has fixed: what a run is compared by."""
    if isinstance(function, partial):
        fixed = [described(value) if callable(value) else repr(value) for value in function.args]
        fixed += [
            f"{name}={described(value) if callable(value) else repr(value)}"
            for name, value in sorted(function.keywords.items())
        ]
        return f"{described(function.func)}({', '.join(fixed)})"
    return getattr(function, "__qualname__", type(function).__qualname__)
