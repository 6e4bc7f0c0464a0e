"""Rows in the middle of generation: their keys and values, how far each has come, what it may not look at.

What all that changes with a step is a tensor written in place, so that a CUDA graph can replay it. Knows nothing of how
a step is computed.
Shapes: b rows, d features of a head.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from palm_rlhf_pytorch.attention import KVCache
from palm_rlhf_pytorch.rotary import rotary_factors

SPAN = 256  # with CUDA graphs, attention reads the cache in multiples of so many places: one graph for each


class Rows(ABC):
    """What a decoder keeps of a batch beside keys and values, whose layout is its own; it belongs to one call.

    hidden_places: (b, 1, room), minus infinity where a row has nothing to see, or None where all see all.
    positions: of the rows' next tokens, (b,).
    filled: the place where these go in the cache, which the caller raises after each step.
    place: the same where the device reads it, (1,), for steps that a CUDA graph replays.
    factors: cosines and sines that turn a query, a key and a value at each position, (2, room, 3, 1, d / 2).
    """

    def __init__(
        self, *, batch: int, room: int, dim_head: int, xpos_scale_base: int | None, dtype: torch.dtype,
        device: torch.device, replayable: bool,
    ) -> None:  # fmt: skip
        """Nothing has been read yet.

        Args:
            batch: rows b.
            room: places a row has in the cache.
            dim_head: features d of a head.
            xpos_scale_base: of the model's positions.
            dtype: of keys and values.
            device: where they are.
            replayable: read the cache in multiples of SPAN, so that a CUDA graph of one step serves for the next.
        """
        self.room, self.dtype, self.device, self.replayable = room, dtype, device, replayable
        self.hidden_places = self._places(batch, -torch.inf) if replayable else None
        self.positions = torch.zeros(batch, dtype=torch.long, device=self.device)
        self.place = torch.zeros(1, dtype=torch.long, device=self.device)
        self.filled = 0
        self.factors = _turns(room, dim_head, scale_base=xpos_scale_base, device=self.device)

    def take(self, cache: KVCache, rows: Tensor, sources: Tensor, *, end: int) -> None:
        """Fill rows with what a prefill cached: its rows `sources`, the last token at place end - 1.

        Args:
            cache: keys and values of prompts.
            rows: which rows of this batch, (k,).
            sources: which rows of the cache they get, (k,).
            end: tokens of the longest prompt of all, padding included.
        """
        start = end - cache.filled
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self.store(layer, rows, start, keys[sources, : cache.filled], values[sources, : cache.filled])
        mask = cache.mask[sources, : cache.filled]
        if self.hidden_places is None and (start or not bool(mask.all())):
            self.hidden_places = self._places(len(self.positions), 0.0)
        if self.hidden_places is not None:
            self.hidden_places[rows, 0, :start] = -torch.inf
            hidden = torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, -torch.inf)
            self.hidden_places[rows, 0, start:end] = hidden
        self.positions[rows] = cache.lengths[sources]
        self.place.fill_(end)
        self.filled = end

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone, in ascending order."""
        self.move(rows)
        self.positions = self.positions[rows]
        if self.hidden_places is not None:
            self.hidden_places = self.hidden_places[rows]

    @abstractmethod
    def store(self, layer: int, rows: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Put a layer's keys and values (k, n, d) of rows (k,) at places from start on."""

    @abstractmethod
    def move(self, rows: Tensor) -> None:
        """Keep some rows' keys and values alone, (b',) ascending: they move within their memory."""

    @property
    def span(self) -> int:
        """How many places of the cache the next step reads: those filled then, or for graphs the next multiple."""
        needed = self.filled + 1
        return -(-needed // SPAN) * SPAN if self.replayable else needed

    def _places(self, batch: int, value: float) -> Tensor:
        return torch.full((batch, 1, self.room), value, dtype=self.dtype, device=self.device)


def _turns(room: int, dim_head: int, *, scale_base: int | None, device: torch.device) -> Tensor:
    """Cosines and sines that turn a query, a key and a value at each position, (2, room, 3, 1, dim_head / 2)."""
    factors = rotary_factors(torch.arange(room, device=device), dim_head, scale_base=scale_base)
    one, none = torch.ones_like(factors.query_cos), torch.zeros_like(factors.query_sin)
    cos = torch.stack((factors.query_cos, factors.key_cos, one), dim=2)
    sin = torch.stack((factors.query_sin, factors.key_sin, none), dim=2)
    return torch.cat((cos, sin))[..., None, dim_head // 2 :].contiguous()
