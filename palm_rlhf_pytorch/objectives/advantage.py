"""From a judge's scores to advantages: KL-shaped rewards, generalised advantage estimation, returns.

Pure functions of tensors. Nothing here samples, scores or whitens, and no gradient flows through any of it.
Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
https://arxiv.org/abs/1506.02438; the reward is that of Ziegler et al., "Fine-Tuning Language Models from Human
Preferences", https://arxiv.org/abs/1909.08593
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_masked


class ShapedRewards(NamedTuple):
    """`rewards` of each response token, and the `kl` (nats) that was taken from them before its coefficient, (b, t)."""

    rewards: Tensor
    kl: Tensor


class Advantages(NamedTuple):
    """`advantages` and `returns` of each response token, both (b, t) and zero outside the mask."""

    advantages: Tensor
    returns: Tensor


def shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float
) -> ShapedRewards:
    """Reward of each token: minus its share of the KL to the reference, plus the score on the response's last token.

    r_t = -kl_coef (logprobs_t - ref_logprobs_t) + score [t is the last True of the mask]

    The estimator is k1 (see `policy_gradient.kl_k1`) and no other: only with it is ref * exp(score / kl_coef) the
    policy of highest expected return.

    Args:
        scores: a judge's score of each response, (b,).
        logprobs: log-probability (nats) of each response token under the policy that sampled it, (b, t).
        ref_logprobs: the same under the frozen reference, (b, t).
        mask: True where a response token is the policy's own, the end-of-text token included, (b, t).
        kl_coef: price of a nat of KL, in units of the score; at least 0.

    Returns:
        ShapedRewards, zero outside the mask. A row without any True has no place for its score and is all zero.

    Raises:
        ValueError: if shapes differ, a score is NaN or infinite, or kl_coef is below 0.
        TypeError: if mask is not bool.
    """
    check_masked(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_two_axes(mask)
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} must be (b,) for mask (b, t) {tuple(mask.shape)}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef ({kl_coef}) must be 0 or above")
    broken = ~scores.isfinite()
    if bool(broken.any()):
        raise ValueError(f"scores of rows {broken.nonzero()[:, 0].tolist()} are NaN or infinite")
    kl = at_least_float32(logprobs.detach() - ref_logprobs.detach()).masked_fill(~mask, 0.0)
    num_left = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (num_left == 1)
    return ShapedRewards(-kl_coef * kl + rearrange(scores.detach(), "b -> b 1") * last, kl)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95) -> Advantages:
    """Generalised advantage estimation over the True tokens of each row, in that order.

    delta_t = r_t + gamma V_t' - V_t,   A_t = delta_t + gamma lambda A_t',   R_t = A_t + V_t                 (eq. 16)

    where t' is the next True token after t, and V and A are 0 after the last. A False token (padding, or a tool's words
    between two of the policy's) takes no part: its reward and value are not read, and no step of gamma is counted.

    Args:
        rewards: (b, t).
        values: expected return before each token was sampled, (b, t).
        mask: True where a token is the policy's own, (b, t).
        gamma: discount of a step; 1.0 as in openai/lm-human-preferences, in [0, 1].
        gae_lambda: lambda, the weight of longer looks ahead; 0.95 as there, in [0, 1].

    Returns:
        Advantages, not yet whitened, zero outside the mask; `returns` are the lambda-returns the value loss aims at.

    Raises:
        ValueError: if shapes differ, or gamma or gae_lambda is not in [0, 1].
        TypeError: if mask is not bool.
    """
    check_masked(mask, rewards=rewards, values=values)
    _check_two_axes(mask)
    _check_unit_interval("gamma", gamma)
    _check_unit_interval("gae_lambda", gae_lambda)
    rewards, values = at_least_float32(rewards.detach()), at_least_float32(values.detach())
    deltas = rewards + gamma * _next_values(values, mask) - values
    # A_t = a_t A_t' + b_t, where a False token hands on what comes after it
    scales = torch.where(mask, gamma * gae_lambda, 1.0).to(rewards.dtype).T.contiguous()
    advantages = deltas.masked_fill(~mask, 0.0).T.contiguous()
    steps = advantages.unbind()
    for step, following, scale in zip(steps[-2::-1], steps[:0:-1], scales.unbind()[-2::-1], strict=True):
        step.addcmul_(scale, following)  # one small operation a step: this loop is all that is not vectorised
    advantages = advantages.T.masked_fill(~mask, 0.0)
    return Advantages(advantages, advantages + values.masked_fill(~mask, 0.0))


def _next_values(values: Tensor, mask: Tensor) -> Tensor:
    """The value of the next True token after each place, 0 where there is none, (b, t)."""
    length = values.shape[1]
    places = torch.where(mask, torch.arange(length, device=mask.device), length)
    following = places.flip(-1).cummin(dim=-1).values.flip(-1)  # the first True token from each place on
    following = F.pad(following[:, 1:], (0, 1), value=length)
    return F.pad(values.masked_fill(~mask, 0.0), (0, 1)).gather(1, following)


def monte_carlo_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each True token to the row's last, G_t = r_t + gamma G_t'.

    What explained variance is measured against: unlike lambda-returns these owe nothing to the critic.

    Args:
        rewards: (b, t).
        mask: True where a token is the policy's own, (b, t).
        gamma: discount of a step, in [0, 1].

    Returns:
        (b, t), zero outside the mask.

    Raises:
        ValueError: if shapes differ, or gamma is not in [0, 1].
        TypeError: if mask is not bool.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, gae_lambda=1.0).advantages


def _check_two_axes(mask: Tensor) -> None:
    if mask.ndim != 2 or mask.shape[1] == 0:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: it must be (b, t) with at least one response token")


def _check_unit_interval(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} ({value}) must lie between 0 and 1")
