"""Whole runs of two processes: alike each time, told and written by one, and ended by both where one has an error."""

import json
import shutil

import pytest

from palm_rlhf_pytorch.policy.inspection import find_rollouts, read_rollouts
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint
from tests.distributed.ranks import in_ranks
from tests.distributed.runs import run_and_resume, run_twice, trained_run

KIND = "RLHFTrainer"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes, twice: what both processes say of it, and its folder."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return in_ranks(folder, run_twice, run_dir=folder), folder


def test_a_run_is_reproducible_and_its_processes_agree(undisturbed):
    (first, second), _ = undisturbed
    runs = first[0] + second[0]
    assert all(run["error"] is None and run["steps"] == 12 for run in runs)
    assert len({run["weights"] for run in runs}) == 1
    assert all(run["history"] == runs[0]["history"] and len(run["history"]) == 3 for run in runs)
    assert len({line["policy/loss"] for line in runs[0]["history"]}) == 3


def test_rollouts_are_kept_of_both_processes(undisturbed):
    _, folder = undisturbed
    update = read_rollouts(find_rollouts(f"{folder}-0"))
    files = [RolloutFile(f"{folder}-0/experience/update-00000002.rank-{rank}.rollouts") for rank in range(2)]
    scores = sorted(score for file in files for score in file.scores.tolist())
    kept = [[row.score for row in update.rows if row.best == best] for best in (True, False)]
    assert update.step == 3 and kept == [scores[: -len(kept[0]) - 1 : -1], scores[: len(kept[1])]]


def test_processes_answer_the_same_prompt_differently(undisturbed):
    (first, second), folder = undisturbed
    assert first[1] != second[1]
    files = [RolloutFile(f"{folder}-0/experience/update-00000001.rank-{rank}.rollouts") for rank in range(2)]
    assert [len(file) for file in files] == [5, 5]
    prompts = [set(file.column("prompt_rows").tolist()) for file in files]
    assert prompts[0] | prompts[1] == set(range(5))


def test_the_main_process_alone_prints_and_writes(undisturbed):
    _, folder = undisturbed
    said = [(folder.parent / f"run.rank-{rank}.log").read_text() for rank in range(2)]
    for text in ("preflight: ", "ppo: 100%"):
        assert text in said[0] and text not in said[1]
    assert "Traceback" not in said[0] + said[1]
    lines = [json.loads(line) for line in (folder.parent / "run-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_a_checkpoint_holds_the_experience_of_both(undisturbed):
    _, folder = undisturbed
    checkpoints = Checkpoints(f"{folder}-0/checkpoints")
    assert checkpoints.steps() == list(range(1, 13))  # one after sampling, two within learning, one after the update
    held = load_checkpoint(f"{folder}-0/checkpoints/step-00000006", kind=KIND)
    names = [f"update-00000001.rank-{rank}.rollouts" for rank in range(2)]
    assert sorted(held.files) == sorted([*names, *(f"{name}.scores" for name in names)])
    assert held.values["processes"] == 2 and len(held.values["random"]) == 2


def test_one_process_goes_on_where_two_stopped_and_says_so(undisturbed, tmp_path):
    (first, _), folder = undisturbed
    shutil.copytree(f"{folder}-0", tmp_path / "run")
    for step in range(7, 13):  # back into the middle of the second update
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    [one] = in_ranks(tmp_path / "one", trained_run, ranks=1, run_dir=tmp_path / "run", resume="auto")
    assert one["error"] is None and one["updates"] == 3
    assert any("written by 2 processes, this run has 1" in text for text in one["warned"])
    assert one["weights"] != first[0][0]["weights"]  # not the same bits, as it says


@pytest.mark.parametrize(
    ("fault", "own", "others"),
    [
        ("raises", "OSError: the judge's server is gone", "RuntimeError: another process stopped: rank 1: OSError"),
        ("hangs", "TimeoutError: the judge took longer", "RuntimeError: another process stopped: rank 1: TimeoutError"),
        ("disk", "OSError: no space left", "RuntimeError: another process stopped: rank 1: OSError"),
        ("nan", "ValueError: 5 of 10 scores in update 2", "ValueError: 5 of 10 scores in update 2"),
        ("sigterm", None, None),
    ],
)
def test_both_stop_where_one_has_to_and_the_run_goes_on(undisturbed, tmp_path, fault, own, others):
    (alone, _), folder = undisturbed
    run = tmp_path / "run"
    ranks = in_ranks(tmp_path / "ranks", run_and_resume, run_dir=run, fault=fault)
    for (ended, resumed), error in zip(ranks, (others, own), strict=True):
        assert (ended["error"] is None) == (error is None) and (ended["error"] or "").startswith(error or "")
        assert ended["updates"] == 1 and ended["stopped"] == (None if error else "SIGTERM")
        assert resumed["weights"] == alone[0][0]["weights"] and resumed["error"] is None
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (run, folder.parent / "run-0")]
    assert [_without_time(line) for line in lines[0]] == [_without_time(line) for line in lines[1]]


def _without_time(line):
    return {name: value for name, value in json.loads(line).items() if not name.startswith("perf/")}
