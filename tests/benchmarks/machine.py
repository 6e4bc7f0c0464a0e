"""Which machine this is, and the ceilings it sets: how fast it reads memory, how fast it multiplies large matrices."""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.palm.native import best_build
from tests.benchmarks.report import Ceilings

READ_BYTES = {"cpu": 2**28, "cuda": 2**33}  # far beyond any cache: 256 MiB, 8 GiB
MATRIX = {"cpu": 2048, "cuda": 8192}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, work that it leaves to a CUDA device included."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    """Until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device, *, instruction_cap: str | None) -> dict[str, Any]:
    """What must be known of a machine to compare numbers; instruction_cap as `cap_instruction_set` gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found = {
        "cpu": names[0] if names else platform.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load_at_start": load, "torch": torch.__version__,
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "instruction_cap": instruction_cap,
        "native_build": best_build(),
    }  # fmt: skip
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def measure_bandwidth(device: torch.device, *, repeats: int = 5) -> float:
    """Bytes read a second of one large float32 tensor, by its sum or its product with a vector; the best of repeats."""
    numbers = torch.ones(READ_BYTES[device.type] // 4, device=device)
    matrix, vector = numbers.view(-1, 512), numbers[:512].clone()
    readers = numbers.sum, partial(torch.mv, matrix, vector)
    for read in readers:
        read()
    return 4 * numbers.numel() / min(seconds(read, device) for _ in range(repeats) for read in readers)


def measure_matrix_rate(device: torch.device, dtype: torch.dtype, *, repeats: int = 5) -> float:
    """Operations a second of one large square product; the best of some repeats.

    In float32 on a CPU two libraries may do it, MKL and oneDNN ("medium"), and the faster one is the ceiling, provided
    that its result is one of float32.
    """
    size = MATRIX[device.type]
    first, second = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    precision, rates = torch.get_float32_matmul_precision(), []
    exact = first @ second
    try:
        for choice in ("highest", "medium") if (device.type, dtype) == ("cpu", torch.float32) else (precision,):
            torch.set_float32_matmul_precision(choice)
            product = torch.nn.functional.linear(first, second.T)
            if (product - exact).abs().max() <= 1e-4 * exact.abs().max():
                best = min(seconds(lambda: torch.nn.functional.linear(first, second.T), device) for _ in range(repeats))
                rates.append(2 * size**3 / best)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert rates, "a product differs from itself"
    return max(rates)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Both, now."""
    return Ceilings(measure_bandwidth(device), measure_matrix_rate(device, dtype))
