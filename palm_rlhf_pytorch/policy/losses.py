"""From what the model says of a microbatch to the loss of it, and its part of each diagnostic.

One class a method: `Learner` takes its steps with whichever it is given. Knows no optimizer and no rank: parts of
several microbatches and ranks add up to the step's.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.group import Counts, GroupObjective, group_loss
from palm_rlhf_pytorch.objectives.policy_gradient import policy_loss, value_loss
from palm_rlhf_pytorch.policy.actor_critic import PolicyOutput
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.targets import Targets


class StepLoss(NamedTuple):
    """`policy` and `value`, the losses of actor and critic, and `figures`, by the metrics' names, without gradient."""

    policy: Tensor
    value: Tensor
    figures: dict[str, Tensor]


class Clipping(NamedTuple):
    """Of each response token, (b, t): the ratio that is clipped, and 1 where its clipped loss is the larger one."""

    ratios: Tensor
    clipped: Tensor


class Loss(Protocol):
    """What the learner asks of a method.

    Attributes:
        entropy_grad: whether the loss needs a gradient of the entropy.
        kl_grad: whether it needs the exact KL to the reference, with its gradient.
    """

    @property
    def entropy_grad(self) -> bool: ...  # noqa: D102
    @property
    def kl_grad(self) -> bool: ...  # noqa: D102

    def __call__(self, out: PolicyOutput, rollout: Rollout, targets: Targets, mask: Tensor, counts: Counts) -> StepLoss:
        """The loss of one microbatch of an optimizer step.

        Args:
            out: what the model says of it now.
            rollout: the responses, with what was recorded of them.
            targets: what they teach.
            mask: True on response tokens that count, (b, t).
            counts: of the whole step.
        """
        ...

    def clipping(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Clipping:
        """Where the loss clips; arguments (b, t) each, see `objectives.policy_gradient.policy_loss`."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Regularized:
    """Weights of what is added to the policy's loss: token means over the step, as the loss is.

    Attributes:
        entropy_coef: of the entropy, which is subtracted.
        kl_exact_coef: of the KL to the reference over the whole vocabulary.
    """

    entropy_coef: float = 0.0
    kl_exact_coef: float = 0.0

    @property
    def entropy_grad(self) -> bool:
        """Whether the entropy is part of the loss."""
        return self.entropy_coef != 0

    @property
    def kl_grad(self) -> bool:
        """Whether the exact KL is."""
        return self.kl_exact_coef != 0

    def regularized(
        self, loss: Tensor, out: PolicyOutput, mask: Tensor, counts: Counts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with what is added to it, and figures of that."""
        entropy = out.entropy.masked_fill(~mask, 0.0).sum() / counts.tokens.clamp(min=1)
        figures = {"policy/entropy": entropy.detach()}
        if self.entropy_grad:
            loss = loss - self.entropy_coef * entropy
        if self.kl_grad:
            kl = out.kl_exact.masked_fill(~mask, 0.0).sum() / counts.tokens.clamp(min=1)
            figures["policy/kl_exact"] = kl.detach()
            loss = loss + self.kl_exact_coef * kl
        return loss, figures


@dataclass(frozen=True, kw_only=True)
class PPOLoss(_Regularized):
    """Clipped surrogate and clipped value loss; see `objectives.policy_gradient`.

    Attributes:
        eps_clip: see `PPOSettings`, as for the others.
        dual_clip: likewise.
        value_clip: likewise.
    """

    eps_clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2

    def __call__(self, out: PolicyOutput, rollout: Rollout, targets: Targets, mask: Tensor, counts: Counts) -> StepLoss:
        """See `Loss`."""
        policy = policy_loss(
            out.logprobs, rollout.logprobs, targets.advantages, mask, eps_clip=self.eps_clip,
            dual_clip=self.dual_clip, num_tokens=counts.tokens,
        )  # fmt: skip
        value = value_loss(
            out.values, rollout.values, targets.returns, mask, value_clip=self.value_clip, num_tokens=counts.tokens
        )
        loss, extra = self.regularized(policy.loss, out, mask, counts)
        figures = {f"policy/{name}": figure.detach() for name, figure in policy._asdict().items()}
        figures |= {f"value/{name}": figure.detach() for name, figure in value._asdict().items()}
        return StepLoss(loss, value.loss, figures | extra)

    def clipping(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Clipping:
        """See `Loss`."""
        ratios = (logprobs - old_logprobs).exp().masked_fill(~mask, 0.0)
        found = _clipping(ratios, advantages, mask, low=self.eps_clip, high=self.eps_clip)
        if self.dual_clip is None:
            return found
        capped = mask & (advantages < 0) & (ratios > self.dual_clip)
        return Clipping(ratios, found.clipped.maximum(capped.float()))


@dataclass(frozen=True, kw_only=True)
class GroupStepLoss(_Regularized):
    """The loss of GRPO and its kin; see `objectives.group`.

    Attributes:
        objective: which of them.
        max_length: tokens a response may have, for Dr. GRPO's constant.
    """

    objective: GroupObjective
    max_length: int

    def __call__(self, out: PolicyOutput, rollout: Rollout, targets: Targets, mask: Tensor, counts: Counts) -> StepLoss:
        """See `Loss`."""
        found = group_loss(
            out.logprobs, rollout.logprobs, rollout.ref_logprobs, targets.advantages[:, 0], mask,
            objective=self.objective, counts=counts, max_length=self.max_length,
        )  # fmt: skip
        loss, extra = self.regularized(found.loss, out, mask, counts)
        figures = {f"policy/{name}": figure.detach() for name, figure in found.policy._asdict().items()}
        if self.objective.kl_loss_coef:
            extra["policy/kl_loss"] = found.kl.detach()
        return StepLoss(loss, torch.zeros_like(loss), figures | extra)

    def clipping(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Clipping:
        """See `Loss`; where a whole response has one ratio, each of its tokens has that."""
        new, old = (self.objective.level(part, mask)[0] for part in (logprobs, old_logprobs))
        ratios = (new - old).exp().expand_as(mask).masked_fill(~mask, 0.0)
        return _clipping(ratios, advantages, mask, low=self.objective.eps_clip, high=self.objective.eps_clip_high)


def _clipping(ratios: Tensor, advantages: Tensor, mask: Tensor, *, low: float, high: float) -> Clipping:
    """Clipped is what has moved beyond the trust region to the side on which it earns."""
    beyond = torch.where(advantages > 0, ratios > 1 + high, (advantages < 0) & (ratios < 1 - low))
    return Clipping(ratios, (beyond & mask).float())
