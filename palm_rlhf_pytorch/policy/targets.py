"""From scored responses to what each token teaches: rewards, KL, advantages and returns, a part of the rows at a time.

Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation", https://arxiv.org/abs/1506.02438
Reads rows from memory or from disk alike, and holds no more of them than a pass needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.advantage import gae, shaped_rewards
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.tensors import Moments
from palm_rlhf_pytorch.training.ranks import Ranks

WHITENING_EPS = 1e-8  # as in openai/lm-human-preferences


class Targets(NamedTuple):
    """What responses teach: per response token, (b, t), zero outside the mask, without gradient."""

    rewards: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor


def make_targets(
    rollout: Rollout, scores: Tensor, *, kl_coef: float, gamma: float, gae_lambda: float, reward_scale: float = 1.0
) -> Targets:
    """Rewards (KL penalty on each token, score on the last), advantages as GAE gives them, and returns.

    Where a judge has given rewards per token they stand where it put them, and the last token has what is left of the
    score: nothing, but for what normalising and penalties have changed.

    Args:
        rollout: responses with log-probabilities and values.
        scores: what the last token of each response earns, (b,).
        kl_coef: price of a nat of KL to the reference.
        gamma: discount per token.
        gae_lambda: weight of longer returns.
        reward_scale: what rewards per token are multiplied by, as the scores were.
    """
    mask = rollout.response_mask
    given = None if rollout.rewards is None else reward_scale * rollout.rewards.masked_fill(~mask, 0.0)
    last = scores if given is None else scores - given.sum(dim=-1)
    rewards, kl = shaped_rewards(last, rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=kl_coef)
    rewards = rewards if given is None else rewards + given
    return Targets(rewards, kl, *gae(rewards, rollout.values, mask, gamma=gamma, gae_lambda=gae_lambda))


class Source(Protocol):
    """Where rows come from, n of them: a `Rollout` in memory, or experience on disk.

    ended, prompt_rows, versions, eos_token, scores: as in Rollout, (n,).
    """

    @property
    def ended(self) -> Tensor: ...  # noqa: D102
    @property
    def prompt_rows(self) -> Tensor: ...  # noqa: D102
    @property
    def versions(self) -> Tensor: ...  # noqa: D102
    @property
    def eos_token(self) -> int | None: ...  # noqa: D102
    @property
    def scores(self) -> Tensor | None: ...  # noqa: D102

    def spans(self) -> Sequence[tuple[int, int]]:
        """Tokens of prompt and response of each row."""
        ...

    def select(self, rows: Rows) -> Rollout:
        """Some of the rows."""
        ...


@dataclass
class Lesson:
    """Rows to learn from, on the CPU, and what each response earns; PPO's, and the base of other methods'.

    Attributes:
        source: the rows.
        scores: what the last token of each earns, (n,); whatever stands where a row does not count.
        counted: True on rows that count, (n,); the others (without a finite score) teach nothing.
        kl_coef: price of a nat of KL to the reference.
        gamma: discount per token.
        gae_lambda: weight of longer returns.
        version: how many updates the policy has had; rows sampled by an older one are weighted.
        importance_cap: bound on their importance weights.
        reward_scale: see `make_targets`.
        whitens: whether advantages are whitened over all rows. values: whether there is a critic's to be looked at.
    """

    whitens: ClassVar[bool] = True
    values: ClassVar[bool] = True

    source: Source
    scores: Tensor
    counted: Tensor
    kl_coef: float
    gamma: float = 1.0
    gae_lambda: float = 0.95
    version: int = 0
    importance_cap: float = 2.0
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        self.spans = self.source.spans()
        self.whitening: Moments | None = None

    def parts(self, max_tokens: int) -> Iterator[tuple[Rows, Rollout, Targets]]:
        """All rows that count, some at a time, with what they teach before whitening."""
        rows = self.counted.nonzero()[:, 0].tolist()
        if rows:
            for batch in row_batches(self.spans, rows, device=torch.device("cpu"), max_tokens=max_tokens):
                yield batch, *self.read(batch)

    def read(self, rows: Rows) -> tuple[Rollout, Targets]:
        """Some rows, and what they teach; advantages are whitened where `whitening` says by what."""
        rollout = self.source.select(rows)
        targets = self.targets(rollout, rows)
        if self.whitening is None:
            return rollout, targets
        scale = torch.rsqrt(self.whitening.var + WHITENING_EPS)
        advantages = ((targets.advantages - self.whitening.mean) * scale).to(targets.advantages.dtype)
        advantages = (advantages * self.importance(rollout)).masked_fill(~rollout.response_mask, 0.0)
        return rollout, targets._replace(advantages=advantages)

    def targets(self, rollout: Rollout, rows: Rows) -> Targets:
        """What some rows teach, before whitening."""
        return make_targets(
            rollout, self.scores[rows.numbers], kl_coef=self.kl_coef, gamma=self.gamma, gae_lambda=self.gae_lambda,
            reward_scale=self.reward_scale,
        )  # fmt: skip

    def prepare(self, ranks: Ranks, *, max_tokens: int) -> dict[str, float]:
        """Look at all rows, before they are read, for what a method must know of them; figures of that, as metrics."""
        return {}

    @property
    def fresh(self) -> Tensor:
        """True on rows that this policy has sampled, whether they count or not, (n,)."""
        return self.source.versions >= self.version

    def importance(self, rollout: Rollout) -> Tensor:
        """Weight of each token of a row: 1 if it was sampled by this policy, else how much likelier it is now, (b, t).

        min(exp(logprob - behaviour's logprob), cap), from the policy at the beginning of the update: the ratio is
        clipped around that policy, not around the one that sampled (Hilton et al., "Batch size-invariance for policy
        optimization", https://arxiv.org/abs/2110.00641; the cap as in Espeholt et al., "IMPALA",
        https://arxiv.org/abs/1802.01561). Where rows are old, `sampler_logprobs` are the behaviour's.
        """
        old = (rollout.versions < self.version)[:, None]
        weights = (rollout.logprobs - rollout.sampler_logprobs).exp().clamp(max=self.importance_cap)
        return torch.where(old, weights, torch.ones_like(weights))

    def named(self, rows: list[int], limit: int = 8) -> str:
        """Some rows by the prompts they answer, for messages."""
        if not rows:
            return "no row of this process"
        chosen = torch.tensor(rows[:limit])
        part = self.source.select(next(row_batches(self.spans, rows[:limit], device=chosen.device)))
        answered = sorted(part.prompt_rows.tolist())
        more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
        return f"responses {sorted(chosen.tolist())}{more} (to prompts {answered})"
