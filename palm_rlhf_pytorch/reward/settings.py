"""A reward model's own settings: what its constructor takes beside the trunk, checked, and kept in its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of `RewardModel`, whose docstring says what they mean."""

    num_binned_output: int
    label_offset: int
    use_lora: bool
    lora_r: int
    lora_alpha: float | None
    dropout: float
    pool_prompt: bool
    pool_last: bool

    def __post_init__(self) -> None:
        bins = self.num_binned_output
        if bins < 0 or bins == 1:
            raise ValueError(f"num_binned_output ({bins}) must be 0 for a scalar head, or at least 2 ratings")
        if self.label_offset and not bins:
            raise ValueError(
                f"label_offset ({self.label_offset}) is the lowest of the bins: give num_binned_output too"
            )
        if self.lora_r < 1:
            raise ValueError(f"lora_r ({self.lora_r}) must be at least 1; use_lora=False trains the whole trunk")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha ({self.lora_alpha}) must be above 0, or None for lora_r")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) is a probability: it must be at least 0 and below 1")
        if self.pool_prompt and self.pool_last:
            raise ValueError("pool_prompt and pool_last contradict: choose the mean of all tokens, or the last one")


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """In words, what a file says otherwise than the model at hand; both have the same keys."""
    return [f"{name} ({here[name]} here, {value} in the file)" for name, value in there.items() if here[name] != value]
