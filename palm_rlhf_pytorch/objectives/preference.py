"""Losses of what people say about responses: pairs, rankings, bins, numbers, thumbs. The reward model's.

Pure functions of tensors. Knows no model: scores come in, a loss goes out. Each is a mean over labels, in which a label
counts as much as its weight says.
Bradley and Terry, "Rank Analysis of Incomplete Block Designs", https://doi.org/10.2307/2334029; as a reward model's
loss, Stiennon et al., "Learning to Summarize from Human Feedback", https://arxiv.org/abs/2009.01325
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_same_shape


class PreferenceLoss(NamedTuple):
    """Scalars: `loss` (nats per pair), `accuracy` (share of pairs ordered as labelled), `mean_margin` (score units)."""

    loss: Tensor
    accuracy: Tensor
    mean_margin: Tensor


class LabelLoss(NamedTuple):
    """Scalars: `loss` (nats per label), `accuracy` (share of what the labels say that the scores say too, 0 to 1)."""

    loss: Tensor
    accuracy: Tensor


class ScalarLoss(NamedTuple):
    """Scalars: `loss` (squared score units), `error` (mean absolute error, score units)."""

    loss: Tensor
    error: Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    label: Tensor | None = None,
    weight: Tensor | None = None,
    centering: float = 0.0,
) -> PreferenceLoss:
    """Negative log-likelihood of the preferences, when the log-odds of a preference are the difference of the scores.

    L = -mean(p log sigma(d) + (1 - p) log sigma(-d)) + centering mean((chosen + rejected)^2),
    d = chosen - rejected - margin

    Args:
        chosen: scores of the preferred responses, (b,).
        rejected: scores of the other ones, (b,).
        margin: by how much the scores should differ, (b,) or one number (https://arxiv.org/abs/2307.09288); None for 0.
        label: p, probability that `chosen` is preferred, (b,), in [0, 1]; 0.5 is a tie. None for 1.
        weight: how much each pair counts in all means, (b,); None for all alike.
        centering: weight of the pull of scores to mean 0, which the pairs leave free (https://arxiv.org/abs/2312.09244);
            off by default, 0.01 is usual.

    Returns:
        PreferenceLoss in float32. `accuracy` is the chance that a labeller who follows p agrees with the order of the
        scores; equal scores count a half. `mean_margin` is the mean of chosen - rejected.

    Raises:
        ValueError: if there is no pair, shapes differ, a label is outside [0, 1], weights are negative or all 0, or
            centering is below 0.
    """
    given = {"margin": margin, "label": label, "weight": weight}
    tensors = {name: tensor for name, tensor in given.items() if isinstance(tensor, Tensor)}
    check_same_shape(chosen=chosen, rejected=rejected, **tensors)
    if chosen.ndim != 1 or len(chosen) == 0:
        raise ValueError(f"chosen has shape {tuple(chosen.shape)}: it must be (b,) with at least one pair")
    if label is not None and not bool(((label >= 0) & (label <= 1)).all()):
        raise ValueError(f"label ({label.tolist()}) must lie between 0 and 1: the probability that chosen is preferred")
    if not centering >= 0:
        raise ValueError(f"centering ({centering}) must be 0 or above")
    chosen, rejected = at_least_float32(chosen), at_least_float32(rejected)
    label = torch.ones_like(chosen) if label is None else label.to(chosen.dtype)
    gap = chosen - rejected
    losses = _soft_losses(gap if margin is None else gap - margin, label) + centering * (chosen + rejected).square()
    gap = gap.detach()
    share = _shares(weight, gap)
    return PreferenceLoss(_mean(losses, share), _mean(_agreement(gap, label), share), _mean(gap, share))


def ranking_loss(
    scores: Tensor, ranks: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None, shrink: float = 0.001
) -> LabelLoss:
    """K-wise loss of rankings: Bradley-Terry over all pairs of each, and a pull of the scores to 0.

    L = mean over rankings of mean over their k(k-1)/2 pairs i, j of
        -(p log sigma(s_i - s_j) + (1 - p) log sigma(s_j - s_i)) + shrink (s_i^2 + s_j^2) / 2,
    p = 1 where i ranks before j, 0 where after, 1/2 where they are tied. https://arxiv.org/abs/2203.02155 (eq. 1) and
    https://arxiv.org/abs/2304.07327, whose code has the pull.

    Args:
        scores: of the responses of each ranking, (b, k).
        ranks: their places, integers, the smallest is the best, equal ones are tied, (b, k).
        mask: True where there is a response, (b, k), for rankings of unequal length; None for all.
        weight: how much each ranking counts, (b,); None for all alike.
        shrink: weight of the pull; 0.001 in OpenAssistant.

    Returns:
        LabelLoss in float32; `accuracy` is that of the pairs as in `bradley_terry_loss`, a mean over rankings of means.

    Raises:
        ValueError: if shapes differ, a ranking has fewer than two responses, weights are negative or all 0, or shrink
            is below 0.
    """
    mask = _checked_rankings(scores, ranks, mask)
    if not shrink >= 0:
        raise ValueError(f"shrink ({shrink}) must be 0 or above")
    scores = at_least_float32(scores).masked_fill(~mask, 0.0)
    first, second = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1, device=scores.device)
    counted = mask[:, first] & mask[:, second]
    order = ranks[:, second] - ranks[:, first]
    label = (order.sign().to(scores.dtype) + 1) / 2
    gap = scores[:, first] - scores[:, second]
    pull = shrink * (scores[:, first].square() + scores[:, second].square()) / 2
    of_pair = counted.to(scores.dtype) / counted.sum(dim=1, keepdim=True)
    share = _shares(weight, scores[:, 0].detach())
    losses, agreement = _soft_losses(gap, label) + pull, _agreement(gap.detach(), label)
    return LabelLoss(_mean((losses * of_pair).sum(dim=1), share), _mean((agreement * of_pair).sum(dim=1), share))


def choice_loss(
    scores: Tensor, ranks: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
) -> LabelLoss:
    """K-way cross entropy: the scores are the logits of being chosen as the best.

    L = -mean log softmax(scores)[best]; several that share the best rank share the target. Ziegler et al., eq. 1,
    https://arxiv.org/abs/1909.08593. Of the order below the best it learns nothing.

    Args:
        scores: of the responses of each ranking, (b, k).
        ranks: as in `ranking_loss`.
        mask: likewise.
        weight: likewise.

    Returns:
        LabelLoss in float32; `accuracy` is the share of rankings whose highest score is a best response's.

    Raises:
        ValueError: if shapes differ, a ranking has fewer than two responses, or weights are negative or all 0.
    """
    mask = _checked_rankings(scores, ranks, mask)
    logits = at_least_float32(scores).masked_fill(~mask, -torch.inf)
    ranks = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).max)
    best = ranks == ranks.amin(dim=1, keepdim=True)
    target = best.to(logits.dtype) / best.sum(dim=1, keepdim=True)
    losses = -(target * logits.log_softmax(dim=1).masked_fill(~mask, 0.0)).sum(dim=1)
    right = best.gather(1, logits.argmax(dim=1, keepdim=True))
    share = _shares(weight, losses.detach())
    return LabelLoss(_mean(losses, share), _mean(rearrange(right, "b 1 -> b"), share))


def bins_loss(logits: Tensor, bins: Tensor, *, weight: Tensor | None = None) -> LabelLoss:
    """Cross entropy of ratings on a scale of c bins.

    L = -mean log softmax(logits)[bin]

    Args:
        logits: (b, c).
        bins: integers from 0 to c - 1, (b,).
        weight: how much each rating counts, (b,); None for all alike.

    Returns:
        LabelLoss in float32; `accuracy` is the share of ratings whose bin is the most likely one.

    Raises:
        ValueError: if there is no rating, shapes differ, or weights are negative or all 0.
        IndexError: if a bin is out of range.
    """
    if logits.ndim != 2 or bins.shape != logits.shape[:1] or len(bins) == 0:
        raise ValueError(f"logits {tuple(logits.shape)} and bins {tuple(bins.shape)} must be (b, c) and (b,), b not 0")
    losses = F.cross_entropy(at_least_float32(logits), bins, reduction="none")
    share = _shares(weight, losses.detach())
    return LabelLoss(_mean(losses, share), _mean(logits.argmax(dim=1) == bins, share))


def scalar_loss(scores: Tensor, values: Tensor, *, weight: Tensor | None = None) -> ScalarLoss:
    """Mean squared error of scores against numbers that people gave, mean((score - value)^2).

    Args:
        scores: (b,).
        values: (b,).
        weight: how much each rating counts, (b,); None for all alike.

    Raises:
        ValueError: if there is no rating, shapes differ, or weights are negative or all 0.
    """
    _check_row(scores=scores, values=values)
    errors = at_least_float32(scores) - values
    share = _shares(weight, errors.detach())
    return ScalarLoss(_mean(errors.square(), share), _mean(errors.detach().abs(), share))


def vote_loss(scores: Tensor, up: Tensor, *, middle: float = 0.0, weight: Tensor | None = None) -> LabelLoss:
    """Logistic loss of thumbs up and down: the log-odds of a thumb up are the score's distance from the middle.

    L = -mean log sigma(+-(score - middle)), + for up

    Args:
        scores: (b,).
        up: True for a thumb up, (b,).
        middle: the score at which up and down are equally likely; for bins the middle of the scale.
        weight: how much each vote counts, (b,); None for all alike.

    Returns:
        LabelLoss in float32; `accuracy` is the share of votes on their side of the middle, a half on it.

    Raises:
        ValueError: if there is no vote, shapes differ, or weights are negative or all 0.
    """
    _check_row(scores=scores, up=up)
    distance = at_least_float32(scores) - middle
    label = up.to(distance.dtype)
    share = _shares(weight, distance.detach())
    return LabelLoss(_mean(_soft_losses(distance, label), share), _mean(_agreement(distance.detach(), label), share))


def _soft_losses(difference: Tensor, label: Tensor) -> Tensor:
    return -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)


def _agreement(gap: Tensor, label: Tensor) -> Tensor:
    """Chance that a labeller who follows `label` agrees with the sign of the gap; a half where there is none."""
    return torch.where(gap > 0, label, 1 - label).masked_fill(gap == 0, 0.5)


def _shares(weight: Tensor | None, like: Tensor) -> Tensor:
    """Each label's share in a mean, (b,), in the dtype of what is averaged."""
    if weight is None:
        return torch.full_like(like, 1 / len(like))
    check_same_shape(weight=weight, labels=like)
    total = weight.sum()
    if not bool((weight >= 0).all()) or not 0 < float(total) < torch.inf:
        raise ValueError(f"weight ({weight.tolist()}) must be 0 or above and finite, and not all 0")
    return (weight / total).to(like.dtype)


def _mean(values: Tensor, share: Tensor) -> Tensor:
    return (values * share).sum()  # not a product of vectors: autocast would round it to bfloat16


def _check_row(**tensors: Tensor) -> None:
    check_same_shape(**tensors)
    shape = tuple(next(iter(tensors.values())).shape)
    if len(shape) != 1 or shape[0] == 0:
        raise ValueError(f"{' and '.join(tensors)} have shape {shape}: it must be (b,) with at least one label")


def _checked_rankings(scores: Tensor, ranks: Tensor, mask: Tensor | None) -> Tensor:
    """Where there is a response, (b, k)."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    check_same_shape(scores=scores, ranks=ranks, mask=mask)
    if scores.ndim != 2 or len(scores) == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: they must be (b, k) with at least one ranking")
    if bool((mask.sum(dim=1) < 2).any()):
        raise ValueError(f"rankings of {mask.sum(dim=1).tolist()} responses: each takes at least two")
    return mask
