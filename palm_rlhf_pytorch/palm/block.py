"""One layer of PaLM: attention and feedforward side by side, one product in and one product out.

Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", section 2, https://arxiv.org/abs/2204.02311
Knows nothing of tokens, other layers, or how its cache is kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf_pytorch.attention import attend
from palm_rlhf_pytorch.lora import LayerAdapter
from palm_rlhf_pytorch.products import linear
from palm_rlhf_pytorch.rotary import RotaryFactors, rotate

RMS_EPS = 1e-6  # the same in every dtype: torch's default is 0.008 in bfloat16, which shrinks what it normalises


class Pass(NamedTuple):
    """What all layers of one forward pass have in common.

    rotary: factors that place queries and keys.
    causal: each query sees the keys up to its own place; for a pass without mask.
    mask: True where a query may look at a key, (b or 1, i, j), or None.
    attn_dropout: probability of dropping an attention weight.
    ff_dropout: probability of dropping a feedforward feature.
    recompute: keep a layer's input alone for the backward pass, and compute the layer again there.
    """

    rotary: RotaryFactors
    causal: bool
    mask: Tensor | None
    attn_dropout: float
    ff_dropout: float
    recompute: bool = False


class ParallelTransformerBlock(nn.Module):
    """x -> attention(norm(x)) + feedforward(norm(x)), one product in and one product out (section 2 of the paper)."""

    def __init__(
        self, *, dim: int, dim_head: int, heads: int, ff_mult: int, qk_rmsnorm: bool, qk_scale: float, fused: bool
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.fused = heads, dim_head, fused
        inner, ff_inner = heads * dim_head, ff_mult * dim
        self.splits = (inner, dim_head, dim_head, ff_inner, ff_inner)
        self.norm = nn.LayerNorm(dim, bias=False)
        self.in_proj = nn.Linear(dim, sum(self.splits), bias=False)  # queries, key, value, feedforward, its gate
        self.out_proj = nn.Linear(inner + ff_inner, dim, bias=False)
        self.scale = qk_scale if qk_rmsnorm else dim_head**-0.5
        self.q_norm = nn.RMSNorm(dim_head, eps=RMS_EPS) if qk_rmsnorm else None
        self.k_norm = nn.RMSNorm(dim_head, eps=RMS_EPS) if qk_rmsnorm else None

    def forward(
        self,
        x: Tensor,
        common: Pass,
        *,
        lora: LayerAdapter | None = None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The layer's update of x (b, n, d); `store` swaps new keys and values for all that a cache holds."""
        if not common.recompute:
            return self._update(x, common, lora, store)
        random = common.attn_dropout > 0 or common.ff_dropout > 0
        update: Tensor = checkpoint(
            self._update, x, common, lora, store, use_reentrant=False, preserve_rng_state=random
        )
        return update

    def _update(
        self,
        x: Tensor,
        common: Pass,
        lora: LayerAdapter | None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
    ) -> Tensor:
        x = self.norm(x)
        projected = linear(x, self.in_proj.weight)
        into, ff, gate = projected.split((sum(self.splits[:3]), *self.splits[3:]), dim=-1)
        if lora is not None:
            into = lora.add_in(into, x)
        q, k, v = into.split(self.splits[:3], dim=-1)
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        q, k = self._place(q, k, common.rotary)
        if store is not None:
            k, v = store(k, v)
        out = attend(
            q, k, v, scale=self.scale, causal=common.causal, mask=common.mask, dropout=common.attn_dropout,
            fused=self.fused,
        )  # fmt: skip
        out = rearrange(out, "b h n d -> b n (h d)")
        update = linear(_both(out, ff, gate, dropout=common.ff_dropout), self.out_proj.weight)
        return update if lora is None else lora.add_out(update, out)

    def _place(self, q: Tensor, k: Tensor, rotary: RotaryFactors) -> tuple[Tensor, Tensor]:
        """Normalise where asked, then turn queries (b, h, n, d) and keys (b, n, d) by their positions."""
        if self.q_norm is not None and self.k_norm is not None:  # |q| = |k| = 1, so that qk_scale bounds the logits
            q, k = self.q_norm(q) * self.dim_head**-0.5, self.k_norm(k) * self.dim_head**-0.5
        query_factors = (rearrange(factor, "b n d -> b 1 n d") for factor in (rotary.query_cos, rotary.query_sin))
        return rotate(q, *query_factors), rotate(k, rotary.key_cos, rotary.key_sin)

    @torch.no_grad()
    def merged(self, lora: LayerAdapter) -> tuple[Tensor, Tensor]:
        """Weights in and out with an adapter's update added, summed in float32; new tensors."""
        into, out = self.in_proj.weight, self.out_proj.weight
        update = torch.cat((lora.q.delta(), lora.k.delta(), lora.v.delta())).to(into.device)
        into = (into + F.pad(update, (0, 0, 0, len(into) - len(update)))).to(into.dtype)
        update = lora.o.delta().to(out.device)
        return into, (out + F.pad(update, (0, out.shape[1] - update.shape[1]))).to(out.dtype)

    def merge(self, lora: LayerAdapter | None) -> None:
        """Put the merged weights in place, if there is an adapter; models that share the old ones keep them."""
        if lora is not None:
            self.in_proj.weight.data, self.out_proj.weight.data = self.merged(lora)


def _both(out: Tensor, ff: Tensor, gate: Tensor, *, dropout: float) -> Tensor:
    """Attention's output and the gated feedforward side by side, (b, n, inner + f).

    Without gradients in as few passes over memory as there can be: on a CPU they cost more than the arithmetic.
    """
    if torch.is_grad_enabled() or dropout > 0:
        ff = F.silu(gate) * ff
        return torch.cat((out, F.dropout(ff, dropout) if dropout > 0 else ff), dim=-1)
    both = out.new_empty(*out.shape[:-1], out.shape[-1] + ff.shape[-1])
    both[..., : out.shape[-1]] = out
    torch.mul(F.silu(gate, inplace=True), ff, out=both[..., out.shape[-1] :])
    return both
