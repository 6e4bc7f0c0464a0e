"""From a judge's raw score to what the policy is rewarded with at the end of a response.

Judging, checking, choosing the best, normalising, and the price of a response that never ended. A judge is any callable
`(sequences, prompt_mask=..., mask=...) -> scores (b,)`; a reward model is one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.tensors import lengths_to_mask, masked_moments, pad_ragged, split_rows

Judge = Callable[..., Tensor]


@contextmanager
def evaluating(module: object) -> Iterator[None]:
    """Put a module into eval mode, and each of its parts back into its own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()] if isinstance(module, nn.Module) else []
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@torch.no_grad()
def judge_sequences(
    judge: Judge,
    sequences: Tensor,
    prompt_mask: Tensor,
    mask: Tensor,
    *,
    max_batch_size: int,
    max_batch_tokens: int,
    where: str,
) -> Tensor:
    """Scores (b,) of sequences, checked; in eval mode, without gradient, a batch at a time.

    Rows of similar length are judged together, in their order if one batch takes them all, and trimmed to the longest
    of them.

    Args:
        judge: called as judge(sequences, prompt_mask=..., mask=...), ids as int64.
        sequences: ids of prompt and response, padded on the right, (b, n).
        prompt_mask: True on prompt tokens, (b, n).
        mask: True on prompt and response tokens, (b, n).
        max_batch_size: rows of one call.
        max_batch_tokens: rows times the longest of them in one call, if it has more than one row.
        where: which step this is; added to a judge's own error.

    Returns:
        float32, (b,).

    Raises:
        TypeError: if scores are no tensor of numbers.
        ValueError: if their shape is not (b,), or one is NaN or infinite (the rows are named).
    """
    lengths, device = mask.sum(dim=-1).tolist(), sequences.device
    scores = torch.zeros(len(lengths), device=device)
    with evaluating(judge):
        for rows in split_rows(lengths, max_rows=max_batch_size, max_tokens=max_batch_tokens):
            index, width = torch.tensor(rows, device=device), lengths[max(rows, key=lengths.__getitem__)]
            masks = {"prompt_mask": prompt_mask[index, :width], "mask": mask[index, :width]}
            try:
                found = judge(sequences[index, :width].long(), **masks)
            except Exception as error:
                error.add_note(f"raised by the reward model while scoring rows {_listed(rows)} of {where}")
                raise
            scores[index] = _as_scores(found, len(rows), where=f"the reward model in {where}").to(device)
    return check_scores(scores, len(lengths), where=f"the reward model in {where}")


def check_scores(scores: object, count: int, *, where: str) -> Tensor:
    """Scores as float32 without gradient, if they are one finite number for each of count rows.

    Raises:
        TypeError: if scores are no tensor of real numbers.
        ValueError: if their shape is not (count,), or one is NaN or infinite (the rows are named).
    """
    found = _as_scores(scores, count, where=where)
    bad = ~found.isfinite()
    if bool(bad.any()):
        raise ValueError(f"scores of {where} are NaN or infinite for rows {_listed(bad.nonzero()[:, 0].tolist())}")
    return found


def _as_scores(scores: object, count: int, *, where: str) -> Tensor:
    """What can be said without looking at the numbers, for which a device would have to be waited for."""
    if not isinstance(scores, Tensor) or scores.is_complex():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores of {where} are {kind}: they must be a tensor of real numbers, ({count},)")
    if scores.shape != (count,):
        raise ValueError(f"scores of {where} have shape {tuple(scores.shape)}: it must be ({count},)")
    return scores.detach().float()


def _listed(rows: list[int]) -> str:
    return f"{rows[:10]} and {len(rows) - 10} more" if len(rows) > 10 else f"{rows}"


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
    return texts[int(scores.argmax())]


class ScoreNormalizer:
    """Shift and scale scores to mean 0, deviation 1 over the first responses judged, then keep shift and scale.

    The first rollout is sampled from the reference, so its responses are reference responses. Without this a constant
    score teaches length instead of the task. Where the first scores are all alike the scale stays 1, and is taken from
    the first rollout whose scores differ.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, scores: Tensor, *, reduce: Callable[[Tensor], Tensor]) -> Self:
        """Take mean and deviation of scores (b,) of all ranks, as far as they are not fixed yet; returns itself."""
        if self.std is not None:
            return self
        moments = masked_moments(scores, torch.ones_like(scores, dtype=torch.bool), reduce=reduce)
        mean, std = float(moments.mean), float(moments.var.sqrt())
        if self.mean is None:
            self.mean = mean
        if std > 1e-6 * abs(mean):  # above what rounding alone gives
            self.std = std
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalised scores (b,)."""
        return (scores - (self.mean or 0.0)) / (self.std or 1.0)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "std": self.std}

    def restore(self, state: dict[str, float | None]) -> None:
        """Take over what `state` gave."""
        self.mean, self.std = state["mean"], state["std"]


def learnt_scores(
    rollout: Rollout,
    normalizer: ScoreNormalizer | None,
    *,
    penalty: float | None,
    replacement: float | None,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is learnt from a rollout's raw scores: normalised, with the price of a missing EOS, (b,).

    Args:
        rollout: with its scores.
        normalizer: fixes its shift and scale on the first scores it sees; None takes raw scores.
        penalty: see `penalize_missing_eos`.
        replacement: likewise.
        reduce: sums a tensor over ranks.

    Raises:
        TypeError: if scores are no tensor of real numbers.
        ValueError: if there are none, or they are not one finite number for each response.
    """
    if rollout.scores is None:
        raise ValueError("rollout has no scores: call score(rollout) first, or set them by rollout._replace(scores=)")
    scores = check_scores(rollout.scores, len(rollout.sequences), where="this rollout").to(rollout.sequences.device)
    if normalizer is not None:
        scores = normalizer.fit(scores, reduce=reduce)(scores)
    return penalize_missing_eos(scores, rollout, penalty=penalty, replacement=replacement)


def penalize_missing_eos(
    scores: Tensor, rollout: Rollout, *, penalty: float | None, replacement: float | None
) -> Tensor:
    """Price of a response that ran into its limit, in units of the normalised score; none where no token ends one.

    Args:
        scores: (b,).
        rollout: says which responses ended.
        penalty: subtracted from the score; None for nothing.
        replacement: takes the score's place; None for nothing.
    """
    if rollout.eos_token is None:
        return scores
    if replacement is not None:
        return torch.where(rollout.ended, scores, replacement)
    return scores if penalty is None else scores - penalty * (~rollout.ended)
