"""`palm-rlhf reward` on a few labels, and `palm-rlhf reward ask` with what came of it."""

import contextlib
import io
import itertools
import json
import os
import random
import signal

import pytest
import torch

from palm_rlhf_pytorch.cli import reward
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, load_judge
from palm_rlhf_pytorch.reward.learning import LabelledLoss
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.datasets import read_labels
from palm_rlhf_pytorch.training.metrics import read_metrics
from tests.distributed.ranks import in_ranks


def rows(count, *, seed=0):
    """Pairs, rankings, ratings and votes in turn: the more a's the better."""
    chance = random.Random(seed)

    def text(quality):
        return "a" * (quality + 1) + "".join(chance.choices("xyz", k=4 - quality))

    for number in range(count):
        low, high = sorted(chance.sample(range(4), 2))
        yield (
            {"prompt": f"p{number}", "chosen": text(high), "rejected": text(low), "annotator": f"{number % 3}"},
            {"prompt": f"p{number}", "responses": [text(high), text(low)], "ranks": [1, 2]},
            {"prompt": f"p{number}", "completion": text(low), "rating": low},
            {"prompt": f"p{number}", "completion": text(high), "label": high > 1},
        )[number % 4]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=4).save(tmp_path / "palm.pt")
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(100)))
    return tmp_path


def command(folder, *options, data="labels.jsonl"):
    files = [str(folder / data), "--palm", str(folder / "palm.pt"), "--out", str(folder / "out" / "rm.pt")]
    return ["reward", *files, "--device", "cpu", "--held-out", "0.3", "--lr", "0.02", *options]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("plotting", [True, False])
def test_reward_learns_reports_and_saves(folder, capsys, monkeypatch, plotting):
    def plot(bins, path, *, title):
        if not plotting:
            raise ImportError(needs("a plot", "matplotlib", extra="plot"))
        path.write_bytes(b"a picture")

    monkeypatch.setattr(reward, "reliability_plot", plot)
    with (folder / "labels.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": "x"}\n')
    assert main(command(folder, "--whole-trunk", "--epochs", "6", "--on-bad-record", "skip")) == 0
    printed = capsys.readouterr().out
    assert "101 rows" in printed and "line 101: rejected is missing" in printed
    expected = ["rm.config.yaml", "rm.metrics.jsonl", "rm.pt", "rm.report.json", "rm.report.md", "rm.tokenizer.json"]
    assert files(folder / "out") == expected[:3] + ["rm.reliability.png"] * plotting + expected[3:]
    assert ('pip install "palm-rlhf-pytorch[plot]"' in printed) != plotting
    report = json.loads((folder / "out" / "rm.report.json").read_text())
    held_out = report["pairs"]["accuracy"]["count"] + report["ratings"]["count"] + report["votes"]["accuracy"]["count"]
    assert 15 < held_out < 45 and f"{held_out} held out" in printed
    assert report["pairs"]["accuracy"]["share"] > 0.8 and report["ratings"]["spearman"] > 0.5
    written = (folder / "out" / "rm.report.md").read_text()
    assert "accuracy on pairs" in written and ("reliability.png" in written) == plotting
    assert "best after" in printed and "1 bad records left out" in written
    model = RewardModel.from_checkpoint(folder / "out" / "rm.pt")
    assert float(model.score_std) != 1 and model.adapter is None


def test_a_bad_record_stops_before_anything_is_written(folder, capsys):
    with (folder / "labels.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": "x", "rejected": "y", "margin": "wide"}\n')
    assert main(command(folder)) == 2
    error = capsys.readouterr().err
    assert "palm-rlhf reward: error: " in error and "labels.jsonl, line 101: margin" in error
    assert "--on-bad-record skip" in error
    assert not (folder / "out").exists()


def test_members_of_an_ensemble_are_asked_what_to_ask(folder, capsys):
    ensemble, pairs, asked = folder / "out" / "rm.pt", folder / "pairs.jsonl", folder / "asked.jsonl"
    assert main(command(folder, "--members", "2", "--epochs", "1")) == 0
    judge = load_judge(ensemble)
    assert isinstance(judge, RewardEnsemble) and len(judge.models) == 2
    assert not torch.equal(judge.models[0].head.weight, judge.models[1].head.weight)
    assert {"rm.0.metrics.jsonl", "rm.1.metrics.jsonl"} < set(files(folder / "out"))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows(40, seed=1) if "chosen" in row))
    capsys.readouterr()
    ask = ["reward", "ask", str(pairs), "--reward-model", str(ensemble), "--count", "4", "--device", "cpu"]
    assert main([*ask, "--out", str(asked)]) == 0
    assert "4 of 10 rows" in capsys.readouterr().out
    assert main(ask) == 0
    printed = capsys.readouterr()
    assert printed.out == asked.read_text() and "4 of 10 rows" in printed.err
    found = [json.loads(line) for line in printed.out.splitlines()]
    gains = [row["expected"]["gain"] for row in found]
    assert gains == sorted(gains, reverse=True) and len(gains) == 4
    asked.write_text("".join(json.dumps(row | {"choice": "b"}) + "\n" for row in found))
    assert [label.chosen.response for label in read_labels(asked).records] == [row["response_b"] for row in found]
    judge.models[0].save(folder / "single.pt")
    assert main(["reward", "ask", str(pairs), "--reward-model", str(folder / "single.pt"), "--device", "cpu"]) == 2
    assert "--members 5" in capsys.readouterr().err


def test_a_run_told_to_stop_goes_on_to_the_same_model(folder, capsys, monkeypatch):
    options = ["--members", "2", "--epochs", "2", "--batch-tokens", "120"]
    assert main(command(folder, *options)) == 0
    expected = load_judge(folder / "out" / "rm.pt").state_dict()
    report = (folder / "out" / "rm.report.json").read_text()
    first, second = (len(read_metrics(folder / "out" / f"rm.{number}.metrics.jsonl")) for number in range(2))
    assert second > 3
    plain, calls = LabelledLoss.forward, itertools.count(1)

    def told(self, *args, **kwargs):
        if next(calls) == first + 3:  # in the second member's third step
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *args, **kwargs)

    (folder / "out" / "rm.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(LabelledLoss, "forward", told)
        assert main(command(folder, *options)) == 0
    assert "stopped by SIGTERM" in capsys.readouterr().out and (folder / "out" / "rm.run").is_dir()
    assert main(command(folder, *options)) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(command(folder, *options, "--resume")) == 0
    found = load_judge(folder / "out" / "rm.pt").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert (folder / "out" / "rm.report.json").read_text() == report and not (folder / "out" / "rm.run").exists()


def learnt(out, *, source):
    """What a process of several says with the command, and its exit code."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        return main([*command(source, "--epochs", "1"), "--out", f"{out}.pt"]), told.getvalue()


def test_two_processes_learn_one_model_and_the_main_one_alone_writes(folder):
    (code, told), (other, nothing) = in_ranks(folder / "both", learnt, source=folder)
    assert code == other == 0 and "accuracy on pairs" in told and nothing == ""
    RewardModel.from_checkpoint(folder / "both.pt")
    steps = [line["step"] for line in read_metrics(folder / "both.metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and not (folder / "both.run").exists()


def test_columns_get_the_names_that_are_asked_for(folder, capsys):
    table = ["mark,sentence", *(f"{number % 3},{'good ' * (number % 3)}film {number}" for number in range(30))]
    (folder / "labels.csv").write_text("\n".join(table))
    options = ("--bins", "3", "--column", "sentence=text", "--column", "mark=rating", "--epochs", "1")
    assert main(command(folder, *options, data="labels.csv")) == 0
    assert "30 ratings, 0 bad" in capsys.readouterr().out
    assert RewardModel.from_checkpoint(folder / "out" / "rm.pt").settings.num_binned_output == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bins", "2"], "2 bins take whole numbers from 0 to 1"),
        (["--held-out", "0"], "held_out (0.0)"),
        (["--members", "0"], "--members 0"),
        (["--members", "2", "--whole-trunk"], "use_lora=False"),
        (["--epochs", "0"], "epochs (0)"),
        (["--column", "text"], "--column text"),
        (["--palm", "nowhere.pt"], "nowhere.pt"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_options_are_refused_and_no_model_is_written(folder, capsys, options, message):
    assert main(command(folder, *options)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out" / "rm.pt").exists()


def test_a_language_model_of_another_vocabulary_is_refused(folder, capsys):
    PaLM(num_tokens=300, dim=8, depth=1, heads=1, dim_head=4).save(folder / "palm.pt")
    assert main(command(folder)) == 2
    assert "num_tokens=300" in capsys.readouterr().err


def test_help_of_both_commands_reads_as_such(capsys):
    for argv, told in ((["reward", "--help"], "DATA [DATA ...]"), (["reward", "ask", "--help"], "--per-prompt N")):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0 and told in capsys.readouterr().out
