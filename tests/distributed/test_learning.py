"""Two processes learn what one would, and hold the same weights after every step, whole weights or shards."""

import pytest

from tests.distributed.ranks import in_ranks
from tests.distributed.runs import learnt, sampled

BASE = {"actor_lora": False, "critic_lora": False}
CASES = {
    "lora": {},
    "base": {**BASE, "max_norm": 0.05},
    # four rows a step of both: the second process has no more for the last step of an epoch
    "dropout": {"actor_dropout": 0.1, "critic_dropout": 0.2, "minibatch_size": 4, "epochs": 2},
    "last layer": {**BASE, "actor_last_layers": 1, "critic_last_layers": 1, "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """Responses of unequal lengths, one without a score, which falls to the second process."""
    [found] = in_ranks(tmp_path_factory.mktemp("sampled") / "run", sampled, ranks=1)
    return found


@pytest.mark.filterwarnings("ignore:actor_dropout")
@pytest.mark.parametrize(
    ("case", "fsdp"),
    [("lora", False), ("base", False), ("dropout", False), ("dropout", True), ("lora", True), ("last layer", True)],
)
def test_two_processes_learn_what_one_does(tmp_path, rollout, case, fsdp):
    options = {"rollout": rollout, **CASES[case]}
    [one] = in_ranks(tmp_path / "one", learnt, ranks=1, **options)
    first, second = in_ranks(tmp_path / "two", learnt, ranks=2, fsdp=fsdp, **options)

    assert len(set(first["steps"])) == len(first["steps"]) == (8 if case == "dropout" else 6)
    assert first["steps"] == second["steps"]
    assert first["metrics"] == second["metrics"] and first["metrics"].keys() == one["metrics"].keys()
    assert first["metrics"]["reward/dropped"] == 1 and first["metrics"]["policy/skipped_steps"] == 0
    if case != "dropout":  # whose draws are each process's own
        apart = [float((first["weights"][name] - weight).abs().max()) for name, weight in one["weights"].items()]
        assert max(apart) <= 1e-6
        assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-7)

    for found in (one, first, second):  # of each microbatch
        assert found["calls"]["forward"] == found["calls"]["backward"] >= len(found["steps"])
    if fsdp:  # shards are gathered for every pass: each process must take as many
        assert first["calls"] == second["calls"]
    elif case != "dropout":
        assert first["calls"] != second["calls"]
    assert first["held"] + second["held"] == pytest.approx(1.0 if fsdp else 2.0)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_step_that_is_not_finite_on_one_process_is_left_out_by_both(tmp_path, rollout, fsdp):
    options = {"rollout": rollout, "broken": True, "max_batch_tokens": 400, "epochs": 3}
    first, second = in_ranks(tmp_path / "two", learnt, fsdp=fsdp, **options)
    assert first["steps"] == second["steps"]
    assert first["steps"][0] == first["steps"][1] != first["steps"][2]
    assert first["metrics"]["policy/skipped_steps"] == second["metrics"]["policy/skipped_steps"] == 1


def test_steps_differ_where_gradients_are_not_shared(tmp_path, rollout):
    """The comparison above can fail: processes that learn each for itself part at the first step."""
    first, second = in_ranks(tmp_path / "apart", learnt, ranks=2, alone=True, rollout=rollout)
    assert all(a != b for a, b in zip(first["steps"], second["steps"], strict=True))
