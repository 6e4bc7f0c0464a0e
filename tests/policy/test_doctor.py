"""The doctor's rules, each on a trace that shows its fault, on one that just does not, and on a healthy run."""

import json
import math
from dataclasses import fields

import numpy as np
import pytest

from palm_rlhf_pytorch.objectives.group import GroupObjective
from palm_rlhf_pytorch.policy.doctor import RULES, WATCHED, Doctor
from palm_rlhf_pytorch.policy.group_settings import GroupSettings
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.training.metrics import GLOSSARY

UPDATES = 37


def healthy(updates=UPDATES, seed=3):
    """Metrics of a run in which the policy learns, with the noise of real ones."""
    noise = np.random.default_rng(seed).standard_normal((updates, 9))
    learnt = [1 - math.exp(-at / 12) for at in range(updates)]
    return [
        {
            "objective/kl": 6 * share + 0.2 * z[0],
            "objective/kl_coef": 0.05,
            "policy/clipped_fraction": 0.12 + 0.02 * z[1],
            "policy/approx_kl": 0.015 * math.exp(0.2 * z[2]),
            "policy/entropy": 2.2 - share + 0.05 * z[3],
            "policy/grad_norm": 1.4 * math.exp(0.3 * z[4]),
            "policy/skipped_steps": 0.0,
            "value/explained_variance": 0.6 * share - 0.1 + 0.02 * z[5],
            "value/grad_norm": 2.5 * math.exp(0.3 * z[4]),
            "response/eos_rate": 0.4 + 0.3 * share,
            "response/length_mean": 40 + 15 * share + z[6],
            "reward/score": 2 * share + 0.3 * z[7],
            "reward/score_std": 1.1,
            "reward/held_out_score": share + 0.3 * z[8],
            "reward/dropped": 0.0,
            "score/length_corr": 0.1,
            "rollout/sampler_logprob_diff_max": 0.01,
        }
        for share, z in zip(learnt, noise, strict=True)
    ]


def trace(changes):
    """A healthy run in which some metrics are, from update 0 on, a number or a function of the update."""
    return [
        metrics | {name: value(at) if callable(value) else value for name, value in changes.items()}
        for at, metrics in enumerate(healthy())
    ]


def said(records, **facts):
    """Rule and update, counted from 1, of all that a doctor says."""
    doctor = Doctor(**{"eos_token": True, "max_norm": 1.0, **facts})
    return [(finding.rule, at) for at, record in enumerate(records, 1) for finding in doctor.examine(record)]


def after(start, then, *, at=20):
    return lambda update: start if update < at else then


def sawtooth(rate, *, at=0):
    """A trend of `rate` an update under noise of 0.5 up and down."""
    return lambda update: rate * (update - at) + 0.5 * (-1) ** update


# rule, what shows it, when it is first seen, what just does not
CASES = [
    ("skipped_steps", {"policy/skipped_steps": after(0, 1)}, 21, {"policy/skipped_steps": 0}),
    ("dropped_scores", {"reward/dropped": after(0, 2)}, 21, {"reward/dropped": 0}),
    ("sampler_mismatch", {"rollout/sampler_logprob_diff_max": 0.11}, 3, {"rollout/sampler_logprob_diff_max": 0.1}),
    ("kl_negative", {"objective/kl": -0.06}, 5, {"objective/kl": -0.04}),
    ("kl_negative", {"objective/kl": -0.3}, 5, {"objective/kl": lambda at: 0.01 if at % 5 == 4 else -0.3}),
    ("kl_exploding", {"objective/kl": after(9, 51)}, 23, {"objective/kl": after(9, 49)}),
    # windows end at update 15: means of 2^(at / 4), 1.45 3.45 8.2, each 2.4 times the one before
    (
        "kl_exploding",
        {"objective/kl": lambda at: 2 ** (at / 4)},
        15,
        {"objective/kl": lambda at: min(2 ** (at / 5.1), 48)},
    ),
    # a tenth of that: the oldest window is above 1 nat from update 13 to 17 on, 0.1457 * 2^(12 / 4) = 1.17
    ("kl_exploding", {"objective/kl": lambda at: 0.1 * 2 ** (at / 4)}, 27, {"objective/kl": lambda at: 0.001 * at**2}),
    ("clip_fraction", {"policy/clipped_fraction": 0.31}, 3, {"policy/clipped_fraction": 0.3}),
    ("approx_kl", {"policy/approx_kl": 0.11}, 3, {"policy/approx_kl": 0.099}),
    ("explained_variance", {"value/explained_variance": -0.01}, 11, {"value/explained_variance": 0.0}),
    ("clipped_gradients", {"policy/grad_norm": 30.5}, 5, {"policy/grad_norm": 29.5}),
    ("clipped_gradients", {"value/grad_norm": 30.5}, 5, {"value/grad_norm": lambda at: 9 if at % 5 == 4 else 400}),
    ("no_eos", {"response/eos_rate": after(0.1, 0)}, 23, {"response/eos_rate": 0.001}),
    ("no_eos", {"response/eos_rate": 0}, 3, {"response/eos_rate": lambda at: 0.1 if at % 3 == 2 else 0}),
    ("scores_alike", {"reward/score_std": 0.0}, 3, {"reward/score_std": lambda at: 0.2 if at % 3 == 2 else 0.0}),
    ("scores_alike", {"reward/score_std": 1e-4, "reward/score": 1e4}, 3, {"reward/score_std": 1e-4}),  # rounding
    ("entropy_collapse", {"policy/entropy": after(2.0, 0.39)}, 23, {"policy/entropy": after(2.0, 0.41)}),
    ("length_drift", {"response/length_mean": after(20, 41)}, 25, {"response/length_mean": after(20, 40)}),
    ("length_drift", {"response/length_mean": after(20, 9.9)}, 25, {"response/length_mean": after(20, 10.1)}),
    # a slope s under noise of 0.5 is s * 25.8 / 0.52 standard errors over 20 updates, s * 9.1 / 0.55 over 10
    (
        "overoptimized",
        {"reward/score": sawtooth(0.25), "reward/held_out_score": sawtooth(-0.25)},
        10,
        {"reward/score": sawtooth(0.25), "reward/held_out_score": sawtooth(-0.04)},
    ),
    (
        "overoptimized",
        {"reward/score": sawtooth(0.1), "reward/held_out_score": after(1, 0)},
        23,
        {"reward/score": sawtooth(0.04), "reward/held_out_score": sawtooth(-0.25)},
    ),
]


@pytest.mark.parametrize("seed", range(6))
def test_a_healthy_run_is_left_alone(seed):
    assert said(healthy(150, seed)) == []


@pytest.mark.parametrize(("rule", "shown", "when", "hidden"), CASES)
def test_rule_sees_its_fault_alone_and_nothing_just_inside_its_threshold(rule, shown, when, hidden):
    found = said(trace(shown))
    assert {name for name, _ in found} == {rule}
    assert found[0] == (rule, when)
    assert said(trace(hidden)) == []


def test_every_rule_is_tried():
    assert {rule for rule, *_ in CASES} == set(RULES)


def test_target_of_kl_sets_its_limit():
    assert said(trace({"objective/kl": 15.1}), target_kl=1.5)[0] == ("kl_exploding", 3)
    assert said(trace({"objective/kl": 14.9}), target_kl=1.5) == []
    assert said(trace({"objective/kl": 55}), target_kl=30.0) == []  # on its way to what was asked for
    assert said(trace({"objective/kl": 61}), target_kl=30.0)[0] == ("kl_exploding", 3)


def test_rules_that_need_a_setting_are_quiet_without_it():
    assert said(trace({"response/eos_rate": 0.0}), eos_token=False) == []
    assert said(trace({"policy/grad_norm": 1e3, "value/grad_norm": 1e3}), max_norm=None) == []


def test_a_rule_that_spoke_is_quiet_for_ten_updates():
    always = trace({"policy/clipped_fraction": 0.5})
    assert said(always) == [("clip_fraction", at) for at in (3, 13, 23, 33)]
    assert said(always, repeat_after=30) == [("clip_fraction", at) for at in (3, 33)]
    with pytest.raises(ValueError, match=r"repeat_after \(0\)"):
        Doctor(eos_token=True, repeat_after=0)


def test_findings_give_the_numbers_and_name_a_setting():
    faults = {
        "policy/clipped_fraction": 0.45, "objective/kl": 80.0, "objective/kl_coef": 0.07, "response/eos_rate": 0,
    }  # fmt: skip
    doctor = Doctor(eos_token=True)
    findings = {found.rule: found for record in trace(faults)[:3] for found in doctor.examine(record)}
    kl, clipped, eos = (findings.pop(rule) for rule in ("kl_exploding", "clip_fraction", "no_eos"))
    assert findings == {}
    assert "80 nats" in kl.message and "kl_coef (now 0.07)" in kl.advice
    assert "45%" in clipped.message and "actor_lr" in clipped.advice
    assert "3 updates" in eos.message and "max_new_tokens" in eos.advice
    assert str(eos) == f"{eos.message}. Try: {eos.advice}."
    doctor, ended_once = Doctor(eos_token=True), trace({"response/eos_rate": after(0.3, 0)})
    (eos,) = (found for record in ended_once[:24] for found in doctor.examine(record))
    assert "some did at first" in eos.message and "missing_eos_penalty" in eos.advice


def test_advice_to_a_run_without_a_critic_names_nothing_that_it_has_not():
    faults = {
        "objective/kl": 80.0, "policy/skipped_steps": 1, "policy/entropy": after(2.0, 0.3), "response/eos_rate": 0,
        "response/length_mean": after(20, 60), "policy/clipped_fraction": 0.5,
    }  # fmt: skip
    settings = {field.name for field in fields(GroupSettings)} | {field.name for field in fields(GroupObjective)}
    foreign = {field.name for field in fields(PPOSettings)} - settings
    doctor = Doctor(**GroupSettings().doctor_arguments())
    advice = [found.advice for record in trace(faults) for found in doctor.examine(record)]
    assert len(advice) >= 5
    assert not [name for name in foreign for text in advice if name in text]
    assert any("the objective's kl_coef" in text for text in advice)


@pytest.mark.parametrize(
    ("lengths", "correlation", "hacked"),
    [((20, 60), 0.6, True), ((20, 60), 0.4, False), ((60, 20), -0.6, True), ((60, 20), 0.6, False)],
)
def test_length_drift_is_worded_by_what_the_judge_pays_for(lengths, correlation, hacked):
    doctor = Doctor(eos_token=True)
    records = trace({"response/length_mean": after(*lengths), "score/length_corr": correlation})
    first = next(finding for record in records for finding in doctor.examine(record))
    assert first.rule == "length_drift"
    assert ("length hacking" in first.message) == hacked


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("start", [0, 17])
def test_missing_and_non_finite_metrics_are_no_finding_and_no_crash(value, start):
    for name in WATCHED:
        records = healthy()
        for record in records[start:]:
            del record[name]
            if value is not None:
                record[name] = value
        assert said(records) == []
    assert said([{}] * UPDATES) == [] == said([dict.fromkeys(WATCHED, math.nan)] * UPDATES)


def test_held_out_scores_of_some_updates_are_enough():
    changes = {"reward/score": sawtooth(0.25), "reward/held_out_score": lambda at: math.nan if at % 2 else -0.3 * at}
    found = said(trace(changes))
    assert found[0] == ("overoptimized", 19)  # the tenth pair


@pytest.mark.parametrize("cut", [1, 4, 11, 24])
def test_a_restored_doctor_goes_on_as_the_first_would(cut):
    records = trace({"policy/clipped_fraction": 0.5, "response/length_mean": after(20, 90), "response/eos_rate": 0})
    whole, first, second = (Doctor(eos_token=True) for _ in range(3))
    expected = [whole.examine(record) for record in records]
    assert [first.examine(record) for record in records[:cut]] == expected[:cut]
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    first.examine(records[0])  # what goes on elsewhere does not reach it
    assert [second.examine(record) for record in records[cut:]] == expected[cut:]
    assert second.state() == whole.state()


def test_memory_does_not_grow():
    doctor, sizes = Doctor(eos_token=True), []
    for record in trace({}) * 9:
        doctor.examine(record | {"perf/tokens_per_second": 1e3})
        sizes.append(len(json.dumps(doctor.state())))
    assert max(sizes[200:]) < 1.05 * max(sizes[20:60])


def test_what_is_watched_is_in_the_glossary():
    assert set(WATCHED) <= GLOSSARY.keys()
    assert set(WATCHED) == healthy()[0].keys()
