"""Proves the identities PPO rests on, on the user's own models, prompts and settings, before the first step.

A table of small checks: each says what it found and, where that is not right, the cause and what to do. The trainer is
left as it was, to the bit. A check whose premise has failed is skipped, so that one fault shows as one failure.
"""

import random
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from palm_rlhf_pytorch.policy import identities
from palm_rlhf_pytorch.policy.judge_checks import (
    held_out_judge,
    judge_and_padding,
    judge_repeats,
    judge_scores,
    judge_tells_apart,
    normalisation,
)
from palm_rlhf_pytorch.policy.judging import evaluating
from palm_rlhf_pytorch.policy.premises import end_token, memory_fits, optimizer, prompts_fit, weights
from palm_rlhf_pytorch.policy.probe import Finding, Probe, Status, Trainer, sampling

WIDTH = 110  # columns of the table


class Check(NamedTuple):
    """One line of the report: what was looked at, how it came out, the numbers; cause and remedy where it is not ok."""

    name: str
    status: Status
    found: str
    remedy: str


class Report(NamedTuple):
    """What `preflight` found, and how many seconds it took."""

    checks: list[Check]
    seconds: float

    def __str__(self) -> str:
        return self.table()

    @property
    def ok(self) -> bool:
        """Whether no check has failed; warnings are allowed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """Checks that found a fault: training would learn something else than it says."""
        return [check for check in self.checks if check.status == "fail"]

    @property
    def warnings(self) -> list[Check]:
        """Checks that found what may be meant, but seldom is."""
        return [check for check in self.checks if check.status == "warn"]

    def table(self) -> str:
        """A line for each check, then cause and remedy of those that are not ok; at most 110 columns."""
        head = f"preflight: {len(self.checks)} checks in {self.seconds:.1f} s"
        head += f", {len(self.failures)} failed, {len(self.warnings)} to look at"
        column = max(len(check.name) for check in self.checks)
        lines = [head]
        for check in self.checks:
            start = f"  {check.status:<4}  {check.name:<{column}}  "
            lines += textwrap.wrap(check.found, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
        return "\n".join(lines + _advice(self.failures + self.warnings))

    def raise_failures(self) -> None:
        """Raise a PreflightError that lists the failures, if there are any."""
        if not self.ok:
            count = f"{len(self.failures)} of {len(self.checks)} checks before the run failed"
            raise PreflightError("\n".join([count, *_advice(self.failures)]))


class PreflightError(ValueError):
    """Training would not do what it says; the message lists each failed check with its cause and what to do."""


def preflight(
    trainer: Trainer,
    *,
    max_seq_len: int = 2048,
    max_new_tokens: int | None = None,
    eos_token: int | None = None,
    temperature: float = 1.0,
    memory: Callable[[], tuple[float, float]] | None = None,
) -> Report:
    """Sample a few short responses and check on them what PPO takes for granted; a second or two for a small model.

    Nothing of the trainer changes: weights, gradients, optimizer, counters, modes, global random states. The judge is
    called about ten times, with six responses or one; a held-out judge once.

    Args:
        trainer: an RLHFTrainer.
        max_seq_len: as in `RLHFTrainer.train`, as for the others.
        max_new_tokens: likewise; the responses sampled here have at most 16 tokens.
        eos_token: likewise.
        temperature: likewise.
        memory: gives the bytes that a step of learning needs, and those there are; None leaves that check out.

    Returns:
        Report; a failing check is in it and raises nothing, nor does an error of a model or a judge.
    """
    started = time.perf_counter()
    probe = Probe(
        trainer, max_seq_len=max_seq_len, max_new_tokens=max_new_tokens, eos_token=eos_token, temperature=temperature,
        memory=memory,
    )  # fmt: skip
    checks: dict[str, Check] = {}
    with evaluating(trainer.learner.model), evaluating(trainer.actor_critic), _random_states_kept():
        for step in STEPS:
            checks[step.name] = Check(step.name, *_taken(step, probe, checks))
    return Report(list(checks.values()), time.perf_counter() - started)


class Step(NamedTuple):
    """A check and its premises: it is skipped where one of `after` has failed, or one of `unless` has even warned."""

    name: str
    run: Callable[[Probe], Finding]
    after: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()


def _taken(step: Step, probe: Probe, checks: dict[str, Check]) -> Finding:
    """What a check finds, if its premises hold; an error of what it looks at is a finding too."""
    for name in step.after + step.unless:
        premise = checks[name]
        blocked = premise.status == "skip" and premise.found.startswith("after ")
        if premise.status == "fail" or blocked or (premise.status == "warn" and name in step.unless):
            return Finding("skip", premise.found if blocked else f"after {name!r}")
    try:
        return step.run(probe)
    except Exception as error:  # models and judges are the user's: an error of theirs belongs in the report
        text = " ".join(str(error).split())
        return Finding(
            "fail", f"raised {type(error).__name__}: {textwrap.shorten(text, 300)}",
            "call judge(sequences, prompt_mask=..., mask=...) yourself on ids (b, n): it must return a tensor of b"
            " numbers, (b,), not (b, 1) or a list"
            if step.run in (judge_scores, held_out_judge)
            else "the model or a setting raised this: trainer.rollout and trainer.learn on a few prompts show where",
        )  # fmt: skip


STEPS = (
    Step("end token", end_token),
    Step("prompts fit", prompts_fit),
    Step("memory", memory_fits),
    Step("weights", weights),
    Step("optimizer", optimizer),
    Step("sampling", sampling, after=("prompts fit", "memory", "weights")),
    Step("dropout", identities.dropout, after=("sampling",)),
    Step("values", identities.values, after=("sampling",)),
    Step("temperature", identities.by_hand, after=("dropout",)),
    Step("padding", identities.padding, after=("temperature", "values")),
    Step("sampler = learner", identities.sampler, after=("padding",)),
    Step("ratio is 1", identities.ratio, after=("padding",)),
    Step("KL is 0", identities.kl, after=("ratio is 1",)),
    Step("score placement", identities.score_placement, after=("values",)),
    Step("gradients", identities.gradients, after=("values", "optimizer")),
    Step("judge's scores", judge_scores, after=("sampling",)),
    Step("judge repeats", judge_repeats, after=("judge's scores",)),
    Step("judge tells apart", judge_tells_apart, after=("judge's scores",)),
    Step("judge and padding", judge_and_padding, unless=("judge repeats",)),
    Step("normalisation", normalisation, unless=("judge tells apart",)),
    Step("held-out judge", held_out_judge, after=("sampling",)),
)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Python's, numpy's and torch's global random states come back, on all devices."""
    python, legacy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _advice(checks: list[Check]) -> list[str]:
    """What was found by some checks, and what to do about it."""
    return [
        line
        for check in checks
        for line in ("", *textwrap.wrap(f"{check.name}: {check.found}", WIDTH))
        + tuple(textwrap.wrap(check.remedy, WIDTH, initial_indent="    ", subsequent_indent="    "))
    ]
