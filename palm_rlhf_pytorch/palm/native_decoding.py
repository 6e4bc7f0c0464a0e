"""Decoding by the native step: the same function as `Decoder`, on a CPU.

Weights are read where they are: nothing is laid out anew, and an adapter stays beside them, so that a call costs no
copies. Knows of the native code what native.py says.
Shapes: b rows, h heads, d features of a head, v vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.lora import Adapter, LayerAdapter
from palm_rlhf_pytorch.palm.block import RMS_EPS, ParallelTransformerBlock
from palm_rlhf_pytorch.palm.decoding import Decodable, Decoder, as_blocks, gains_of
from palm_rlhf_pytorch.palm.native import LARGEST_HEAD, WIDTH, Layer, Step, native
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
        self.keys = torch.zeros(len(blocks), batch, room // WIDTH, d, WIDTH, dtype=dtype)
        self.values = torch.zeros(len(blocks), batch, room, d, dtype=dtype)
        take = native("take", dtype)
        assert take is not None, "decodes_natively was asked"
        self._take = take
        layers = [_tensors(block, None if adapter is None else adapter.layer(i)) for i, block in enumerate(blocks)]
        rank_in, rank_out = _rank(layers, "up_in"), _rank(layers, "up_out")
        norm = model.norm.weight.detach().float()
        (dim, both), inner = first.out_proj.weight.shape, first.heads * d
        widths = {
            "x": dim, "normed": dim, "projected": len(first.in_proj.weight), "low": max(rank_in, rank_out), "both": both
        }  # fmt: skip
        scratch = {name: torch.empty(batch, width, dtype=dtype) for name, width in widths.items()}
        self._held = (layers, norm, scratch)  # their addresses are all that the step has
        self._layers = (Layer * len(blocks))(
            *(
                Layer(keys=keys.data_ptr(), values=values.data_ptr(), **_addresses(tensors))
                for tensors, keys, values in zip(layers, self.keys, self.values, strict=True)
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
        places = torch.arange(start, start + keys.shape[1])
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
        """
        step, logits = self._step, torch.empty(len(tokens), len(self.embedding), dtype=self.dtype)
        hidden = self.hidden_places
        tokens = tokens.contiguous()
        step.rows, step.place, step.tokens, step.logits = len(tokens), self.filled, tokens.data_ptr(), logits.data_ptr()
        step.positions, step.hidden_places = self.positions.data_ptr(), None if hidden is None else hidden.data_ptr()
        step.threads = torch.get_num_threads()
        self._take(step, self._layers)
        return logits

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (b, v) of final hidden states (b, d)."""
        return F.linear(hidden, self.embedding)


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
    trained = [] if adapter is None else list(adapter.parameters())
    if any(each.device.type != "cpu" for each in (*weights, *trained)) or torch.compiler.is_compiling():
        return False
    if any(type(each) not in PLAIN or not each.is_contiguous() or each.dtype != embedding.dtype for each in weights):
        return False
    block = blocks[0]
    sizes = (*block.out_proj.weight.shape, block.dim_head, block.dim_head * block.heads)
    if any(size % WIDTH for size in sizes) or block.dim_head > LARGEST_HEAD:
        return False
    return product_dtype(embedding) == embedding.dtype and native("take", embedding.dtype) is not None


PLAIN = (Tensor, torch.nn.Parameter)


def _tensors(block: ParallelTransformerBlock, lora: LayerAdapter | None) -> dict[str, Tensor | None]:
    """What the step needs of a layer; ranks are filled up with zeros to a multiple of WIDTH."""
    into, out = block.in_proj.weight.detach(), block.out_proj.weight.detach()
    found = {"norm": block.norm.weight.detach().float(), "into": into, "out": out, "gains": gains_of(block)}
    if lora is not None:
        down_in, up_in, down_out, up_out = (part.detach().to(into.dtype).mT for part in lora.side_by_side())
        found |= {
            "down_in": _filled(down_in, dim=0), "up_in": _filled(up_in, dim=1), "down_out": _filled(down_out, dim=0),
            "up_out": _filled(up_out, dim=1),
        }  # fmt: skip
    return found


def _filled(matrix: Tensor, *, dim: int) -> Tensor:
    more = _up(matrix.shape[dim]) - matrix.shape[dim]
    return F.pad(matrix, (0, 0, 0, more) if dim == 0 else (0, more)).contiguous()


def _up(size: int) -> int:
    return -(-size // WIDTH) * WIDTH


def _rank(layers: list[dict[str, Tensor | None]], name: str) -> int:
    ranks = [up.shape[1] for layer in layers if (up := layer.get(name)) is not None]
    return max(ranks, default=0)


def _addresses(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    return {name: None if each is None else each.data_ptr() for name, each in tensors.items()}
