"""From logits to a token: temperature, top-k, top-p (`truncation` has the cut), and one draw.

Everything is float32 or wider whatever the model's dtype: noise drawn in half precision samples another distribution.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.palm.native import draw_tokens
from palm_rlhf_pytorch.tensors import at_least_float32
from palm_rlhf_pytorch.truncation import Truncation, truncate

SMALLEST_TEMPERATURE = torch.finfo(torch.float32).tiny  # below it float32 divides by zero; it is greedy long before


class Sample(NamedTuple):
    """Tokens (...) and the log-probability (nats) each was drawn with, (...)."""

    tokens: Tensor
    logprobs: Tensor


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Sample:
    """Draw one token a row from softmax(logits / temperature), cut to top-k and top-p where given.

    The draw inverts the cumulative distribution with one uniform number a row: exact, and on a CPU ten times as fast
    as adding Gumbel noise to a large vocabulary.

    Args:
        logits: (..., v), any float dtype. Where a NaN is among them, the log-probability is NaN.
        temperature: 0 takes the most likely token; its log-probability is then reported at temperature 1.
        top_k: keep the k most likely tokens.
        top_p: keep the smallest set of tokens whose mass reaches top_p.
        generator: random state; None takes torch's global one.
        uniform: numbers from [0, 1) to draw with, (...), in place of the generator's.

    Returns:
        Sample(tokens, logprobs), the log-probability under the distribution that was drawn from.
    """
    if temperature < SMALLEST_TEMPERATURE:
        logits = at_least_float32(logits)
        tokens = logits.argmax(dim=-1)
        return Sample(tokens, logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(dim=-1))
    if uniform is None:
        shape, device = logits.shape[:-1], logits.device
        uniform = torch.rand(shape, dtype=uniform_dtype(device), device=device, generator=generator)
    drawn = draw_tokens(logits, uniform, temperature=temperature) if top_k is None and top_p is None else None
    if drawn is not None:
        return Sample(*drawn)
    logits = at_least_float32(logits)
    if temperature != 1:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # no infinity at a small temperature
    probabilities = truncate(logits, top_k=top_k, top_p=top_p).softmax(dim=-1)
    tokens = _draw(probabilities, uniform)
    return Sample(tokens, probabilities.gather(-1, tokens[..., None])[..., 0].log())


def uniform_dtype(device: torch.device) -> torch.dtype:
    """Of uniform numbers: float64 where the device has it, since float32 knows no multiple below 2^-24."""
    return torch.float32 if device.type == "mps" else torch.float64


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution (..., v) at uniform (...); tokens of probability 0 never come.

    In two levels, first among blocks of tokens and then within one: running sums go one by one, so they are kept short.
    """
    width = _block_width(probabilities.shape[-1])
    blocks = F.pad(probabilities, (0, -probabilities.shape[-1] % width)).unflatten(-1, (-1, width))
    sums = blocks.sum(dim=-1).to(uniform.dtype).cumsum(dim=-1)
    target = uniform[..., None] * sums[..., -1:]
    block = _first_above(sums, target)
    within = blocks.gather(-2, block[..., None].expand(*block.shape, width))[..., 0, :]
    before = F.pad(sums, (1, 0)).gather(-1, block)
    token = _first_above(within.to(uniform.dtype).cumsum(dim=-1), target - before)
    return (block * width + token)[..., 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first place (..., 1) whose running sum (..., k) exceeds the target (..., 1) and which adds to it.

    Where rounding took the target to the whole sum or beyond it, the last place that adds.
    """
    found = torch.searchsorted(cumulative, target, right=True)
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1, keepdim=True)  # of NaN the first: no place is beyond
    return torch.minimum(found, last)


@cache
def _block_width(num_tokens: int) -> int:
    """The divisor of num_tokens next to its root; where none is near, the root, and the last block is padded."""
    root = math.isqrt(num_tokens)
    divisors = [width for width in range(max(1, root // 4), 4 * root + 1) if num_tokens % width == 0]
    return min(divisors, key=lambda width: abs(width - root), default=root)


def check_sampling(*, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings that name no distribution.

    Raises:
        TypeError: if top_k is not a whole number.
        ValueError: if temperature is below 0 or not finite, top_k below 1, or top_p outside (0, 1].
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature ({temperature}) must be 0 (greedy) or above, and finite")
    Truncation(top_k, top_p).check()
