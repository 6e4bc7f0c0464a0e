"""The memory that a process takes: of tensors while they live, of the process, and what the device has.

On CUDA torch is asked; elsewhere Linux is, and on other systems nothing is known of the process.
"""

import time
import weakref
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 2**20  # bytes of a tensor from which memory in use is looked at: to ask takes longer than to make a small one


class LiveBytes(TorchDispatchMode):
    """Counts bytes of tensors made inside while they live: now, and at most since it was last entered.

    Views and what is written in place are nothing new. `resident` is the most memory in use after a large one was made.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.now, self.most, self.resident = device, 0, 0, 0
        self.alive: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Self:
        self.most = self.now
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info is None for result in func._schema.returns):
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    self._count(made)
        return out

    def _count(self, made: Tensor) -> None:
        # oneDNN's own layout has no storage
        memory: Any = made.untyped_storage() if made.layout == torch.strided else made
        key, size = id(memory), memory.nbytes if memory is made else memory.nbytes()

        def freed(_: object) -> None:
            del self.alive[key]
            self.now -= size

        if key not in self.alive:
            self.alive[key] = weakref.ref(memory, freed)
            self.now += size
            self.most = max(self.most, self.now)
            if size >= LARGE:
                self.resident = max(self.resident, memory_in_use(self.device)[0])


def memory_in_use(device: torch.device) -> tuple[int, int]:
    """Bytes in use, and the most so far where that is told: of tensors on CUDA, else of the process (on Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), 0
    status = _kilobytes("/proc/self/status")
    return status.get("VmRSS", 0), status.get("VmHWM", 0)


def device_bytes_of(device: torch.device) -> int:
    """Bytes that the device, or the container, has for this process; 0 where that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free, limit = _kilobytes("/proc/meminfo").get("MemAvailable", 0), Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"  # of a container
    here = free + memory_in_use(device)[0] if free else 0
    return min(here, int(allowed)) if allowed.isdigit() else here


def _kilobytes(path: str) -> dict[str, int]:
    """The sizes that a file of Linux's tells, in bytes; none elsewhere."""
    lines = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
