"""Low-rank adapters: a second set of weights, small, beside a frozen one.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685
`LoRA` is one adapted product, `Adapter` one for each attention projection of each layer. A language model takes an
adapter as an argument of its pass; a scope is an adapter it keeps under a name. Knows nothing of the model.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class LoRA(nn.Module):
    """What is added to a linear map: (x A) B alpha / r, in float32.

    A is drawn with deviation dim^-0.5, so that x A has the size of x; B is zero, so that an untrained adapter changes
    nothing. The product is never formed as A B first: that matrix is as large as the one it spares.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        r: int = 8,
        alpha: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make an adapter of a map dim -> dim_out.

        Args:
            dim: features in.
            dim_out: features out.
            r: rank; 8 is the default that users of the README's API know.
            alpha: the update is scaled by alpha / r; None means r, a scale of 1.
            generator: random state for A; None takes torch's global one.

        Raises:
            ValueError: if r or alpha is not positive.
        """
        super().__init__()
        if r < 1:
            raise ValueError(f"r ({r}), the rank of an adapter, must be at least 1")
        if alpha is not None and not 0 < alpha < float("inf"):
            raise ValueError(f"alpha ({alpha}), the numerator of an adapter's scale, must be above 0, or None for r")
        self.scale = (r if alpha is None else alpha) / r
        self.A = nn.Parameter(torch.randn(dim, r, generator=generator, dtype=torch.float32) * dim**-0.5)
        self.B = nn.Parameter(torch.zeros(r, dim_out, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The update for x (..., dim): (..., dim_out), in x's dtype."""
        return (((x.to(self.A.dtype) @ self.A) @ self.B) * self.scale).to(x.dtype)

    def delta(self) -> Tensor:
        """What merging adds to a weight of shape (dim_out, dim), float32, without gradient."""
        return (self.A.detach() @ self.B.detach()).T * self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module, but stay float32 when the model around it becomes bfloat16 or float16."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype not in (torch.float16, torch.bfloat16):
                return moved
            return tensor.to(moved.device, torch.float32)  # not moved.float(): its digits are gone already

        return super()._apply(keep_float32, recurse)


class LayerAdapter(nn.Module):
    """Adapters of one layer's attention: queries, keys, values and the way out."""

    def __init__(
        self, dim: int, dim_head: int, heads: int, *, r: int, alpha: float | None, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        inner = heads * dim_head
        self.q = LoRA(dim, inner, r=r, alpha=alpha, generator=generator)
        self.k = LoRA(dim, dim_head, r=r, alpha=alpha, generator=generator)
        self.v = LoRA(dim, dim_head, r=r, alpha=alpha, generator=generator)
        self.o = LoRA(inner, dim, r=r, alpha=alpha, generator=generator)

    def add_in(self, projected: Tensor, x: Tensor) -> Tensor:
        """Queries, keys and values side by side (..., inner + 2 dim_head), with what x (..., dim) adds to them.

        Without gradients the sum is in the place of `projected`.
        """
        down, up, _, _ = self.side_by_side()
        return _add_product(projected, x, down, up)

    def add_seen(self, projected: Tensor, x: Tensor) -> Tensor:
        """Keys and values alone (..., 2 dim_head), with what x (..., dim) adds to them; likewise."""
        down, up, out, _ = self.side_by_side()
        rank, inner = len(self.q.B), len(out)
        return _add_product(projected, x, down[:, rank:], up[rank:, inner:])

    def add_out(self, projected: Tensor, x: Tensor) -> Tensor:
        """The way out (..., dim), with what x (..., inner) adds to it; likewise."""
        return _add_product(projected, x, self.o.A, self.o.B * self.o.scale)

    def side_by_side(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The adapter as four matrices, scales included: it adds x @ down_in @ up_in, and x @ down_out @ up_out.

        Returns:
            down_in (dim, 3 r), up_in (3 r, inner + 2 dim_head) block by block, down_out (inner, r), up_out (r, dim).
        """
        into = (self.q, self.k, self.v)
        down_in = torch.cat([lora.A for lora in into], dim=1)
        up_in = torch.block_diag(*(lora.B * lora.scale for lora in into))
        return down_in, up_in, self.o.A, self.o.B * self.o.scale


def _add_product(base: Tensor, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Base + x @ down @ up in base's dtype; where that is the adapter's own, in one pass over base."""
    low = x.to(down.dtype) @ down
    if not base.dtype == low.dtype == up.dtype:
        return base + (low @ up).to(base.dtype)
    add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
    return add(base.flatten(0, -2), low.flatten(0, -2), up).unflatten(0, base.shape[:-1])


class Adapter(nn.Module):
    """One LayerAdapter for each adapted layer, keyed by the layer's number."""

    def __init__(
        self,
        *,
        depth: int,
        dim: int,
        dim_head: int,
        heads: int,
        r: int = 8,
        alpha: float | None = None,
        last_layers: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make adapters for a model of the given shape.

        Args:
            depth: layers of the model.
            dim: its features.
            dim_head: features of a head.
            heads: query heads.
            r: rank.
            alpha: scale numerator, None means r.
            last_layers: adapt only so many layers, counted from the output; None adapts all.
            generator: random state of the initial A.

        Raises:
            ValueError: if last_layers is not within 1 .. depth.
        """
        super().__init__()
        if last_layers is not None and not 1 <= last_layers <= depth:
            raise ValueError(f"last_layers ({last_layers}) must be from 1 to the model's depth ({depth}), or None")
        first = 0 if last_layers is None else depth - last_layers
        self.config = {"r": r, "alpha": alpha, "last_layers": last_layers}
        self.layers = nn.ModuleDict(
            {
                str(layer): LayerAdapter(dim, dim_head, heads, r=r, alpha=alpha, generator=generator)
                for layer in range(first, depth)
            }
        )

    def layer(self, index: int) -> LayerAdapter | None:
        """The adapter of one layer, None where the layer has none."""
        found = self.layers[str(index)] if str(index) in self.layers else None
        assert found is None or isinstance(found, LayerAdapter)
        return found
