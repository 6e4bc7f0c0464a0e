"""The watch, on runs that turn at a known update, on runs that do not, and the frontier of a run worked by hand."""

import json
import math

import numpy as np
import pytest

from palm_rlhf_pytorch.policy.watch import Watch, WatchSettings, frontier, frontier_table, nearest_step
from palm_rlhf_pytorch.training.metrics import GLOSSARY

NAN = float("nan")
NAMES = {
    "score": "reward/score",
    "held_out": "reward/held_out_score",
    "kl": "objective/kl",
    "length": "response/length_mean",
    "corr": "score/length_corr",
    "distinct": "rollout/distinct_2",
}


def learnt(at):
    return 1 - math.exp(-at / 30)


def trace(updates, *, seed=0, noise=0.2, memory=0.0, **curves):
    """Metrics of a run, each a function of the update under noise that lasts: a share `memory` of it goes on."""
    assert set(NAMES.values()) <= GLOSSARY.keys()
    draws = np.random.default_rng(seed).standard_normal((updates, len(curves)))
    for at in range(1, updates):
        draws[at] = memory * draws[at - 1] + math.sqrt(1 - memory**2) * draws[at]
    scale = {"score": noise, "held_out": noise}
    return [
        {
            NAMES[name]: curve(at) + scale.get(name, 0.0) * draws[at, place]
            for place, (name, curve) in enumerate(curves.items())
        }
        for at in range(updates)
    ]


def first_verdict(records, watch=None):
    watch = watch or Watch()
    found = ((step, watch.examine(record, step)) for step, record in enumerate(records, start=1))
    return next(((step, verdict) for step, verdict in found if verdict is not None), (None, None))


HACKED = {"score": lambda at: 2 * learnt(at) + at / 100, "held_out": lambda at: learnt(at) - max(0, at - 80) * 0.03}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_whose_held_out_score_turns_is_stopped_and_sent_back(seed):
    step, verdict = first_verdict(trace(300, seed=seed, **HACKED))
    assert 85 < step < 220 and verdict.stop
    assert 40 < verdict.best_step < 105  # around 80, where the policy was best
    assert "held-out" in verdict.reason and "rose" in verdict.reason


@pytest.mark.parametrize("memory", [0.0, 0.4])
@pytest.mark.parametrize(
    "curves",
    [
        {"score": lambda at: 2 * learnt(at), "held_out": learnt},  # a healthy run
        {"score": lambda at: at / 50, "held_out": lambda at: 0.0},  # learns nothing that counts, but spoils nothing
        {"score": lambda at: -at / 50, "held_out": lambda at: -at / 50},  # both fall: no judge is fooled
        {"score": lambda at: 0.0, "held_out": lambda at: 0.0},
        {"score": lambda at: 2 * learnt(at), "kl": lambda at: 49 * learnt(at), "corr": lambda at: 0.3,
         "length": lambda at: 20 + 15 * learnt(at), "distinct": lambda at: 0.6 - 0.2 * learnt(at)},
    ],
)  # fmt: skip
def test_runs_without_the_fault_go_on(curves, memory):
    for seed in range(4):
        assert first_verdict(trace(300, seed=seed, memory=memory, **curves)) == (None, None)


def test_the_rule_by_hand():
    """Windows of one update: a straight rise, then a fall; patience 3."""
    held_out = [1, 2, 3, 4, 5, 6, 7, 6.5, 5.5, 4.5, 3.5, 2.5]
    records = [{"reward/score": 1.0 * at, "reward/held_out_score": float(held_out[at])} for at in range(12)]
    settings = WatchSettings(window=1, patience=3, noise=0.0)
    # highest at update 7, of the policy of 6 updates. At update 8 the bend is all the noise there is: pairs of updates
    # have the means 1.5, 3.5, 5.5, 6.75, so that a value has the variance 2 * 0.75^2 / (6 * 2) = 0.306^2, and the
    # highest of 8 stands out by sqrt(2 log 8) * 0.306 = 0.62: a fall of 0.5 is none yet, those of 9, 10, 11 are
    watch = Watch(settings)
    assert watch.best_step is None
    step, verdict = first_verdict(records, watch)
    assert step == 11 and verdict.best_step == watch.best_step == 6
    flat = [record | {"reward/score": 1.0} for record in records]  # the score learnt from does not rise
    assert first_verdict(flat, Watch(settings)) == (None, None)
    recovers = [*records[:10], records[6] | {"reward/score": 20.0}, *records[10:12]]  # two falls, level, two falls
    assert first_verdict(recovers, Watch(settings)) == (None, None)


def test_nothing_is_decided_before_four_windows_tell_the_noise():
    records = [{"reward/score": float(at), "reward/held_out_score": -float(at)} for at in range(30)]
    step, verdict = first_verdict(records)  # windows and patience of 5: of updates 20 to 24, against 1 to 5
    assert step == 24 and verdict.best_step == 2


SIGNS = {
    "kl": ({"kl": lambda at: at}, 50, "KL to the reference"),
    "length": ({"length": lambda at: 20 + at / 2, "corr": lambda at: 0.6}, 44, "the judge pays"),
    "distinct": ({"distinct": lambda at: 0.6 - at / 250}, 76, "became alike"),
}


@pytest.mark.parametrize("sign", SIGNS)
def test_without_a_held_out_judge_a_sign_stops_a_run_whose_score_rises(sign):
    curves, turned, reason = SIGNS[sign]
    step, verdict = first_verdict(trace(150, score=lambda at: at / 30, **curves))
    assert turned < step <= turned + 12 and reason in verdict.reason
    assert abs(verdict.best_step - turned) <= 6
    assert first_verdict(trace(150, score=lambda at: 1.0, **curves)) == (None, None)
    judged = trace(150, score=lambda at: at / 30, held_out=lambda at: at / 60, **curves)  # a judge says all is well
    assert first_verdict(judged) == (None, None)


def test_length_that_the_judge_does_not_pay_for_is_no_sign():
    longer = trace(150, score=lambda at: at / 30, length=lambda at: 20 + at, corr=lambda at: 0.2)
    shorter = trace(150, score=lambda at: at / 30, length=lambda at: max(5, 40 - at), corr=lambda at: 0.6)
    paid_for = trace(150, score=lambda at: at / 30, length=lambda at: max(5, 40 - at), corr=lambda at: -0.6)
    assert [first_verdict(records)[0] is None for records in (longer, shorter, paid_for)] == [True, True, False]


def test_what_it_remembers_is_json_and_all_it_needs():
    records = trace(220, seed=1, **HACKED)
    records[30]["reward/held_out_score"] = NAN
    del records[31]["reward/held_out_score"]
    expected = first_verdict(records)
    for cut in (3, 31, 57, expected[0] - 1):
        before, after = Watch(), Watch()
        for step in range(1, cut + 1):
            before.examine(records[step - 1], step)
        state = json.loads(json.dumps(before.state(), allow_nan=False))
        after.restore(state)
        assert after.state() == before.state() == state
        found = next(
            (step, verdict) for step in range(cut + 1, 221) if (verdict := after.examine(records[step - 1], step))
        )
        assert found == expected
    assert len(json.dumps(before.state())) < 4000  # however long the run


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"patience": 0}, "patience"), ({"window": 0}, "window"), ({"noise": NAN}, "noise"), ({"max_kl": 0}, "max_kl"),
     ({"min_distinct": 1.0}, "min_distinct"), ({"max_length_factor": 1.0}, "max_length_factor"),
     ({"length_corr": 0.0}, "length_corr")],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WatchSettings(**settings)


def test_nearest_checkpoint():
    assert nearest_step(40, [10, 35, 45, 60]) == 35
    assert nearest_step(40, [60, 41, 10]) == 41
    assert nearest_step(40, []) is None


def test_frontier_by_hand():
    rows = [(1, 0.1, 0.0, 0.5), (2, 1.0, 1.0, 0.9), (3, 0.8, 2.0, 0.8), (4, 3.0, 1.5, 0.7), (5, 3.0, 2.5, 0.2),
            (6, NAN, 9.0, 9.0), (7, 2.0, 2.0, NAN), (8, 4.0, 2.5, 0.1)]  # fmt: skip
    records = [
        {"step": step, "objective/kl": kl, "reward/score": score, "reward/held_out_score": held_out}
        for step, kl, score, held_out in rows
    ]
    found = frontier(records)
    assert [tuple(point) for point in found] == [(1, 0.1, 0.0, 0.5), (3, 0.8, 2.0, 0.8), (5, 3.0, 2.5, 0.2)]
    means = frontier(records[:5], window=2)  # of updates 1 and 2, 2 and 3, ...
    assert [(point.step, point.kl, point.score) for point in means] == [
        (2, pytest.approx(0.55), 0.5), (3, 0.9, 1.5), (4, 1.9, 1.75), (5, 3.0, 2.0)
    ]  # fmt: skip
    table = frontier_table([*found, *frontier([{"step": 9, "objective/kl": 1.0, "reward/score": 2.0}])])
    assert len(table.splitlines()) == 5 and table.splitlines()[-1].split() == ["9", "1", "2", "-"]
    assert frontier([]) == []
    with pytest.raises(ValueError, match=r"window \(0\)"):
        frontier(records, window=0)
