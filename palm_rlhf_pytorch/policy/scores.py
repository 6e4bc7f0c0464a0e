"""From a judge's raw score to what the policy is rewarded with at the end of a response.

Judging, checking, normalising, and the price of a response that never ended. A judge is any callable
`(sequences, prompt_mask=..., mask=...) -> scores (b,)`; a reward model is one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.tensors import masked_moments

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
    judge: Judge, sequences: Tensor, prompt_mask: Tensor, mask: Tensor, *, max_batch_size: int, where: str
) -> Tensor:
    """Scores (b,) of sequences, checked; in eval mode, without gradient, a batch at a time.

    Args:
        judge: called as judge(sequences, prompt_mask=..., mask=...).
        sequences: ids of prompt and response, padded on the right, (b, n).
        prompt_mask: True on prompt tokens, (b, n).
        mask: True on prompt and response tokens, (b, n).
        max_batch_size: rows of one call.
        where: which step this is; added to a judge's own error.

    Returns:
        float32, (b,).

    Raises:
        TypeError: if scores are no tensor of numbers.
        ValueError: if their shape is not (b,), or one is NaN or infinite (the rows are named).
    """
    scores = []
    with evaluating(judge):
        for rows in torch.arange(len(sequences), device=sequences.device).split(max_batch_size):
            try:
                found = judge(sequences[rows], prompt_mask=prompt_mask[rows], mask=mask[rows])
            except Exception as error:
                error.add_note(
                    f"raised by the reward model while scoring rows {int(rows[0])} to {int(rows[-1])} of {where}"
                )
                raise
            scores.append(_checked(found, rows, where).to(sequences.device))
    return torch.cat(scores)


def _checked(scores: object, rows: Tensor, where: str) -> Tensor:
    if not isinstance(scores, Tensor) or scores.is_complex():
        raise TypeError(
            f"the reward model returned {type(scores).__name__} in {where}: it must return a tensor of scores"
        )
    if scores.shape != rows.shape:
        raise ValueError(f"the reward model returned shape {tuple(scores.shape)} in {where}: it must be ({len(rows)},)")
    bad = ~scores.isfinite()
    if bool(bad.any()):
        numbers = rows[bad.to(rows.device)].tolist()
        raise ValueError(f"the reward model returned NaN or infinite scores in {where}, for rows {numbers[:10]}")
    return scores.detach().float()


class ScoreNormalizer:
    """Shift and scale scores to mean 0, deviation 1 over the first responses judged, then keep shift and scale.

    The first rollout is sampled from the reference, so its responses are reference responses. Without this a constant
    score teaches length instead of the task. The deviation stays 1 until scores differ.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, scores: Tensor, *, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take mean and deviation of scores (b,) of all ranks, as far as they are not fixed yet."""
        if self.mean is not None and self.std is not None:
            return
        moments = masked_moments(scores, torch.ones_like(scores, dtype=torch.bool), reduce=reduce)
        std = float(moments.var.sqrt())
        if self.std is None and std > 1e-6 * max(1.0, abs(float(moments.mean))):  # above what rounding alone gives
            self.mean, self.std = float(moments.mean), std
        elif self.mean is None:
            self.mean = float(moments.mean)

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalised scores (b,)."""
        return (scores - (self.mean or 0.0)) / (self.std or 1.0)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "std": self.std}

    def restore(self, state: dict[str, float | None]) -> None:
        """Take over what `state` gave."""
        self.mean, self.std = state["mean"], state["std"]


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
