"""Next-token cross entropy under a mask: the loss of pretraining and of supervised fine-tuning.

Pure functions of tensors. Knows no model and no tokenizer: what is padding, prompt or response, a mask says.
Bengio et al., "A Neural Probabilistic Language Model", https://www.jmlr.org/papers/v3/bengio03a.html
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_masked, chosen_logprobs


class LanguageLoss(NamedTuple):
    """Scalars: `loss`, nats per predicted token, and `num_tokens`, how many tokens were predicted."""

    loss: Tensor
    num_tokens: Tensor


def next_token_loss(
    logits: Tensor, ids: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
) -> LanguageLoss:
    """Cross entropy of each token given those before it, averaged over the tokens that count.

    L = -mean(log softmax(logits[:, i])[ids[:, i + 1]])

    Args:
        logits: (b, n, v).
        ids: the tokens the logits were computed from, (b, n).
        mask: True where a token counts as a target, (b, n); None for all. A response mask trains on responses only.
            With padding on the left, leave out each row's first token too: padding alone would have to predict it.
        ignore_index: a target with this id does not count. -100 as in torch, no token's id; id 0 is a token like any.

    Returns:
        LanguageLoss in float32. Without any target (also when n is 1) the loss is 0 and its gradient zero.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if mask is not bool.
    """
    if ids.ndim != 2 or logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)} must be (b, n, v) and (b, n)")
    counted = _counted_targets(ids, mask, ignore_index)
    targets = ids[:, 1:].long().masked_fill(~counted, -100)
    loss = F.cross_entropy(
        at_least_float32(rearrange(logits[:, :-1], "b n v -> (b n) v")),
        rearrange(targets, "b n -> (b n)"),
        ignore_index=-100,
        reduction="sum",
    )
    return LanguageLoss(loss / counted.sum().clamp(min=1), counted.sum())


def chunked_next_token_loss(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
) -> LanguageLoss:
    """The same loss from features and output embedding, without a (b, n, v) tensor of logits ever being kept.

    Args:
        hidden: features after the model's last norm, (b, n, d).
        weight: output embedding, (v, d).
        ids: see `next_token_loss`, as for `mask` and `ignore_index`.
        mask: True where a token counts as a target, (b, n); None for all.
        ignore_index: a target with this id does not count.

    Returns:
        LanguageLoss, equal to that of `next_token_loss(hidden @ weight.T, ids, ...)`, at the cost of a second product
        in the backward pass.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if mask is not bool.
    """
    if ids.ndim != 2 or hidden.shape[:-1] != ids.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and ids {tuple(ids.shape)} must be (b, n, d) and (b, n)")
    counted = _counted_targets(ids, mask, ignore_index)
    logprobs = chosen_logprobs(hidden[:, :-1][counted], weight, ids[:, 1:][counted]).logprobs
    return LanguageLoss(-logprobs.sum() / counted.sum().clamp(min=1), counted.sum())


def _counted_targets(ids: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    check_masked(mask, ids=ids)
    return mask[:, 1:] & (ids[:, 1:] != ignore_index)
