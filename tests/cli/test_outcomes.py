"""Files of an earlier run: a command that is refused leaves them, one that has learnt does not."""

import pytest
from accelerate import Accelerator

from palm_rlhf_pytorch.cli import main as entry
from palm_rlhf_pytorch.cli.outcomes import left_as_found

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
