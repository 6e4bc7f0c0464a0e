"""`palm-rlhf ppo`, `check` and `plan` on tiny models."""

import signal

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics


@pytest.fixture
def models(tmp_path):
    """Files of a model, its judge and three prompts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
        judge = RewardModel(palm)
    palm.save(tmp_path / "palm.pt")
    judge.save(tmp_path / "judge.pt")
    (tmp_path / "prompts.txt").write_text("The cat\nA\nWhere is\n", encoding="utf-8")
    return tmp_path


def arguments(folder, *options, run="run"):
    """The command line of a run of three updates: of 4, 4 and 2 responses."""
    return [
        str(folder / "palm.pt"), "--reward-model", str(folder / "judge.pt"), "--prompts", str(folder / "prompts.txt"),
        "--run-dir", str(folder / run), "--episodes", "10", "--update-timesteps", "4", "--max-new-tokens", "5",
        "--max-seq-len", "30", "--epochs", "2", "--minibatch-size", "3", "--actor-lr", "0.01", "--seed", "5",
        "--device", "cpu", *options,
    ]  # fmt: skip


def without_times(path):
    return [{name: value for name, value in line.items() if "perf/" not in name} for line in read_metrics(path)]


@pytest.fixture
def stop_after_first_update(monkeypatch):
    """The process is asked to stop while the first update is logged."""
    log = MetricsLog.log

    def stopping(self, metrics, step):
        log(self, metrics, step)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "log", stopping)


def test_ppo_trains_saves_and_tells_what_changed(models, capsys):
    before = (models / "palm.pt").read_bytes()
    assert main(["ppo", *arguments(models)]) == 0
    records = read_metrics(models / "run" / "metrics.jsonl")
    assert [record["episodes"] for record in records] == [4, 8, 10]
    printed = capsys.readouterr().out
    for name in ("reward/score", "objective/kl", "response/length_mean"):
        assert f"{records[0][name]:>9.3f}{records[-1][name]:>9.3f}" in printed
    improved, palm = PaLM.from_checkpoint(models / "run" / "improved_palm.pt"), PaLM.from_checkpoint(models / "palm.pt")
    assert improved.config == palm.config and str(models / "run" / "improved_palm.pt") in printed
    assert any(not torch.equal(a, b) for a, b in zip(palm.parameters(), improved.parameters(), strict=True))
    assert (models / "palm.pt").read_bytes() == before
    assert main(["generate", str(models / "run" / "improved_palm.pt"), "A", "--max-new-tokens", "3"]) == 0


def test_a_folder_that_holds_a_run_is_refused_without_resume(models, capsys):
    assert main(["ppo", *arguments(models, "--no-preflight")]) == 0
    before = (models / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["ppo", *arguments(models, "--no-preflight")]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and str(models / "run") in error and error.count("\n") == 1
    assert main(["ppo", *arguments(models, "--no-preflight", "--resume")]) == 0  # nothing is left to do
    assert (models / "run" / "metrics.jsonl").read_bytes() == before


def test_a_stopped_run_goes_on_to_the_end_of_one_that_never_stopped(
    models, capsys, stop_after_first_update, monkeypatch
):
    assert main(["ppo", *arguments(models, "--no-preflight")]) == 0
    assert "SIGTERM" in (printed := capsys.readouterr().out) and "--resume" in printed
    assert len(read_metrics(models / "run" / "metrics.jsonl")) == 1
    assert not (models / "run" / "improved_palm.pt").exists()
    monkeypatch.undo()
    kept = (models / "run" / "config.yaml").read_bytes()
    assert main(["ppo", *arguments(models, "--no-preflight", "--resume", "--seed", "9")]) == 2
    assert "seed (9) is not the run's" in capsys.readouterr().err
    assert (models / "run" / "config.yaml").read_bytes() == kept
    assert main(["ppo", *arguments(models, "--no-preflight", "--resume")]) == 0
    assert main(["ppo", *arguments(models, "--no-preflight", "--resume", run="whole")]) == 0  # begins: nothing is there
    assert without_times(models / "run" / "metrics.jsonl") == without_times(models / "whole" / "metrics.jsonl")
    resumed, whole = (PaLM.from_checkpoint(models / run / "improved_palm.pt") for run in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_check_says_what_fails_and_ppo_then_does_not_begin(models, capsys):
    assert main(["check", *arguments(models)]) == 0
    passed = capsys.readouterr().out
    assert "fail" not in passed.split("\n", 1)[1] and len(passed.splitlines()) > 12
    assert main(["check", *arguments(models, "--max-seq-len", "7")]) == 1
    assert "max_seq_len is 7" in capsys.readouterr().out
    judge = RewardModel.from_checkpoint(models / "judge.pt")
    torch.nn.init.constant_(judge.head.bias, torch.nan)
    judge.save(models / "judge.pt")
    assert main(["check", *arguments(models)]) == 1
    assert "judge's scores" in capsys.readouterr().out.split("\n\n", 1)[1]  # among the remedies
    assert not (models / "run").exists()
    assert main(["ppo", *arguments(models)]) == 2
    assert not (models / "run" / "metrics.jsonl").exists()
    assert main(["ppo", *arguments(models, "--no-preflight")]) == 2  # no score is finite


def test_plan_tells_each_phase_and_writes_nothing(models, capsys):
    before = sorted(models.iterdir())
    assert main(["plan", *arguments(models)]) == 0
    printed = capsys.readouterr().out
    assert all(phase in printed for phase in ("models", "generate", "observe", "score", "learn"))
    assert sorted(models.iterdir()) == before


FILES = [
    ("none.txt", ["--prompts", "none.txt"]),
    ("RewardModel", ["--reward-model", "PALM"]),
    ("actor_lora_r (0)", ["--lora-r", "0"]),
    ("--device abacus", ["--device", "abacus"]),
]
SAMPLING = [("temperature (0.0)", ["--temperature", "0"]), ("max_seq_len (7)", ["--max-seq-len", "7"])]


@pytest.mark.parametrize(
    ("command", "message", "options"),
    [(command, *case) for command in ("ppo", "plan") for case in [*FILES, *SAMPLING]]
    + [("check", *case) for case in FILES],  # what is wrong with the sampling stands in its table
)
def test_mistakes_are_one_line(command, message, options, models, capsys):
    options = [str(models / "palm.pt") if option == "PALM" else option for option in options]
    assert main([command, *arguments(models, *options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"palm-rlhf {command}: error: ") and error.count("\n") == 1
    assert message in error


def test_another_vocabulary_is_refused(models, capsys):
    PaLM(num_tokens=31, dim=8, depth=1, heads=1, dim_head=4).save(models / "palm.pt")
    assert main(["ppo", *arguments(models)]) == 2
    assert "num_tokens=31" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ppo", "check", "plan"])
def test_help_names_the_options_of_a_run(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(option in printed for option in ("PALM", "--reward-model", "--prompts", "--run-dir", "--kl-coef"))
    assert ("--resume" in printed) == (command == "ppo")
