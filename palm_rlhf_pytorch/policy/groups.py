"""What groups of responses teach: each is compared with the others to its prompt.

The base is `targets.Lesson`; knows no trainer and no loss.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.advantage import shaped_rewards
from palm_rlhf_pytorch.objectives.group import GroupObjective, informative_groups, overlong_penalty
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.policy.targets import Lesson, Targets
from palm_rlhf_pytorch.training.ranks import Ranks


@dataclass
class GroupLesson(Lesson):
    """Rows whose advantage is that of a response within its group: `group_size` responses of this rank to one prompt.

    Attributes:
        objective: how it is made.
        group_size: see `GroupSettings`, as for the others.
        limits: tokens each response may have, (n,); where there is an overlong_buffer.
        overlong_buffer: see there.
        drop_truncated: likewise.
        max_groups: groups that teach; those whose responses all earned the same are left out first, where there are
            more. None for all, those too.
    """

    objective: GroupObjective | None = None
    group_size: int | None = None
    limits: Tensor | None = None
    overlong_buffer: int | None = None
    drop_truncated: bool = False
    max_groups: int | None = None
    whitens: ClassVar[bool] = False
    values: ClassVar[bool] = False

    def prepare(self, ranks: Ranks, *, max_tokens: int) -> dict[str, float]:
        """Compare the responses; which of them count, and figures of the groups over all ranks."""
        assert self.objective is not None and self.source.scores is not None, "GRPOTrainer gives both"
        raw, dropped = self.source.scores[self.counted].double(), float((~self.counted).sum())
        groups, teaching = self.weigh()
        earned = self._earned(max_tokens)
        self.counted = self.counted & kept_groups(groups, teaching, self.max_groups)[groups]
        self.advantages = self.objective.advantages(earned, groups, self.counted)
        own = [float(teaching.sum()), float(len(teaching)), float(raw.sum()), float(len(raw)), dropped]
        informative, count, total, judged, dropped = ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return {
            "reward/dropped": dropped,
            "rollout/informative_groups": informative / max(count, 1),
            "rollout/groups": count,
            "reward/score_sampled": total / judged if judged else float("nan"),
        }

    def weigh(self) -> tuple[Tensor, Tensor]:
        """Leave out and punish what the settings say, once; the number of each row's group, and which groups teach."""
        if bool((self.source.prompt_rows < 0).any()):
            raise ValueError(
                "prompt_rows holds -1: responses are compared with others to their prompt, which it names; give"
                " `rollout` the prompt_rows of next_prompts, or a number for each prompt"
            )
        if self.drop_truncated and self.source.eos_token is not None:
            self.counted = self.counted & self.source.ended
        if self.overlong_buffer is not None and self.limits is not None:
            lengths = torch.tensor([steps for _, steps in self.spans])
            penalty = overlong_penalty(lengths, max_length=self.limits, buffer=self.overlong_buffer)
            self.scores = self.scores + penalty.to(self.scores.dtype)
        groups, _ = group_numbers(self.source.prompt_rows, size=self.group_size)
        return groups, informative_groups(self.scores, groups, self.counted)

    def targets(self, rollout: Rollout, rows: Rows) -> Targets:
        """One advantage for all tokens of a response; returns mean nothing here."""
        mask = rollout.response_mask
        rewards, kl = shaped_rewards(
            self.scores[rows.numbers], rollout.logprobs, rollout.ref_logprobs, mask, kl_coef=self.kl_coef
        )
        advantages = self.advantages[rows.numbers, None] * mask
        return Targets(rewards, kl, advantages, torch.zeros_like(advantages))

    def _earned(self, max_tokens: int) -> Tensor:
        """Score of each response minus the price of its KL to the reference, (n,)."""
        earned = self.scores.clone()
        rows = self.counted.nonzero()[:, 0].tolist()
        if self.kl_coef and rows:
            for batch in row_batches(self.spans, rows, device=torch.device("cpu"), max_tokens=max_tokens):
                part = self.source.select(batch)
                kl = (part.logprobs - part.ref_logprobs).masked_fill(~part.response_mask, 0.0).sum(dim=-1)
                earned[batch.numbers] -= self.kl_coef * kl
        return earned


def group_numbers(prompt_rows: Tensor, *, size: int | None = None) -> tuple[Tensor, Tensor]:
    """Groups in the order in which their prompts first come: the number of each response's, (n,), and their sizes.

    A prompt that was handed out several times has as many groups, so that a group is as large, and counts for as much,
    as any other.

    Args:
        prompt_rows: which prompt each response answers, (n,).
        size: responses of a group; a prompt's last takes what is left over. None for one group a prompt.
    """
    _, prompts, counts = torch.unique(prompt_rows, return_inverse=True, return_counts=True)
    if size is not None:
        order = prompts.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))  # among all, prompt by prompt
        before = place - (counts.cumsum(0) - counts)[prompts]  # earlier responses to the same prompt
        part = (before // size).minimum((counts // size - 1).clamp(min=0)[prompts])
        prompts = prompts * len(order) + part
    _, first_seen, sizes = torch.unique(prompts, return_inverse=True, return_counts=True)
    places = torch.full((len(sizes),), len(prompt_rows)).scatter_reduce(
        0, first_seen, torch.arange(len(prompt_rows)), "amin"
    )
    order = places.argsort()
    return order.argsort()[first_seen], sizes[order]


def kept_groups(groups: Tensor, teaching: Tensor, most: int | None) -> Tensor:
    """Which groups are learnt from: all, or the first `most` of those that teach anything, (number of groups,)."""
    if most is None:
        return torch.ones_like(teaching)
    return teaching & (teaching.cumsum(0) <= most)
