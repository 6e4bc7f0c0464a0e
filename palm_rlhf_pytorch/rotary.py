"""Rotary position embedding with xPos decay, stateless: positions in, factors out.

A query and a key turned by their own positions have a product that depends on the distance alone. xPos also shrinks
that product with distance, by scaling the query at position i with s^(i / base) and the key at j with s^(-j / base).
Su et al., "RoFormer", https://arxiv.org/abs/2104.09864
Sun et al., "A Length-Extrapolatable Transformer", https://arxiv.org/abs/2212.10554

Angles and scales are float32 whatever the model's dtype. There is no cache and no centre that moves with the longest
call, so a token's factors never change: that is what a key/value cache needs. Knows nothing of attention.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

THETA = 10_000.0  # base of the angles' geometric series, section 3.3 of RoFormer
GAMMA = 0.4  # section 3.2 of xPos: the smallest scale is GAMMA / (1 + GAMMA) = 1 / 3.5


class RotaryFactors(NamedTuple):
    """What queries and keys are multiplied by, xPos scale included; each (b or 1, n, d), float32.

    Pairs are features k and k + d / 2. Sines have the sign they are added with: minus for the first half.
    """

    query_cos: Tensor
    query_sin: Tensor
    key_cos: Tensor
    key_sin: Tensor


def rotary_factors(positions: Tensor, dim_head: int, *, scale_base: int | None = None) -> RotaryFactors:
    """Factors for tokens at the given positions.

    angle_k = position * 10000^(-2k / d);  scale_k = ((2k / d + 0.4) / 1.4)^(position / scale_base)

    Args:
        positions: position of each token in its own row, (b, n) or (n,), whole numbers from 0.
        dim_head: d, even.
        scale_base: tokens over which the fastest-decaying pair of features shrinks by 3.5; None turns the decay off.

    Returns:
        RotaryFactors with a batch dimension, (b or 1, n, d).
    """
    positions = positions.reshape(-1, positions.shape[-1]).float()
    pairs = torch.arange(0, dim_head, 2, device=positions.device, dtype=torch.float32) / dim_head
    angles = positions[..., None] * THETA**-pairs
    cos, sin = angles.cos(), angles.sin()
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    if scale_base is None:
        return RotaryFactors(cos, sin, cos, sin)
    scale = ((pairs + GAMMA) / (1 + GAMMA)) ** (positions[..., None] / scale_base)
    scale = torch.cat((scale, scale), dim=-1)
    return RotaryFactors(cos * scale, sin * scale, cos / scale, sin / scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (..., n, d) by the factors (broadcast against it); computed in float32, returned in x's dtype."""
    first, second = x.chunk(2, dim=-1)
    # not addcmul, which rounds once or twice as the layout has it: a row's bits would depend on its neighbours
    return (x * cos).add_(torch.cat((second, first), dim=-1) * sin).to(x.dtype)


def longest_position(dtype: torch.dtype, *, scale_base: int | None) -> int | float:
    """How many tokens xPos can scale before keys leave the dtype's range (infinity without decay).

    A key at j carries 3.5^(j / base). It must be representable, with room for its own size; where the exponent has
    eight bits (float32, bfloat16) its product with a query must be too, also for the pairs that the mask then hides.
    """
    if scale_base is None:
        return math.inf
    room = 32.0 if dtype == torch.float16 else 1e5
    return int(scale_base * math.log(torch.finfo(dtype).max / room) / math.log((1 + GAMMA) / GAMMA))
