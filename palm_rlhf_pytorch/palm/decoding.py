"""Decoding: one token of each row through all layers, over keys and values kept so far.

The same function as the model's own pass, written for a step that is repeated: weights laid out for products with few
rows, heads folded into the query length, queries, keys and values placed and kept in one go, nothing allocated that
grows, and no number asked of the device, so that a CUDA graph can replay it. On a CPU an operation between two products
costs some ten times its arithmetic, the caches being full of weights: fewer operations are the faster ones.
Shapes: b rows, h heads, d features, v vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.lora import Adapter, LayerAdapter
from palm_rlhf_pytorch.palm.block import RMS_EPS, ParallelTransformerBlock
from palm_rlhf_pytorch.palm.rows import SPAN, Rows
from palm_rlhf_pytorch.products import Product, pack, product_dtype
from palm_rlhf_pytorch.tensors import at_least_float32

STEPS_WORTH_PACKING = 12  # laying out a copy of the weights takes as long as it saves in about ten steps


class Decodable(Protocol):
    """What a decoder takes of a language model."""

    layers: nn.ModuleList
    token_emb: nn.Embedding
    norm: nn.LayerNorm
    xpos_scale_base: int | None


class LowRank(NamedTuple):
    """A layer's adapter kept beside its weights: queries, keys and values in one, and the way out."""

    down_in: Tensor  # (d, 3 r)
    up_in: Tensor  # (3 r, inner + 2 dim_head), block by block, scale included
    down_out: Tensor  # (inner, r)
    up_out: Tensor  # (r, d)


class DecodingLayer(NamedTuple):
    """What a step needs of one layer."""

    norm: nn.LayerNorm
    project_in: Product
    project_out: Product
    low_rank: LowRank | None
    gains: Tensor | None  # of normalised queries and keys, (h + 1, 2, dim_head / 2), dim_head^-0.5 included


class Decoder(Rows):
    """A language model in the middle of generation: its weights ready for one token a row, and the rows' cache.

    Belongs to one call. In float32 an adapter is merged into copies of the weights; in half precision, where the sum
    would round small updates away, it stays beside them. The model's own weights are never written.
    """

    def __init__(
        self, model: Decodable, *, batch: int, room: int, adapter: Adapter | None, steps: int,
        replayable: bool | None = None,
    ) -> None:  # fmt: skip
        """Lay out the weights, and make room for the rows.

        Args:
            model: whose weights.
            batch: rows b.
            room: tokens a row may have.
            adapter: low-rank adapter of the pass.
            steps: how often a step will be taken; few are not worth copies of the weights.
            replayable: read the cache in multiples of SPAN, so that a CUDA graph of one step serves for the next;
                room is rounded up to one. None where there are such graphs.

        Raises:
            TypeError: if a layer was put into a wrapper: what that does to it would be left out.
        """
        blocks = as_blocks(model)
        self.embedding, self.norm = model.token_emb.weight, model.norm
        dtype, device = product_dtype(self.embedding), self.embedding.device
        self.heads, self.dim_head, self.scale = blocks[0].heads, blocks[0].dim_head, blocks[0].scale
        replayable = device.type == "cuda" if replayable is None else replayable
        rows = batch if steps >= STEPS_WORTH_PACKING else None
        self.layers = [
            _decoding_layer(block, None if adapter is None else adapter.layer(index), dtype=dtype, rows=rows)
            for index, block in enumerate(blocks)
        ]
        self.project_vocabulary = _product(self.embedding.detach(), dtype=dtype, rows=rows)
        room = -(-room // SPAN) * SPAN if replayable else room
        # of each layer keys and values together, (b, 2, room, d)
        self.cache = torch.zeros(len(blocks), batch, 2, room, self.dim_head, dtype=dtype, device=device)
        super().__init__(
            batch=batch, room=room, dim_head=self.dim_head, xpos_scale_base=model.xpos_scale_base, dtype=dtype,
            device=device, replayable=replayable,
        )  # fmt: skip
        self.kinds = torch.tensor([0] * self.heads + [1, 2], device=device)  # of the factors: queries, key, value
        self.signs = torch.tensor([-1.0, 1.0], device=device)[:, None]  # of the sines, for halves (second, first)

    def store(self, layer: int, rows: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Put a layer's keys and values (k, n, d) of rows (k,) at places from start on."""
        for kind, kept in enumerate((keys, values)):
            self.cache[layer, rows, kind, start : start + kept.shape[1]] = kept

    def move(self, rows: Tensor) -> None:
        """Keep some rows' keys and values alone, (b',) ascending."""
        for cache in self.cache:
            cache[: len(rows), :, : self.filled] = cache[rows, :, : self.filled]
        self.cache = self.cache[:, : len(rows)]

    def __call__(self, tokens: Tensor, *, span: int) -> Tensor:
        """Logits (b, v) of the successors of tokens (b,), which take the next place; `filled` is the caller's to raise.

        Args:
            tokens: ids, (b,).
            span: what the property says.
        """
        x = F.embedding(tokens, self.embedding)
        cos, sin = self.factors.index_select(1, self.positions).index_select(2, self.kinds)
        sin = sin * self.signs
        bias = None
        if self.hidden_places is not None:
            self.hidden_places.index_fill_(2, self.place, 0.0)
            bias = self.hidden_places[:, None, :, :span]
        seen = (self.cache[:, :, kind : kind + 1, :span].unbind() for kind in range(2))
        for layer, cache, keys, values in zip(self.layers, self.cache.unbind(), *seen, strict=True):
            x = self._layer(x, layer, cache, keys, values, cos=cos, sin=sin, bias=bias)
        self.place += 1
        self.positions += 1
        self.positions.clamp_(max=self.factors.shape[1] - 1)  # a row that has ended goes on, and is not looked at
        return self.read_out(_normalise(x, self.norm))

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (b, v) of final hidden states (b, d)."""
        return self.project_vocabulary(hidden.to(self.dtype))

    def _layer(
        self, x: Tensor, layer: DecodingLayer, cache: Tensor, keys: Tensor, values: Tensor, *, cos: Tensor, sin: Tensor,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """X (b, d) after a layer; its cache is (b, 2, room, dim_head), the part it sees (b, 1, span, dim_head) each."""
        h, d = self.heads, self.dim_head
        normed = _normalise(x, layer.norm).to(self.dtype)
        projected = layer.project_in(normed)
        low = layer.low_rank
        if low is not None:
            projected[:, : (h + 2) * d].addmm_(normed @ low.down_in, low.up_in)
        wide = (projected.shape[1] - (h + 2) * d) // 2
        placing, ff, gate = projected.split(((h + 2) * d, wide, wide), dim=1)
        placed = self._place(placing.view(-1, h + 2, 2, d // 2), layer.gains, cos, sin)
        query, kept = placed.view(-1, h + 2, 1, d).split((h, 2), dim=1)
        cache.index_copy_(2, self.place, kept)
        # all heads see the same keys: one head with h queries reads them once, not h times
        query = query.transpose(1, 2)
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=self.scale).flatten(1)
        both = torch.cat((out, F.silu(gate, inplace=True).mul_(ff)), dim=1)
        x = layer.project_out(both, onto=x) if x.dtype == self.dtype else x + layer.project_out(both)
        return x if low is None else x.add_((out @ low.down_out) @ low.up_out)

    def _place(self, x: Tensor, gains: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, key and value (b, h + 2, 2, d / 2), halves of their pairs apart; a value that is finite stays so."""
        if gains is not None:
            normed = F.rms_norm(at_least_float32(x[:, :-1]), x.shape[-2:], eps=RMS_EPS) * gains
            x = torch.cat((normed, x[:, -1:].to(normed.dtype)), dim=1)
        return (x * cos).add_(x.flip(2) * sin).to(self.dtype)


def _normalise(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, None, norm.eps)


def as_blocks(model: Decodable) -> list[ParallelTransformerBlock]:
    """The model's layers, none of them in a wrapper.

    Raises:
        TypeError: if one is: what the wrapper does to it would be left out.
    """
    blocks = []
    for index, layer in enumerate(model.layers):
        if not isinstance(layer, ParallelTransformerBlock):
            raise TypeError(
                f"layers.{index} is a {type(layer).__name__}, not a ParallelTransformerBlock: generation reads the"
                " weights of the layers itself; wrap the whole model, or compile a layer in place (layer.compile())"
            )
        blocks.append(layer)
    return blocks


def gains_of(block: ParallelTransformerBlock) -> Tensor | None:
    """Gains of normalised queries and keys, dim_head^-0.5 included, (h + 1, dim_head) of at least float32."""
    if block.q_norm is None or block.k_norm is None:
        return None
    gains = torch.stack((*[block.q_norm.weight] * block.heads, block.k_norm.weight)).detach()
    return at_least_float32(gains) * block.dim_head**-0.5


def _decoding_layer(
    block: ParallelTransformerBlock, lora: LayerAdapter | None, *, dtype: torch.dtype, rows: int | None
) -> DecodingLayer:
    weights = block.in_proj.weight.detach(), block.out_proj.weight.detach()
    low_rank = None
    if lora is not None and dtype in (torch.float32, torch.float64):
        weights = block.merged(lora)
    elif lora is not None:
        low_rank = LowRank(*(part.detach().to(dtype) for part in lora.side_by_side()))
    gains = gains_of(block)
    project_in, project_out = (_product(weight, dtype=dtype, rows=rows) for weight in weights)
    return DecodingLayer(
        block.norm, project_in, project_out, low_rank, None if gains is None else gains.unflatten(1, (2, -1))
    )


def _product(weight: Tensor, *, dtype: torch.dtype, rows: int | None) -> Product:
    return pack(weight.to(dtype), rows=rows)
