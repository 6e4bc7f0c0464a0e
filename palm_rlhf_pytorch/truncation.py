"""Which tokens top-k and top-p leave of a distribution over a vocabulary.

Fan et al., "Hierarchical Neural Story Generation" (top-k), https://arxiv.org/abs/1805.04833
Holtzman et al., "The Curious Case of Neural Text Degeneration" (top-p), https://arxiv.org/abs/1904.09751
Pure functions of logits: what is sampled and what is learnt are cut by one rule. Knows no model and no draw.
Where two routes round logits differently, a token at the border may be in one set and not in the other. It is rare, so
that mean differences stay those of rounding: of 4,000 tokens at top_p 0.5 to 0.9 up to one in float32, and up to three
in bfloat16, had a log-probability that was off by the border token's share.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LIKELIEST = 512  # tokens among which a CPU looks for the nucleus before it sorts a vocabulary, ten times as long


class Truncation(NamedTuple):
    """A cut of a distribution: to its top_k likeliest tokens, then to those that hold top_p of what is left."""

    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Refuse numbers that leave no distribution.

        Raises:
            TypeError: if top_k is not a whole number.
            ValueError: if top_k is below 1, or top_p outside (0, 1].
        """
        top_k, top_p = self
        if top_k is not None and not isinstance(top_k, int):
            raise TypeError(f"top_k ({top_k!r}) counts tokens: it must be an int, not {type(top_k).__name__}, or None")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k ({top_k}) counts tokens: it must be at least 1, or None for no cut")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p ({top_p}) is a probability mass: it must be above 0 and at most 1")

    def kept(self, logits: Tensor) -> Tensor | None:
        """What stays of softmax(logits): the k likeliest tokens, of these the fewest whose mass reaches top_p.

        Args:
            logits: (..., v), already divided by the temperature.

        Returns:
            True on what stays, (..., v); None if that is all.
        """
        top_k, top_p = self
        if top_k is not None and top_k < logits.shape[-1]:
            order = logits.topk(top_k, dim=-1).indices
            if top_p is None or top_p >= 1:
                return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, True)
            left = torch.full_like(logits, -torch.inf).scatter_(-1, order, logits.gather(-1, order))
            return _marked(order, left.softmax(dim=-1), top_p)
        return None if top_p is None or top_p >= 1 else _nucleus(logits, top_p)


def truncate(logits: Tensor, *, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Set to minus infinity what top-k and then top-p leave out; logits (..., v), already divided by temperature."""
    kept = Truncation(top_k, top_p).kept(logits)
    return logits if kept is None else logits.masked_fill(~kept, -torch.inf)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """True on the likeliest tokens that have top_p together, (..., v).

    On a CPU only rows whose LIKELIEST do not suffice are sorted whole; to ask which they are costs nothing there.
    """
    probabilities = logits.softmax(dim=-1)
    if logits.device.type != "cpu" or logits.shape[-1] <= LIKELIEST:
        return _marked(logits.argsort(dim=-1, descending=True, stable=True), probabilities, top_p)
    order = logits.topk(LIKELIEST, dim=-1).indices
    kept = _marked(order, probabilities, top_p)
    short = probabilities.gather(-1, order).cumsum(dim=-1)[..., -1] < top_p
    if bool(short.any()):
        order = logits[short].argsort(dim=-1, descending=True, stable=True)
        kept[short] = _marked(order, probabilities[short], top_p)
    return kept


def _marked(order: Tensor, probabilities: Tensor, top_p: float) -> Tensor:
    """True (..., v) on the first tokens of an order (..., k) that have top_p of probabilities (..., v) together."""
    before = F.pad(probabilities.gather(-1, order)[..., :-1].cumsum(dim=-1), (1, 0))  # mass of those that come first
    kept = torch.zeros_like(probabilities, dtype=torch.bool)
    return kept.scatter_(-1, order, ~(before >= top_p))  # so that a NaN, which sampling reports, is kept
