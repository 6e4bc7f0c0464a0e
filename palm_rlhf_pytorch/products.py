"""Products with a weight, by the fastest library at hand.

On a CPU torch multiplies float32 matrices with MKL, which is slow on processors that are not Intel's, and lays a weight
out anew for every product with few rows. oneDNN, inside torch too, does neither. Its operators are private to torch:
each is called here alone, tried once on a small product, and replaced by `F.linear` where it is missing or wrong.
Half precision is multiplied through float32 on processors that would emulate it: the same function, since products are
summed in float32 either way. Which route is taken depends on shapes, the processor and torch's build alone.
Knows nothing of models.
"""

from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.processor import float32_rows, mkl_is_slow

LARGE = 2**26  # multiplications from which a float32 product is worth oneDNN's own set-up; half a millisecond
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of a trial product of unit size


class Product(Protocol):
    """The product with a weight (k, d) that is used many times, without gradient."""

    def __call__(self, x: Tensor, *, onto: Tensor | None = None) -> Tensor:
        """X (b, d) @ weight.T, (b, k), and the sum with `onto` (b, k) of the same dtype where that is given."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """X @ weight.T, differentiable: `F.linear`, by oneDNN or through float32 where that is the faster route.

    Args:
        x: (..., d).
        weight: (k, d).

    Returns:
        (..., k), in autocast's dtype where that is on.
    """
    if not _plain_cpu(x) or not _plain_cpu(weight) or torch.compiler.is_compiling():
        return F.linear(x, weight)
    if _is_large_float32(x, weight):
        out: Tensor = _Float32Product.apply(x.reshape(-1, x.shape[-1]), weight)
    elif _is_slow_half(x, weight):
        dtype = product_dtype(weight)
        out = _HalfProduct.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight, dtype)
    else:  # torch lays x out by itself where it must
        return F.linear(x, weight)
    return out.reshape(*x.shape[:-1], weight.shape[0])


def transposed(x: Tensor, y: Tensor) -> Tensor:
    """X.T @ y, (k, d), of rows x (m, k) and y (m, d): a weight's gradient, which MKL takes without a copy."""
    return x.t() @ y if x.dtype in (torch.float32, torch.float64) else linear(x.t(), y.t())


def pack(weight: Tensor, *, rows: int | None) -> Product:
    """The product with a weight that is used many times.

    On a CPU the weight is copied into oneDNN's layout once: a product with few rows then reads it at the memory's
    speed. Nothing is copied elsewhere, nor where MKL reads it as fast: one or two float32 rows on Intel's processors.
    The copy of a half-precision weight is in float32, twice its size, where that is the faster route for so many rows.

    Args:
        weight: (k, d).
        rows: how many rows x will have, most of the time; None if the product is not taken often enough to pay.
    """
    if rows is None or not _plain_cpu(weight):
        return partial(_multiply, weight=weight)
    wide = float32_rows(weight.dtype)
    if wide is not None and rows >= wide:
        return partial(_multiply_wide, product=pack(weight.detach().float(), rows=rows), dtype=weight.dtype)
    fast = rows <= 2 and weight.dtype == torch.float32 and not mkl_is_slow()
    if fast or not onednn_works(weight.dtype):
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
            _onednn(x, weight=weight, onto=exact.to(dtype)),
        ]
    except (
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # not built for this processor or dtype, or another signature
        return False
    wanted = [exact, exact, exact.to(dtype).double() @ weight.double(), exact + exact.to(dtype).double()]
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


class _HalfProduct(torch.autograd.Function):
    """x @ weight.T of a half-precision x, and of a weight rounded to that dtype, taken in float32 and rounded once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return linear(x.float(), weight.to(dtype).float()).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, torch.dtype], output: Tensor) -> None:
        x, weight, ctx.dtype = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            wide = grad.float()
            grad_x = linear(wide, weight.to(ctx.dtype).float().t()).to(x.dtype) if needs_x else None
            grad_weight = (wide.t() @ x.float()).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, None


def _onednn(x: Tensor, *, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    operator = torch.ops.mkldnn._linear_pointwise
    out: Tensor = (
        operator.default(x, weight, None, "none", [], "")
        if onto is None
        else operator.binary(x, onto, weight, None, "add")
    )
    return out


def _multiply(x: Tensor, *, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    return F.linear(x, weight) if onto is None else torch.addmm(onto, x, weight.t())


def _multiply_wide(x: Tensor, *, product: Product, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    return product(x.float(), onto=None if onto is None else onto.float()).to(dtype)


def _is_large_float32(x: Tensor, weight: Tensor) -> bool:
    large = x.numel() * weight.shape[0] >= LARGE and x.numel() > x.shape[-1]
    if not large or x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    return mkl_is_slow() and onednn_works(torch.float32)


def _is_slow_half(x: Tensor, weight: Tensor) -> bool:
    dtype = product_dtype(weight)
    if float32_rows(dtype) is None:
        return False
    return torch.is_autocast_enabled("cpu") or x.dtype == weight.dtype == dtype


def _plain_cpu(tensor: Tensor) -> bool:
    """A dense tensor in main memory, of no subclass that would want to see the product (nn.Parameter is none)."""
    return tensor.device.type == "cpu" and tensor.layout == torch.strided and type(tensor) in PLAIN


PLAIN = (Tensor, torch.nn.Parameter)
