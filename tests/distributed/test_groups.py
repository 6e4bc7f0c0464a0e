"""Group methods in two processes: whole groups on each, sampled again by both, and the bits of an undisturbed run."""

import pytest

from palm_rlhf_pytorch.objectives.group import DR_GRPO, GRPO, GSPO, RLOO
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.training.metrics import MetricsLog
from tests.distributed.ranks import in_ranks
from tests.distributed.runs import learnt, rank, run_and_resume, sampled, trained_run

GROUPS = {"kind": GRPOTrainer, "group_size": 5}


@pytest.fixture(scope="module")
def rollout(tmp_path_factory):
    """Responses whose every other one is answered to the same prompt, so that each process has whole groups."""
    [found] = in_ranks(tmp_path_factory.mktemp("sampled") / "run", sampled, ranks=1)
    found["prompt_rows"] = found["prompt_rows"] * 0 + (found["prompt_rows"].new_tensor(range(14)) % 2)
    return found


@pytest.mark.parametrize("objective", [GRPO, DR_GRPO, RLOO, GSPO], ids=["grpo", "dr_grpo", "rloo", "gspo"])
@pytest.mark.filterwarnings("ignore:minibatch_size")
def test_two_processes_learn_what_one_does(tmp_path, rollout, objective):
    options = {"rollout": rollout, "objective": objective, "actor_lora": False, **GROUPS}
    [one] = in_ranks(tmp_path / "one", learnt, ranks=1, **options)
    first, second = in_ranks(tmp_path / "two", learnt, ranks=2, **options)
    assert first["steps"] == second["steps"] and len(set(first["steps"])) == 6
    apart = [float((first["weights"][name] - weight).abs().max()) for name, weight in one["weights"].items()]
    assert max(apart) <= 1e-6
    assert first["metrics"] == second["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-7)


@pytest.mark.filterwarnings("ignore:minibatch_size")
def test_a_run_that_samples_again_goes_on_to_the_same_bits(tmp_path):
    """With a judge of one id many prompts get answers that all score alike: both processes sample several rounds."""
    options = {"max_rounds": 4, "num_episodes": 30, **GROUPS}
    alone = in_ranks(tmp_path / "alone", trained_run, run_dir=tmp_path / "left", **options)
    assert all(run["error"] is None and run["updates"] == 3 for run in alone)
    assert alone[0]["history"] == alone[1]["history"]
    files = [path for path in (tmp_path / "left" / "experience").iterdir() if path.suffix == ".rollouts"]
    rounds = {path.name.split("-")[0] for path in files}
    assert len(rounds) > 1, rounds
    for path in files:  # whole groups
        counts = RolloutFile(path).column("prompt_rows").unique(return_counts=True)[1]
        assert not (counts % 5).any()
    ranks = in_ranks(tmp_path / "stopped", run_and_resume, run_dir=tmp_path / "run", fault="sigterm", **options)
    for (ended, resumed), undisturbed in zip(ranks, alone, strict=True):
        assert ended["stopped"] == "SIGTERM"
        assert resumed["weights"] == undisturbed["weights"] != ended["weights"]


def refused_metrics(folder, *, run_dir):
    """A run whose main process cannot write metrics."""
    log = MetricsLog.log

    def refused(*given, **named):
        if rank() == 0:
            raise OSError("no space left")
        return log(*given, **named)

    MetricsLog.log = refused
    try:
        return trained_run(folder, run_dir=run_dir, num_episodes=20, **GROUPS)["error"]
    finally:
        MetricsLog.log = log


@pytest.mark.filterwarnings("ignore:minibatch_size")
def test_a_disk_that_refuses_metrics_ends_both_processes(tmp_path):
    first, second = in_ranks(tmp_path / "logs", refused_metrics, run_dir=tmp_path / "run")
    assert first == "OSError: no space left"
    assert second == "RuntimeError: another process stopped: rank 0: OSError: no space left"
