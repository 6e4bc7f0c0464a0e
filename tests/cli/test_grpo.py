"""`palm-rlhf grpo`, and the options it shares with `ppo`, on tiny models."""

import json

import pytest
import torch

from palm_rlhf_pytorch.cli.grpo import OBJECTIVES
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.metrics import read_metrics


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of a model, two judges, prompts and a text."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
        for name in ("judge", "other"):
            RewardModel(palm).save(folder / f"{name}.pt")
    palm.save(folder / "palm.pt")
    (folder / "prompts.txt").write_text("The cat\nA\nWhere is\n", encoding="utf-8")
    (folder / "book.txt").write_text("A cat is where the cat was. " * 9, encoding="utf-8")
    return folder


def run(command, folder, run_dir, *options):
    return main([
        command, str(folder / "palm.pt"), "--reward-model", str(folder / "judge.pt"), "--prompts",
        str(folder / "prompts.txt"), "--run-dir", str(run_dir), "--episodes", "16", "--update-timesteps", "8",
        "--max-new-tokens", "5", "--max-seq-len", "30", "--minibatch-size", "4", "--actor-lr", "0.01",
        "--device", "cpu", *options,
    ])  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grpo_trains_saves_and_tells_what_changed(models, tmp_path, capsys, objective):
    options = ["--objective", objective, "--group-size", "4", "--max-rounds", "2", "--overlong-buffer", "2"]
    assert run("grpo", models, tmp_path / "run", *options, "--kl-loss-coef", "0.01") == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["episodes"] for line in lines] == [8, 16]
    assert all(line["policy/kl_loss"] >= 0 for line in lines)
    printed = capsys.readouterr().out
    assert "improved_palm.pt" in printed and "reward-model score" in printed
    PaLM.from_checkpoint(tmp_path / "run" / "improved_palm.pt")
    assert run("grpo", models, tmp_path / "run", *options) == 2
    assert "--resume" in capsys.readouterr().err
    assert run("grpo", models, tmp_path / "run", *options, "--kl-loss-coef", "0.01", "--resume") == 0


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_shared_options_reach_the_run(models, tmp_path, command):
    options = ["--held-out-judge", str(models / "other.pt"), "--watch", "--max-approx-kl", "0.5"]
    options += ["--pretraining", str(models / "book.txt"), "--ptx-coef", "0.5", "--no-preflight"]
    options += ["--group-size", "2"] if command == "grpo" else ["--critic-warmup", "1"]
    assert run(command, models, tmp_path / "run", *options) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for name in ("reward/held_out_score", "policy/ptx_loss", "policy/ended_early"):
        assert all(name in line for line in lines)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} <= {"The cat", "A", "Where is"}
    assert all(isinstance(sample["held_out_score"], float) for sample in samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", "3"], "multiples of group_size (3)"),
        (["--group-size", "1"], "group_size (1)"),
        (["--ptx-coef", "0.5"], "pretraining is None"),
        (["--top-p", "1.5"], "top_p (1.5)"),
        (["--kl-coef", "-1"], "kl_coef (-1.0)"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, options, message):
    assert run("grpo", models, tmp_path / "run", *options) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith("palm-rlhf grpo: error: ")
