"""Best of n for many prompts: of n responses to each, the one that a judge scores highest.

Stiennon et al., "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325
Mudgal et al., "Controlled Decoding from Language Models", https://arxiv.org/abs/2310.17022
Beirami et al., "Theoretical guarantees on the best-of-n alignment policy", https://arxiv.org/abs/2401.01879
Nothing is learnt. `policy/answers.py` has the best of several responses to one prompt.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.judging import Judge, judge_sequences
from palm_rlhf_pytorch.tensors import align_left, check_masked, lengths_to_mask, pad_ragged, split_rows


class Best(NamedTuple):
    """The best response to each of m prompts; padding is on the right.

    sequences: ids of prompt and response, (m, n).
    prompt_lengths: tokens of each prompt, (m,).
    lengths: tokens of each response, the EOS included, (m,).
    ended: True where the response drew EOS, (m,).
    scores: of the best, (m,).
    all_scores: of every sample, (m, g), NaN or infinite where the judge says so.
    kl_bound: nats a response, see `best_of_n_kl_bound`.
    """

    sequences: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor
    scores: Tensor
    all_scores: Tensor
    kl_bound: float

    @property
    def mask(self) -> Tensor:
        """True on prompt and response tokens, (m, n)."""
        return lengths_to_mask(self.prompt_lengths + self.lengths, self.sequences.shape[1])

    @property
    def prompt_mask(self) -> Tensor:
        """True on prompt tokens, (m, n)."""
        return lengths_to_mask(self.prompt_lengths, self.sequences.shape[1])


@torch.no_grad()
def best_of_n(
    generate: Callable[..., Generation],
    judge: Judge,
    prompts: Tensor,
    prompt_mask: Tensor,
    *,
    num_samples: int,
    max_batch_size: int = 64,
    max_batch_tokens: int = 4096,
    **sampling: object,
) -> Best:
    """The best of num_samples responses to each prompt; samples of a prompt are sampled together, it is read once.

    Args:
        generate: `partial(generate_responses, palm)` or an `ActorCritic`'s method; called as generate(prompts,
            prompt_mask, **sampling).
        judge: called as judge(sequences, prompt_mask=..., mask=...) -> scores (b,).
        prompts: ids, (m, p), padding on either side.
        prompt_mask: True on real tokens, (m, p).
        num_samples: n, responses to each prompt.
        max_batch_size: responses sampled at once; a prompt's are split where n is above it.
        max_batch_tokens: see `judge_sequences`.
        **sampling: max_new_tokens, temperature (above 0), eos_token, generator, on_step, ... for `generate`.

    Returns:
        Best, in the prompts' order. The first of several that score alike is taken; a score that is not finite never.

    Raises:
        TypeError: if prompt_mask is not bool.
        ValueError: if shapes differ, num_samples or max_batch_size is below 1, a prompt is all padding, or no
            response to a prompt has a finite score.
    """
    if num_samples < 1 or max_batch_size < 1:
        raise ValueError(f"num_samples ({num_samples}) and max_batch_size ({max_batch_size}) must be at least 1")
    check_masked(prompt_mask, prompts=prompts)
    ids, mask = align_left(prompts, prompt_mask)
    lengths = mask.sum(dim=-1)
    limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
    found: dict[int, tuple[Tensor, bool, Tensor]] = {}
    for rows in split_rows(lengths.tolist(), max_rows=max(1, max_batch_size // num_samples)):
        texts: list[Tensor] = []
        ended: list[Tensor] = []
        each = torch.tensor(rows, device=ids.device).repeat_interleave(num_samples)
        for part in each.split(max_batch_size):
            width = int(lengths[part].max())
            out = generate(ids[part, :width], mask[part, :width], **sampling)
            drawn = zip(part.tolist(), out.tokens, out.mask, strict=True)
            texts += [torch.cat((ids[row][mask[row]], tokens[real])) for row, tokens, real in drawn]
            ended.append(out.ended)
        scores = _scores(judge, texts, lengths[each], limits).reshape(len(rows), num_samples)
        for place, row in enumerate(rows):
            best = place * num_samples + _best(scores[place], row)
            found[row] = texts[best], bool(torch.cat(ended)[best]), scores[place]
    return _joined([found[row] for row in range(len(ids))], lengths, num_samples)


def best_of_n_kl_bound(num_samples: int) -> float:
    """At most so many nats is the policy that best of n makes away from the one it samples: log n - (n - 1) / n.

    A bound on KL(best of n || policy) of a prompt's responses, not an estimate of it. It is met where each response is
    rare and no two score alike; where responses repeat, as those to a prompt with a sure answer do, KL is less, down
    to 0 (Beirami et al.).

    Raises:
        ValueError: if num_samples is below 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples ({num_samples}) must be at least 1")
    return math.log(num_samples) - (num_samples - 1) / num_samples


def _scores(judge: Judge, texts: list[Tensor], prompt_lengths: Tensor, limits: dict[str, int]) -> Tensor:
    sequences, mask = pad_ragged(texts)
    prompt_mask = lengths_to_mask(prompt_lengths, sequences.shape[1])
    return judge_sequences(judge, sequences, prompt_mask, mask, where="best_of_n", **limits)


def _best(scores: Tensor, row: int) -> int:
    finite = scores.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"none of the {len(scores)} responses to prompt {row} has a finite score; look at the judge")
    return int(scores.masked_fill(~finite, -torch.inf).argmax())


def _joined(rows: list[tuple[Tensor, bool, Tensor]], prompt_lengths: Tensor, num_samples: int) -> Best:
    sequences, mask = pad_ragged([ids for ids, _, _ in rows])
    all_scores = torch.stack([scores for _, _, scores in rows])
    return Best(
        sequences=sequences,
        prompt_lengths=prompt_lengths,
        lengths=mask.sum(dim=-1) - prompt_lengths,
        ended=torch.tensor([ended for _, ended, _ in rows], device=sequences.device),
        scores=all_scores.masked_fill(~all_scores.isfinite(), -torch.inf).amax(dim=-1),
        all_scores=all_scores,
        kl_bound=best_of_n_kl_bound(num_samples),
    )
