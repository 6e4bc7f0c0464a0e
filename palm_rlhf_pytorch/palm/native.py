"""The functions of step.c and draw.c: which build of them this processor runs, if any, and their calls.

Installing the package compiles them where there is GCC. Where there was none, where the processor is not one that they
are compiled for, or where torch has loaded no OpenMP runtime that they can share, decoding goes through torch alone.
Which it is depends on the installation and the processor, and on what oneDNN was told to stay below
(ONEDNN_MAX_CPU_ISA=SSE41 turns them off). Knows nothing of models: addresses and numbers only.
"""

import ctypes
import zlib
from collections.abc import Callable
from ctypes import Structure, c_double, c_float, c_int64, c_uint32, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

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
# setup.py marks what it compiles with their CRC-32
SOURCES = ("vectors.h", "products.h", "step.c", "draw.c", "native.py")
DRAW_BLOCK = 256  # tokens whose weights draw.c sums before they count


class Layer(Structure):
    """`struct layer` of step.c: addresses of one layer's tensors."""

    _fields_ = [
        ("eps", c_float),
        *(
            (name, c_void_p)
            for name in (
                "norm", "into", "out", "gains", "down_in", "up_in", "down_out", "up_out", "keys", "values",
            )
        ),
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
def native(name: str, dtype: torch.dtype) -> Callable[..., int] | None:
    """A function of the C files for tensors of a dtype, "take" or "draw", or None where there is none here."""
    library = _library() if dtype in KINDS else None
    if library is None:
        return None
    function = getattr(library, f"{name}_{KINDS[dtype]}")
    function.restype = c_int64
    return lambda *structures: function(*map(ctypes.byref, structures))


def draw_tokens(logits: Tensor, uniform: Tensor, *, temperature: float) -> tuple[Tensor, Tensor] | None:
    """A token of each row of logits (b, v) and its log-probability (nats), (b,) each; None where torch must draw.

    Args:
        logits: of a dense tensor in main memory, float32 or bfloat16.
        uniform: where to invert each row's cumulative distribution, float64 from [0, 1), (b,).
        temperature: above 0.
    """
    if not is_plain(logits) or not is_plain(uniform) or logits.requires_grad:
        return None
    if logits.dim() != 2 or 0 in logits.shape or uniform.shape != logits.shape[:1] or uniform.dtype != torch.float64:
        return None
    draw = native("draw", logits.dtype)
    if draw is None:
        return None
    (rows, vocabulary), logits, uniform = logits.shape, logits.contiguous(), uniform.contiguous()
    tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
    # of the dtypes that the C code writes, whatever torch's default is
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, vocabulary // DRAW_BLOCK + 1, dtype=torch.float32, device=logits.device)
    draw(
        Draw(
            rows, vocabulary, torch.get_num_threads(), temperature, logits.data_ptr(), uniform.data_ptr(),
            tokens.data_ptr(), logprobs.data_ptr(), sums.data_ptr(),
        )
    )  # fmt: skip
    return tokens, logprobs


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what its address says: of torch's own class, dense, in main memory, and no transform's."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_neg():
        return False
    if forward_ad._current_level >= 0:  # tangents would be left out
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # vmap's and grad's say they are Tensors


def _library() -> ctypes.CDLL | None:
    name = best_build()
    return None if name is None else load(name)


@cache
def best_build() -> str | None:
    """The build that decoding on this machine uses, or None."""
    usable = (name for name, flags, level in BUILDS if is_allowed(*flags, level=level) and load(name) is not None)
    return next(usable, None)


@cache
def load(name: str) -> ctypes.CDLL | None:
    """One build; None where it was not compiled, or from other sources, or for a system with another OpenMP runtime."""
    room = Path(__file__).parent
    for path in (room / f"_native_{name}{suffix}" for suffix in EXTENSION_SUFFIXES):
        try:  # torch's OpenMP runtime is not linked, but found among what torch loaded
            library = ctypes.CDLL(str(path))
            made_from = c_uint32.in_dll(library, "sources").value
        except (OSError, ValueError):
            continue
        if made_from == zlib.crc32(b"".join((room / file).read_bytes() for file in SOURCES)):
            return library
    return None
