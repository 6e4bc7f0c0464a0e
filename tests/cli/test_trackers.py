"""`--log-with`, and what a run leaves for `plot` and `inspect`."""

import json

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training import trackers


@pytest.fixture
def models(tmp_path):
    """Files of a model, its judge, prompts and pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
        judge = RewardModel(palm)
        torch.nn.init.normal_(judge.head.weight)
    palm.save(tmp_path / "palm.pt")
    judge.save(tmp_path / "judge.pt")
    (tmp_path / "prompts.txt").write_text("The cat\nA\nWhere is\n", encoding="utf-8")
    pairs = [{"prompt": f"{row}", "chosen": "aa" * (1 + row % 3), "rejected": "g"} for row in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return tmp_path


def ppo(folder, *options):
    return main([
        "ppo", str(folder / "palm.pt"), "--reward-model", str(folder / "judge.pt"), "--prompts",
        str(folder / "prompts.txt"), "--run-dir", str(folder / "run"), "--episodes", "8", "--update-timesteps", "4",
        "--max-new-tokens", "5", "--no-preflight", "--device", "cpu", *options,
    ])  # fmt: skip


def test_a_run_is_tracked_plotted_and_inspected(models, capsys):
    pytest.importorskip("tensorboard")
    assert ppo(models, "--log-with", "tensorboard", "--project", "mine") == 0
    assert list((models / "run" / "trackers" / "mine").glob("events.*"))
    assert main(["plot", str(models / "run"), "--out", str(models / "run.html")]) == 0
    assert main(["inspect", str(models / "run")]) == 0
    printed = capsys.readouterr().out
    assert "RLHFTrainer, update 2;" in printed and len(printed.split("clipped\n", 1)[1].splitlines()) >= 1
    page = (models / "run.html").read_text(encoding="utf-8")
    assert "Explained variance" in page and "the best and the worst of update 2" in page


def test_each_member_of_an_ensemble_has_a_run_of_its_own(models):
    pytest.importorskip("tensorboard")
    command = ["reward", str(models / "pairs.jsonl"), "--palm", str(models / "palm.pt"), "--device", "cpu"]
    assert main([*command, "--out", str(models / "rm.pt"), "--members", "2", "--log-with", "tensorboard"]) == 0
    assert all(list((models / f"rm.{number}.trackers").glob("palm-rlhf/events.*")) for number in (0, 1))


@pytest.mark.parametrize(
    ("name", "message"), [("abacus", "is no tracker: choose from"), ("wandb", 'pip install "palm-rlhf-pytorch[wandb]"')]
)
def test_trackers_that_cannot_be_are_named_before_any_work(models, capsys, monkeypatch, name, message):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    assert ppo(models, "--log-with", name) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (models / "run").exists()
