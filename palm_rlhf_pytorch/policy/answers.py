"""The best of several responses to one prompt, by a judge's score.

Stiennon et al., "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325 (best of n)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.judging import Judge, check_scores, judge_sequences
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged


def best_response(
    judge: Judge, prompt: Tensor, responses: Sequence[Generation], *, max_batch_size: int, max_batch_tokens: int
) -> Tensor:
    """Prompt and response (n,) of the sample with the highest score.

    Args:
        judge: called as judge(sequences, prompt_mask=..., mask=...).
        prompt: ids that all samples answer, (p,).
        responses: samples, in one or more batches.
        max_batch_size: rows of one call of the judge.
        max_batch_tokens: see `judge_sequences`.
    """
    texts = [
        torch.cat((prompt, tokens[real]))
        for batch in responses
        for tokens, real in zip(batch.tokens, batch.mask, strict=True)
    ]
    sequences, mask = pad_ragged(texts)
    lengths = torch.full(sequences.shape[:1], len(prompt), device=sequences.device)
    prompt_mask = lengths_to_mask(lengths, sequences.shape[1])
    scores = judge_sequences(
        judge, sequences, prompt_mask, mask, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens,
        where="generate",
    )  # fmt: skip
    return texts[int(check_scores(scores, len(texts), where="the reward model in generate").argmax())]


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
