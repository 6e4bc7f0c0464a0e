"""Losses that learn from preferences without a judge: DPO and its kin on pairs, KTO on single votes.

Pure functions of summed log-probabilities. Knows no model: what a response's tokens sum to comes in, a loss goes out.
Rafailov et al., "Direct Preference Optimization", https://arxiv.org/abs/2305.18290. With D = (chosen - ref_chosen) -
(rejected - ref_rejected), beta D is the log-odds of the preference under the reward beta log(policy / reference).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.tensors import at_least_float32, check_same_shape, identity


class PairLogprobs(NamedTuple):
    """Log-probabilities (nats) of pairs of responses, summed over each response's tokens; all (b,).

    chosen, rejected: under the policy. ref_chosen, ref_rejected: under the reference, without gradient.
    chosen_lengths, rejected_lengths: tokens in these sums, at least 1.
    label: probability that `chosen` is preferred, in [0, 1]; 0.5 is a tie. None for 1.
    weight: factor of each pair's loss, 0 or above; None for 1.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    label: Tensor | None = None
    weight: Tensor | None = None

    def per_token(self) -> "PairLogprobs":
        """The same with means over tokens in place of sums."""
        chosen, rejected = self.chosen_lengths, self.rejected_lengths
        return self._replace(
            chosen=self.chosen / chosen, rejected=self.rejected / rejected,
            ref_chosen=self.ref_chosen / chosen, ref_rejected=self.ref_rejected / rejected,
        )  # fmt: skip

    def without_reference(self) -> "PairLogprobs":
        """The same against a reference that holds all responses equally likely."""
        zeros = torch.zeros_like(self.ref_chosen)
        return self._replace(ref_chosen=zeros, ref_rejected=zeros)


class DirectLoss(NamedTuple):
    """Scalars, each a mean over pairs; all but `loss` without gradient.

    loss: what is minimised.
    reward_chosen, reward_rejected: what the loss takes for the responses' rewards, beta (log policy - log reference).
    accuracy: chance that a labeller who follows the labels agrees with the order of the rewards; equal ones count half.
    margin: reward_chosen - reward_rejected.
    """

    loss: Tensor
    reward_chosen: Tensor
    reward_rejected: Tensor
    accuracy: Tensor
    margin: Tensor


PairObjective = Callable[[PairLogprobs], DirectLoss]


def dpo_loss(pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> DirectLoss:
    """DPO: logistic regression of the labels on the difference of rewards; with label_smoothing above 0, cDPO.

    L = mean(-q log sigma(beta D) - (1 - q) log sigma(-beta D)),  q = p (1 - e) + (1 - p) e

    It reaches reference * exp(reward / beta) where the labels are the probabilities themselves, on all pairs; hard
    labels alone drive D to infinity. cDPO: https://ericmitchell.ai/cdpo.pdf

    Args:
        pairs: log-probabilities, with p = label.
        beta: price of straying from the reference, reward per nat; 0.1 is usual.
        label_smoothing: e, the share of labels taken to be flipped; below 0.5.

    Raises:
        ValueError: if there is no pair, shapes differ, or a label, a weight, a length or a number is out of range.
    """
    _check_share(label_smoothing)
    label = _label(pairs) * (1 - 2 * label_smoothing) + label_smoothing
    return _averaged(pairs, lambda difference: -F.logsigmoid(difference), beta=beta, label=label)


def robust_dpo_loss(pairs: PairLogprobs, *, beta: float = 0.1, flip_rate: float = 0.1) -> DirectLoss:
    """DPO whose expectation over flipped labels is DPO's on the true ones, if labels flip at just that rate.

    L = mean((1 - e) l(beta D) - e l(-beta D)) / (1 - 2 e),  l = -log sigma

    Chowdhury et al., https://arxiv.org/abs/2403.00409. The loss may be negative, and is not bounded below.

    Args:
        pairs: log-probabilities, with labels as they were given.
        beta: see `dpo_loss`.
        flip_rate: e, the share of labels that are flipped; below 0.5.
    """
    _check_share(flip_rate)

    def corrected(difference: Tensor) -> Tensor:
        kept, flipped = -F.logsigmoid(difference), -F.logsigmoid(-difference)
        return ((1 - flip_rate) * kept - flip_rate * flipped) / (1 - 2 * flip_rate)

    return _averaged(pairs, corrected, beta=beta)


def ipo_loss(pairs: PairLogprobs, *, beta: float = 0.1, per_token: bool = True) -> DirectLoss:
    """IPO: the difference of log-ratios is drawn to a target, so that it stays finite whatever the labels.

    L = mean(p (D - 1 / (2 beta))^2 + (1 - p) (D + 1 / (2 beta))^2), least where beta D = p - 1/2

    Azar et al., https://arxiv.org/abs/2310.12036

    Args:
        pairs: log-probabilities, with p = label.
        beta: strength of the regularisation (tau in the paper).
        per_token: take means over each response's tokens, as the authors do in practice; False takes sums, as the
            paper writes it. A target of 1 / (2 beta) nats is far for a mean: beta is of another size then.
    """
    _check_beta(beta)
    counted = pairs.per_token() if per_token else pairs
    return _averaged(counted, lambda difference: (difference / beta - 1 / (2 * beta)).square(), beta=beta)


def hinge_loss(pairs: PairLogprobs, *, beta: float = 0.1) -> DirectLoss:
    """SLiC's hinge: mean(max(0, 1 - beta D)); pairs that are 1 apart are learnt from no more.

    Zhao et al., https://arxiv.org/abs/2305.10425, on log-ratios as in Liu et al., https://arxiv.org/abs/2309.06657
    """
    return _averaged(pairs, lambda difference: F.relu(1 - difference), beta=beta)


def length_normalised_dpo_loss(pairs: PairLogprobs, *, beta: float = 5.0, label_smoothing: float = 0.0) -> DirectLoss:
    """DPO on means over tokens, so that long responses are not preferred for their length.

    Lambert et al., "Tulu 3", https://arxiv.org/abs/2411.15124, whose beta is 5: means are small beside sums.
    """
    return dpo_loss(pairs.per_token(), beta=beta, label_smoothing=label_smoothing)


def simpo_loss(pairs: PairLogprobs, *, beta: float = 2.0, gamma: float = 1.0) -> DirectLoss:
    """SimPO: the reward is beta times the mean log-probability itself, without reference, and must differ by gamma.

    L = mean(-log sigma(beta (mean chosen - mean rejected) - gamma))

    Meng et al., https://arxiv.org/abs/2405.14734: beta 2 to 2.5, gamma about half of it.
    """
    if not math.isfinite(gamma):
        raise ValueError(f"gamma ({gamma}) must be finite")
    free = pairs.without_reference().per_token()
    return _averaged(free, lambda difference: -F.logsigmoid(difference - gamma), beta=beta)


def with_nll(pairs: PairLogprobs, *, loss: PairObjective = dpo_loss, coef: float = 1.0) -> DirectLoss:
    """A loss plus coef times the negative log-likelihood (nats a token) of the preferred responses.

    It keeps preferred responses likely, which losses on differences alone do not. Pang et al.,
    https://arxiv.org/abs/2404.19733. Soft labels weigh both responses by the chance of being preferred.
    """
    if not coef >= 0:
        raise ValueError(f"coef ({coef}) must be 0 or above")
    found, means, label = loss(pairs), pairs.per_token(), _label(pairs)
    likelihood = label * at_least_float32(means.chosen) + (1 - label) * at_least_float32(means.rejected)
    return found._replace(loss=found.loss - coef * (_weight(pairs) * likelihood).mean())


class VoteLoss(NamedTuple):
    """Scalars: `loss`, and without gradient the mean reward of responses voted up and down, 0 where there are none.

    accuracy: share of votes on the right side of the baseline; on it counts half.
    """

    loss: Tensor
    reward_up: Tensor
    reward_down: Tensor
    accuracy: Tensor


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    up: Tensor,
    *,
    baseline: Tensor,
    beta: float = 0.1,
    up_weight: float = 1.0,
    down_weight: float = 1.0,
    weight: Tensor | None = None,
) -> VoteLoss:
    """KTO: a response is worth what its log-ratio exceeds a baseline by, with a value that saturates on both sides.

    L = mean(w_up (1 - sigma(beta (d - z0))) over votes up, w_down (1 - sigma(beta (z0 - d))) over votes down),
    d = logprobs - ref_logprobs.  Ethayarajh et al., https://arxiv.org/abs/2402.01306

    Args:
        logprobs: of each response, summed over its tokens, under the policy, (b,).
        ref_logprobs: the same under the reference, no gradient, (b,).
        up: True for a vote up, (b,).
        baseline: z0, a scalar, see `kto_baseline`; 0 leaves it out.
        beta: price of straying from the reference; 0.1 in the paper.
        up_weight: w_up; the paper keeps up_weight n_up / (down_weight n_down) between 1 and 4/3.
        down_weight: w_down.
        weight: factor of each vote's loss, (b,); None for 1.

    Raises:
        ValueError: if there is no vote, shapes differ, or a number is out of range.
        TypeError: if up is not bool.
    """
    _check_beta(beta)
    given = {} if weight is None else {"weight": weight}
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, up=up, **given)
    if logprobs.ndim != 1 or len(logprobs) == 0:
        raise ValueError(f"logprobs has shape {tuple(logprobs.shape)}: it must be (b,) with at least one vote")
    if up.dtype != torch.bool:
        raise TypeError(f"up is {up.dtype}: it must be torch.bool, True for a vote up")
    for name, value in (("up_weight", up_weight), ("down_weight", down_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} ({value}) must be 0 or above")
    ratio = at_least_float32(logprobs) - at_least_float32(ref_logprobs)
    gap = beta * (ratio - baseline.detach()) * torch.where(up, 1.0, -1.0)
    losses = torch.where(up, up_weight, down_weight) * torch.sigmoid(-gap)
    losses = losses if weight is None else losses * weight
    rewards, gap = beta * ratio.detach(), gap.detach()
    accuracy = ((gap > 0).float() + 0.5 * (gap == 0).float()).mean()
    return VoteLoss(losses.mean(), _mean_where(rewards, up), _mean_where(rewards, ~up), accuracy)


def kto_baseline(logratios: Tensor, *, reduce: Callable[[Tensor], Tensor] = identity) -> Tensor:
    """KTO's z0: an estimate of KL(policy || reference), from responses read after prompts that they do not answer.

    z0 = max(0, mean(log policy(y' | x) - log reference(y' | x))), over all ranks, without gradient; 0 of none.

    Args:
        logratios: of mismatched prompts and responses, summed over the tokens of each response, (b,).
        reduce: sums a tensor over all ranks.
    """
    values = at_least_float32(logratios.detach())
    total, count = reduce(torch.stack([values.sum(), values.new_tensor(len(values))])).unbind()
    return (total / count.clamp(min=1)).clamp(min=0)


def _averaged(
    pairs: PairLogprobs, loss_of: Callable[[Tensor], Tensor], *, beta: float, label: Tensor | None = None
) -> DirectLoss:
    """Mean over pairs of p l(beta D) + (1 - p) l(-beta D), and what is reported beside it."""
    _check_beta(beta)
    label_given, weight = _label(pairs), _weight(pairs)
    label = label_given if label is None else label
    chosen = beta * (at_least_float32(pairs.chosen) - at_least_float32(pairs.ref_chosen))
    rejected = beta * (at_least_float32(pairs.rejected) - at_least_float32(pairs.ref_rejected))
    difference = chosen - rejected
    losses = label * loss_of(difference) + (1 - label) * loss_of(-difference)
    margin = difference.detach()
    agreement = torch.where(margin > 0, label_given, 1 - label_given).masked_fill(margin == 0, 0.5)
    return DirectLoss(
        (weight * losses).mean(), chosen.detach().mean(), rejected.detach().mean(), agreement.mean(),
        margin.mean(),
    )  # fmt: skip


def _label(pairs: PairLogprobs) -> Tensor:
    """The labels (b,), of pairs that were checked."""
    tensors = {name: part for name, part in pairs._asdict().items() if part is not None}
    check_same_shape(**tensors)
    if pairs.chosen.ndim != 1 or len(pairs.chosen) == 0:
        raise ValueError(f"chosen has shape {tuple(pairs.chosen.shape)}: it must be (b,) with at least one pair")
    if bool((torch.minimum(pairs.chosen_lengths, pairs.rejected_lengths) < 1).any()):
        raise ValueError("a response without a token has no log-probability: lengths must be at least 1")
    if pairs.label is None:
        return torch.ones_like(at_least_float32(pairs.chosen.detach()))
    if not bool(((pairs.label >= 0) & (pairs.label <= 1)).all()):
        raise ValueError(
            f"label ({pairs.label.tolist()}) must lie between 0 and 1: the probability that chosen is preferred"
        )
    return at_least_float32(pairs.label)


def _weight(pairs: PairLogprobs) -> Tensor:
    if pairs.weight is None:
        return torch.ones_like(at_least_float32(pairs.chosen.detach()))
    if not bool(((pairs.weight >= 0) & pairs.weight.isfinite()).all()):
        raise ValueError(f"weight ({pairs.weight.tolist()}) must be 0 or above")
    return at_least_float32(pairs.weight)


def _mean_where(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta ({beta}) must be above 0")


def _check_share(share: float) -> None:
    if not 0 <= share < 0.5:
        raise ValueError(f"a share of flipped labels ({share}) must be at least 0 and below 0.5")
