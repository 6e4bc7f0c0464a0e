"""Bytes and floating-point operations of a PaLM's step, counted by hand from its sizes.

Matrices alone are counted: norms are a thousandth. A multiply-add is two operations. One key/value head.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and a name for tables."""

    name: str
    num_tokens: int
    dim: int
    depth: int
    heads: int = 8
    dim_head: int = 64
    ff_mult: int = 4

    @property
    def head_weights(self) -> int:
        """Weights of the embedding, which is the read-out too."""
        return self.num_tokens * self.dim

    @property
    def layer_weights(self) -> int:
        """Weights of all layers: queries, key, value, the gated feedforward's two ways in, and both ways out."""
        inner, ff = self.heads * self.dim_head, self.ff_mult * self.dim
        return self.depth * self.dim * (inner + 2 * self.dim_head + 2 * ff + inner + ff)

    @property
    def weights(self) -> int:
        """All of them."""
        return self.head_weights + self.layer_weights

    def decode_bytes(self, *, batch: int, context: float, itemsize: int) -> float:
        """What one decoding step reads: every weight once, and each row's keys and values of `context` tokens."""
        return itemsize * (self.weights + batch * context * self.depth * 2 * self.dim_head)

    def attention_flops(self, *, context: float) -> float:
        """Of one token that sees `context` others: products with keys, and with values, in every head and layer."""
        return 4 * self.depth * self.heads * self.dim_head * context

    def decode_flops(self, *, batch: int, context: float) -> float:
        """Of one decoding step."""
        return batch * (2 * self.weights + self.attention_flops(context=context))

    def prefill_flops(self, *, batch: int, length: int) -> float:
        """Of reading prompts: the read-out is needed of the last token alone."""
        return batch * (length * self._trunk_flops(length) + 2 * self.head_weights)

    def train_flops(self, *, batch: int, length: int) -> float:
        """Of forward and backward pass: the backward pass takes two products for each of the forward pass."""
        return 3 * batch * length * (self._trunk_flops(length) + 2 * self.head_weights)

    def observe_flops(self, *, batch: int, length: int, response: int) -> float:
        """Of three passes (actor, critic, reference), of which two read out the response's tokens."""
        return 3 * batch * length * self._trunk_flops(length) + 2 * batch * response * 2 * self.head_weights

    def _trunk_flops(self, length: int) -> float:
        """Of a token in a causal pass over `length` of them, which sees half of them, without the read-out."""
        return 2 * self.layer_weights + self.attention_flops(context=(length + 1) / 2)


README = Shape("README", num_tokens=20_000, dim=512, depth=12)
ONE_BILLION = Shape("1B", num_tokens=20_000, dim=2048, depth=16, heads=16, dim_head=128)
EIGHT_BILLION = Shape("8B", num_tokens=256_000, dim=4096, depth=32, heads=16, dim_head=256)
PPO_SMALL = Shape("256x4", num_tokens=256, dim=256, depth=4)
