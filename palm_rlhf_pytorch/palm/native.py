"""The functions of step.c and draw.c: which build of them this processor runs, if any, and their calls.

`pip install` compiles them where there is a C compiler. Where there was none, where the processor is not one that they
are compiled for, or where torch has loaded no OpenMP runtime that they can share, decoding goes through torch alone.
Which it is depends on the installation and the processor, and on what oneDNN was told to stay below
(ONEDNN_MAX_CPU_ISA=SSE41 turns them off). Knows nothing of models: addresses and numbers only.
"""

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_double, c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf_pytorch.processor import is_allowed

# what setup.py compiles, best first: the build's name, the processor's flags it needs, and oneDNN's name for the level
AVX512 = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq")
BUILDS = (
    ("avx512_bf16", (*AVX512, "avx512_bf16"), "AVX512_CORE_BF16"),
    ("avx512", AVX512, "AVX512_CORE"),
    ("avx2", ("avx2", "fma"), "AVX2"),
)
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
WIDTH = 32  # inputs of products, and widths of the feedforward, come in multiples of it; so do places of the cache
LARGEST_HEAD = 256  # features of a head, a multiple of WIDTH too


class Layer(Structure):
    """`struct layer` of step.c: addresses of one layer's tensors."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "norm", "into", "out", "gains", "down_in", "up_in", "down_out", "up_out", "keys", "values",
        )
    ]  # fmt: skip


class Step(Structure):
    """`struct step` of step.c: sizes, settings, and addresses of what all layers share."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                "depth", "rows", "dim", "heads", "dim_head", "wide", "vocabulary", "rank_in", "rank_out", "room",
                "place", "last_position", "threads",
            )
        ),
        *((name, c_float) for name in ("scale", "eps", "gain_eps")),
        *(
            (name, c_void_p)
            for name in (
                "turns", "norm", "embedding", "tokens", "positions", "hidden_places", "x", "normed", "projected", "low",
                "both", "logits",
            )
        ),
    ]  # fmt: skip


class Draw(Structure):
    """`struct draw` of draw.c: sizes, and addresses of what is read and written."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "vocabulary", "threads")),
        ("temperature", c_double),
        *((name, c_void_p) for name in ("logits", "uniforms", "tokens", "logprobs", "sums")),
    ]


@cache
def native(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """A function of the C files for tensors of a dtype, "take" or "draw", or None where there is none here."""
    library = _library() if dtype in KINDS else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{KINDS[dtype]}")
    function.restype = None
    return lambda *structures: function(*map(ctypes.byref, structures))


def draw_tokens(logits: Tensor, uniform: Tensor, *, temperature: float) -> tuple[Tensor, Tensor] | None:
    """A token of each row of logits (b, v) and its log-probability (nats), (b,) each; None where torch must draw.

    Args:
        logits: of a dense tensor in main memory, float32 or bfloat16.
        uniform: where to invert each row's cumulative distribution, float64 from [0, 1), (b,).
        temperature: above 0.
    """
    if torch.compiler.is_compiling() or logits.device.type != "cpu":
        return None
    if type(logits) is not Tensor or logits.requires_grad:
        return None
    draw = native("draw", logits.dtype)
    if draw is None or logits.dim() != 2 or uniform.dtype != torch.float64 or 0 in logits.shape:
        return None
    (rows, vocabulary), logits, uniform = logits.shape, logits.contiguous(), uniform.contiguous()
    tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    sums = torch.empty(rows, vocabulary // WIDTH + 1)
    draw(
        Draw(
            rows, vocabulary, torch.get_num_threads(), temperature, logits.data_ptr(), uniform.data_ptr(),
            tokens.data_ptr(), logprobs.data_ptr(), sums.data_ptr(),
        )
    )  # fmt: skip
    return tokens, logprobs


@cache
def _library() -> ctypes.CDLL | None:
    for name, flags, level in BUILDS:
        found = load(name) if is_allowed(*flags, level=level) else None
        if found is not None:
            return found
    return None


def load(name: str) -> ctypes.CDLL | None:
    """One build, or None where it was not compiled, or for another system, Python source or OpenMP runtime."""
    for path in Path(__file__).parent.glob(f"_native_{name}.*"):
        try:  # torch's OpenMP runtime is not linked, but found among what torch loaded: there is never a second one
            library = ctypes.CDLL(str(path))
            sizes = [*(c_int64 * 2).in_dll(library, "step_sizes"), *(c_int64 * 1).in_dll(library, "draw_sizes")]
        except (OSError, ValueError):
            continue
        if sizes == [ctypes.sizeof(structure) for structure in (Step, Layer, Draw)]:
            return library
    return None
