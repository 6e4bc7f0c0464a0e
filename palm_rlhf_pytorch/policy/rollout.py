"""A rollout: one batch of responses, with a number per token of all that learning needs.

    prompts -> responses -> old and reference log-probabilities, values -> (a judge's scores)

Sequences are prompt and response, padded on the right; what belongs to response tokens is (b, t), aligned to where each
response starts. Nothing here has the size of the vocabulary: a response token takes 24 bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic, Observation
from palm_rlhf_pytorch.tensors import align_left, lengths_to_mask, split_rows


class Rollout(NamedTuple):
    """One batch of responses; b sequences, n tokens of the longest, t of the longest response.

    sequences: ids of prompt and response, padded on the right, (b, n), int32: `.long()` where they are to index.
    prompt_lengths: tokens of each prompt, (b,).
    lengths: tokens of each response, the EOS included, (b,).
    logprobs: log-probability (nats) of each response token under the policy that sampled it, by the path that learns,
        (b, t).
    ref_logprobs: the same under the reference, (b, t).
    values: the critic's value before each response token, (b, t).
    sampler_logprobs: the log-probability the sampler saw; equal to logprobs up to rounding, (b, t).
    kl_exact: KL(policy || reference) of the whole next-token distributions, nats, (b, t); a metric, never a reward.
    ended: True where the response ended with EOS, (b,).
    prompt_rows: which of the trainer's prompts each answers, -1 where that is not known, (b,), int64.
    versions: how many updates the policy had had that sampled it, (b,), int64.
    temperature: of sampling, and so of every log-probability.
    eos_token: the id that ends a response, None if none does.
    scores: the judge's raw scores, (b,); None before judging. A response without a finite score counts nowhere.
    rewards: what the judge gave each response token, (b, t), raw; the score is their sum. None if it gave scores alone.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    sampler_logprobs: Tensor
    kl_exact: Tensor
    ended: Tensor
    prompt_rows: Tensor
    versions: Tensor
    temperature: float
    eos_token: int | None
    scores: Tensor | None = None
    rewards: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.sequences.device

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on a device; what is there already stays."""
        parts = self._asdict().items()
        moved: dict[str, Any] = {name: part.to(device) for name, part in parts if isinstance(part, Tensor)}
        return self._replace(**moved)

    @property
    def response_mask(self) -> Tensor:
        """True on response tokens, (b, t)."""
        # not lengths_to_mask: to check lengths it waits for the device, and this is asked for in every microbatch
        return torch.arange(self.logprobs.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def prompt_mask(self) -> Tensor:
        """True on prompt tokens, (b, n)."""
        return lengths_to_mask(self.prompt_lengths, self.sequences.shape[1])

    @property
    def mask(self) -> Tensor:
        """True on prompt and response tokens, (b, n)."""
        return lengths_to_mask(self.prompt_lengths + self.lengths, self.sequences.shape[1])

    def select(self, rows: "Tensor | Rows") -> "Rollout":
        """Some of the rows, trimmed to the longest sequence and response among them."""
        if isinstance(rows, Tensor):
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
            if len(rows) == 0:
                raise ValueError("rows selects no row of the rollout; give at least one")
            rows = next(row_batches(self.spans(), rows.tolist(), device=rows.device))
        index, steps = rows.numbers, rows.steps
        return Rollout(
            sequences=self.sequences[index, : rows.total],
            prompt_lengths=self.prompt_lengths[index],
            lengths=self.lengths[index],
            logprobs=self.logprobs[index, :steps],
            ref_logprobs=self.ref_logprobs[index, :steps],
            values=self.values[index, :steps],
            sampler_logprobs=self.sampler_logprobs[index, :steps],
            kl_exact=self.kl_exact[index, :steps],
            ended=self.ended[index],
            prompt_rows=self.prompt_rows[index],
            versions=self.versions[index],
            temperature=self.temperature,
            eos_token=self.eos_token,
            scores=None if self.scores is None else self.scores[index],
            rewards=None if self.rewards is None else self.rewards[index, :steps],
        )

    def spans(self) -> list[tuple[int, int]]:
        """Tokens of each prompt and of each response, as numbers; asking waits for the device: ask once."""
        prompts, responses = torch.stack((self.prompt_lengths, self.lengths)).tolist()
        return list(zip(prompts, responses, strict=True))


class Rows(NamedTuple):
    """Some rows of a rollout, and what is to be known of them without asking the device.

    numbers: which rows, (b,), on the device.
    total: tokens of the longest sequence among them; steps: of the longest response.
    num_tokens: response tokens of all of them together.
    since: the last place of the shortest prompt of the whole rollout: what is read out stands there or later, and a
        row's numbers do not depend on which other rows come with it.
    """

    numbers: Tensor
    total: int
    steps: int
    num_tokens: int
    since: int


def row_batches(
    spans: Sequence[tuple[int, int]],
    rows: Sequence[int],
    *,
    device: torch.device,
    max_rows: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Rows]:
    """Cut rows into batches of similar length; one batch, in the order given, where nothing limits it.

    Args:
        spans: tokens of prompt and response of every row of a rollout, see `Rollout.spans`.
        rows: which of them to batch.
        device: where the rollout is; the row numbers go there at once.
        max_rows: see `split_rows`, as for `max_tokens`.
        max_tokens: rows times the longest sequence of a batch.
    """
    since = max(0, min((prompt for prompt, _ in spans), default=1) - 1)
    parts = split_rows([sum(spans[row]) for row in rows], max_rows=max_rows or len(rows), max_tokens=max_tokens)
    numbers, start = torch.tensor([rows[place] for part in parts for place in part], device=device), 0
    for part in parts:  # a view at a time: there can be thousands
        batch, end = [spans[rows[place]] for place in part], start + len(part)
        lengths = [length for _, length in batch]
        yield Rows(numbers[start:end], max(map(sum, batch)), max(lengths), sum(lengths), since)
        start = end


class Prompting(NamedTuple):
    """What to sample responses to, and how.

    prompts: ids, (b, p), padding on either side. prompt_mask: True on real tokens, (b, p).
    prompt_rows: which of the trainer's prompts they are, (b,); -1 where that is not known.
    max_new_tokens: for each row, (b,). temperature: above 0. eos_token: id that ends a response, or None.
    """

    prompts: Tensor
    prompt_mask: Tensor
    prompt_rows: Tensor
    max_new_tokens: Tensor
    temperature: float
    eos_token: int | None

    def select(self, rows: list[int]) -> "Prompting":
        """Some of the prompts."""
        return self._replace(
            prompts=self.prompts[rows], prompt_mask=self.prompt_mask[rows], prompt_rows=self.prompt_rows[rows],
            max_new_tokens=self.max_new_tokens[rows],
        )  # fmt: skip

    def batches(self, max_batch_size: int) -> list[list[int]]:
        """Rows to be sampled together: all in their order, or, if they are too many, those of similar length."""
        if len(self.prompts) <= max_batch_size:
            return [list(range(len(self.prompts)))]
        return split_rows(self.prompt_mask.sum(dim=-1).tolist(), max_rows=max_batch_size)


def collect_rollout(
    actor_critic: ActorCritic,
    prompting: Prompting,
    *,
    generator: Callable[[int], torch.Generator],
    version: int,
    max_batch_size: int,
    max_batch_tokens: int,
    on_step: Callable[[], object] | None = None,
) -> Rollout:
    """A response to each prompt, with all that learning needs, in the prompts' order; see `rollout_parts`."""
    batches = prompting.batches(max_batch_size)
    parts = rollout_parts(
        actor_critic, prompting, batches, generator=generator, version=version, max_batch_tokens=max_batch_tokens,
        on_step=on_step,
    )  # fmt: skip
    return _join(list(parts), batches)


def rollout_parts(
    actor_critic: ActorCritic,
    prompting: Prompting,
    batches: Sequence[list[int]],
    *,
    generator: Callable[[int], torch.Generator],
    version: int,
    max_batch_tokens: int,
    on_step: Callable[[], object] | None = None,
    first: int = 0,
) -> Iterator[Rollout]:
    """Sample the batches one after the other; what a batch gives does not depend on those before it.

    Args:
        actor_critic: policy, critic and reference; dropout is off whatever its mode.
        prompting: all prompts.
        batches: rows of each.
        generator: gives the random state of a batch's draws, by the batch's number.
        version: how many updates the policy has had.
        max_batch_tokens: tokens, padding included, in one pass over whole sequences.
        on_step: called after each generated token of a batch.
        first: number of the batch to begin with.
    """
    for number in range(first, len(batches)):
        was_training = actor_critic.training
        actor_critic.eval()
        try:
            with torch.no_grad():
                part = _collect(
                    actor_critic, prompting.select(batches[number]), generator=generator(number), version=version,
                    max_batch_tokens=max_batch_tokens, on_step=on_step,
                )  # fmt: skip
        finally:
            actor_critic.train(was_training)
        yield part


def _collect(
    actor_critic: ActorCritic,
    prompting: Prompting,
    *,
    generator: torch.Generator,
    version: int,
    max_batch_tokens: int,
    on_step: Callable[[], object] | None,
) -> Rollout:
    """Generate one batch, then read it by the path that learns."""
    prompts, prompt_mask = align_left(prompting.prompts, prompting.prompt_mask)
    out = actor_critic.generate(
        prompts, prompt_mask, max_new_tokens=prompting.max_new_tokens, temperature=prompting.temperature,
        eos_token=prompting.eos_token, generator=generator, on_step=on_step,
    )  # fmt: skip
    sequences, mask = align_left(torch.cat((prompts, out.tokens), 1), torch.cat((prompt_mask, out.mask), 1))
    rollout = recorded(
        sequences.masked_fill(~mask, 0).int(), prompt_mask.sum(dim=-1), out.mask.sum(dim=-1),
        temperature=prompting.temperature, sampler_logprobs=out.logprobs, ended=out.ended,
        prompt_rows=prompting.prompt_rows, versions=torch.full_like(prompting.prompt_rows, version),
        eos_token=prompting.eos_token,
    )  # fmt: skip
    return observed(actor_critic, rollout, max_batch_tokens=max_batch_tokens)


def recorded(
    sequences: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, temperature: float, **known: Any
) -> Rollout:
    """A rollout of which no more is known than is given; numbers per token are 0, and no response has ended."""
    steps = next((part.shape[1] for part in known.values() if isinstance(part, Tensor) and part.ndim == 2), None)
    steps = int(lengths.max()) if steps is None else steps
    blank, rows = sequences.new_zeros(len(sequences), steps, dtype=torch.float32), torch.zeros_like(prompt_lengths)
    return Rollout(
        sequences, prompt_lengths, lengths, logprobs=blank, ref_logprobs=blank, values=blank, sampler_logprobs=blank,
        kl_exact=blank, ended=rows.bool(), prompt_rows=rows - 1, versions=rows, temperature=temperature, eos_token=None,
    )._replace(**known)  # fmt: skip


@torch.no_grad()
def observed(actor_critic: ActorCritic, rollout: Rollout, *, max_batch_tokens: int) -> Rollout:
    """The rollout without columns that no row needs, and with what actor, critic and reference say of it now."""
    spans = rollout.spans()
    rollout = rollout._replace(sequences=rollout.sequences[:, : max(map(sum, spans))].contiguous())
    seen = Observation(*(torch.zeros_like(rollout.logprobs) for _ in Observation._fields))
    device = rollout.sequences.device
    for rows in row_batches(spans, range(len(spans)), device=device, max_tokens=max_batch_tokens):
        found = actor_critic.observe(
            rollout.sequences[rows.numbers, : rows.total], rollout.prompt_lengths[rows.numbers], rows.steps,
            temperature=rollout.temperature, lengths=rollout.lengths[rows.numbers], num_tokens=rows.num_tokens,
            since=rows.since,
        )  # fmt: skip
        for record, values in zip(seen, found, strict=True):
            record[rows.numbers, : rows.steps] = values.to(record.dtype)
    return rollout._replace(**seen._asdict())


def _join(parts: list[Rollout], batches: list[list[int]]) -> Rollout:
    """One rollout of several, padded to the longest sequence and response, each batch's rows in their places."""
    if len(parts) == 1:
        return parts[0]

    def stack(tensors: list[Tensor]) -> Tensor:
        width = max(tensor[0].numel() for tensor in tensors)
        joined = tensors[0].new_zeros(sum(map(len, tensors)), width)
        for tensor, batch in zip(tensors, batches, strict=True):
            joined[batch, : tensor[0].numel()] = tensor.reshape(len(tensor), -1)
        return joined if tensors[0].ndim == 2 else joined[:, 0]

    tensors: dict[str, Any] = {
        name: stack([getattr(part, name) for part in parts])
        for name, value in parts[0]._asdict().items()
        if isinstance(value, Tensor)
    }
    return parts[0]._replace(**tensors)
