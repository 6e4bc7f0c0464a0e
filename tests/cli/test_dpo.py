"""`palm-rlhf dpo` on a tiny model."""

import json
import signal

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.direct_records import pairs_of
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics


@pytest.fixture
def files(tmp_path):
    """A model, pairs on twelve prompts in two files, and votes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
    palm.save(tmp_path / "palm.pt")
    pairs = [
        {"prompt": f"Say {row}: ", "chosen": "a" * (2 + row % 3), "rejected": "z" * (3 - row % 2)} for row in range(12)
    ]
    for name, part in (("one.jsonl", pairs[:7]), ("two.jsonl", pairs[7:])):
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in part), encoding="utf-8")
    return tmp_path


def arguments(folder, *options, run="run"):
    """The command line of a run of six steps, or so."""
    return [
        "dpo", str(folder / "palm.pt"), "--data", str(folder / "one.jsonl"), str(folder / "two.jsonl"), "--run-dir",
        str(folder / run), "--epochs", "2", "--minibatch-size", "4", "--lr", "0.05", "--held-out", "0.3",
        "--device", "cpu", *options,
    ]  # fmt: skip


def test_dpo_trains_saves_and_tells_what_changed(files, capsys):
    assert main(arguments(files)) == 0
    printed = capsys.readouterr().out
    assert "12 rows: 12 pairs, 0 bad" in printed and "0.500    1.000" in printed  # accuracy, before and after
    records = read_metrics(files / "run" / "metrics.jsonl")
    assert f"{0.6931:>9.3f}{records[-1]['eval/loss']:>9.3f}" in printed
    improved, palm = PaLM.from_checkpoint(files / "run" / "improved_palm.pt"), PaLM.from_checkpoint(files / "palm.pt")
    assert any(not torch.equal(a, b) for a, b in zip(palm.parameters(), improved.parameters(), strict=True))
    assert main(arguments(files)) == 2
    assert "--resume" in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert main(arguments(files, "--resume")) == 0  # nothing is left to do
    assert read_metrics(files / "run" / "metrics.jsonl") == records


@pytest.mark.parametrize(
    "loss",
    [
        ["cdpo", "--flip-rate", "0.2"], ["robust"], ["ipo", "--beta", "0.3"], ["hinge"], ["length-normalised"],
        ["simpo", "--gamma", "0.5", "--nll", "0.1"], ["kto"],
    ],
    ids=lambda loss: loss[0],
)  # fmt: skip
def test_each_loss_learns_the_pairs(loss, files, capsys):
    assert main(arguments(files, "--no-preflight", "--loss", *loss)) == 0
    accuracy = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("accuracy"))
    assert float(accuracy.split()[-1]) > 0.9


def test_a_stopped_run_goes_on_to_the_end_of_one_that_never_stopped(files, capsys, monkeypatch):
    log = MetricsLog.log

    def stopping(self, metrics, step):
        log(self, metrics, step)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "log", stopping)
        assert main(arguments(files)) == 0
    assert "stopped by SIGTERM" in (printed := capsys.readouterr().out) and "--resume" in printed
    assert not (files / "run" / "improved_palm.pt").exists()
    assert main(arguments(files, "--resume")) == 0
    assert main(arguments(files, run="whole")) == 0
    resumed, whole = (PaLM.from_checkpoint(files / run / "improved_palm.pt") for run in ("run", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    reference = (files / "run" / "reference.safetensors").read_bytes()
    for options, message in ((["--seed", "1"], "another run"), (["--epochs", "0"], "num_epochs (0)")):
        assert main(arguments(files, "--resume", *options)) == 2
        assert message in capsys.readouterr().err
    assert (files / "run" / "reference.safetensors").read_bytes() == reference  # of other data it would have been lost


def test_bad_records_stop_or_are_left_out_and_counted(files, capsys):
    with (files / "two.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": 3, "rejected": "x"}\n')
    assert main(arguments(files)) == 2
    assert "two.jsonl, line 6" in (error := capsys.readouterr().err) and "--on-bad-record skip" in error
    assert main(arguments(files, "--on-bad-record", "skip")) == 0
    assert "13 rows: 12 pairs, 1 bad" in capsys.readouterr().out


def test_columns_of_other_names_are_read(files, capsys):
    for name in ("one.jsonl", "two.jsonl"):
        text = (files / name).read_text()
        (files / name).write_text(text.replace('"prompt"', '"question"').replace('"chosen"', '"better"'))
    named = ["--column", "question=prompt", "--column", "better=chosen"]
    assert main(arguments(files, "--no-preflight", *named)) == 0
    assert "columns not read" not in (printed := capsys.readouterr().out) and "without a prompt" not in printed


def test_a_fault_is_told_before_the_first_step(files, capsys):
    same = [{"prompt": f"Say {row}: ", "chosen": "a", "rejected": "a"} for row in range(12)]
    (files / "one.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in same))
    (files / "two.jsonl").write_text(json.dumps(same[0] | {"prompt": "Say what: "}) + "\n")
    assert main(arguments(files)) == 2
    assert "pairs differ" in capsys.readouterr().err
    assert not (files / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("none.jsonl", ["--data", "none.jsonl"]),
        ("--gamma is no number of --loss dpo", ["--gamma", "1"]),
        ("--nll is no number of --loss kto", ["--loss", "kto", "--nll", "1"]),
        ("beta (0.0)", ["--beta", "0"]),
        ("held_out (1.5)", ["--held-out", "1.5"]),
        ("--device abacus", ["--device", "abacus"]),
        ("num_epochs (0)", ["--epochs", "0"]),
    ],
)
def test_mistakes_are_one_line(message, options, files, capsys):
    assert main(arguments(files, *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("palm-rlhf dpo: error: ") and error.count("\n") == 1
    assert message in error


def test_another_vocabulary_is_refused(files, capsys):
    PaLM(num_tokens=31, dim=8, depth=1, heads=1, dim_head=4).save(files / "palm.pt")
    assert main(arguments(files)) == 2
    assert "num_tokens=31" in capsys.readouterr().err


def test_dpo_learns_from_what_it_can_of_a_mixed_file(files, capsys):
    ratings = [
        {"prompt": "Say more: ", "completion": "mm", "rating": 3},
        {"prompt": "x", "completion": "y", "vote": "up"},
    ]
    with (files / "one.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in ratings))
    assert main(arguments(files)) == 0
    assert "2 records of other kinds are left out" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="2 of its records are of other kinds"):
        assert len(pairs_of(files / "one.jsonl")) == 7
    assert main(arguments(files, "--held-out", "0", run="whole")) == 0
    assert "12 records to learn from, 0 held out" in capsys.readouterr().out
    (files / "one.jsonl").write_text(json.dumps(ratings[0]), encoding="utf-8")
    (files / "two.jsonl").write_text("", encoding="utf-8")
    assert main(arguments(files, run="none")) == 2
    assert "no record that --loss dpo learns from" in capsys.readouterr().err
