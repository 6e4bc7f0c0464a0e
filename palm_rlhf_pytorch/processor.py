"""What this machine's processor multiplies fast: with which library, and in which number format.

Read from /proc/cpuinfo and from the cap that oneDNN was given, never timed: the same machine takes the same route
every time, and so rounds alike. Knows nothing of tensors.
"""

import os
import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

# instruction sets by oneDNN's names, as ONEDNN_MAX_CPU_ISA caps them; those that are not here come after
LEVELS = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
)  # fmt: skip
DOT_PRODUCTS = {torch.bfloat16: ("avx512_bf16", "AVX512_CORE_BF16"), torch.float16: ("avx512_fp16", "AVX512_CORE_FP16")}


class Processor(NamedTuple):
    """Of the first processor: whether Intel made it, and its instruction sets; none known where it is not an x86."""

    intel: bool
    flags: frozenset[str]


@cache
def this_processor() -> Processor:
    """What the system says of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return Processor("Intel" in platform.processor(), frozenset())
    told = cpuinfo.read_text()
    flags = next((line for line in told.splitlines() if line.startswith("flags")), "")
    return Processor("Intel" in told, frozenset(flags.partition(":")[2].split()))


@cache
def mkl_is_slow() -> bool:
    """Whether float32 products go to MKL on a processor for which it keeps its slower kernels: any but Intel's.

    On an Intel Xeon (torch 2.13) both are equal, but for gradients of narrow outputs, where MKL is 1.5 times as fast.
    On two cores of an AMD EPYC (Zen 4) MKL multiplies 512 rows by this library's weights at 149 to 198 GFLOP/s, oneDNN
    at 169 to 216; a single row MKL reads at 10 to 17 GB/s, oneDNN at 25 to 33.
    """
    return torch.backends.mkl.is_available() and not this_processor().intel


@cache
def float32_rows(dtype: torch.dtype) -> int | None:
    """Where this processor is slow in a half-precision format, so that its products should be taken through float32.

    None where it is fast; else the rows from which on a weight that is kept had better be kept in float32. Where the
    weight is converted for one product, that pays from some 8 or 100 rows on, and is done for fewer all the same: a
    row's bits would depend on how many come with it.

    Measured on an Intel Xeon (torch 2.13, 512 rows by 512 x 4736): held to AVX2 bfloat16 takes 140 ms where float32
    and both conversions take 22; held to AVX-512 without its bfloat16, 49 and 12; with it, 19 to 30 and 16 to 20. With
    8 rows it is 2.1 and 1.6, 1.3 and 1.0, 0.7 and 1.1. AMD's with AVX-512's bfloat16 are left their own (Zen 4: 405 to
    423 GFLOP/s, twice float32's), and so are those with AMX, whose rates by design are higher still; not measured here.
    """
    processor = this_processor()
    if dtype not in DOT_PRODUCTS or not processor.flags:
        return None
    flag, level = DOT_PRODUCTS[dtype]
    if f"amx_{flag.removeprefix('avx512_')}" in processor.flags and _allowed(None):
        return None
    if flag not in processor.flags or not _allowed(level):
        return 2
    return 32 if processor.intel and dtype == torch.bfloat16 else None


def is_allowed(*flags: str, level: str) -> bool:
    """Whether the processor has these instruction sets, and oneDNN was not told to stay below their level."""
    return this_processor().flags.issuperset(flags) and _allowed(level)


def _allowed(level: str | None) -> bool:
    """Whether oneDNN may use the instructions of a level, or those beyond all levels."""
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return cap not in LEVELS or (level is not None and LEVELS.index(level) <= LEVELS.index(cap))
