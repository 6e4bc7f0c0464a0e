"""Clipped policy-gradient objectives: PPO's surrogate, its value loss, KL estimators and their controller.

Pure functions of tensors. Nothing here samples, stores or steps. Log-probabilities, KL and entropy are in nats.
Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347
"""

from collections.abc import Callable
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_masked, check_same_shape, identity, masked_moments

# exp(20) is 5e8: far outside any trust region, and still finite when summed over a batch.
MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """Scalars. All but `ratio_max` are sums over the mask divided by `num_tokens`, so that they add over microbatches.

    clipped_fraction: share of tokens at which the clipped loss is the larger one; _low and _high are the parts of it
        with a ratio below and above 1.
    approx_kl: KL(old || policy), nats per token, by k3. approx_kl_k1, approx_kl_k2: the same by k1 and k2.
    ratio_mean, ratio_max: of the probability ratios; ratio_max is 0 when the mask is empty. ratio_var: mean (r - 1)^2.
    """

    loss: Tensor
    clipped_fraction: Tensor
    clipped_fraction_low: Tensor
    clipped_fraction_high: Tensor
    approx_kl: Tensor
    approx_kl_k1: Tensor
    approx_kl_k2: Tensor
    ratio_mean: Tensor
    ratio_var: Tensor
    ratio_max: Tensor


class ValueLoss(NamedTuple):
    """Scalars, sums over the mask divided by `num_tokens`: `loss`, `clipped_fraction`, and `error`, the mean square."""

    loss: Tensor
    clipped_fraction: Tensor
    error: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    dual_clip: float | None = None,
    num_tokens: Tensor | float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate loss, averaged over the tokens of the optimizer step.

    L = -sum(min(r A, clip(r, 1 - e, 1 + e') A)) / N,  r = exp(logprobs - old_logprobs)              (eq. 7)

    Only logprobs receives a gradient. The log-ratio is clamped to +-20 before the exponential.

    Args:
        logprobs: log-probability (nats) of each response token under the policy, (b, t).
        old_logprobs: the same before the first of the rollout's steps, (b, t).
        advantages: (b, t), whitened over the whole rollout.
        mask: True where a response token counts, (b, t).
        eps_clip: e, how far below 1 the ratio earns; 0.2 in the paper, in (0, 1).
        eps_clip_high: e', the same above 1; None for e. DAPO (https://arxiv.org/abs/2503.14476) takes 0.28.
        dual_clip: c, caps the loss of a token with negative advantage at -c A; above 1, or None for no cap. 3 in
            https://arxiv.org/abs/1912.09729.
        num_tokens: N, the number of True tokens in the optimizer step over all its microbatches and ranks, or that
            divided by a factor the gradients are averaged by. None for this mask's own. With 0 the loss is 0.
        weights: what each place counts in the loss, (b, t), in place of 1 / N, by which the diagnostics stay means.

    Returns:
        PolicyLoss in float32. A mask without any True gives 0 and a zero gradient.

    Raises:
        ValueError: if shapes differ, or a coefficient is out of its range.
        TypeError: if mask is not bool.
    """
    weighted = {} if weights is None else {"weights": weights}
    check_masked(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, **weighted)
    eps_clip_high = eps_clip if eps_clip_high is None else eps_clip_high
    _check_clips(eps_clip, eps_clip_high, dual_clip)
    mean = _token_mean(mask, num_tokens)
    log_ratio = at_least_float32(logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = at_least_float32(advantages.detach()).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - eps_clip, 1 + eps_clip_high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    log_ratio, ratio = log_ratio.detach(), ratio.detach()
    ratio_max = ratio.masked_fill(~mask, 0.0).max() if ratio.numel() else ratio.sum()
    return PolicyLoss(
        loss=mean(losses) if weights is None else (losses.masked_fill(~mask, 0.0) * weights).sum(),
        clipped_fraction=mean((clipped > unclipped).to(ratio.dtype)),
        clipped_fraction_low=mean(((clipped > unclipped) & (ratio < 1)).to(ratio.dtype)),
        clipped_fraction_high=mean(((clipped > unclipped) & (ratio > 1)).to(ratio.dtype)),
        approx_kl=mean(ratio - 1 - log_ratio),
        approx_kl_k1=mean(-log_ratio),
        approx_kl_k2=mean(log_ratio.square() / 2),
        ratio_mean=mean(ratio),
        ratio_var=mean((ratio - 1).square()),
        ratio_max=ratio_max,
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip: float | None = 0.2,
    num_tokens: Tensor | float | None = None,
) -> ValueLoss:
    """Half the squared error of the values, pessimistically clipped, averaged over the tokens of the optimizer step.

    L = sum(max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2)) / (2 N)

    The clip is that of openai/baselines, not of a paper: V earns nothing by moving further than e from V_old.

    Args:
        values: the critic's values now, (b, t).
        old_values: the same when the rollout was stored, (b, t).
        returns: what they should have been, (b, t).
        mask: True where a response token counts, (b, t).
        value_clip: e, in units of the score, above 0; 0.2 as in openai/lm-human-preferences, where scores have
            deviation 1. None for no clip: scores of a larger scale need that.
        num_tokens: N, see `policy_loss`.

    Returns:
        ValueLoss in float32; `error` is the mean of (V - R)^2 without clip. An empty mask gives 0 and a zero gradient.

    Raises:
        ValueError: if shapes differ, or value_clip is not positive.
        TypeError: if mask is not bool.
    """
    check_masked(mask, values=values, old_values=old_values, returns=returns)
    if value_clip is not None and not value_clip > 0:
        raise ValueError(f"value_clip ({value_clip}) must be above 0, or None for no clip")
    mean = _token_mean(mask, num_tokens)
    values = at_least_float32(values).masked_fill(~mask, 0.0)
    old_values = at_least_float32(old_values.detach()).masked_fill(~mask, 0.0)
    returns = at_least_float32(returns.detach()).masked_fill(~mask, 0.0)
    error = clipped_error = (values - returns).square()
    if value_clip is not None:
        near = torch.clamp(values, old_values - value_clip, old_values + value_clip)
        clipped_error = (near - returns).square()
    return ValueLoss(
        loss=0.5 * mean(torch.maximum(error, clipped_error)),
        clipped_fraction=mean((clipped_error > error).to(values.dtype)),
        error=mean(error.detach()),
    )


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from a token the policy sampled: k1 = d, with d = logprobs - ref_logprobs.

    Unbiased, of either sign, and the only one right inside the reward. As a loss its expected gradient is 0.
    The estimators k1, k2, k3 are Schulman's, http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: log-probability (nats) of the token under the policy, (...).
        ref_logprobs: the same under the reference, (...).

    Returns:
        (...), nats, float32.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 = d^2 / 2: never negative, biased as a value. See `kl_k1`.

    As a loss its expected gradient is exactly that of KL(policy || reference), on-policy.
    """
    return kl_k1(logprobs, ref_logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(-d) - 1 + d: unbiased and never negative, the one to log. See `kl_k1`.

    As a loss its expected gradient is that of KL(reference || policy); times the ratio exp(logprobs - old_logprobs) it
    is that of KL(policy || reference), off-policy too. d is clamped to +-20 before the exponential.
    """
    log_ratio = kl_k1(logprobs, ref_logprobs)
    return torch.expm1(-log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: a distance, not a KL. See `kl_k1`."""
    return kl_k1(logprobs, ref_logprobs).abs()


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) of whole distributions, sum_v p (log p - log q): a metric or a loss, never a reward.

    It does not depend on the token that was chosen, so a policy gradient through it as a reward is 0.

    Args:
        logits: (..., v), already divided by the temperature.
        ref_logits: (..., v), likewise.

    Returns:
        (...), nats, float32.

    Raises:
        ValueError: if shapes differ.
    """
    check_same_shape(logits=logits, ref_logits=ref_logits)
    logprobs = at_least_float32(logits).log_softmax(dim=-1)
    ref_logprobs = at_least_float32(ref_logits).log_softmax(dim=-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


def adaptive_kl_coef(
    kl_coef: float, kl: float, *, target_kl_nats_per_response: float, num_episodes: int, horizon: int = 10_000
) -> float:
    """Next KL coefficient of a proportional controller, to be called once per rollout, after learning from it.

    kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_episodes / horizon)

    Ziegler et al., https://arxiv.org/abs/1909.08593, section 2.2. In a run of 1,000 episodes it can change the
    coefficient by 2 % at most.

    Args:
        kl_coef: the coefficient this rollout was rewarded with, above 0.
        kl: this rollout's KL: the mean over responses, of all ranks, of k1 summed over tokens, in nats per response.
        target_kl_nats_per_response: the KL to keep, in the same unit, above 0; 6 in
            openai/lm-human-preferences.
        num_episodes: responses in this rollout, over all ranks.
        horizon: episodes in which the coefficient can change by a fifth; 10,000 there.

    Raises:
        ValueError: if kl is NaN or infinite, another argument is not positive, or num_episodes is so many times the
            horizon that the coefficient could reach 0.
    """
    if not isfinite(kl):
        raise ValueError(f"kl ({kl}) must be finite")
    given = {"kl_coef": kl_coef, "target_kl_nats_per_response": target_kl_nats_per_response}
    for name, value in {**given, "num_episodes": num_episodes, "horizon": horizon}.items():
        if not value > 0:
            raise ValueError(f"{name} ({value}) must be above 0")
    if num_episodes >= 5 * horizon:
        raise ValueError(f"num_episodes ({num_episodes}) must be below 5 times horizon ({horizon}): raise the horizon")
    error = min(max(kl / target_kl_nats_per_response - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, *, reduce: Callable[[Tensor], Tensor] = identity
) -> Tensor:
    """Share of the returns' variance that the values explain: 1 - var(R - V) / (var(R) + 1e-5), at most 1.

    Give it Monte-Carlo returns: lambda-returns contain the values and flatter a useless critic.

    Args:
        values: (b, t).
        returns: (b, t).
        mask: True where a response token counts, (b, t).
        reduce: sums a tensor over all ranks; by default this rank alone.

    Returns:
        Scalar; 0 where the returns do not vary, or the mask is empty: there is nothing to explain.

    Raises:
        ValueError: if shapes differ.
        TypeError: if mask is not bool.
    """
    check_masked(mask, values=values, returns=returns)
    var = masked_moments(returns, mask, reduce=reduce).var
    unexplained = masked_moments(at_least_float32(returns) - values, mask, reduce=reduce).var
    return torch.where(var > 0, 1 - unexplained / (var + 1e-5), 0.0)


def _token_mean(mask: Tensor, num_tokens: Tensor | float | None) -> Callable[[Tensor], Tensor]:
    if isinstance(num_tokens, (int, float)) and not (num_tokens >= 0 and isfinite(num_tokens)):
        raise ValueError(f"num_tokens ({num_tokens}) must be 0 or above: the number of tokens that count in the step")
    count = torch.as_tensor(mask.sum() if num_tokens is None else num_tokens, device=mask.device)
    # Not clamp(min=1): a count divided by the number of ranks may well be below 1.
    divisor = torch.where(count > 0, count, torch.ones_like(count))
    return lambda x: x.masked_fill(~mask, 0.0).sum() / divisor


def _check_clips(eps_clip: float, eps_clip_high: float, dual_clip: float | None) -> None:
    if not 0 < eps_clip < 1:
        raise ValueError(f"eps_clip ({eps_clip}) must lie between 0 and 1; 0.2 is usual")
    if not eps_clip_high > 0:
        raise ValueError(f"eps_clip_high ({eps_clip_high}) must be above 0, or None for eps_clip")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip ({dual_clip}) must be above 1, or None for no cap; 3 is usual")
