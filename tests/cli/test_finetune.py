"""`palm-rlhf finetune` on small dialogues."""

import json

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=8).save(tmp_path / "palm.pt")
    return str(tmp_path / "palm.pt")


@pytest.fixture
def dialogues(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    asked = [{"role": "user", "content": "say hello"}]
    rows = [
        {"messages": [{**asked[0], "content": f"say {n}"}, {"role": "assistant", "content": "hello " * (n % 4)}]}
        for n in range(40)
        if n % 4
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": asked}]))
    return str(path)


def bits(printed):
    return float(printed.split("bits per byte after: ")[1].split()[0])


@pytest.mark.parametrize("more", [[], ["--lora-r", "2"], ["--no-packing", "--patience", "2"]])
def test_finetune_learns_saves_and_counts(model, dialogues, tmp_path, capsys, more):
    out = tmp_path / "run" / "tuned.pt"
    argv = ["finetune", dialogues, "--palm", model, "--out", str(out), "--length", "64", "--device", "cpu"]
    argv += ["--on-bad-record", "skip", "--epochs", "6", "--lr", "0.02", "--batch-size", "2", "--eval-every", "10"]
    assert main([*argv, "--held-out", "0.3", *more]) == 0
    printed = capsys.readouterr().out
    assert "dialogues.jsonl, line 31: messages" in printed and "lost their ends" not in printed
    assert bits(printed) < (9.5 if more[:1] == ["--lora-r"] else 6.0)  # 8.0 a byte, and the end, at first
    assert PaLM.from_checkpoint(out).finetune_modules.keys() == set()
    names = {path.name for path in out.parent.iterdir()}
    assert names == {
        f"tuned.{name}" for name in ("pt", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "config.yaml")
    }
    sample = json.loads((out.parent / "tuned.samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("\n\nHuman: say ") and sample["prompt"].endswith("\n\nAssistant:")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "line 31: messages holds nothing that the assistant says; mend it"),
        (["--on-bad-record", "skip", "--length", "9"], "none of"),
        (["--on-bad-record", "skip", "--epochs", "0"], "epochs (0)"),
        (["--on-bad-record", "skip", "--lora-r", "0"], "r (0)"),
        (["--on-bad-record", "skip", "--held-out", "0", "--patience", "1"], "leaves nothing to judge by"),
        (["--on-bad-record", "skip", "--eval-every", "0"], "eval_every (0)"),
        (["--palm", "none.pt"], "none.pt"),
    ],
)
def test_finetune_refuses_what_cannot_be(model, dialogues, tmp_path, capsys, options, message):
    out = tmp_path / "tuned.pt"
    argv = ["finetune", dialogues, "--palm", model, "--out", str(out), "--device", "cpu", *options]
    earlier = tmp_path / "tuned.metrics.jsonl"
    earlier.write_text("of another run")
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "palm-rlhf finetune: error: " in error and message in error and not out.exists()
    assert earlier.read_text() == "of another run"
