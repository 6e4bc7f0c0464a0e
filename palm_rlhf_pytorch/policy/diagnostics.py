"""What scored responses say about the run: rewards, KL, lengths, and how well the critic knew them.

Names and units are in `training/metrics.py`; figures are over the responses of all ranks that count, and that this
update has sampled: older ones, learnt from again, are not in them. Rows are read a part at a time, so that memory does
not follow their number.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.advantage import monte_carlo_returns
from palm_rlhf_pytorch.objectives.policy_gradient import kl_k3
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.scores import counted_scores, learnt_scores
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.targets import Lesson, Source, Targets
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.tensors import Moments, RunningMoments, masked_moments
from palm_rlhf_pytorch.training.ranks import Ranks

MAX_PAIRS = 65_536  # pairs of tokens that distinct_2 looks at: the share falls with their number, so it is bounded


def lesson_from(
    source: Source,
    settings: PolicySettings,
    *,
    ranks: Ranks,
    normalizer: ScoreNormalizer,
    kl_coef: float,
    version: int,
    kind: Callable[..., Lesson] = Lesson,
) -> tuple[Lesson, dict[str, float]]:
    """What scored responses teach, ready to be learnt, and the diagnostics of them.

    Args:
        source: responses with raw scores, on the CPU or on disk.
        settings: of PPO.
        ranks: all processes.
        normalizer: of scores; takes its shift and scale here where they are not fixed yet.
        kl_coef: price of a nat of KL to the reference.
        version: how many updates the policy has had.
        kind: makes the lesson, with what is its method's own.
    """
    assert source.scores is not None, "scores are asked for before this"
    counted = counted_scores(
        source.scores, source.prompt_rows, ranks=ranks, max_dropped=settings.max_dropped,
        where=f"update {version + 1}", warn=False,
    )  # fmt: skip
    scores = learnt_scores(
        source, counted, normalizer if settings.normalize_scores else None, penalty=settings.missing_eos_penalty,
        replacement=settings.missing_eos_score, reduce=ranks.sum,
    )  # fmt: skip
    scale = 1.0 / (normalizer.std or 1.0) if settings.normalize_scores else 1.0
    lesson = kind(source, scores, counted, kl_coef=kl_coef, version=version, reward_scale=scale)
    metrics = lesson.prepare(ranks, max_tokens=settings.max_batch_tokens)
    found = survey(lesson, source.scores, ranks=ranks, max_tokens=settings.max_batch_tokens)
    lesson.whitening = found.advantages if lesson.whitens else None
    return lesson, found.metrics | metrics


class Survey(NamedTuple):
    """Diagnostics of a lesson before learning from it, and the moments that whiten its advantages."""

    metrics: dict[str, float]
    advantages: Moments


def survey(lesson: Lesson, raw_scores: Tensor, *, ranks: Ranks, max_tokens: int) -> Survey:
    """Look at the rows of a lesson: metrics are of those that this policy sampled, whitening is by all that count.

    Args:
        lesson: its scores are the learnt ones, normalised, penalties included.
        raw_scores: the judge's, (n,).
        ranks: all processes.
        max_tokens: rows times the longest of them, at a time.
    """
    moments, whitening = {name: RunningMoments() for name in TOKEN_FIGURES}, RunningMoments()
    columns, mismatch = Filling(len(ROW_FIGURES), len(lesson.scores)), torch.zeros(())
    pairs = Filling(-(-MAX_PAIRS // ranks.count), dtype=torch.long)
    for rows, rollout, targets in lesson.parts(max_tokens):
        fresh = rollout.versions >= lesson.version
        mask = rollout.response_mask & fresh[:, None]
        whitening.add(targets.advantages, rollout.response_mask)
        for name, values in _token_figures(rollout, targets, gamma=lesson.gamma):
            moments[name].add(values, mask)
        mismatch = torch.maximum(mismatch, ((rollout.sampler_logprobs - rollout.logprobs).abs() * mask).max())
        if pairs.room:
            pairs.add(_pairs(rollout, mask)[: pairs.room])
        own = (
            targets.kl.sum(dim=-1), targets.rewards.sum(dim=-1), rollout.lengths, rollout.ended,
            raw_scores[rows.numbers], lesson.scores[rows.numbers],
        )  # fmt: skip
        columns.add(torch.stack([values.float() for values in own])[:, fresh])
    metrics = _row_metrics(dict(zip(ROW_FIGURES, columns.filled, strict=True)), ranks)
    tokens = {name: running.compute(ranks.sum) for name, running in moments.items()}
    metrics |= _token_metrics(tokens, lesson.values)
    if not float(tokens["kl"].count):  # a mean over no response is no score of 0, nor a KL of 0
        metrics = dict.fromkeys(metrics, float("nan"))
    metrics["objective/kl_coef"] = lesson.kl_coef
    metrics["objective/non_score_reward"] = -lesson.kl_coef * metrics["objective/kl"]
    metrics["reward/dropped"] = float(ranks.sum((lesson.fresh & ~lesson.counted).sum().float()))
    metrics["rollout/sampler_logprob_diff_max"] = float(ranks.max(mismatch))
    metrics["rollout/distinct_2"] = _distinct(pairs.filled, ranks)
    return Survey(metrics, whitening.compute(ranks.sum))


class Filling:
    """Columns that come in parts, (..., n), in a tensor made beforehand.

    A list of small tensors, one kept from each part, would pin the memory of the large ones freed between them.
    """

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        self._values, self._count = torch.zeros(shape, dtype=dtype), 0

    @property
    def room(self) -> int:
        """How many columns may still come."""
        return self._values.shape[-1] - self._count

    @property
    def filled(self) -> Tensor:
        """Those that came."""
        return self._values[..., : self._count]

    def add(self, part: Tensor) -> None:
        """Take in columns (..., k), k at most `room`."""
        start, self._count = self._count, self._count + part.shape[-1]
        self._values[..., start : self._count] = part


ROW_FIGURES = ("kl", "reward", "length", "ended", "score", "learnt")
TOKEN_FIGURES = ("kl", "kl_k3", "kl_exact", "value", "return", "advantage", "monte_carlo", "unexplained", "mismatch")


def _token_figures(rollout: Rollout, targets: Targets, *, gamma: float) -> Iterator[tuple[str, Tensor]]:
    """What is averaged over tokens, (b, t) each, in the order of TOKEN_FIGURES."""
    returns = monte_carlo_returns(targets.rewards, rollout.response_mask, gamma=gamma)
    figures = (
        targets.kl, kl_k3(rollout.logprobs, rollout.ref_logprobs), rollout.kl_exact, rollout.values, targets.returns,
        targets.advantages, returns, returns - rollout.values,
        (rollout.sampler_logprobs - rollout.logprobs).abs(),
    )  # fmt: skip
    yield from zip(TOKEN_FIGURES, figures, strict=True)


def _token_metrics(tokens: dict[str, Moments], values: bool) -> dict[str, float]:
    figures = {
        "objective/kl_token": float(tokens["kl"].mean),
        "objective/kl_k3": float(tokens["kl_k3"].mean),
        "objective/kl_exact": float(tokens["kl_exact"].mean),
        "advantages/mean": float(tokens["advantage"].mean),
        "advantages/std": float(tokens["advantage"].var.sqrt()),
        "rollout/sampler_logprob_diff_mean": float(tokens["mismatch"].mean),
    }
    if not values:
        return figures
    var = float(tokens["monte_carlo"].var)
    explained = 1 - float(tokens["unexplained"].var) / (var + 1e-5) if var > 0 else 0.0  # as `explained_variance`
    return figures | {
        "returns/mean": float(tokens["return"].mean),
        "returns/var": float(tokens["return"].var),
        "value/mean": float(tokens["value"].mean),
        "value/explained_variance": explained,
    }


def _row_metrics(table: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Figures over responses, from columns (n,) of what is known of each."""

    def over_rows(values: Tensor) -> Moments:
        return masked_moments(values.double(), torch.ones_like(values, dtype=torch.bool), reduce=ranks.sum)

    score, length, ended = over_rows(table["score"]), over_rows(table["length"]), over_rows(table["ended"]).mean
    covariance = over_rows((table["score"] - score.mean) * (table["length"] - length.mean)).mean
    longest = table["length"].max() if len(table["length"]) else torch.zeros(())
    return {
        "objective/kl": float(over_rows(table["kl"]).mean),
        "objective/rlhf_reward": float(over_rows(table["reward"]).mean),
        "reward/score": float(score.mean),
        "reward/score_std": float(score.var.sqrt()),
        "reward/score_normalized": float(over_rows(table["learnt"]).mean),
        "response/length_mean": float(length.mean),
        "response/length_max": float(ranks.max(longest)),
        "response/eos_rate": float(ended),
        "response/truncated_rate": 1 - float(ended),
        "score/length_corr": float(covariance / (score.var * length.var).sqrt().clamp(min=1e-8)),
    }


def timing_metrics(
    num_tokens: int, started: float, sampled: float, *, ranks: Ranks, device: torch.device
) -> dict[str, float]:
    """Seconds and speed of an update that ends now.

    Args:
        num_tokens: response tokens that were sampled and learnt from, by this rank.
        started: perf_counter before sampling.
        sampled: the same before learning.
        ranks: all processes.
        device: where the model is.
    """
    now = time.perf_counter()
    tokens = float(ranks.sum(torch.tensor(float(num_tokens))))
    return {
        "perf/rollout_seconds": sampled - started,
        "perf/learn_seconds": now - sampled,
        "perf/tokens_per_second": tokens / (now - started),
        "perf/rollout_tokens_per_second": tokens / (sampled - started),
        "perf/learn_tokens_per_second": tokens / (now - sampled),
        "perf/peak_memory_bytes": peak_memory(device),
    }


def peak_memory(device: torch.device) -> float:
    """Most bytes so far: of tensors on a CUDA device, else of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there, kilobytes on Linux
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def headline(metrics: dict[str, float]) -> dict[str, str]:
    """What a progress bar shows."""
    shown = {"score": "reward/score", "kl": "objective/kl", "length": "response/length_mean"}
    return {label: f"{metrics[name]:.3g}" for label, name in shown.items()}


def distinct_2(rollout: Rollout) -> float:
    """Share of the pairs of neighbouring response tokens that are different pairs; 0 where there is none.

    Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055; over the first MAX_PAIRS.
    """
    pairs = _pairs(rollout, rollout.response_mask)[:MAX_PAIRS]
    return len(pairs.unique()) / len(pairs) if len(pairs) else 0.0


def _pairs(rollout: Rollout, mask: Tensor) -> Tensor:
    """Each pair of neighbouring tokens in a mask (b, t) of the responses as one number, row by row."""
    places = rollout.prompt_lengths[:, None] + torch.arange(mask.shape[1], device=mask.device)
    tokens = rollout.sequences.gather(1, places.clamp(max=rollout.sequences.shape[1] - 1)).long()
    return (tokens[:, :-1] * 2**31 + tokens[:, 1:])[mask[:, 1:]]


def _distinct(pairs: Tensor, ranks: Ranks) -> float:
    """Different pairs over pairs, of all ranks; each brings at most its share of MAX_PAIRS."""
    if ranks.count > 1:
        padded = pairs.new_full((-(-MAX_PAIRS // ranks.count),), -1)
        padded[: len(pairs)] = pairs
        pairs = ranks.gather(padded)
        pairs = pairs[pairs >= 0]
    return len(pairs.unique()) / len(pairs) if len(pairs) else 0.0
