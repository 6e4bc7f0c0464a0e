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

from palm_rlhf_pytorch.attention import attend
from palm_rlhf_pytorch.lora import LayerAdapter
from palm_rlhf_pytorch.rotary import RotaryFactors, rotate

RMS_EPS = 1e-6  # the same in every dtype: torch's default is 0.008 in bfloat16, which shrinks what it normalises


class Pass(NamedTuple):
    """What all layers of one forward pass have in common.

    rotary: factors that place queries and keys.
    causal: each query sees the keys up to its own place; for a pass without mask.
    mask: True where a query may look at a key, (b or 1, i, j), or None.
    attn_dropout: probability of dropping an attention weight.
    ff_dropout: probability of dropping a feedforward feature.
    """

    rotary: RotaryFactors
    causal: bool
    mask: Tensor | None
    attn_dropout: float
    ff_dropout: float


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
        x = self.norm(x)
        projected = self.in_proj(x)
        q, k, v, ff, gate = projected.split(self.splits, dim=-1)
        if lora is not None:
            # in the projection's dtype: under autocast x is wider, and adapted passes alone would attend in float32
            dq, dk, dv = lora.project_in(x).to(projected.dtype).split(self.splits[:3], dim=-1)
            q, k, v = q + dq, k + dk, v + dv
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        q, k = self._place(q, k, common.rotary)
        if store is not None:
            k, v = store(k, v)
        out = attend(
            q, k, v, scale=self.scale, causal=common.causal, mask=common.mask, dropout=common.attn_dropout,
            fused=self.fused,
        )  # fmt: skip
        out = rearrange(out, "b h n d -> b n (h d)")
        ff = F.silu(gate) * ff
        ff = F.dropout(ff, common.ff_dropout) if common.ff_dropout > 0 else ff
        update = self.out_proj(torch.cat((out, ff), dim=-1))
        return update if lora is None else update + lora.o(out)

    def _place(self, q: Tensor, k: Tensor, rotary: RotaryFactors) -> tuple[Tensor, Tensor]:
        """Normalise where asked, then turn queries (b, h, n, d) and keys (b, n, d) by their positions."""
        if self.q_norm is not None and self.k_norm is not None:  # |q| = |k| = 1, so that qk_scale bounds the logits
            q, k = self.q_norm(q) * self.dim_head**-0.5, self.k_norm(k) * self.dim_head**-0.5
        query_factors = (rearrange(factor, "b n d -> b 1 n d") for factor in (rotary.query_cos, rotary.query_sin))
        return rotate(q, *query_factors), rotate(k, rotary.key_cos, rotary.key_sin)

    @torch.no_grad()
    def merge(self, lora: LayerAdapter | None) -> None:
        """Add an adapter's update, if there is one, to the weights, summed in float32.

        The sums are new tensors: a model that shares its weights with this one keeps them as they were.
        """
        if lora is None:
            return
        into = self.in_proj.weight
        update = torch.cat((lora.q.delta(), lora.k.delta(), lora.v.delta())).to(into.device)
        into.data = (into + F.pad(update, (0, 0, 0, len(into) - len(update)))).to(into.dtype)
        out = self.out_proj.weight
        update = lora.o.delta().to(out.device)
        out.data = (out + F.pad(update, (0, out.shape[1] - update.shape[1]))).to(out.dtype)
