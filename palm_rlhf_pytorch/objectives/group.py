"""Group methods: several responses to one prompt are judged against one another, in place of a critic.

    scores -> advantages within each group -> clipped loss, weighted token by token or response by response

GRPO: Shao et al., "DeepSeekMath", https://arxiv.org/abs/2402.03300. Dr. GRPO: Liu et al., "Understanding R1-Zero-Like
Training", https://arxiv.org/abs/2503.20783. DAPO: Yu et al., https://arxiv.org/abs/2503.14476. RLOO: Ahmadian et al.,
"Back to Basics", https://arxiv.org/abs/2402.14740. GSPO: Zheng et al., "Group Sequence Policy Optimization",
https://arxiv.org/abs/2507.18071. Pure functions of tensors; nothing here samples, stores or steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor

from palm_rlhf_pytorch.objectives.policy_gradient import PolicyLoss, kl_k3, policy_loss
from palm_rlhf_pytorch.tensors import at_least_float32, check_same_shape

MAX_KL_LOG_RATIO = 10.0  # exp(20), which the surrogate allows, would swamp a loss through k3


class Counts(NamedTuple):
    """Of one optimizer step, over all its microbatches and ranks: response tokens that count, and responses."""

    tokens: Tensor
    rows: Tensor


# advantages: from what each response earned, (n,), which group each belongs to, (n,), and which count, (n,)


def normalized_advantages(rewards: Tensor, groups: Tensor, counted: Tensor, *, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean) / (std + eps) over the group, std with Bessel's correction: GRPO's.

    Args:
        rewards: what each response earned, (n,).
        groups: the number of the prompt that each answers, (n,), integers from 0; groups may differ in size.
        counted: True on responses that count, (n,); the others take part in no mean.
        eps: keeps groups of nearly equal rewards from growing without bound; 1e-4.

    Returns:
        (n,) in float32, without gradient; exactly 0 where a response does not count, is alone in its group, or all of
        its group have earned the same.
    """
    found = _group_moments(rewards, groups, counted)
    return found.masked(found.centered / (found.std + eps))


def centered_advantages(rewards: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """A_i = r_i - mean over the group: Dr. GRPO's; (g - 1) / g times that of RLOO. As `normalized_advantages`."""
    found = _group_moments(rewards, groups, counted)
    return found.masked(found.centered)


def leave_one_out_advantages(rewards: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """A_i = r_i - mean over the others of the group: RLOO's, an unbiased baseline. As `normalized_advantages`."""
    found = _group_moments(rewards, groups, counted)
    return found.masked(found.centered * found.size / (found.size - 1).clamp(min=1))


class _GroupMoments(NamedTuple):
    """Of each response, (n,): how many of its group count, how far it is off their mean, their std, if they differ."""

    size: Tensor
    centered: Tensor
    std: Tensor
    differ: Tensor
    dtype: torch.dtype

    def masked(self, advantages: Tensor) -> Tensor:
        return advantages.masked_fill(~self.differ, 0.0).to(self.dtype)


def _group_moments(rewards: Tensor, groups: Tensor, counted: Tensor) -> _GroupMoments:
    check_same_shape(rewards=rewards, groups=groups, counted=counted)
    if counted.dtype != torch.bool:
        raise TypeError(f"counted is {counted.dtype}: it must be torch.bool, True on responses that count")
    if not bool(rewards[counted].isfinite().all()):
        raise ValueError("rewards of responses that count must be finite")
    dtype = at_least_float32(rewards).dtype
    rewards = rewards.detach().double().masked_fill(~counted, 0.0)
    size = int(groups.max()) + 1 if len(groups) else 0
    empty = rewards.new_zeros(size)
    count = empty.index_add(0, groups, counted.double())
    mean = empty.index_add(0, groups, rewards) / count.clamp(min=1)
    centered = (rewards - mean[groups]).masked_fill(~counted, 0.0)
    var = empty.index_add(0, groups, centered.square()) / (count - 1).clamp(min=1)
    differ = counted & informative_groups(rewards, groups, counted)[groups]
    return _GroupMoments(count[groups], centered, var[groups].sqrt(), differ, dtype)


def informative_groups(rewards: Tensor, groups: Tensor, counted: Tensor) -> Tensor:
    """Which groups teach anything: True where two responses that count have earned differently, (largest group + 1,).

    DAPO's dynamic sampling drops the others and samples more prompts in their place. Arguments as above.
    """
    size, rewards = int(groups.max()) + 1 if len(groups) else 0, rewards.double()
    highest = rewards.new_full((size,), -torch.inf).scatter_reduce(0, groups[counted], rewards[counted], "amax")
    lowest = rewards.new_full((size,), torch.inf).scatter_reduce(0, groups[counted], rewards[counted], "amin")
    return highest > lowest


def overlong_penalty(lengths: Tensor, *, max_length: int | Tensor, buffer: int) -> Tensor:
    """DAPO's soft punishment of responses that come near their limit, to be added to the score, (n,).

    0 up to max_length - buffer tokens, then falling linearly to -1 at max_length, and -1 beyond (eq. 13).

    Args:
        lengths: tokens of each response, (n,).
        max_length: the limit, 20,480 in the paper; or that of each response, (n,).
        buffer: tokens over which the penalty grows, 4,096 there; from 1 to the largest max_length.

    Raises:
        ValueError: if buffer is not from 1 to max_length.
    """
    most = max_length if isinstance(max_length, int) else int(max_length.max())
    if not 1 <= buffer <= most:
        raise ValueError(f"buffer ({buffer}) must be from 1 to max_length ({most})")
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


# level of the ratio: a function of what belongs to tokens (b, t) and their mask, giving what is clipped, and its mask


def per_token(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A ratio for each token, (b, t): PPO's and GRPO's."""
    return x, mask


def sequence_mean(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One ratio a response, exp of the mean log-ratio of its tokens, (b, 1): GSPO's (eq. 7)."""
    total, some = sequence_sum(x, mask)
    return total / reduce(mask, "b t -> b 1", "sum").clamp(min=1), some


def sequence_sum(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One ratio a response, that of the probabilities of the whole response, (b, 1): RLOO's."""
    return reduce(x.masked_fill(~mask, 0.0), "b t -> b 1", "sum"), mask.any(dim=-1, keepdim=True)


# weights: what each place of a mask counts in the loss of an optimizer step


def token_average(mask: Tensor, counts: Counts, max_length: int) -> Tensor:
    """All tokens of the step count alike, 1 / N: DAPO's, and PPO's."""
    return mask / counts.tokens.clamp(min=1)


def sequence_average(mask: Tensor, counts: Counts, max_length: int) -> Tensor:
    """All responses count alike, and the tokens of a response share in it: the GRPO paper's, RLOO's and GSPO's."""
    return mask / reduce(mask, "b t -> b 1", "sum").clamp(min=1) / counts.rows.clamp(min=1)


def constant_average(mask: Tensor, counts: Counts, max_length: int) -> Tensor:
    """Tokens of all responses count 1 / (responses * longest possible response): Dr. GRPO's, blind to length."""
    return mask / (counts.rows.clamp(min=1) * max_length)


@dataclass(frozen=True, kw_only=True)
class GroupObjective:
    """What tells the group methods apart; `dataclasses.replace(GRPO, eps_clip_high=0.2)` makes another.

    Attributes:
        advantages: from rewards to advantages within groups: normalized_advantages, centered_advantages or
            leave_one_out_advantages, or a function like them.
        level: what the ratio is of: per_token, sequence_mean or sequence_sum.
        average: how places are weighted: token_average, sequence_average or constant_average.
        eps_clip: how far below 1 the ratio earns.
        eps_clip_high: how far above 1.
        kl_coef: price of a nat of KL to the reference, taken from each response's reward.
        kl_loss_coef: weight in the loss of ratio * k3 against the reference, whose gradient is that of the KL.
    """

    advantages: Callable[[Tensor, Tensor, Tensor], Tensor] = normalized_advantages
    level: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = per_token
    average: Callable[[Tensor, Counts, int], Tensor] = token_average
    eps_clip: float = 0.2
    eps_clip_high: float = 0.28
    kl_coef: float = 0.0
    kl_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in ("kl_coef", "kl_loss_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} ({getattr(self, name)}) must be 0 or above, and finite")
        if not 0 < self.eps_clip < 1:
            raise ValueError(f"eps_clip ({self.eps_clip}) must be above 0 and below 1")
        if not (self.eps_clip_high > 0 and isfinite(self.eps_clip_high)):
            raise ValueError(f"eps_clip_high ({self.eps_clip_high}) must be above 0, and finite")
        if self.level is not per_token and self.average is not sequence_average:
            raise ValueError(
                f"average ({_named(self.average)}) weights tokens, but level ({_named(self.level)}) leaves one ratio a"
                " response: average must be sequence_average"
            )

    def plain(self) -> dict[str, float | str]:
        """JSON-able: numbers, and functions by their names."""
        return {name: value if isinstance(value, int | float) else _named(value) for name, value in vars(self).items()}


def _named(function: Any) -> str:
    """What tells a function from others, in the next process too: its name, and what a `partial` has fixed of it."""
    if isinstance(function, partial):
        fixed = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{_named(function.func)}({', '.join(fixed)})"
    return str(getattr(function, "__qualname__", type(function).__qualname__))


GRPO = GroupObjective()  # token mean and higher upper clip as in DAPO, no KL
DR_GRPO = GroupObjective(advantages=centered_advantages, average=constant_average, eps_clip_high=0.2)
DAPO = GRPO  # its other parts, dynamic sampling and overlong shaping, belong to sampling and scores
RLOO = GroupObjective(
    advantages=leave_one_out_advantages, level=sequence_sum, average=sequence_average, eps_clip_high=0.2, kl_coef=0.05
)
GSPO = GroupObjective(level=sequence_mean, average=sequence_average, eps_clip=3e-4, eps_clip_high=4e-4)


class GroupLoss(NamedTuple):
    """Scalars: `loss`, the surrogate's diagnostics `policy`, and `kl`, the part of the loss before its coefficient."""

    loss: Tensor
    policy: PolicyLoss
    kl: Tensor


def group_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: GroupObjective,
    counts: Counts,
    max_length: int,
) -> GroupLoss:
    """Clipped surrogate of one microbatch, and the KL penalty in the loss if there is one.

    L = -sum_i w_i min(r_i A_i, clip(r_i, 1 - e, 1 + e') A_i) + beta sum_t w_t r_t k3_t

    where i goes over tokens or over responses, as the objective says. r k3 has the gradient of KL(policy || reference)
    on and off policy, for responses of one token exactly; of longer ones it leaves out what a token does to later ones.

    Args:
        logprobs: log-probability (nats) of each response token under the policy, (b, t).
        old_logprobs: the same before the first of the rollout's steps, (b, t).
        ref_logprobs: the same under the reference, (b, t).
        advantages: of each response, (b,).
        mask: True where a response token counts, (b, t).
        objective: which method.
        counts: of the whole optimizer step.
        max_length: tokens a response may have, for constant_average.

    Returns:
        GroupLoss in float32; parts of several microbatches and ranks add up to the step's.
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, mask=mask)
    new, places = objective.level(at_least_float32(logprobs), mask)
    old, _ = objective.level(at_least_float32(old_logprobs.detach()), mask)
    policy = policy_loss(
        new, old, rearrange(advantages, "b -> b 1").expand_as(new), places, eps_clip=objective.eps_clip,
        eps_clip_high=objective.eps_clip_high, weights=objective.average(places, counts, max_length),
        num_tokens=counts.tokens if objective.level is per_token else counts.rows,
    )  # fmt: skip
    if objective.level is not per_token:  # how far the policy has moved is told in nats a token whatever is clipped
        policy = policy._replace(**_moved(logprobs.detach(), old_logprobs, mask, counts))
    kl = policy.loss.new_zeros(())
    if objective.kl_loss_coef:
        since, apart = (
            at_least_float32(logprobs - other.detach())
            .masked_fill(~mask, 0.0)
            .clamp(-MAX_KL_LOG_RATIO, MAX_KL_LOG_RATIO)
            for other in (old_logprobs, ref_logprobs)
        )
        kl = (objective.average(mask, counts, max_length) * since.exp() * kl_k3(apart, torch.zeros_like(apart))).sum()
    return GroupLoss(policy.loss + objective.kl_loss_coef * kl, policy, kl)


def _moved(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, counts: Counts) -> dict[str, Tensor]:
    """KL(old || policy) by its estimators, means over response tokens."""
    found = policy_loss(logprobs, old_logprobs, torch.zeros_like(logprobs), mask, num_tokens=counts.tokens)
    return {name: getattr(found, name) for name in ("approx_kl", "approx_kl_k1", "approx_kl_k2")}
