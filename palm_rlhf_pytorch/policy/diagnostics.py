"""What a rollout says about the run: rewards, KL, lengths, and how well the critic knew them.

Names and units are in `training/metrics.py`; figures are over the responses of all ranks, but for the largest (names in
`_max`) and for distinct_2, which are this rank's.
"""

import resource
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.advantage import monte_carlo_returns
from palm_rlhf_pytorch.objectives.policy_gradient import explained_variance, kl_k3
from palm_rlhf_pytorch.policy.learning import Targets
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.tensors import Moments, masked_moments


def rollout_metrics(
    rollout: Rollout,
    targets: Targets,
    normalized: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    reduce: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Diagnostics of a scored rollout, before learning from it.

    Args:
        rollout: with raw scores.
        targets: what it teaches.
        normalized: normalised scores, penalties included, (b,).
        kl_coef: the coefficient that made the targets.
        gamma: discount per token.
        reduce: sums a tensor over ranks.
    """
    assert rollout.scores is not None
    mask, lengths = rollout.response_mask, rollout.lengths.float()
    rows = torch.ones_like(rollout.ended)

    def over_rows(values: Tensor) -> Moments:
        return masked_moments(values.float(), rows, reduce=reduce)

    def over_tokens(values: Tensor) -> Moments:
        return masked_moments(values, mask, reduce=reduce)

    score, length = over_rows(rollout.scores), over_rows(lengths)
    kl = over_rows(targets.kl.sum(dim=-1)).mean
    returns = monte_carlo_returns(targets.rewards, mask, gamma=gamma)
    mismatch = (rollout.sampler_logprobs - rollout.logprobs).abs()
    advantage, target = over_tokens(targets.returns - rollout.values), over_tokens(targets.returns)
    covariance = over_rows((rollout.scores - score.mean) * (lengths - length.mean)).mean
    ended = over_rows(rollout.ended).mean
    figures: dict[str, Tensor | float] = {
        "objective/kl": kl,
        "objective/kl_token": over_tokens(targets.kl).mean,
        "objective/kl_k3": over_tokens(kl_k3(rollout.logprobs, rollout.ref_logprobs)).mean,
        "objective/kl_exact": over_tokens(rollout.kl_exact).mean,
        "objective/kl_coef": kl_coef,
        "objective/non_score_reward": -kl_coef * kl,
        "objective/rlhf_reward": over_rows(targets.rewards.sum(dim=-1)).mean,
        "reward/score": score.mean,
        "reward/score_std": score.var.sqrt(),
        "reward/score_normalized": over_rows(normalized).mean,
        "returns/mean": target.mean,
        "returns/var": target.var,
        "advantages/mean": advantage.mean,
        "advantages/std": advantage.var.sqrt(),
        "value/mean": over_tokens(rollout.values).mean,
        "value/explained_variance": explained_variance(rollout.values, returns, mask, reduce=reduce),
        "response/length_mean": length.mean,
        "response/length_max": lengths.max(),
        "response/eos_rate": ended,
        "response/truncated_rate": 1 - ended,
        "score/length_corr": covariance / (score.var * length.var).sqrt().clamp(min=1e-8),
        "rollout/sampler_logprob_diff_mean": over_tokens(mismatch).mean,
        "rollout/sampler_logprob_diff_max": (mismatch * mask).max(),
        "rollout/distinct_2": distinct_2(rollout),
    }
    device = {name: value for name, value in figures.items() if isinstance(value, Tensor)}  # asked once, not one by one
    asked = zip(device, torch.stack([value.float() for value in device.values()]).tolist(), strict=True)
    return {name: float(value) for name, value in (figures | dict(asked)).items()}


def timing_metrics(
    rollout: Rollout, started: float, sampled: float, *, reduce: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Seconds and speed of an update that ends now.

    Args:
        rollout: what was sampled and learnt from.
        started: perf_counter before sampling.
        sampled: the same before learning.
        reduce: sums a tensor over ranks.
    """
    now = time.perf_counter()
    tokens = float(reduce(rollout.lengths.sum().float()))
    return {
        "perf/rollout_seconds": sampled - started,
        "perf/learn_seconds": now - sampled,
        "perf/tokens_per_second": tokens / (now - started),
        "perf/rollout_tokens_per_second": tokens / (sampled - started),
        "perf/learn_tokens_per_second": tokens / (now - sampled),
        "perf/peak_memory_bytes": peak_memory(rollout.sequences.device),
    }


def peak_memory(device: torch.device) -> float:
    """Most bytes so far: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kilobytes on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def headline(metrics: dict[str, float]) -> dict[str, str]:
    """What a progress bar shows."""
    shown = {"score": "reward/score", "kl": "objective/kl", "length": "response/length_mean"}
    return {label: f"{metrics[name]:.3g}" for label, name in shown.items()}


def distinct_2(rollout: Rollout) -> float:
    """Share of this rank's pairs of neighbouring response tokens that are different pairs; 0 where there is none.

    Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055
    """
    mask = rollout.response_mask
    places = rollout.prompt_lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
    tokens = rollout.sequences.gather(1, places.clamp(max=rollout.sequences.shape[1] - 1))
    pairs = torch.stack((tokens[:, :-1], tokens[:, 1:]), dim=-1)[mask[:, 1:]]
    return len(torch.unique(pairs, dim=0)) / len(pairs) if len(pairs) else 0.0
