"""From a judge's raw score to what the policy is rewarded with at the end of a response.

Judging, checking, normalising, and the price of a response that never ended. A judge is any callable
`(sequences, prompt_mask=..., mask=...) -> scores (b,)`; a reward model is one.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.policy.rollout import row_batches
from palm_rlhf_pytorch.policy.targets import Source
from palm_rlhf_pytorch.tensors import masked_moments, split_rows
from palm_rlhf_pytorch.training.ranks import Ranks

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
    timeout: float | None = None,
) -> Tensor:
    """Scores (b,) of sequences, as the judge gives them; in eval mode, without gradient, a batch at a time.

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
        timeout: seconds that one call may take; None waits as long as it takes.

    Returns:
        float32, (b,); NaN or infinite where the judge says so.

    Raises:
        TypeError: if scores are no tensor of numbers.
        ValueError: if their shape is not (b,).
        TimeoutError: if a call takes longer than timeout.
    """
    lengths, device = mask.sum(dim=-1).tolist(), sequences.device
    scores = torch.zeros(len(lengths), device=device)
    with evaluating(judge):
        for rows in split_rows(lengths, max_rows=max_batch_size, max_tokens=max_batch_tokens):
            index, width = torch.tensor(rows, device=device), lengths[max(rows, key=lengths.__getitem__)]
            masks = {"prompt_mask": prompt_mask[index, :width], "mask": mask[index, :width]}
            try:
                found = _within(timeout, lambda: judge(sequences[index, :width].long(), **masks))  # noqa: B023
            except Exception as error:
                error.add_note(f"raised by the reward model while scoring rows {_listed(rows)} of {where}")
                raise
            scores[index] = raw_scores(found, len(rows), where=f"the reward model in {where}").to(device)
    return scores


def _within(seconds: float | None, call: Callable[[], object]) -> object:
    """The result of a call, made in a thread of its own where it may not take longer than so many seconds.

    A thread cannot be stopped: a call that hangs is left behind, and does not keep the program from ending.
    """
    if seconds is None:
        return call()
    outcome: list[object] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():  # which is each thread's own
                outcome.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="judge")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"the judge took longer than judge_timeout ({seconds} seconds)")
    if errors:
        raise errors[0]
    return outcome[0]


def judge_source(
    judge: Judge,
    source: Source,
    *,
    device: torch.device,
    max_batch_size: int,
    max_batch_tokens: int,
    where: str,
    timeout: float | None = None,
) -> Tensor:
    """Scores (n,) of all rows of a source, on the CPU, a batch of it in memory at a time.

    Args:
        judge: see `judge_sequences`.
        source: rollouts in memory or on disk.
        device: where the judge takes its tensors.
        max_batch_size: see `judge_sequences`, as for the others.
        max_batch_tokens: likewise.
        where: likewise.
        timeout: likewise.
    """
    spans = source.spans()
    scores = torch.zeros(len(spans))
    limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
    batches = row_batches(
        spans, range(len(spans)), device=torch.device("cpu"), max_rows=max_batch_size, max_tokens=max_batch_tokens
    )
    for rows in batches:
        part = source.select(rows).to(device)
        try:
            found = judge_sequences(
                judge, part.sequences, part.prompt_mask, part.mask, where=where, timeout=timeout, **limits
            )
        except Exception as error:
            error.add_note(
                f"while scoring responses {_listed(rows.numbers.tolist())} of {where}, to prompts"
                f" {_listed(part.prompt_rows.tolist())}"
            )
            raise
        scores[rows.numbers] = found.to("cpu")
    return scores


def counted_scores(
    scores: Tensor, prompt_rows: Tensor, *, ranks: Ranks, max_dropped: float, where: str, warn: bool = True
) -> Tensor:
    """Which responses count: those with a finite score, (n,); a few others are warned of and left out.

    Args:
        scores: the judge's, (n,).
        prompt_rows: which prompt each answers, (n,).
        ranks: all processes.
        max_dropped: the largest share of responses that may be left out, over all processes.
        where: which step this is.
        warn: whether to say so.

    Raises:
        ValueError: on every process, if more are not finite.
    """
    counted = scores.isfinite()
    bad, total = ranks.sum(torch.stack([(~counted).sum(), torch.tensor(len(scores))]).double()).tolist()
    if not bad:
        return counted
    own = (~counted).nonzero()[:, 0].tolist(), prompt_rows[~counted].tolist()
    named = "; ".join(
        f"responses {_listed(rows)}"
        + (f" of process {rank}" if ranks.count > 1 else "")
        + f", to prompts {_listed(of)}"
        for rank, (rows, of) in enumerate(ranks.gather_values(own))
        if rows
    )
    told = f"{bad:.0f} of {total:.0f} scores in {where} are NaN or infinite: {named}"
    if bad > max_dropped * total:
        raise ValueError(
            f"{told}. More than max_dropped ({max_dropped:.0%}) is no accident: look at the judge; nothing was learnt"
            " from these responses"
        )
    if warn and ranks.rank == 0:
        warnings.warn(f"{told}; these responses are left out", stacklevel=2)
    return counted


def check_scores(scores: object, count: int, *, where: str) -> Tensor:
    """Scores as float32 without gradient, if they are one finite number for each of count rows.

    Raises:
        TypeError: if scores are no tensor of real numbers.
        ValueError: if their shape is not (count,), or one is NaN or infinite (the rows are named).
    """
    found = raw_scores(scores, count, where=where)
    bad = ~found.isfinite()
    if bool(bad.any()):
        raise ValueError(f"scores of {where} are NaN or infinite for rows {_listed(bad.nonzero()[:, 0].tolist())}")
    return found


def raw_scores(scores: object, count: int, *, where: str) -> Tensor:
    """Scores as float32 without gradient, if they are one for each of count rows; whether finite is not asked here.

    Raises:
        TypeError: if scores are no tensor of real numbers.
        ValueError: if their shape is not (count,).
    """
    if not isinstance(scores, Tensor) or scores.is_complex():
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores of {where} are {kind}: they must be a tensor of real numbers, ({count},)")
    if scores.shape != (count,):
        raise ValueError(f"scores of {where} have shape {tuple(scores.shape)}: it must be ({count},)")
    return scores.detach().float()


def _listed(rows: list[int]) -> str:
    return f"{rows[:10]} and {len(rows) - 10} more" if len(rows) > 10 else f"{rows}"


class ScoreNormalizer:
    """Shift and scale scores to mean 0, deviation 1 over the first responses judged, then keep shift and scale.

    The first rollout is sampled from the reference, so its responses are reference responses. Without this a constant
    score teaches length instead of the task. Where the first scores are all alike the scale stays 1, and is taken from
    the first rollout whose scores differ.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, scores: Tensor, counted: Tensor, *, reduce: Callable[[Tensor], Tensor]) -> Self:
        """Take mean and deviation of the scores that count, (n,), of all ranks, as far as they are not fixed yet."""
        if self.std is not None:
            return self
        moments = masked_moments(scores, counted, reduce=reduce)
        mean, std = float(moments.mean), float(moments.var.sqrt())
        if self.mean is None and int(moments.count) > 0:
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
    source: Source,
    counted: Tensor,
    normalizer: ScoreNormalizer | None,
    *,
    penalty: float | None,
    replacement: float | None,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is learnt from raw scores: normalised, with the price of a missing EOS, (n,); 0 where a row does not count.

    Args:
        source: with its scores.
        counted: which rows count, (n,).
        normalizer: fixes its shift and scale on the first scores it sees; None takes raw scores.
        penalty: see `penalize_missing_eos`.
        replacement: likewise.
        reduce: sums a tensor over ranks.
    """
    assert source.scores is not None, "scores are asked for before this"
    scores = source.scores.masked_fill(~counted, 0.0)
    if normalizer is not None:
        scores = normalizer.fit(scores, counted, reduce=reduce)(scores)
    scores = penalize_missing_eos(scores, source.ended, source.eos_token, penalty=penalty, replacement=replacement)
    return scores.masked_fill(~counted, 0.0)


def penalize_missing_eos(
    scores: Tensor, ended: Tensor, eos_token: int | None, *, penalty: float | None, replacement: float | None
) -> Tensor:
    """Price of a response that ran into its limit, in units of the normalised score; none where no token ends one.

    Args:
        scores: (n,).
        ended: True where the response ended with its EOS, (n,).
        eos_token: the id that ends a response, or None.
        penalty: subtracted from the score; None for nothing.
        replacement: takes the score's place; None for nothing.
    """
    if eos_token is None:
        return scores
    if replacement is not None:
        return torch.where(ended, scores, replacement)
    return scores if penalty is None else scores - penalty * (~ended)
