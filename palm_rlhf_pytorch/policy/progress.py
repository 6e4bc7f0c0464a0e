"""How far an update has come: what of it a checkpoint must hold beside the weights."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """How far an update has come: everything of it that is not in the weights.

    Attributes:
        epoch: the pass over the rows that the next step belongs to, from 0.
        minibatch: which minibatch of it comes next, from 0.
        steps: optimizer steps taken so far; skipped: those left out because a number was not finite.
        ended: whether the policy has moved so far that the rest of the update is left out.
        totals: sum over the steps taken, or the largest value, of each diagnostic.
    """

    epoch: int = 0
    minibatch: int = 0
    steps: int = 0
    skipped: int = 0
    ended: bool = False
    totals: dict[str, Tensor] = field(default_factory=dict)

    def is_over(self) -> bool:
        """Whether the rest is left out."""
        return self.ended

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able; float32 numbers come back to the same bits."""
        return {**vars(self), "totals": {name: float(value) for name, value in self.totals.items()}}

    @classmethod
    def restored(cls, state: dict[str, Any], *, device: torch.device) -> "Progress":
        """What `state` gave."""
        totals = {name: torch.tensor(value, device=device) for name, value in state["totals"].items()}
        return cls(**{**state, "totals": totals})


def accumulate(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add values to totals, name by name; of what is a maximum keep the larger."""
    for name, value in values.items():
        join = torch.maximum if name.endswith("_max") else torch.add
        totals[name] = join(totals[name], value) if name in totals else value
