"""Losses on pairs of responses of which people prefer one: the reward model's.

Pure functions of tensors. Knows no model: scores come in, a loss goes out.
Bradley and Terry, "Rank Analysis of Incomplete Block Designs", https://doi.org/10.2307/2334029; as a reward model's
loss, Stiennon et al., "Learning to Summarize from Human Feedback", https://arxiv.org/abs/2009.01325
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_same_shape


class PreferenceLoss(NamedTuple):
    """Scalars: `loss` (nats per pair), `accuracy` (share of pairs ordered as labelled), `mean_margin` (score units)."""

    loss: Tensor
    accuracy: Tensor
    mean_margin: Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float | None = None,
    label: Tensor | None = None,
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
        centering: weight of the pull of scores to mean 0, which the pairs leave free (https://arxiv.org/abs/2312.09244);
            off by default, 0.01 is usual.

    Returns:
        PreferenceLoss in float32. `accuracy` is the chance that a labeller who follows p agrees with the order of the
        scores; equal scores count a half. `mean_margin` is the mean of chosen - rejected.

    Raises:
        ValueError: if there is no pair, shapes differ, a label is outside [0, 1], or centering is below 0.
    """
    given = {"margin": margin, "label": label}
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
    difference = gap if margin is None else gap - margin
    losses = -label * F.logsigmoid(difference) - (1 - label) * F.logsigmoid(-difference)
    gap = gap.detach()
    agreement = torch.where(gap > 0, label, 1 - label).masked_fill(gap == 0, 0.5)
    return PreferenceLoss(losses.mean() + centering * (chosen + rejected).square().mean(), agreement.mean(), gap.mean())
