"""Checkpoints of the supervised loop: what is saved of it, and how it goes on.

Knows an optimizer and parameters by name, not what is learnt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.random_states import random_states, set_random_states
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.stopping import StopSignal
from palm_rlhf_pytorch.training.tensor_file import check_state

KIND = "fit"


@dataclass
class Saves:
    """Checkpoints of a call of `fit`.

    Attributes:
        checkpoints: where they go, and which are kept.
        every: steps between two; the last step always makes one.
        resume: go on from the newest whole one, if there is one.
        stopped: after the call, the signal that ended it early, if one did.
    """

    checkpoints: Checkpoints
    every: int = 100
    resume: bool = False
    stopped: str | None = None


@dataclass
class Skips:
    """Steps left out because a number was not finite: all of them, and those since the last good one."""

    total: int = 0
    in_a_row: int = 0


class Keeper:
    """Saves a call of `fit`, brings it back, and listens for signals meanwhile; without `saves` it does nothing."""

    def __init__(
        self,
        saves: Saves | None,
        model: nn.Module,
        trained: list[nn.Parameter],
        optimizer: Optimizer,
        accelerator: Accelerator | None,
        plan: dict[str, Any],
    ) -> None:
        chosen = {id(parameter) for parameter in trained}
        self.parameters = {name: weight for name, weight in model.named_parameters() if id(weight) in chosen}
        self.saves, self.optimizer, self.plan, self.skips = saves, optimizer, plan, Skips()
        self.ranks = Ranks(accelerator)
        self.stop = StopSignal(self.ranks, enabled=saves is not None)

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.__exit__()

    def resumed(self, source: Iterator[Any], metrics: MetricsLog | None) -> int:
        """Take over the newest checkpoint, if that is asked for; the steps that are done.

        Raises:
            ValueError: if it is of another model or of other arguments.
        """
        if self.saves is None:
            return 0
        if not self.saves.resume:
            if self.saves.checkpoints.steps():
                raise ValueError("saves.checkpoints hold a run already: resume=True goes on with it")
            return 0
        found = self.saves.checkpoints.latest(kind=KIND)
        done = 0 if found is None else found.step
        if metrics is not None:
            metrics.rewind(done)
        if found is not None:
            self._take(found)
            for _ in range(done * self.plan["accumulate"]):
                next(source)  # learnt from already
            self.skips = Skips(**found.values["skips"])
            set_random_states(found.values["random"][self.ranks.rank])
        return done

    def _take(self, found: Checkpoint) -> None:
        """Check a checkpoint, then take over weights and optimizer."""
        kept = found.values["plan"]
        differing = [
            f"{name}: {kept.get(name)}, now {value}" for name, value in self.plan.items() if kept.get(name) != value
        ]
        if differing:
            raise ValueError(f"{found.path} was written by a run with other arguments ({'; '.join(differing)})")
        check_state(self.parameters, found.tensors["model"], path=found.path)
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(found.tensors["model"][name])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in found.tensors["optimizer"].items():
            number, moment = name.split(".")
            moments.setdefault(int(number), {})[moment] = value
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def ended(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Save where it is time to; whether the run is to end here."""
        if self.saves is None:
            return False
        stopped = self.ranks.any(self.stop.name is not None)
        if stopped:
            self.saves.stopped = self.stop.name or "SIGTERM"
        if stopped or step % self.saves.every == 0 or step == self.plan["num_steps"]:
            self.saves.checkpoints.save(step, kind=KIND, metrics=metrics, **self._state())
        return stopped

    def _state(self) -> dict[str, Any]:
        moments = self.optimizer.state_dict()["state"]
        optimizer = {f"{number}.{name}": value for number, named in moments.items() for name, value in named.items()}
        return {
            "values": {
                "plan": self.plan,
                "skips": asdict(self.skips),
                "random": self.ranks.gather_values(random_states()),
            },
            "tensors": {
                "model": {name: weight.detach() for name, weight in self.parameters.items()},
                "optimizer": optimizer,
            },
        }
