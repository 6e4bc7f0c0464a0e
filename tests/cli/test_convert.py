"""`palm-rlhf convert`: what it says, what it writes, and what it refuses before it loads anything."""

from pathlib import Path

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.cli.main import main

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize("out", ["palm.pt", "palm.safetensors", "folder"])
def test_published_checkpoint_is_written_as_ours(tmp_path, capsys, out):
    assert main(["convert", str(REFERENCE / "palm.pt"), str(tmp_path / out), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "PaLM, layout of the published PaLMs" in printed and "the same to the bit" in printed
    assert "num_tokens 97, dim 48, depth 2, heads 3, dim_head 16; 72,384 parameters, float32" in printed
    numbers = np.load(REFERENCE / "palm.npz")
    logits = PaLM.from_pretrained(tmp_path / out).eval()(torch.from_numpy(numbers["seq"]))
    torch.testing.assert_close(logits, torch.from_numpy(numbers["logits"]), atol=1e-4, rtol=0)


def test_dtype_and_kind_and_scopes_are_kept(tmp_path, capsys):
    judge = str(tmp_path / "judge")
    assert main(["convert", str(REFERENCE / "reward_model.pt"), judge, "--dtype", "bfloat16", "--kind", "reward"]) == 0
    assert RewardModel.from_pretrained(judge).palm.token_emb.weight.dtype == torch.bfloat16
    palm = PaLM(num_tokens=9, dim=4, depth=1, heads=1, dim_head=2, finetune_scopes=["actor"])
    palm.save(tmp_path / "palm.pt", with_scopes=True)
    assert main(["convert", str(tmp_path / "palm.pt"), str(tmp_path / "palm.safetensors"), "--check"]) == 0
    assert list(PaLM.from_pretrained(tmp_path / "palm.safetensors").finetune_modules) == ["actor"]
    assert "scopes actor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["palm.pt", "x", "--kind", "reward"], "holds a PaLM, not a RewardModel (--kind reward)"),
        (["palm.npz", "x"], "it is a numpy .npz archive"),
        (["nothing.pt", "x"], "no such file or folder"),
        ([".", "x"], "several files of weights (palm.pt, reward_model.pt)"),
        (["palm.pt", "x.bin"], "must end in .safetensors or .pt, or name a folder"),
        (["palm.pt", "there"], "is a file; name a folder"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, message):
    source, out, *options = arguments
    (tmp_path / "there").write_text("a file")
    assert main(["convert", str(REFERENCE / source), str(tmp_path / out), *options]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
