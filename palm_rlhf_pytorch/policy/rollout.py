"""A rollout: one batch of responses, with a number per token of all that learning needs.

    prompts -> responses -> old and reference log-probabilities, values -> (a judge's scores)

Sequences are prompt and response, padded on the right; what belongs to response tokens is (b, t), aligned to where each
response starts. Nothing here has the size of the vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic, Observation
from palm_rlhf_pytorch.tensors import align_left, lengths_to_mask, split_rows


class Rollout(NamedTuple):
    """One batch of responses; b sequences, n tokens of the longest, t of the longest response.

    sequences: ids of prompt and response, padded on the right, (b, n).
    prompt_lengths: tokens of each prompt, (b,).
    response_mask: True on response tokens, the EOS included, (b, t).
    logprobs: log-probability (nats) of each response token under the policy that sampled it, by the path that learns,
        (b, t).
    ref_logprobs: the same under the reference, (b, t).
    values: the critic's value before each response token, (b, t).
    sampler_logprobs: the log-probability the sampler saw; equal to logprobs up to rounding, (b, t).
    kl_exact: KL(policy || reference) of the whole next-token distributions, nats, (b, t); a metric, never a reward.
    ended: True where the response ended with EOS, (b,).
    temperature: of sampling, and so of every log-probability.
    eos_token: the id that ends a response, None if none does.
    scores: the judge's raw scores, (b,); None before judging.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    sampler_logprobs: Tensor
    kl_exact: Tensor
    ended: Tensor
    temperature: float
    eos_token: int | None
    scores: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, (b,)."""
        return self.response_mask.sum(dim=-1)

    @property
    def prompt_mask(self) -> Tensor:
        """True on prompt tokens, (b, n)."""
        return lengths_to_mask(self.prompt_lengths, self.sequences.shape[1])

    @property
    def mask(self) -> Tensor:
        """True on prompt and response tokens, (b, n)."""
        return lengths_to_mask(self.prompt_lengths + self.lengths, self.sequences.shape[1])

    def select(self, rows: Tensor) -> "Rollout":
        """Some of the rows, trimmed to the longest sequence and response among them."""
        lengths = self.lengths[rows]
        total, steps = int((self.prompt_lengths[rows] + lengths).max()), int(lengths.max())
        return Rollout(
            sequences=self.sequences[rows, :total],
            prompt_lengths=self.prompt_lengths[rows],
            response_mask=self.response_mask[rows, :steps],
            logprobs=self.logprobs[rows, :steps],
            ref_logprobs=self.ref_logprobs[rows, :steps],
            values=self.values[rows, :steps],
            sampler_logprobs=self.sampler_logprobs[rows, :steps],
            kl_exact=self.kl_exact[rows, :steps],
            ended=self.ended[rows],
            temperature=self.temperature,
            eos_token=self.eos_token,
            scores=None if self.scores is None else self.scores[rows],
        )


@torch.no_grad()
def collect_rollout(
    actor_critic: ActorCritic,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: Tensor,
    temperature: float,
    eos_token: int | None,
    generator: torch.Generator,
    max_batch_size: int,
    max_batch_tokens: int,
    on_step: Callable[[], object] | None = None,
) -> Rollout:
    """Sample a response to each prompt, and record what learning needs of it.

    Args:
        actor_critic: policy, critic and reference; dropout is off whatever its mode.
        prompts: ids, (b, p), padding on either side.
        prompt_mask: True on real tokens, (b, p).
        max_new_tokens: for each row, (b,).
        temperature: above 0.
        eos_token: id that ends a response, or None.
        generator: random state of the draws.
        max_batch_size: rows generated together.
        max_batch_tokens: tokens, padding included, in one pass over whole sequences.
        on_step: called after each generated token of a batch.
    """
    was_training = actor_critic.training
    actor_critic.eval()
    try:
        parts = [
            _collect(
                actor_critic, *align_left(prompts[rows], prompt_mask[rows]), max_new_tokens[rows],
                temperature=temperature, eos_token=eos_token, generator=generator,
                max_batch_tokens=max_batch_tokens, on_step=on_step,
            )
            for rows in torch.arange(len(prompts)).split(max_batch_size)
        ]  # fmt: skip
    finally:
        actor_critic.train(was_training)
    return _join(parts)


def _collect(
    actor_critic: ActorCritic,
    prompts: Tensor,
    prompt_mask: Tensor,
    max_new_tokens: Tensor,
    *,
    temperature: float,
    eos_token: int | None,
    generator: torch.Generator,
    max_batch_tokens: int,
    on_step: Callable[[], object] | None,
) -> Rollout:
    """Generate one batch, then read it by the path that learns."""
    out = actor_critic.generate(
        prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature, eos_token=eos_token,
        generator=generator, on_step=on_step,
    )  # fmt: skip
    prompt_lengths = prompt_mask.sum(dim=-1)
    sequences, mask = align_left(torch.cat((prompts, out.tokens), 1), torch.cat((prompt_mask, out.mask), 1))
    sequences = sequences.masked_fill(~mask, 0)[:, : int(mask.sum(dim=-1).max())]
    steps = out.tokens.shape[1]
    seen = Observation(*(torch.zeros_like(out.logprobs) for _ in Observation._fields))
    lengths = mask.sum(dim=-1)
    for rows in split_rows(lengths, max_rows=len(lengths), max_tokens=max_batch_tokens):
        part = sequences[rows, : int(lengths[rows].max())], prompt_lengths[rows], steps
        for record, values in zip(seen, actor_critic.observe(*part, temperature=temperature), strict=True):
            record[rows] = values.to(record.dtype)
    seen = Observation(*(record.masked_fill(~out.mask, 0.0) for record in seen))
    return Rollout(
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        response_mask=out.mask,
        logprobs=seen.logprobs,
        ref_logprobs=seen.ref_logprobs,
        values=seen.values,
        sampler_logprobs=out.logprobs,
        kl_exact=seen.kl_exact,
        ended=out.ended,
        temperature=temperature,
        eos_token=eos_token,
    )


def _join(parts: list[Rollout]) -> Rollout:
    """One rollout of several, padded to the longest sequence and response."""
    if len(parts) == 1:
        return parts[0]

    def stack(tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim == 1:
            return torch.cat(tensors)
        joined = tensors[0].new_zeros(sum(map(len, tensors)), max(tensor.shape[1] for tensor in tensors))
        row = 0
        for tensor in tensors:
            joined[row : row + len(tensor), : tensor.shape[1]] = tensor
            row += len(tensor)
        return joined

    tensors: dict[str, Any] = {
        name: stack([getattr(part, name) for part in parts])
        for name, value in parts[0]._asdict().items()
        if isinstance(value, Tensor)
    }
    return parts[0]._replace(**tensors)


def sample_answers(
    actor_critic: ActorCritic,
    prompt: Tensor,
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    eos_token: int | None,
    generator: torch.Generator,
    max_batch_size: int,
    on_step: Callable[[], object] | None = None,
) -> list[Generation]:
    """Several responses of the actor to one prompt (p,), at most max_batch_size of them in a batch."""
    return [
        actor_critic.generate(
            prompt.expand(len(share), -1), None, max_new_tokens=max_new_tokens, temperature=temperature,
            eos_token=eos_token, generator=generator, on_step=on_step,
        )
        for share in torch.arange(num_samples).split(max_batch_size)
    ]  # fmt: skip
