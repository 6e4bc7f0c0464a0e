"""A judge is asked about responses: in eval mode, a batch at a time, within a time limit, and what it says is checked.

A judge is any callable `(sequences, prompt_mask=..., mask=...)` that gives scores (b,) or rewards per response token
(b, t); a reward model is one, and so is a JudgeSum of several. Knows no policy and learns nothing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.policy.rollout import row_batches
from palm_rlhf_pytorch.policy.targets import Source
from palm_rlhf_pytorch.reward.caching import CachedJudge
from palm_rlhf_pytorch.reward.functions import summed
from palm_rlhf_pytorch.reward.weighted import JudgeSum
from palm_rlhf_pytorch.tensors import identity, lengths_to_mask, split_rows

Judge = Callable[..., Tensor]


class Judged(NamedTuple):
    """What a judge says of n responses, on the CPU.

    scores: (n,), NaN or infinite where it says so. rewards: for each response token, (n, t), 0 beyond a response, if it
    gives such: the scores are their sums. parts: where it is a JudgeSum, each judge's own scores by name, (n,).
    """

    scores: Tensor
    rewards: Tensor | None
    parts: dict[str, Tensor]

    def to(self, device: torch.device) -> "Judged":
        """The same on a device."""
        rewards = None if self.rewards is None else self.rewards.to(device)
        return Judged(self.scores.to(device), rewards, {name: part.to(device) for name, part in self.parts.items()})


def ask_source(
    judge: Judge,
    source: Source,
    *,
    device: torch.device,
    max_batch_size: int,
    max_batch_tokens: int,
    where: str,
    timeout: float | None = None,
) -> dict[str, Tensor]:
    """What a judge gives for all rows of a source, as `ask` does, on the CPU; a batch of it in memory at a time.

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
    longest = max(steps for _, steps in spans)
    found: dict[str, Tensor] = {}
    limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
    batches = row_batches(
        spans, range(len(spans)), device=torch.device("cpu"), max_rows=max_batch_size, max_tokens=max_batch_tokens
    )
    for rows in batches:
        part = source.select(rows).to(device)
        try:
            part_found = ask(judge, part.sequences, part.prompt_mask, part.mask, where=where, timeout=timeout, **limits)
        except Exception as error:
            error.add_note(
                f"while scoring responses {listed(rows.numbers.tolist())} of {where}, to prompts"
                f" {listed(part.prompt_rows.tolist())}"
            )
            raise
        for name, values in part_found.items():
            put(found, name, rows.numbers, values.to("cpu"), count=len(spans), steps=longest)
    return found


def judged(
    judge: Judge, found: dict[str, Tensor], lengths: Tensor, *, reduce: Callable[[Tensor], Tensor] = identity
) -> Judged:
    """What `ask_source` gave as scores; the first such call fixes the scales of a JudgeSum.

    Args:
        judge: that was asked.
        found: what it gave.
        lengths: tokens of each response, (n,).
        reduce: sums a tensor over ranks: each must call this.
    """
    sums = {name: summed(values) for name, values in found.items()}
    if not isinstance(judge, JudgeSum):
        return Judged(sums[""], found[""] if found[""].ndim == 2 else None, {})
    total = judge.fit(found, reduce=reduce).total(found, lengths)
    return Judged(summed(total), total if total.ndim == 2 else None, sums)


def judge_source(judge: Judge, source: Source, **options: Any) -> Judged:
    """`ask_source` and `judged` in one, for one process."""
    lengths = torch.tensor([steps for _, steps in source.spans()])
    return judged(judge, ask_source(judge, source, **options), lengths)


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
    """Scores (b,) of sequences, rewards per token summed; in eval mode, without gradient, a batch at a time.

    Rows of similar length are judged together, in their order if one batch takes them all, and trimmed to the longest
    of them. A JudgeSum whose scales are not fixed yet is asked without any.

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
    judge = judge.raw() if isinstance(judge, JudgeSum) and not judge.is_fitted else judge
    limits = {"max_batch_size": max_batch_size, "max_batch_tokens": max_batch_tokens}
    found = ask(judge, sequences, prompt_mask, mask, where=where, timeout=timeout, **limits)
    if isinstance(judge, JudgeSum):
        return summed(judge.total(found, (mask & ~prompt_mask).sum(dim=-1)))
    return summed(found[""])


@torch.no_grad()
def ask(
    judge: Judge,
    sequences: Tensor,
    prompt_mask: Tensor,
    mask: Tensor,
    *,
    max_batch_size: int,
    max_batch_tokens: int,
    where: str,
    timeout: float | None,
) -> dict[str, Tensor]:
    """What a judge gives for sequences, (b,) or (b, t), under the name ""; of a JudgeSum each judge's, by its name.

    Arguments and errors are those of `judge_sequences`.
    """
    lengths, device = mask.sum(dim=-1).tolist(), sequences.device
    steps = (mask & ~prompt_mask).sum(dim=-1)
    scores: dict[str, Tensor] = {}
    with evaluating(judge):
        for rows in split_rows(lengths, max_rows=max_batch_size, max_tokens=max_batch_tokens):
            index, width = torch.tensor(rows, device=device), lengths[max(rows, key=lengths.__getitem__)]
            masks = {"prompt_mask": prompt_mask[index, :width], "mask": mask[index, :width]}
            call: Any = judge.parts if isinstance(judge, JudgeSum) else judge
            try:
                found = _within(timeout, lambda: call(sequences[index, :width].long(), **masks))  # noqa: B023
            except Exception as error:
                error.add_note(f"raised by the reward model while scoring rows {listed(rows)} of {where}")
                raise
            named = found if isinstance(judge, JudgeSum) and isinstance(found, dict) else {"": found}
            for name, values in named.items():
                whose = f"the judge {name!r} in {where}" if name else f"the reward model in {where}"
                checked = checked_rewards(values, steps[index], where=whose).to(device)
                put(scores, name, index, checked, count=len(lengths), steps=int(steps.max()))
    return scores


def put(found: dict[str, Tensor], name: str, rows: Tensor, values: Tensor, *, count: int, steps: int) -> None:
    """Put what was said of some rows to the rest, scores (count,) or rewards (count, steps).

    Raises:
        ValueError: if a judge gives scores for some and rewards for others.
    """
    if name not in found:
        shape = (count,) if values.ndim == 1 else (count, steps)
        found[name] = torch.zeros(shape, device=values.device)
    if found[name].ndim != values.ndim:
        raise ValueError(f"the judge {name} gave scores (b,) for some responses and rewards (b, t) for others")
    if values.ndim == 1:
        found[name][rows] = values
    else:
        found[name][rows, : values.shape[1]] = values


def uncached(judge: Judge) -> Judge:
    """The judge behind a cache, for who wants to know whether it says the same twice."""
    return judge.judge if isinstance(judge, CachedJudge) else judge


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


def check_scores(scores: object, count: int, *, where: str) -> Tensor:
    """Scores as float32 without gradient, if they are one finite number for each of count rows.

    Raises:
        TypeError: if scores are no tensor of real numbers.
        ValueError: if their shape is not (count,), or one is NaN or infinite (the rows are named).
    """
    found = raw_scores(scores, count, where=where)
    bad = ~found.isfinite()
    if bool(bad.any()):
        raise ValueError(f"scores of {where} are NaN or infinite for rows {listed(bad.nonzero()[:, 0].tolist())}")
    return found


def checked_rewards(found: object, lengths: Tensor, *, where: str) -> Tensor:
    """Scores (b,) as `raw_scores`, or rewards per response token (b, t) with 0 beyond each response.

    Raises:
        TypeError: see there.
        ValueError: likewise, or if rewards are for fewer tokens than the longest response has.
    """
    if not isinstance(found, Tensor) or found.ndim != 2 or found.is_complex():
        return raw_scores(found, len(lengths), where=where)
    count, longest = len(lengths), int(lengths.max())
    if found.shape[0] != count or found.shape[1] < longest:
        raise ValueError(
            f"rewards of {where} have shape {tuple(found.shape)}: it must be ({count}, {longest}), a number for each"
            f" token of the longest response; scores are ({count},)"
        )
    beyond = ~lengths_to_mask(lengths.to(found.device), longest)
    return found[:, :longest].detach().float().masked_fill(beyond, 0.0)


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


def listed(rows: list[int]) -> str:
    """Some numbers in words, at most ten of them."""
    return f"{rows[:10]} and {len(rows) - 10} more" if len(rows) > 10 else f"{rows}"


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
