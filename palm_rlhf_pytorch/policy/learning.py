"""One PPO update: advantages of a rollout, then epochs of clipped steps over its minibatches.

Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347
Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438
Knows nothing of prompts, judges or files.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.objectives.advantage import gae, shaped_rewards
from palm_rlhf_pytorch.objectives.policy_gradient import policy_loss, value_loss
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.tensors import masked_whiten
from palm_rlhf_pytorch.training.optimizer import adamw, parameter_groups


class Targets(NamedTuple):
    """What a rollout teaches: per response token, (b, t), zero outside the mask, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


def make_targets(
    rollout: Rollout,
    scores: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    gae_lambda: float,
    reduce: Callable[[Tensor], Tensor],
) -> Targets:
    """Rewards (KL penalty on each token, score on the last), whitened advantages, and returns.

    Args:
        rollout: responses with log-probabilities and values.
        scores: what the last token of each response earns, (b,).
        kl_coef: price of a nat of KL to the reference.
        gamma: discount per token.
        gae_lambda: weight of longer returns.
        reduce: sums a tensor over ranks, so that whitening is over the whole rollout.
    """
    mask = rollout.response_mask
    rewards, kl = shaped_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, rollout.values, mask, gamma=gamma, gae_lambda=gae_lambda)
    return Targets(rewards, kl, masked_whiten(advantages, mask, reduce=reduce), returns)


class Learner:
    """Owns the optimizer of an ActorCritic and takes PPO's steps.

    One forward, one summed loss, one backward a microbatch: two backwards through one wrapped model let ranks drift
    apart. Sums are divided by the number of response tokens in the whole optimizer step, on all ranks, so that
    neither microbatches nor ranks change the gradient.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        accelerator: Accelerator,
        *,
        actor_lr: float,
        critic_lr: float,
        actor_wd: float,
        critic_wd: float,
        betas: tuple[float, float],
        adam_eps: float,
        max_norm: float | None,
        eps_clip: float,
        dual_clip: float | None,
        value_clip: float | None,
        entropy_coef: float,
        epochs: int,
        minibatch_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
    ) -> None:
        self.accelerator = accelerator
        self.actor, self.critic = actor_critic.actor_parameters(), actor_critic.critic_parameters()
        groups = parameter_groups(self.actor.items(), lr=actor_lr, weight_decay=actor_wd)
        self.actor_groups = len(groups)  # they come first; the rest is the critic's
        groups += parameter_groups(self.critic.items(), lr=critic_lr, weight_decay=critic_wd)
        optimizer = adamw(groups, lr=actor_lr, betas=betas, eps=adam_eps)
        self.model: nn.Module
        self.model, self.optimizer = accelerator.prepare(actor_critic, optimizer)
        self.max_norm, self.eps_clip, self.dual_clip, self.value_clip = max_norm, eps_clip, dual_clip, value_clip
        self.entropy_coef, self.epochs = entropy_coef, epochs
        self.minibatch_size = minibatch_size
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.draws = actor_critic.has_dropout
        self.steps = 0

    def update(self, rollout: Rollout, targets: Targets, *, generator: torch.Generator) -> dict[str, float]:
        """All epochs over a rollout, reshuffled each; the mean of each diagnostic over the optimizer steps.

        Args:
            rollout: this rank's responses; every rank brings the same number.
            targets: of the same.
            generator: random state of the order and of dropout, on the CPU.

        Raises:
            FloatingPointError: if a gradient norm is not finite; the weights are then as before that optimizer step.
        """
        share = max(1, self.minibatch_size // self.accelerator.num_processes)
        device = rollout.sequences.device
        self.model.train()
        self.accelerator.sync_gradients = True  # accelerate's state is one for all trainers of the process
        spans = rollout.spans()
        totals: dict[str, Tensor] = {}
        steps = 0
        with _seeded(generator, device) if self.draws else nullcontext():
            for _ in range(self.epochs):
                order = torch.randperm(len(spans), generator=generator).split(share)
                for rows in order:
                    _accumulate(totals, self._step(rollout, targets, spans, rows.tolist()))
                    steps += 1
                    self.steps += 1
        lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        sums = dict(zip(totals, torch.stack(list(totals.values())).tolist(), strict=True))
        metrics = {name: value / (1 if name.endswith("_max") else steps) for name, value in sums.items()}
        return metrics | {"policy/lr": lrs[0], "value/lr": lrs[self.actor_groups]}

    def _step(
        self, rollout: Rollout, targets: Targets, spans: list[tuple[int, int]], rows: list[int]
    ) -> dict[str, Tensor]:
        """One optimizer step on some rows, in microbatches that max_batch_size and max_batch_tokens allow."""
        device = rollout.sequences.device
        num_tokens = torch.full((), float(sum(spans[row][1] for row in rows)), device=device)
        num_tokens = self.accelerator.reduce(num_tokens, "sum").clamp(min=1)
        totals: dict[str, Tensor] = {}
        limits = {"max_rows": self.max_batch_size, "max_tokens": self.max_batch_tokens}
        micros = list(row_batches(spans, rows, device=device, **limits))
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1
            with self.accelerator.no_sync(self.model) if not last else nullcontext():
                _accumulate(totals, self._backward(rollout.select(micro), targets, micro, num_tokens))
        totals = self._over_ranks(totals)
        self.accelerator.unscale_gradients(self.optimizer)
        totals["policy/grad_norm"] = self._clip(self.actor.values())
        totals["value/grad_norm"] = self._clip(self.critic.values())
        finite = torch.isfinite(totals["policy/grad_norm"] + totals["value/grad_norm"])
        if self.accelerator.scaler is None and not bool(finite):  # float16's scaler leaves such steps out by itself
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"gradient norms of actor {float(totals['policy/grad_norm'])} and critic"
                f" {float(totals['value/grad_norm'])} in optimizer step {self.steps + 1}: the weights were left as they"
                " are; lower the learning rate, or look for extreme scores"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return totals

    def _backward(self, rollout: Rollout, targets: Targets, rows: Rows, num_tokens: Tensor) -> dict[str, Tensor]:
        """Gradients of one microbatch, added to those there are; its part of each diagnostic."""
        mask, steps = rollout.response_mask, rows.steps
        advantages, returns = targets.advantages[rows.numbers, :steps], targets.returns[rows.numbers, :steps]
        with self.accelerator.autocast():
            out = self.model(
                rollout.sequences, rollout.prompt_lengths, steps, temperature=rollout.temperature,
                lengths=rollout.lengths, num_tokens=rows.num_tokens, entropy_grad=self.entropy_coef != 0,
            )  # fmt: skip
        policy = policy_loss(
            out.logprobs, rollout.logprobs, advantages, mask, eps_clip=self.eps_clip, dual_clip=self.dual_clip,
            num_tokens=num_tokens,
        )  # fmt: skip
        value = value_loss(out.values, rollout.values, returns, mask, value_clip=self.value_clip, num_tokens=num_tokens)
        entropy = (out.entropy * mask).sum() / num_tokens
        loss = policy.loss + value.loss
        if self.entropy_coef != 0:
            loss = loss - self.entropy_coef * entropy
        # the wrapper averages over ranks and accelerate divides by its accumulation steps; N is already of them all
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss * scale)
        figures = {f"policy/{name}": figure.detach() for name, figure in policy._asdict().items()}
        figures |= {f"value/{name}": figure.detach() for name, figure in value._asdict().items()}
        return figures | {"policy/entropy": entropy.detach()}

    def _over_ranks(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks, and the largest of what is a maximum."""
        if self.accelerator.num_processes == 1:
            return totals
        return {
            name: self.accelerator.gather(value).max()
            if name.endswith("_max")
            else self.accelerator.reduce(value, "sum")
            for name, value in totals.items()
        }

    def _clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Scale the gradients of one group down to max_norm together; their norm before."""
        limit = float("inf") if self.max_norm is None else self.max_norm
        return nn.utils.clip_grad_norm_(list(parameters), limit)


def _accumulate(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add values to totals, name by name; of what is a maximum keep the larger."""
    for name, value in values.items():
        join = torch.maximum if name.endswith("_max") else torch.add
        totals[name] = join(totals[name], value) if name in totals else value


@contextmanager
def _seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global random state: seed that from a generator, and put it back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield
