"""Files of an earlier run: a command that is refused leaves them, one that has learnt does not."""

import pytest
from accelerate import Accelerator

from palm_rlhf_pytorch.cli import main as entry
from palm_rlhf_pytorch.cli.outcomes import left_as_found
from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

TINY = [
    "--dim", "8", "--depth", "1", "--heads", "1", "--dim-head", "4", "--length", "8", "--batch-size", "2", "--steps",
    "2", "--device", "cpu", "--sample-tokens", "3",
]  # fmt: skip


@pytest.mark.parametrize(
    ("learns", "expected"), [(False, {"m": "old", "c": "old"}), (True, {"m": "new", "c": "new", "n": "new"})]
)
def test_files_come_back_unless_something_was_learnt(tmp_path, learns, expected):
    metrics, config, new = (tmp_path / name for name in "mcn")
    for path in (metrics, config):
        path.write_text("old")
    with pytest.raises(RuntimeError), left_as_found(Accelerator(cpu=True), [metrics], [config, new]):
        metrics.unlink()
        config.write_text("new")
        new.write_text("new")
        if learns:
            metrics.write_text("new")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected


def test_a_refused_command_leaves_what_stands_beside_its_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words and more words " * 20)
    assert entry.main(["pretrain", "text.txt", *TINY]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"palm.config.yaml", "palm.metrics.jsonl", "palm.samples.jsonl"} <= before.keys()
    for wrong in (["--warmup-steps", "9"], ["--patience", "0"]):
        assert entry.main(["pretrain", "text.txt", *TINY, *wrong]) == 2
        assert wrong[0].strip("-").replace("-", "_") in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "argv",
    [
        ["pretrain", "text.txt", "--out", "mine.run", *TINY],
        ["pretrain", "text.txt", "--out", "mine.tokens", *TINY],
        ["pretrain", "text.txt", "--out", "mine", "--tokens", "mine", *TINY],
        ["finetune", "none.jsonl", "--palm", "none.pt", "--out", "mine.run"],
        ["reward", "none.jsonl", "--palm", "palm.pt", "--out", "mine.run"],
    ],
    ids=lambda argv: " ".join(argv[:5]),
)
def test_a_model_that_would_have_the_name_of_a_folder_is_refused_before_the_work(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("words and more words " * 20)
    PaLM(num_tokens=ByteTokenizer().num_tokens, dim=8, depth=1, heads=1, dim_head=4).save(tmp_path / "palm.pt")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert entry.main(argv) == 2
    assert f"--out {argv[argv.index('--out') + 1]}: a folder of that name is to hold" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_complete_model_is_not_trained_again_by_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten " * 20)
    assert entry.main(["pretrain", "text.txt", *TINY]) == 0
    before = (tmp_path / "palm.pt").read_bytes()
    capsys.readouterr()
    assert entry.main(["pretrain", "text.txt", *TINY, "--resume", "--lr", "0.5"]) == 2
    assert "palm.pt is complete: --resume has nothing to go on with" in capsys.readouterr().err
    assert (tmp_path / "palm.pt").read_bytes() == before


def test_curves_are_a_page_where_the_picture_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    def missing(*_, **__):
        raise ImportError(needs("a plot", "matplotlib", extra="plot"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("palm_rlhf_pytorch.cli.plot.curves_plot", missing)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.5}\n')
    assert entry.main(["plot", "metrics.jsonl"]) == 0
    assert (tmp_path / "runs.html").is_file() and not (tmp_path / "runs.png").exists()
    assert "no runs.png: a plot needs matplotlib" in capsys.readouterr().out
    assert entry.main(["plot", "metrics.jsonl", "--out", "runs.png"]) == 2
