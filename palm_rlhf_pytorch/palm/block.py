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

from palm_rlhf_pytorch.attention import attend, attention_mask
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
        since: int = 0,
    ) -> Tensor:
        """The layer's update of x (b, n, d).

        Args:
            x: features.
            common: what layers have in common.
            lora: the layer's adapter.
            store: swaps new keys and values for all that a cache holds.
            since: the first place whose update is wanted; of those before it only keys and values are computed.

        Returns:
            (b, n - since, d).
        """
        if not common.recompute:
            return self._update(x, common, lora, store, since)
        random = common.attn_dropout > 0 or common.ff_dropout > 0
        update: Tensor = checkpoint(
            self._update, x, common, lora, store, since, use_reentrant=False, preserve_rng_state=random
        )
        return update

    def _update(
        self,
        x: Tensor,
        common: Pass,
        lora: LayerAdapter | None,
        store: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        since: int,
    ) -> Tensor:
        x = self.norm(x)
        wanted = x[:, since:]
        projected = linear(wanted, self.in_proj.weight)
        into, ff, gate = projected.split((sum(self.splits[:3]), *self.splits[3:]), dim=-1)
        if lora is not None:
            into = lora.add_in(into, wanted)
        q, k, v = into.split(self.splits[:3], dim=-1)
        if since:
            k, v = (torch.cat(parts, dim=1) for parts in zip(self._seen(x[:, :since], lora), (k, v), strict=True))
        q = rearrange(q, "b n (h d) -> b h n d", h=self.heads)
        q, k = self._place(q, k, common.rotary)
        if store is not None:
            k, v = store(k, v)
        causal, mask = common.causal, None if common.mask is None else common.mask[:, since:]
        if since and causal:  # fused kernels count queries from the first key; the last query alone sees all keys
            alone = q.shape[2] == 1
            mask = None if alone else attention_mask(None, q.shape[2], k.shape[1], causal=True, device=x.device)
            causal = False
        out = attend(q, k, v, scale=self.scale, causal=causal, mask=mask, dropout=common.attn_dropout, fused=self.fused)
        out = rearrange(out, "b h n d -> b n (h d)")
        update = linear(_both(out, ff, gate, dropout=common.ff_dropout), self.out_proj.weight)
        return update if lora is None else lora.add_out(update, out)

    def _seen(self, x: Tensor, lora: LayerAdapter | None) -> tuple[Tensor, ...]:
        """Keys and values alone of normalised features (b, n, d), not yet placed, (b, n, dim_head) each."""
        inner, *kept = self.splits[:3]
        projected = linear(x, self.in_proj.weight[inner : inner + sum(kept)])
        return (projected if lora is None else lora.add_seen(projected, x)).split(kept, dim=-1)

    def _place(self, q: Tensor, k: Tensor, rotary: RotaryFactors) -> tuple[Tensor, Tensor]:
        """Normalise where asked, then turn queries (b, h, i, d), the last of them, and keys (b, n, d) by positions."""
        if self.q_norm is not None and self.k_norm is not None:  # |q| = |k| = 1, so that qk_scale bounds the logits
            q, k = self.q_norm(q) * self.dim_head**-0.5, self.k_norm(k) * self.dim_head**-0.5
        last = slice(k.shape[1] - q.shape[2], None)
        query_factors = (factor[:, None, last] for factor in (rotary.query_cos, rotary.query_sin))
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

    Without gradients in as few passes over memory as there can be: on a CPU they cost more than the arithmetic. A
    compiler makes its own of them.
    """
    if torch.is_grad_enabled() or dropout > 0 or torch.compiler.is_compiling():
        ff = F.silu(gate) * ff
        return torch.cat((out, F.dropout(ff, dropout) if dropout > 0 else ff), dim=-1)
    both = out.new_empty(*out.shape[:-1], out.shape[-1] + ff.shape[-1])
    both[..., : out.shape[-1]] = out
    torch.mul(F.silu(gate, inplace=True), ff, out=both[..., out.shape[-1] :])
    return both
