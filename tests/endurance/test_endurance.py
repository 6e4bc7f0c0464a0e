"""A little of what `python -m tests.endurance` does at length."""

import signal

import pytest

from tests.endurance.killing import ended_at_boundaries, killed_at_random

SHORT = {"num_episodes": 20}  # two updates: 20 checkpoints, at every place where a run can stand
# the first update's eight: sampled and judged, six minibatches in two epochs, done; the second has older rows too
SAMPLED, MINIBATCH, EPOCH, UPDATE, STALE_MINIBATCH = 1, 3, 4, 8, 12


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True], ids=["ppo", "grpo"])
def test_runs_killed_at_random_moments_end_with_the_bits_of_one_left_alone(tmp_path, grouped):
    report = killed_at_random(tmp_path / "run", kills=5, grouped=grouped, **SHORT)
    assert report["kills"] == 5 and report["differences"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "places"),
    [
        (signal.SIGKILL, (SAMPLED, MINIBATCH, EPOCH, UPDATE, STALE_MINIBATCH)),
        (signal.SIGTERM, (SAMPLED,)),
        (signal.SIGINT, (EPOCH,)),
    ],
)
def test_runs_ended_at_a_boundary_end_with_the_bits_of_one_left_alone(tmp_path, number, places):
    report = ended_at_boundaries(tmp_path / "run", number=number, places=places, **SHORT)
    assert report["places"] == len(places) and report["differences"] == []


@pytest.mark.slow
def test_two_processes_ended_at_a_boundary_end_with_the_bits_of_two_left_alone(tmp_path):
    report = ended_at_boundaries(tmp_path / "run", number=signal.SIGKILL, places=(MINIBATCH,), ranks=2, **SHORT)
    assert report["places"] == 1 and report["differences"] == []
