"""One update: epochs of steps over the minibatches of a lesson, which can stop after any step and go on.

Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347, whose loop it is; the loss
is given. Knows nothing of prompts, judges or files.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from math import isfinite
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.objectives.group import Counts
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.losses import Loss
from palm_rlhf_pytorch.policy.pretraining import Pretraining
from palm_rlhf_pytorch.policy.progress import Progress, accumulate
from palm_rlhf_pytorch.policy.rollout import Rows, row_batches
from palm_rlhf_pytorch.policy.sharding import Sharding, asks_for_sharding, gathering_gradients, whole_tensor
from palm_rlhf_pytorch.policy.targets import Lesson, Targets
from palm_rlhf_pytorch.training.optimizer import parameter_groups
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory, new_optimizer
from palm_rlhf_pytorch.training.ranks import Ranks

WATCHED = ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm")  # a step with one not finite is left out
Random = Callable[..., torch.Generator]  # (purpose, *counts): the same state for the same arguments


class Learner:
    """Owns the optimizer of an ActorCritic and takes its steps.

    One forward, one summed loss, one backward a microbatch: two backwards through one wrapped model let ranks drift
    apart. Sums are divided by the number of response tokens in the whole optimizer step, on all ranks, so that
    neither microbatches nor ranks change the gradient. Where accelerate's settings ask for FSDP, `model` is a sharded
    twin of the ActorCritic, which has its own weights only within `whole()`.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        accelerator: Accelerator,
        *,
        loss: Loss,
        optimizer: OptimizerFactory | None = None,
        pretraining: Pretraining | None = None,
        ptx_coef: float = 0.0,
        actor_lr: float,
        actor_wd: float,
        betas: tuple[float, float],
        adam_eps: float,
        max_norm: float | None,
        epochs: int,
        minibatch_size: int,
        max_batch_size: int,
        max_batch_tokens: int,
        max_skipped_steps: int = 3,
        max_approx_kl: float | None = None,
        critic_lr: float = 0.0,
        critic_wd: float = 0.0,
        critic_warmup: int = 0,
    ) -> None:
        self.accelerator, self.ranks = accelerator, Ranks(accelerator)
        self.sharding = Sharding(actor_critic, accelerator) if asks_for_sharding(accelerator) else None
        learnt = actor_critic if self.sharding is None else self.sharding.model
        self.actor, self.critic = learnt.actor_parameters(), learnt.critic_parameters()
        groups = parameter_groups(self.actor.items(), lr=actor_lr, weight_decay=actor_wd)
        if self.critic:
            groups += parameter_groups(self.critic.items(), lr=critic_lr, weight_decay=critic_wd)
        stepper = new_optimizer(optimizer, groups, lr=actor_lr, betas=betas, eps=adam_eps)
        if not self._groups_of(self.actor, stepper) or (self.critic and not self._groups_of(self.critic, stepper)):
            raise ValueError("optimizer mixes the policy's parameters with the critic's: keep groups as they are given")
        self.model: nn.Module = learnt
        if self.sharding is None:
            self.model, self.optimizer = accelerator.prepare(learnt, stepper)
        else:  # wrapped already; `prepare` would tell the optimizer's tensors by their memory: empty shards have none
            self.optimizer = accelerator.prepare_optimizer(stepper)
        self.pretraining, self.ptx_coef = pretraining, ptx_coef
        self.random: Random | None = None
        self.loss, self.max_norm, self.epochs, self.minibatch_size = loss, max_norm, epochs, minibatch_size
        self.max_batch_size, self.max_batch_tokens = max_batch_size, max_batch_tokens
        self.max_skipped_steps, self.max_approx_kl, self.critic_warmup = max_skipped_steps, max_approx_kl, critic_warmup
        self.draws = actor_critic.has_dropout
        self.steps = 0
        self.skipped_in_a_row = 0

    def update(
        self,
        lesson: Lesson,
        *,
        random: Random,
        progress: Progress | None = None,
        on_step: Callable[[Progress], object] | None = None,
    ) -> dict[str, float]:
        """All epochs over a lesson, reshuffled each; the mean of each diagnostic over the optimizer steps taken.

        Args:
            lesson: this rank's rows; every rank brings the same number.
            random: gives the random states of the order, ("order", epoch), and of dropout, ("dropout", epoch,
                minibatch), on the CPU.
            progress: where an interrupted update goes on; None begins it.
            on_step: called after each step with where the update stands; what it raises ends the update there.

        Raises:
            FloatingPointError: if loss or gradient norm were not finite in `max_skipped_steps` steps one after the
                other. The weights are as the last good step left them.
        """
        self.model.train()
        self.random = random
        self.accelerator.sync_gradients = True  # accelerate's state is one for all trainers of the process
        progress = progress or Progress()
        rows = lesson.counted.nonzero()[:, 0]
        share = max(self.minibatch_size // self.accelerator.num_processes, 1)
        num_batches = int(self.ranks.max(torch.tensor(-(-len(rows) // share))))
        with self._warming_up(lesson):
            return self._epochs(lesson, rows, num_batches, share, progress, random, on_step)

    def _epochs(
        self,
        lesson: Lesson,
        rows: Tensor,
        num_batches: int,
        share: int,
        progress: Progress,
        random: Random,
        on_step: Callable[[Progress], object] | None,
    ) -> dict[str, float]:
        """What is left of the epochs, in num_batches minibatches of `share` of this rank's rows each."""
        while progress.epoch < self.epochs and num_batches and not progress.is_over():
            epoch = progress.epoch
            order = rows[torch.randperm(len(rows), generator=random("order", epoch))].tolist()
            for number in range(progress.minibatch, num_batches):
                seeded = _seeded(random("dropout", epoch, number), self._device) if self.draws else nullcontext()
                with seeded:
                    self._step(lesson, order[number * share : (number + 1) * share], progress)
                progress.minibatch = number + 1
                if on_step is not None:
                    on_step(progress)
                if progress.is_over():
                    return self._summary(progress)
            progress.epoch, progress.minibatch = epoch + 1, 0
        return self._summary(progress)

    @staticmethod
    def _groups_of(hat: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[dict[str, Any]]:
        """The optimizer's groups that hold the actor's parameters alone, or the critic's."""
        chosen = {id(parameter) for parameter in hat.values()}
        return [group for group in optimizer.param_groups if all(id(part) in chosen for part in group["params"])]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block nothing is sharded, for whatever is not learning; every process must enter it.

        The ActorCritic has its weights, and what the learner is seen to hold are those. They are not to be changed.
        """
        if self.sharding is None:
            yield
            return
        kept, groups = (self.model, self.actor, self.critic), self.optimizer.param_groups
        held = [group["params"] for group in groups]
        plain = dict(self.sharding.plain.named_parameters())
        seen = {id(weight): plain[name] for name, weight in (self.actor | self.critic).items()}
        with self.sharding.whole():
            try:
                self.model = self.sharding.plain
                self.actor, self.critic = ({name: plain[name] for name in hat} for hat in kept[1:])
                for group, weights in zip(groups, held, strict=True):
                    group["params"] = [seen[id(weight)] for weight in weights]
                yield
            finally:
                self.model, self.actor, self.critic = kept
                for group, weights in zip(groups, held, strict=True):
                    group["params"] = weights

    @contextmanager
    def _warming_up(self, lesson: Lesson) -> Iterator[None]:
        """In an update in which the critic learns alone the policy's rates are 0: nor does weight decay move it."""
        groups = self._groups_of(self.actor, self.optimizer) if lesson.version < self.critic_warmup else []
        rates = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = 0.0
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _summary(self, progress: Progress) -> dict[str, float]:
        """The diagnostics of an update."""
        hats = {"policy/lr": self.actor} | ({"value/lr": self.critic} if self.critic else {})
        metrics = {name: float(self._groups_of(hat, self.optimizer)[0]["lr"]) for name, hat in hats.items()}
        metrics["policy/skipped_steps"] = float(progress.skipped)
        if self.max_approx_kl is not None:
            metrics["policy/ended_early"] = float(progress.ended)
        if not progress.totals:
            return metrics
        sums = dict(zip(progress.totals, torch.stack(list(progress.totals.values())).tolist(), strict=True))
        return metrics | {
            name: value / (1 if name.endswith("_max") else progress.steps) for name, value in sums.items()
        }

    @property
    def _device(self) -> torch.device:
        return next(iter(self.actor.values())).device

    def _step(self, lesson: Lesson, rows: list[int], progress: Progress) -> None:
        """One optimizer step on some rows, in microbatches that max_batch_size and max_batch_tokens allow."""
        own = [float(sum(lesson.spans[row][1] for row in rows)), float(len(rows))]
        counts = Counts(*self.ranks.sum(torch.tensor(own, device=self._device)).clamp(min=1))
        totals: dict[str, Tensor] = self._pretrain(progress) if self.ptx_coef and self.pretraining is not None else {}
        micros = self._microbatches(lesson, rows)
        for number, (micro, counted) in enumerate(micros):
            with gathering_gradients(self.model, self.accelerator, last=number == len(micros) - 1):
                accumulate(totals, self._backward(lesson, micro, counts, counted=counted))
        totals = self._over_ranks(totals)
        self.accelerator.unscale_gradients(self.optimizer)
        totals["policy/grad_norm"] = self._clip(self.actor.values())
        if self.critic:
            totals["value/grad_norm"] = self._clip(self.critic.values())
        self._apply(totals, rows, lesson, progress)

    def _pretrain(self, progress: Progress) -> dict[str, Tensor]:
        """Gradients of the next-token loss on some texts, as many as this rank's share of a step has responses."""
        assert self.pretraining is not None and self.random is not None, "asked for in an update"
        total = torch.zeros((), device=self._device)
        rows, length = max(self.minibatch_size // self.accelerator.num_processes, 1), self.pretraining.length
        generator = self.random("pretraining", progress.epoch, progress.minibatch)
        texts = self.pretraining.windows(rows, generator=generator).to(self._device)
        at_once = max(1, min(self.max_batch_size, self.max_batch_tokens // length))
        weight = self.ptx_coef * self.accelerator.gradient_accumulation_steps / (rows * (length - 1))
        for part in texts.split(at_once):
            ones = torch.ones(len(part), dtype=torch.long, device=self._device)
            with gathering_gradients(self.model, self.accelerator, last=False), self.accelerator.autocast():
                out = self.model(part, ones, length - 1, num_tokens=len(part) * (length - 1), entropy_grad=False)
                loss = -out.logprobs.sum()
                self.accelerator.backward(weight * loss + 0.0 * out.values.sum())  # ranks wait for the critic's too
            total += loss.detach() / (rows * (length - 1) * self.accelerator.num_processes)
        return {"policy/ptx_loss": total}

    def _microbatches(self, lesson: Lesson, rows: list[int]) -> list[tuple[Rows, bool]]:
        """Rows of an optimizer step as max_batch_size and max_batch_tokens allow, and whether they count.

        Ranks wait for one another's gradients, so that a rank whose rows are used up goes along with one that does not
        count; and where weights are sharded for each pass, so that all make as many.
        """
        micros = list(
            row_batches(
                lesson.spans, rows or (~lesson.counted).nonzero()[:1, 0].tolist(), device=torch.device("cpu"),
                max_rows=self.max_batch_size, max_tokens=self.max_batch_tokens,
            )
        )  # fmt: skip
        most = len(micros) if self.sharding is None else int(self.ranks.max(torch.tensor(len(micros))))
        return [(micro, True) for micro in micros] + [(micros[-1], False)] * (most - len(micros))

    def _apply(self, totals: dict[str, Tensor], rows: list[int], lesson: Lesson, progress: Progress) -> None:
        """Take the step if all numbers are finite; else leave weights and optimizer as they are, and count it."""
        watched = [name for name in WATCHED if name in totals]
        known = torch.stack([totals[name].float() for name in watched]).isfinite()
        finite, scaled = bool(known.all()), self.accelerator.scaler is not None
        if finite or scaled:  # float16's scaler leaves out steps whose gradients overflow by itself, and scales down
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.skipped_in_a_row = 0
            self.steps += 1
            progress.steps += 1
            accumulate(progress.totals, totals)
            limit = self.max_approx_kl
            progress.ended = limit is not None and float(totals["policy/approx_kl"]) > limit
            return
        progress.skipped += 1
        self.skipped_in_a_row += not (
            scaled and all(isfinite(float(totals[name])) for name in watched if name.endswith("/loss"))
        )  # no scale mends a loss
        if self.skipped_in_a_row >= self.max_skipped_steps:
            figures = ", ".join(f"{name} {float(totals[name]):.3g}" for name in watched)
            raise FloatingPointError(
                f"{figures} in epoch {progress.epoch + 1}, minibatch {progress.minibatch + 1}, after"
                f" {self.skipped_in_a_row} steps in a row that are not finite; it holds {lesson.named(rows)}. The"
                " weights are as the last good step left them: lower the learning rates, or look for extreme scores"
            )

    def _backward(self, lesson: Lesson, rows: Rows, counts: Counts, *, counted: bool) -> dict[str, Tensor]:
        """Gradients of one microbatch, added to those there are; its part of each diagnostic."""
        rollout, targets = lesson.read(rows)
        mask = rollout.response_mask & lesson.counted[rows.numbers][:, None] & counted
        device = self._device
        rollout, mask = rollout.to(device), mask.to(device)
        with self.accelerator.autocast():
            out = self.model(
                rollout.sequences, rollout.prompt_lengths, rows.steps, temperature=rollout.temperature,
                lengths=rollout.lengths, num_tokens=rows.num_tokens, since=rows.since,
                entropy_grad=self.loss.entropy_grad, kl_grad=self.loss.kl_grad,
            )  # fmt: skip
        found = self.loss(out, rollout, Targets(*(part.to(device) for part in targets)), mask, counts)
        # while the critic warms up the policy's gradient is 0 but there: ranks wait for one
        loss = found.value + found.policy * (0.0 if lesson.version < self.critic_warmup else 1.0)
        # the wrapper averages over ranks and accelerate divides by its accumulation steps; N is already of them all
        scale = self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps
        self.accelerator.backward(loss * scale)
        return found.figures

    def _over_ranks(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks, and the largest of what is a maximum."""
        return {
            name: self.ranks.max(value) if name.endswith("_max") else self.ranks.sum(value)
            for name, value in totals.items()
        }

    def _clip(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Scale the gradients of one group down to max_norm together; their norm before."""
        limit = float("inf") if self.max_norm is None else self.max_norm
        return whole_tensor(nn.utils.clip_grad_norm_(list(parameters), limit))


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
