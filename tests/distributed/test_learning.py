"""Two processes learn what one would, and hold the same weights after every step; with whole weights and with shards."""

import pytest

from tests.distributed.ranks import in_ranks
from tests.distributed.runs import learnt, sampled

BASE = {"actor_lora": False, "critic_lora": False}
CASES = {
    "lora": {},
    "base": {**BASE, "max_norm": 0.05},
    "dropout": {"actor_dropout": 0.1, "critic_dropout": 0.2},
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
    [("lora", False), ("base", False), ("dropout", False), ("lora", True), ("last layer", True)],
)
def test_two_processes_learn_what_one_does(tmp_path, rollout, case, fsdp):
    options = {"rollout": rollout, **CASES[case]}
    [one] = in_ranks(tmp_path / "one", learnt, ranks=1, **options)
    first, second = in_ranks(tmp_path / "two", learnt, ranks=2, fsdp=fsdp, **options)

    assert len(first["steps"]) == 6 and len(set(first["steps"])) == 6
    assert first["steps"] == second["steps"]
    assert first["metrics"] == second["metrics"] and first["metrics"].keys() == one["metrics"].keys()
    assert first["metrics"]["reward/dropped"] == 1 and first["metrics"]["policy/skipped_steps"] == 0
    if case != "dropout":  # whose draws are each process's own
        apart = [float((first["weights"][name] - weight).abs().max()) for name, weight in one["weights"].items()]
        assert max(apart) <= 1e-6
        assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-7)

    for found in (one, first, second):  # 6 steps of so many microbatches, one forward and one backward pass each
        assert found["calls"]["forward"] == found["calls"]["backward"] and found["calls"]["forward"] % 6 == 0
    unequal = first["calls"]["forward"] != second["calls"]["forward"]
    assert unequal is not fsdp  # shards are gathered for every pass: there must be as many on each process
    assert first["held"] + second["held"] == pytest.approx(1.0 if fsdp else 2.0)


def test_steps_differ_where_gradients_are_not_shared(tmp_path, rollout):
    """The comparison above can fail: processes that learn each for itself part at the first step."""
    first, second = in_ranks(tmp_path / "apart", learnt, ranks=2, alone=True, rollout=rollout)
    assert all(a != b for a, b in zip(first["steps"], second["steps"], strict=True))
