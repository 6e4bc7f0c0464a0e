"""Diagnostics of a rollout, against numbers worked by hand."""

import gc
import math

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.diagnostics import distinct_2, headline, survey, timing_metrics
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.targets import Lesson
from palm_rlhf_pytorch.training.metrics import GLOSSARY
from tests.policy.helpers import CPU, one_process

# two responses: of 3 tokens (5 6 5), cut short; and of 1 token (7), ended
ROLLOUT = Rollout(
    sequences=torch.tensor([[1, 2, 5, 6, 5], [3, 7, 0, 0, 0]]),
    prompt_lengths=torch.tensor([2, 1]),
    lengths=torch.tensor([3, 1]),
    logprobs=torch.tensor([[-1.0, -0.5, -2.0], [-0.3, 0.0, 0.0]]),
    ref_logprobs=torch.tensor([[-1.2, -0.4, -1.5], [-0.7, 0.0, 0.0]]),
    values=torch.tensor([[0.3, 0.4, 0.6], [0.2, 0.0, 0.0]]),
    sampler_logprobs=torch.tensor([[-1.0, -0.5, -2.03], [-0.29, 0.0, 0.0]]),
    kl_exact=torch.tensor([[0.1, 0.2, 0.3], [0.8, 0.0, 0.0]]),
    ended=torch.tensor([False, True]),
    prompt_rows=torch.tensor([4, 2]),
    versions=torch.tensor([0, 0]),
    temperature=1.0,
    eos_token=7,
    scores=torch.tensor([10.0, 40.0]),
)


def survey_of(rollout, learnt, *, counted=None, version=0, max_tokens=9999):
    counted = torch.ones_like(rollout.ended) if counted is None else counted
    lesson = Lesson(rollout, learnt, counted, kl_coef=0.05, gamma=1.0, gae_lambda=0.95, version=version)
    return survey(lesson, rollout.scores, ranks=one_process(), max_tokens=max_tokens)


@pytest.fixture(params=[9999, 1])  # read at once, or row by row
def metrics(request):
    return survey_of(ROLLOUT, torch.tensor([1.0, -0.5]), max_tokens=request.param).metrics


def test_rollout_metrics_are_those_worked_by_hand(metrics):
    # advantages .6683125 .60875 .425 and, of one token, -.5 - .05 * .4 - .2 = -.72; returns .9683125 1.00875 1.025 -.52
    advantages, returns = [0.6683125, 0.60875, 0.425, -0.72], [0.9683125, 1.00875, 1.025, -0.52]
    mean, return_mean = sum(advantages) / 4, sum(returns) / 4
    monte_carlo = torch.tensor([1.02, 1.03, 1.025, -0.52], dtype=torch.float64)
    residual = monte_carlo - torch.tensor([0.3, 0.4, 0.6, 0.2], dtype=torch.float64)
    k3 = [math.exp(-d) - 1 + d for d in (0.2, -0.1, -0.5, 0.4)]
    expected = {
        "objective/kl": 0.0,  # (-.4 + .4) / 2
        "objective/kl_token": 0.0,
        "objective/kl_k3": sum(k3) / 4,
        "objective/kl_exact": 0.35,  # (.1 + .2 + .3 + .8) / 4
        "objective/kl_coef": 0.05,
        "objective/non_score_reward": 0.0,
        "objective/rlhf_reward": 0.25,
        "reward/score": 25.0,
        "reward/score_std": 15.0,
        "reward/score_normalized": 0.25,
        "reward/dropped": 0.0,
        "returns/mean": return_mean,
        "returns/var": sum((x - return_mean) ** 2 for x in returns) / 4,
        "advantages/mean": mean,
        "advantages/std": math.sqrt(sum((x - mean) ** 2 for x in advantages) / 4),
        "value/mean": 1.5 / 4,
        "value/explained_variance": float(1 - residual.var(correction=0) / (monte_carlo.var(correction=0) + 1e-5)),
        "response/length_mean": 2.0,
        "response/length_max": 3.0,
        "response/eos_rate": 0.5,
        "response/truncated_rate": 0.5,
        "score/length_corr": -1.0,
        "rollout/sampler_logprob_diff_mean": 0.01,
        "rollout/sampler_logprob_diff_max": 0.03,
        "rollout/distinct_2": 1.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-5)


def test_names_are_in_the_glossary(metrics):
    timing = timing_metrics(4, 1.0, 2.0, ranks=one_process(), device=CPU)
    assert timing["perf/rollout_seconds"] == 1.0
    assert timing["perf/rollout_tokens_per_second"] == 4.0
    assert timing["perf/peak_memory_bytes"] > 50e6  # torch alone takes more
    assert (metrics | timing).keys() <= GLOSSARY.keys()
    assert headline(metrics | {"objective/kl": 0.98765}) == {"score": "25", "kl": "0.988", "length": "2"}


def test_correlation_is_zero_where_scores_or_lengths_do_not_vary():
    alike = ROLLOUT._replace(scores=torch.tensor([10.0, 10.0]))
    found = survey_of(alike, alike.scores).metrics
    assert found["score/length_corr"] == 0.0
    assert all(math.isfinite(value) for value in found.values())


def test_row_that_does_not_count_is_in_no_figure_but_its_own():
    alone = survey_of(ROLLOUT.select(torch.tensor([1])), torch.tensor([-0.5])).metrics
    broken = ROLLOUT._replace(scores=torch.tensor([float("nan"), 40.0]))
    found = survey_of(broken, torch.tensor([0.0, -0.5]), counted=torch.tensor([False, True])).metrics
    assert found == alone | {"reward/dropped": 1.0}


def test_row_of_an_older_policy_does_not_count_as_a_sampler_that_differs():
    behaviour = torch.tensor([[-1.0, -0.5, -9.0], [-0.29, 0.0, 0.0]])
    old = ROLLOUT._replace(versions=torch.tensor([1, 2]), sampler_logprobs=behaviour)
    found = survey_of(old, torch.tensor([1.0, -0.5]), version=2).metrics
    assert found["rollout/sampler_logprob_diff_max"] == pytest.approx(0.01, abs=1e-6)
    assert found["rollout/sampler_logprob_diff_mean"] == pytest.approx(0.01, abs=1e-6)


def test_survey_keeps_no_tensor_of_the_parts_it_has_seen(monkeypatch):
    many, alive = ROLLOUT.select(torch.arange(2).repeat(20)), []
    lesson = Lesson(many, many.scores, torch.ones(40, dtype=torch.bool), kl_coef=0.05, gamma=1.0, gae_lambda=0.95)
    parts = lesson.parts

    def watched(max_tokens):
        for number, part in enumerate(parts(max_tokens)):
            if number in (3, 37):
                gc.collect()
                alive.append(sum(type(held) is Tensor for held in gc.get_objects()))
            yield part

    monkeypatch.setattr(lesson, "parts", watched)
    survey(lesson, many.scores, ranks=one_process(), max_tokens=1)
    assert len(alive) == 2 and alive[0] == alive[1]


def test_distinct_2_counts_pairs_of_responses_only():
    repeated = ROLLOUT._replace(
        sequences=torch.tensor([[1, 5, 5, 5, 5], [1, 5, 5, 0, 0]]),
        prompt_lengths=torch.tensor([1, 1]),
        lengths=torch.tensor([4, 2]),
        logprobs=torch.zeros(2, 4),
    )
    assert distinct_2(repeated) == 0.25  # (5 5) three times, and once
    assert distinct_2(ROLLOUT) == 1.0  # (5 6), (6 5)
    assert distinct_2(ROLLOUT._replace(lengths=torch.tensor([1, 1]))) == 0.0
