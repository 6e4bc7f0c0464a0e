"""What the processes of a run find out together; in a run of one process each answer is its own.

By accelerate's collectives: every process must ask the same things in the same order.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def new_accelerator(arguments: Mapping[str, Any] | None) -> Accelerator:
    """An Accelerator of these arguments, which knows of all processes that were started.

    Raises:
        ValueError: if several were started and it would take each for the only one: all would write to one folder.
    """
    accelerator = Accelerator(**(arguments or {}))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{started} processes were started (WORLD_SIZE), and accelerate takes each for the only one: on CPUs give"
            ' accelerate_kwargs={"cpu": True}, or set ACCELERATE_USE_CPU=true'
        )
    return accelerator


class Ranks:
    """Sums, largest values and errors over all processes; without an accelerator there is one."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.rank = 0 if accelerator is None else accelerator.process_index

    @property
    def accelerator(self) -> Accelerator:
        """What the processes talk by."""
        assert self._accelerator is not None, "one process alone has no one to talk to"
        return self._accelerator

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, element by element, where the tensor is."""
        if self.count == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.accelerator.device), "sum").to(tensor.device)

    def max(self, value: Tensor) -> Tensor:
        """The largest of a scalar over ranks; of nan and a number, nan."""
        return self.gather(value[None]).max()

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors (b, ...) of all ranks, one after the other; all of one shape."""
        if self.count == 1:
            return tensor
        return self.accelerator.gather(tensor.to(self.accelerator.device)).to(tensor.device)

    def gather_values(self, value: Any) -> list[Any]:
        """A plain value of each rank."""
        return [value] if self.count == 1 else gather_object([value])

    def any(self, flag: bool) -> bool:
        """Whether it is true on at least one rank."""
        return bool(self.max(torch.tensor(float(flag))))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on every rank if it does on one; see `raise_together`."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        self.raise_together(error)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if one has an error, so that no rank waits for one that is gone.

        Raises:
            Exception: the rank's own error; where that has none, a RuntimeError that tells of the others'.
        """
        if self.count == 1:
            if error is not None:
                raise error
            return
        told: Sequence[str | None] = self.gather_values(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        others = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text is not None]
        if others:
            raise RuntimeError("another process stopped: " + "; ".join(others))
