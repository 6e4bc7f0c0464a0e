"""Decoding by the native step: the same function as `Decoder`, on a CPU.

Weights are read where they are: nothing is laid out anew, and an adapter stays beside them, so that a call costs no
copies. Knows of the native code what native.py says.
Shapes: b rows, h heads, d features of a head, v vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.lora import Adapter, LayerAdapter
from palm_rlhf_pytorch.palm.block import RMS_EPS, ParallelTransformerBlock
from palm_rlhf_pytorch.palm.decoding import Decodable, Decoder, as_blocks, gains_of
from palm_rlhf_pytorch.palm.native import LARGEST_HEAD, WIDTH, Layer, Step, is_plain, native
from palm_rlhf_pytorch.palm.rows import Rows
from palm_rlhf_pytorch.products import product_dtype


class NativeDecoder(Rows):
    """Weights ready for one token a row, and the rows' cache; belongs to one call."""

    def __init__(self, model: Decodable, *, batch: int, room: int, adapter: Adapter | None) -> None:
        """Make room for the rows, and say where everything is.

        Args:
            model: whose weights; `decodes_natively` says whether they can be.
            batch: rows b.
            room: tokens a row may have.
            adapter: low-rank adapter of the pass.
        """
        blocks = as_blocks(model)
        first, self.embedding = blocks[0], model.token_emb.weight.detach()
        dtype, d = self.embedding.dtype, first.dim_head
        room = _up(room)  # the step reads keys in vectors
        super().__init__(
            batch=batch, room=room, dim_head=d, xpos_scale_base=model.xpos_scale_base, dtype=dtype,
            device=self.embedding.device, replayable=False,
        )  # fmt: skip
        # keys feature by feature, so many side by side
        options: dict[str, Any] = {"dtype": dtype, "device": self.device}
        self.keys = torch.zeros(len(blocks), batch, room // WIDTH, d, WIDTH, **options)
        self.values = torch.zeros(len(blocks), batch, room, d, **options)
        take = native("take", dtype)
        assert take is not None, "decodes_natively was asked"
        self._take = take
        loras = [None if adapter is None else adapter.layer(index) for index in range(len(blocks))]
        rank_in, rank_out = _ranks(loras)
        layers = [_tensors(*each, rank_in, rank_out) for each in zip(blocks, loras, strict=True)]
        norm = _gain(model.norm)
        (dim, both), inner = first.out_proj.weight.shape, first.heads * d
        widths = {
            "x": dim, "normed": dim, "projected": len(first.in_proj.weight), "low": max(rank_in, rank_out), "both": both
        }  # fmt: skip
        scratch = {name: torch.empty(batch, width, **options) for name, width in widths.items()}
        self._held = (layers, norm, scratch)  # their addresses are all that the step has
        self._layers = (Layer * len(blocks))(
            *(
                Layer(keys=keys.data_ptr(), values=values.data_ptr(), eps=block.norm.eps, **_addresses(tensors))
                for block, tensors, keys, values in zip(blocks, layers, self.keys, self.values, strict=True)
            )
        )
        self._step = Step(
            depth=len(blocks), dim=dim, heads=first.heads, dim_head=d, wide=both - inner,
            vocabulary=len(self.embedding), rank_in=rank_in, rank_out=rank_out, room=room,
            last_position=self.factors.shape[1] - 1, scale=first.scale, eps=model.norm.eps, gain_eps=RMS_EPS,
            **_addresses({"turns": self.factors, "norm": norm, "embedding": self.embedding} | scratch),
        )  # fmt: skip

    def store(self, layer: int, rows: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Put a layer's keys and values (k, n, d) of rows (k,) at places from start on."""
        places = torch.arange(start, start + keys.shape[1], device=self.device)
        self.keys[layer].mT[rows[:, None], places // WIDTH, places % WIDTH] = keys
        self.values[layer, rows, start : start + keys.shape[1]] = values

    def move(self, rows: Tensor) -> None:
        """Keep some rows' keys and values alone, (b',) ascending; the memory stays where it is."""
        for kept, filled in ((self.keys, _up(self.filled) // WIDTH), (self.values, self.filled)):
            for layer in kept:
                layer[: len(rows), :filled] = layer[rows, :filled]

    def __call__(self, tokens: Tensor, *, span: int) -> Tensor:
        """Logits (b, v) of the successors of tokens (b,), which take the next place; `filled` is the caller's to raise.

        Args:
            tokens: ids, (b,).
            span: what the property says.

        Raises:
            IndexError: if there is no such token, or no place is left.
            ValueError: if there are not as many tokens as rows.
        """
        if tokens.shape != self.positions.shape:
            raise ValueError(f"tokens {tuple(tokens.shape)} must be one for each of {len(self.positions)} rows")
        if self.filled >= self.room:
            raise IndexError(f"rows have room for {self.room} tokens, and hold {self.filled}")
        step, hidden = self._step, self.hidden_places
        logits = torch.empty(len(tokens), len(self.embedding), dtype=self.dtype, device=self.device)
        tokens = tokens.to(torch.long).contiguous()
        step.rows, step.place, step.tokens, step.logits = len(tokens), self.filled, tokens.data_ptr(), logits.data_ptr()
        step.positions, step.hidden_places = self.positions.data_ptr(), None if hidden is None else hidden.data_ptr()
        step.threads = torch.get_num_threads()
        wrong = self._take(step, self._layers)
        if wrong >= 0:
            raise IndexError(f"tokens[{wrong}] ({int(tokens[wrong])}) must be from 0 to {len(self.embedding) - 1}")
        return logits

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (b, v) of final hidden states (b, d)."""
        return F.linear(hidden.to(self.dtype), self.embedding)


def new_decoder(
    model: Decodable, *, batch: int, room: int, adapter: Adapter | None, steps: int
) -> Decoder | NativeDecoder:
    """What takes one token a row and step after a prefill: the native one where it can; arguments as `Decoder`'s."""
    if decodes_natively(model, adapter):
        return NativeDecoder(model, batch=batch, room=room, adapter=adapter)
    return Decoder(model, batch=batch, room=room, adapter=adapter, steps=steps)


def decodes_natively(model: Decodable, adapter: Adapter | None = None) -> bool:
    """Whether there is a native step for a model's weights where they are: their device, dtype, layout and sizes."""
    blocks, embedding = as_blocks(model), model.token_emb.weight
    weights = [embedding, *(weight for block in blocks for weight in (block.in_proj.weight, block.out_proj.weight))]
    others = [block.norm.weight for block in blocks] + ([] if adapter is None else list(adapter.parameters()))
    if not all(map(is_plain, (*weights, *others))):
        return False
    if not all(each.is_contiguous() and each.dtype == embedding.dtype for each in weights):
        return False
    block = blocks[0]
    (dim, both), inner = block.out_proj.weight.shape, block.heads * block.dim_head
    if any(size % WIDTH for size in (dim, both, inner, block.dim_head)) or block.dim_head > LARGEST_HEAD:
        return False
    if any(_shape(each) != _shape(block) for each in blocks):
        return False
    return product_dtype(embedding) == embedding.dtype and native("take", embedding.dtype) is not None


def _shape(block: ParallelTransformerBlock) -> tuple[object, ...]:
    shapes = block.in_proj.weight.shape, block.out_proj.weight.shape
    return *shapes, block.heads, block.dim_head, block.scale, block.q_norm is None


def _tensors(
    block: ParallelTransformerBlock, lora: LayerAdapter | None, rank_in: int, rank_out: int
) -> dict[str, Tensor | None]:
    """What the step needs of a layer; ranks are filled up with zeros to those of all layers."""
    into, out, gains = block.in_proj.weight.detach(), block.out_proj.weight.detach(), gains_of(block)
    gains = None if gains is None else gains.float().contiguous()
    found = {"norm": _gain(block.norm), "into": into, "out": out, "gains": gains}
    if lora is not None:
        down_in, up_in, down_out, up_out = (part.detach().to(into.dtype) for part in lora.side_by_side())
        found |= {
            "down_in": _filled(down_in, rank_in).mT.contiguous(), "up_in": _filled(up_in.mT, rank_in),
            "down_out": _filled(down_out, rank_out).mT.contiguous(), "up_out": _filled(up_out.mT, rank_out),
        }  # fmt: skip
    return found


def _gain(norm: torch.nn.LayerNorm) -> Tensor:
    return norm.weight.detach().float().contiguous()


def _filled(matrix: Tensor, rank: int) -> Tensor:
    return F.pad(matrix, (0, rank - matrix.shape[1])).contiguous()


def _ranks(loras: list[LayerAdapter | None]) -> tuple[int, int]:
    """The largest ranks of ways in and out, in multiples of WIDTH."""
    known = [lora for lora in loras if lora is not None]
    into = (sum(len(part.B) for part in (lora.q, lora.k, lora.v)) for lora in known)
    return _up(max(into, default=0)), _up(max((len(lora.o.B) for lora in known), default=0))


def _up(size: int) -> int:
    return -(-size // WIDTH) * WIDTH


def _addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    return {name: None if each is None else each.data_ptr() for name, each in tensors.items()}
