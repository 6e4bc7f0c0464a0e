"""One seed of `tests.learning.bandits` and `tests.learning.tasks`, shorter than the script's."""

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, GradientState

from palm_rlhf_pytorch.objectives import group
from palm_rlhf_pytorch.objectives.policy_gradient import kl_k2
from tests.learning import bandits, tasks
from tests.learning.__main__ import main

pytestmark = pytest.mark.learning


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(("name", "others"), [("PPO, beta .5", (1.5, 1.0)), ("RLOO, beta 1", (2.0, 1.5))])
def test_a_kl_in_the_reward_leads_to_the_known_optimum_and_to_no_other(name, others):
    found = bandits.run(bandits.CASES[name], 0, num_updates=50)
    assert found.outcome.distance_before > 0.2
    assert found.outcome.distance_after < 0.01
    assert min(found.distance_to(tilt) for tilt in others) > 0.1


@pytest.mark.parametrize("kind", ["ratio * k3", "exact KL"])
def test_a_kl_in_the_loss_leads_to_the_optimum_of_the_groups_size(kind):
    """Groups of four: three quarters of the score. Longer runs end up to .02 from it, see `bandits`."""
    found = bandits.run(bandits.CASES[f"Dr. GRPO, {kind} in the loss, beta 1"], 0, num_updates=50)
    assert found.outcome.distance_before > 0.14
    assert found.outcome.distance_after < 0.03
    assert found.distance_to(1.0) > 0.06


def test_another_estimator_in_the_loss_misses_the_optimum(monkeypatch):
    monkeypatch.setattr(group, "kl_k3", kl_k2)
    found = bandits.run(bandits.CASES["Dr. GRPO, ratio * k3 in the loss, beta 1"], 0, num_updates=50)
    assert found.outcome.distance_after > 0.06


def test_the_groups_deviation_in_the_advantage_misses_the_optimum():
    case = bandits.Case(bandits.groups(group.GroupObjective(kl_loss_coef=1.0)), 0.75)
    assert bandits.run(case, 0, num_updates=50).outcome.distance_after > 0.06


def test_grpo_finds_the_best_response():
    found = bandits.run(bandits.CASES["GRPO, best response"], 0, num_updates=25)
    assert found.outcome.distance_before > 0.95
    assert found.outcome.distance_after < 0.02


@pytest.mark.parametrize("method", tasks.METHODS)
def test_sorting_is_learnt(method):
    found = tasks.run("sort", method, 0, num_updates=16)
    assert found.score_before < 0.25
    assert found.score_after > found.score_before + 0.08


@pytest.mark.parametrize("method", ["PPO", "GSPO"])
def test_sentiment_rises_by_a_judge_that_was_not_learnt_from(method):
    found = tasks.run("sentiment", method, 0, num_updates=10)
    assert found.score_after > found.score_before + 0.3


@pytest.mark.parametrize("method", ["DAPO", "RLOO"])
def test_sums_that_were_not_learnt_come_out_right_more_often(method):
    found = tasks.run("arithmetic", method, 0, num_updates=20)
    assert found.score_after > found.score_before + 0.1


def test_the_script_writes_a_table_of_each_seed(tmp_path, capsys):
    table, figures = tmp_path / "table.md", tmp_path / "figures.json"
    assert main(["--only", "texts: ipo", "--seeds", "1", "--write", str(table), "--json", str(figures)]) == 0
    assert table.read_text().count("| texts: ipo | 0 |") == 1
    assert '"learnt": true' in figures.read_text()
    with pytest.raises(SystemExit):
        main(["--only", "nothing like it"])
    assert "there are bandit: PPO, beta .5, " in capsys.readouterr().err
