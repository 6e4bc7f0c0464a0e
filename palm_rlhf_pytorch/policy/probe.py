"""What the checks before a run look at: a few responses of the trainer's own models, sampled as training samples them.

Knows of no identity: `identities` holds the checks of the policy, `preflight` the others and their order.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic, PolicyOutput
from palm_rlhf_pytorch.policy.judging import Judge
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.policy.rollout import Prompting, Rollout, Rows, collect_rollout, row_batches
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.products import product_dtype
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.tensors import pad_ragged

Status = Literal["ok", "warn", "fail", "skip"]
MAX_PROMPTS, MIN_PROMPTS, MAX_TOKENS = 6, 4, 16  # responses sampled, and tokens of the longest
SHORTEST = 8  # tokens that a prompt is cut to at least
# Operations of one pass over what is sampled: a large model reads prompts cut to their ends, so that some twenty passes
# take seconds. The judge, who may look for something in a prompt, reads whole ones, fewer of them.
WORK = {"cpu": 2e10, "cuda": 2e13}
# Two routes to one log-probability, in nats: their mean difference over tokens stays below this, and none is ten times
# as far off. The same products in another order give 1e-6 in float32 and up to 1e-2 in bfloat16.
FLOAT32, HALF = 1e-5, 2e-2


class Finding(NamedTuple):
    """What a check found: its status, the numbers, and where it is not ok the cause with what to do."""

    status: Status
    found: str
    remedy: str = ""


class Trainer(Protocol):
    """What of a trainer is looked at."""

    accelerator: Accelerator
    actor_critic: ActorCritic
    learner: Learner
    reward_model: Judge
    held_out_judge: Judge | None
    prompts: Prompts
    settings: PolicySettings
    normalizer: ScoreNormalizer
    updates: int
    pad_value: int | None

    @property
    def pad_token(self) -> int | None:
        """The id that pads, if the tokenizer or the caller names one."""
        ...


class Gap(NamedTuple):
    """How far two routes to the same numbers are apart: the mean and the largest difference."""

    mean: float
    largest: float

    def within(self, tolerance: float) -> bool:
        """Whether the mean is within the tolerance, and nothing beyond ten times it; never where there is a NaN."""
        return self.mean <= tolerance and self.largest <= 10 * tolerance

    def __str__(self) -> str:
        return f"{self.mean:.1e} on average, {self.largest:.1e} at most"


def gap(first: Tensor, second: Tensor, mask: Tensor) -> Gap:
    """Differences where mask is True, all (b, t); equal infinities are no difference."""
    first, second = first[mask].double(), second[mask].double()
    apart = torch.where(first == second, 0.0, (first - second).abs())
    return Gap(float(apart.mean()), float(apart.max()))


def listed(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


class Probe:
    """What the checks look at, and what they leave for one another: some prompts, responses to them, their scores."""

    def __init__(
        self, trainer: Trainer, *, max_seq_len: int, max_new_tokens: int | None, eos_token: int | None,
        temperature: float, memory: Callable[[], tuple[float, float]] | None = None,
    ) -> None:  # fmt: skip
        self.trainer, self.memory, self.eos_token, self.temperature = trainer, memory, eos_token, temperature
        self.max_seq_len, self.max_new_tokens = max_seq_len, max_new_tokens
        self.settings, self.device = trainer.settings, trainer.accelerator.device
        # not the wrapper: its hooks would have all ranks wait for one another
        self.model: ActorCritic = trainer.accelerator.unwrap_model(trainer.learner.model)
        self.generator = torch.Generator(self.device).manual_seed(0)
        self.rollout: Rollout
        self.texts: Rollout  # what the judge reads: whole prompts, with the same responses
        self.lengths: list[int]  # of the responses, by their tokens alone
        self.mask: Tensor  # the same, (b, t)
        self.read: PolicyOutput  # of all of them in one batch, by the pass that learns in eval mode
        self.read_features: Tensor  # the critic's, (b, n)
        self.scores: Tensor
        self.largest_logit = 0.0

    def tolerance(self) -> float:
        """What a mean difference of log-probabilities may be, by the dtype in which logits are made."""
        with self.trainer.accelerator.autocast():
            dtype = product_dtype(self.model.palm.token_emb.weight)
        rounded = torch.get_float32_matmul_precision() != "highest"  # float32 products of fewer digits
        half = dtype in (torch.bfloat16, torch.float16) or rounded
        eps = torch.finfo(torch.bfloat16 if rounded else dtype).eps
        return max(HALF if half else FLOAT32, eps * self.largest_logit / 2)  # large logits are rounded as coarsely

    @contextmanager
    def reading(self) -> Iterator[None]:
        """As while observing: eval mode, no gradient, the trainer's autocast."""
        self.model.eval()
        with torch.no_grad(), self.trainer.accelerator.autocast():
            yield

    def forward(self, rollout: Rollout, rows: Rows | None = None) -> PolicyOutput:
        """The pass that learns, in the modes of the caller."""
        steps = rollout.logprobs.shape[1] if rows is None else rows.steps
        count = None if rows is None else rows.num_tokens
        with self.trainer.accelerator.autocast():
            out: PolicyOutput = self.model(
                rollout.sequences, rollout.prompt_lengths, steps, temperature=self.temperature,
                lengths=rollout.lengths, num_tokens=count, entropy_grad=self.trainer.learner.loss.entropy_grad,
            )  # fmt: skip
        return out

    def features(self, sequences: Tensor) -> Tensor:
        """The critic's features read by a random head, (b, n): the values of a new one are 0 whatever it sees.

        Where there is no critic they are 0.
        """
        if self.model.critic is None:
            return torch.zeros(sequences.shape, device=sequences.device)
        direction = torch.randn(self.model.palm.dim, generator=torch.Generator().manual_seed(1))
        hidden = self.model.critic.embed(self.model.palm, sequences).float()
        return hidden @ direction.to(hidden) * self.model.palm.dim**-0.5

    def alone(self, row: int) -> Rollout:
        """One of the responses, without padding."""
        return self.rollout.select(torch.tensor([row], device=self.device))

    def affordable(self) -> int:
        """Tokens of a pass that the model reads in a moment."""
        parameters = sum(weight.numel() for weight in self.trainer.actor_critic.palm.parameters())
        return int(WORK.get(self.device.type, WORK["cpu"]) / (2 * parameters))

    def microbatches(self) -> list[Rows]:
        """The responses as a step of learning cuts them."""
        spans = self.rollout.spans()
        limits = {"max_rows": self.settings.max_batch_size, "max_tokens": self.settings.max_batch_tokens}
        return list(row_batches(spans, range(len(spans)), device=self.device, **limits))


def sampling(probe: Probe) -> Finding:
    """Sample a few responses as training does, from train mode; all that follows looks at them."""
    trainer, rows = probe.trainer, _some_prompts(probe)
    whole, whole_mask = trainer.prompts.select(rows)
    ids, mask = _cut(whole, whole_mask, most=probe.affordable() // len(rows) - MAX_TOKENS)
    longest = MAX_TOKENS if probe.max_new_tokens is None else min(MAX_TOKENS, probe.max_new_tokens)
    # responses of unequal length, whatever the model says: the longer the prompt, the longer
    budget = longest - torch.arange(len(ids)).flip(0) * max(1, longest // 5) % max(1, longest)
    budget = budget.minimum(probe.max_seq_len - whole_mask.sum(dim=-1))
    probe.model.train()
    trainer.actor_critic.train()
    prompting = Prompting(
        prompts=ids.to(probe.device), prompt_mask=mask.to(probe.device), prompt_rows=rows.to(probe.device),
        max_new_tokens=budget.to(probe.device), temperature=probe.temperature, eos_token=probe.eos_token,
    )  # fmt: skip
    with trainer.accelerator.autocast():
        rollout = collect_rollout(
            trainer.actor_critic, prompting, generator=lambda _: probe.generator, version=trainer.updates,
            max_batch_size=probe.settings.max_batch_size, max_batch_tokens=probe.settings.max_batch_tokens,
        )  # fmt: skip
    probe.rollout = rollout
    starts = rollout.prompt_lengths.tolist()
    texts = [row[start:] for row, start in zip(rollout.sequences.tolist(), starts, strict=True)]
    probe.lengths = [
        text[:most].index(probe.eos_token) + 1 if probe.eos_token in text[:most] else most
        for text, most in zip(texts, budget.tolist(), strict=True)
    ]
    steps = torch.arange(rollout.logprobs.shape[1], device=probe.device)
    probe.mask = steps < torch.tensor(probe.lengths, device=probe.device)[:, None]
    probe.texts = _whole_texts(rollout, whole, whole_mask, affordable=6 * probe.affordable())
    found = f"{len(ids)} responses of {min(probe.lengths)} to {max(probe.lengths)} tokens"
    if ids.shape[1] < whole.shape[1]:
        found += f", to the last {ids.shape[1]} tokens of prompts"
    return Finding("ok", found)


def _cut(ids: Tensor, mask: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """The last tokens of prompts that are too long, unequally many, ids (b, p) and mask (b, p) padded on the right."""
    lengths = mask.sum(dim=-1).tolist()
    if max(lengths) <= max(most, SHORTEST):
        return ids, mask
    kept = [min(length, max(SHORTEST, most) - row % 4) for row, length in enumerate(lengths)]
    return pad_ragged([row[n - k : n] for row, n, k in zip(ids, lengths, kept, strict=True)])


def _whole_texts(rollout: Rollout, prompts: Tensor, mask: Tensor, *, affordable: int) -> Rollout:
    """Responses with their whole prompts (b, p), as many as can be read in a moment, two at least."""
    lengths = mask.sum(dim=-1)
    width = int(lengths.max()) + rollout.logprobs.shape[1]
    count = min(len(prompts), max(2, affordable // width))
    starts, steps = rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
    texts = [
        torch.cat(
            (prompts[row, : int(lengths[row])].to(rollout.device), rollout.sequences[row, start : start + length])
        )
        for row, start, length in list(zip(range(len(prompts)), starts, steps, strict=True))[-count:]
    ]
    chosen = rollout.select(torch.arange(len(prompts) - count, len(prompts), device=rollout.device))
    sequences, _ = pad_ragged(texts)
    return chosen._replace(sequences=sequences.int(), prompt_lengths=lengths[-count:].to(rollout.device))


def _some_prompts(probe: Probe) -> Tensor:
    """The shortest prompt, the longest, and some between, by number; again where there are few."""
    prompts = probe.trainer.prompts
    width = min(int(prompts.lengths.max()), max(SHORTEST, probe.affordable() // MAX_PROMPTS)) + MAX_TOKENS
    count = min(MAX_PROMPTS, max(MIN_PROMPTS, len(prompts)), probe.settings.max_batch_tokens // width)
    count = max(2, count)  # all checks read them in one pass: no more of it than a step of learning may have
    order = prompts.lengths.argsort(stable=True)
    return order[torch.arange(count) * (len(prompts) - 1) // (count - 1)]
