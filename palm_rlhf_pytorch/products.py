"""Products with a weight, by the fastest library at hand.

On a CPU torch multiplies float32 matrices with MKL, which is slow on processors that are not Intel's, and lays a weight
out anew for every product with few rows. oneDNN, inside torch too, does neither. Its operators are private to torch:
each is called here alone, tried once on a small product, and replaced by `F.linear` where it is missing or wrong.
Knows nothing of models.
"""

import platform
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 2**26  # multiplications from which a float32 product is worth oneDNN's own set-up; half a millisecond
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a trial product of unit size

Product = Callable[[Tensor], Tensor]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X @ weight.T, differentiable: `F.linear`, by oneDNN where it is a large float32 product that MKL is slow at.

    Args:
        x: (..., d).
        weight: (k, d).

    Returns:
        (..., k). Both routes round in float32; which is taken depends on shapes, the processor and torch's build alone.
    """
    if not _is_large_float32(x, weight):
        return F.linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Float32Product.apply(rows, weight)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def pack(weight: Tensor, *, rows: int | None) -> Product:
    """The product with a weight that is used many times: x (..., d) -> x @ weight.T, (..., k), without gradient.

    On a CPU the weight is copied into oneDNN's layout once: a product with few rows then reads it at the memory's
    speed. Nothing is copied elsewhere, nor where MKL reads it as fast: one or two float32 rows on Intel's processors.

    Args:
        weight: (k, d).
        rows: how many rows x will have, most of the time; None if the product is not taken often enough to pay.
    """
    if rows is None or not (_plain_cpu(weight) and onednn_works(weight.dtype)):
        return partial(_multiply, weight=weight)
    if rows <= 2 and weight.dtype == torch.float32 and not mkl_is_slow():
        return partial(_multiply, weight=weight)
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), rows)
    return partial(_onednn, weight=packed)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a product with this weight is taken in: its own dtype, or autocast's where that is on."""
    autocast = torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype


@cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's linear operators for a dtype, and they give what a product in float64 gives."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    if dtype not in TOLERANCE or not torch.backends.mkldnn.is_available():
        return False
    if not all(hasattr(getattr(torch.ops.mkldnn, name, None), "default") for name in operators):
        return False
    x, weight = (torch.arange(n * 19.0, device="cpu").reshape(n, 19).sin().to(dtype) for n in (3, 37))
    exact = x.double() @ weight.double().T
    try:
        found = [
            _onednn(x, weight=torch.ops.mkldnn._reorder_linear_weight.default(weight, len(x))),
            _onednn(x, weight=weight),
            _onednn(exact.to(dtype), weight=weight.t()),
        ]
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # not built for this processor or dtype, or another signature
        return False
    wanted = [exact, exact, exact.to(dtype).double() @ weight.double()]
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, wanted, strict=True)]
    return bool(max(errors) < TOLERANCE[dtype])


class _Float32Product(torch.autograd.Function):
    """x @ weight.T; the weight's own gradient is left to MKL, whose transposed products need no copy."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _onednn(x, weight=weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = _Float32Product.apply(grad, weight.t()) if needs_x else None
        return grad_x, grad.t() @ x if needs_weight else None


def _onednn(x: Tensor, *, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return out


def _multiply(x: Tensor, *, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def _is_large_float32(x: Tensor, weight: Tensor) -> bool:
    large = x.numel() * weight.shape[0] >= LARGE and x.numel() > x.shape[-1]
    if not large or x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or not (_plain_cpu(x) and _plain_cpu(weight)):
        return False
    return mkl_is_slow() and onednn_works(torch.float32)


@cache
def mkl_is_slow() -> bool:
    """Whether float32 products go to MKL on a processor for which it keeps its slower kernels: any but Intel's.

    On an Intel Xeon (torch 2.13) both are equal, but for gradients of narrow outputs, where MKL is 1.5 times as fast.
    """
    cpuinfo = Path("/proc/cpuinfo")
    processor = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "Intel" not in processor


def _plain_cpu(tensor: Tensor) -> bool:
    """A dense tensor in main memory, of no subclass that would want to see the product (nn.Parameter is none)."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and type(tensor) in PLAIN


PLAIN = (Tensor, torch.nn.Parameter)
