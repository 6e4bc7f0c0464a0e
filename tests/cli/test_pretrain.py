"""`palm-rlhf pretrain` on small texts."""

import itertools
import json
import math
import os
import signal

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.cli.pretrain import bits_per_byte
from palm_rlhf_pytorch.palm.transformer import PaLM

TINY = ["--dim", "16", "--depth", "1", "--heads", "2", "--dim-head", "8", "--length", "24", "--batch-size", "4"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the dog lay on the log. " * 40, encoding="utf-8")
    return str(path)


def printed_bits(printed, when):
    return float(printed.split(f"bits per byte {when}: ")[1].split()[0])


def test_pretrain_learns_saves_and_logs(text, tmp_path, capsys):
    out = tmp_path / "run" / "palm.pt"
    argv = ["pretrain", text, text, "--out", str(out), "--steps", "60", "--lr", "0.01", "--device", "cpu", *TINY]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert abs(printed_bits(printed, "before") - math.log2(259)) < 0.15
    assert printed_bits(printed, "after") < 5.0
    assert "sample: " in printed and str(out) in printed
    records = [json.loads(line) for line in (out.parent / f"{out.stem}.metrics.jsonl").read_text().splitlines()]
    assert any("eval/bits_per_byte" in record for record in records)
    assert any("train/loss" in record for record in records)
    assert main(["generate", str(out), "the ", "--max-new-tokens", "4", "--device", "cpu"]) == 0


def test_pretrain_repeats_with_its_seed(text, tmp_path):
    for name in ("a", "b"):
        main(["pretrain", text, "--out", str(tmp_path / name / "palm.pt"), "--steps", "3", "--device", "cpu", *TINY])
    first, second = (PaLM.from_checkpoint(tmp_path / name / "palm.pt").state_dict() for name in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--length", "5000"], "length (5000)"),
        (["--held-out", "1.5"], "held_out (1.5)"),
        (["--dim-head", "7"], "dim_head (7)"),
        (["--batch-size", "0"], "batch_size (0)"),
        (["--steps", "0"], "--steps 0"),
        (["--lr", "-1"], "--lr -1.0"),
        (["--device", "abacus"], "--device abacus"),
        (["--patience", "0"], "patience (0)"),
        (["--accumulate", "0"], "--accumulate 0"),
        (["--samples", "-1"], "--samples -1"),
    ],
)
def test_pretrain_refuses_bad_options_and_writes_no_model(text, tmp_path, capsys, options, message):
    out = tmp_path / "run" / "palm.pt"
    assert main(["pretrain", text, "--out", str(out), "--device", "cpu", *TINY, *options]) == 2
    printed = capsys.readouterr()
    assert "palm-rlhf pretrain: error: " in printed.err and message in printed.err
    assert "bits per byte after" not in printed.out
    assert not out.exists()


def test_pretrain_refuses_files_it_cannot_use(text, tmp_path, capsys):
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"ab\xff")
    empty = tmp_path / "empty.txt"
    empty.touch()
    (tmp_path / "folder").mkdir()
    for path, message in [
        (str(broken), "offset 2"),
        (str(empty), "empty.txt is empty"),
        (str(tmp_path / "none.txt"), "none.txt"),
        (str(tmp_path / "folder"), "a folder without text"),
    ]:
        assert main(["pretrain", text, path, "--out", str(tmp_path / "palm.pt")]) == 2
        assert message in capsys.readouterr().err
    assert main(["pretrain", text, "--out", str(tmp_path), *TINY]) == 2
    assert "is a folder" in capsys.readouterr().err


def test_pretrain_refuses_a_link_before_it_trains(text, tmp_path, capsys):
    out = tmp_path / "palm.pt"
    out.symlink_to(tmp_path / "elsewhere.pt")
    assert main(["pretrain", text, "--out", str(out), *TINY]) == 2
    printed = capsys.readouterr()
    assert "symbolic link" in printed.err
    assert "bits per byte" not in printed.out


def test_bits_per_byte_is_the_loss_of_every_byte_once():
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=8, depth=1, heads=2, dim_head=4).eval()
    tokens = torch.randint(0, 256, (13,))
    logprobs = []
    for window in (tokens[0:5], tokens[4:9], tokens[8:13]):
        predicted = palm(window[None])[0, :-1].log_softmax(dim=-1)
        logprobs.extend(predicted.gather(1, window[1:, None]).flatten().tolist())
    assert len(logprobs) == 12
    expected = -sum(logprobs) / 12 / math.log(2)
    assert bits_per_byte(palm, tokens, length=5, batch_size=2) == pytest.approx(expected, abs=1e-5)


def test_bits_per_byte_keeps_the_mode_and_takes_short_texts():
    palm = PaLM(num_tokens=259, dim=8, depth=1, heads=2, dim_head=4).train()
    assert bits_per_byte(palm, torch.tensor([1, 2, 3]), length=100) == pytest.approx(math.log2(259), abs=0.3)
    assert palm.training
    with pytest.raises(ValueError, match=r"\(1\)"):
        bits_per_byte(palm, torch.tensor([1]), length=100)


@pytest.mark.parametrize("signal_at", [3, 7])  # 7 is the last step: nothing is left to train, only to save
def test_pretrain_stopped_by_a_signal_goes_on_to_the_same_weights(text, tmp_path, capsys, monkeypatch, signal_at):
    argv = ["--steps", "7", "--save-every", "2", "--device", "cpu", *TINY]
    assert main(["pretrain", text, "--out", str(tmp_path / "alone.pt"), *argv]) == 0
    calls, forward = itertools.count(1), PaLM.forward

    def told(self, *args, **options):
        if options.get("return_loss") and self.training and next(calls) == signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args, **options)

    out = tmp_path / "told.pt"
    with monkeypatch.context() as patch:
        patch.setattr(PaLM, "forward", told)
        assert main(["pretrain", text, "--out", str(out), *argv]) == 0
    assert "stopped by SIGINT" in capsys.readouterr().out and not out.exists()
    assert main(["pretrain", text, "--out", str(out), *argv]) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert main(["pretrain", text, "--out", str(out), *argv, "--resume"]) == 0
    first, second = (PaLM.from_checkpoint(tmp_path / name).state_dict() for name in ("alone.pt", "told.pt"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len((tmp_path / "told.metrics.jsonl").read_text().splitlines()) == 7
    assert not (tmp_path / "told.run").exists()


def test_pretrain_leaves_files_alone_that_are_not_its_own(text, tmp_path, capsys, monkeypatch):
    out, save = tmp_path / "palm.pt", PaLM.save
    argv = ["pretrain", text, "--out", str(out), "--steps", "2", "--device", "cpu", *TINY]
    notes = tmp_path / "palm.run" / "notes.txt"

    def save_and_write(self, path):
        notes.write_text("mine")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(PaLM, "save", save_and_write)
        assert main(argv) == 0
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"] and notes.read_text() == "mine"
    metrics = (tmp_path / "palm.metrics.jsonl").read_bytes()
    capsys.readouterr()
    for more in ([], ["--resume"]):
        assert main([*argv, *more]) == 2
        printed = capsys.readouterr()
        assert f"{notes} is not of this run" in printed.err and "bits per byte" not in printed.out
    notes.unlink()
    notes.parent.rmdir()
    notes.parent.symlink_to(tmp_path)
    assert main(argv) == 2
    assert "palm.run must be a folder" in capsys.readouterr().err
    assert (tmp_path / "palm.metrics.jsonl").read_bytes() == metrics


def test_pretrain_resumes_only_with_the_same_text(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "palm.pt"
    argv = ["pretrain", text, "--out", str(out), "--steps", "3", "--device", "cpu", *TINY]
    with monkeypatch.context() as patch:
        patch.setattr(PaLM, "save", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(argv) != 0
    path = tmp_path / "text.txt"
    content = path.read_text(encoding="utf-8")
    path.write_text("a dog and a cat and a hen. " * 80, encoding="utf-8")
    assert main([*argv, "--resume"]) == 2
    assert "over other data" in capsys.readouterr().err and not out.exists()
    path.write_text(content, encoding="utf-8")
    assert main([*argv, "--resume"]) == 0 and out.exists()


def test_pretrain_on_a_folder_by_a_tokenizer_goes_on_from_a_model(tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "bad.txt").write_bytes(b"\xff")
    rows = [{"body": f"row {n} says that the cat sat on mat {n}"} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"other": 1}]))
    (tmp_path / "validation.txt").write_text("the cat sat on row 7. " * 20)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([row["body"] for row in rows], trainer)
    backend.save(str(tmp_path / "bpe.json"))
    out, common = tmp_path / "palm.pt", ["--column", "body", "--device", "cpu", "--batch-size", "4", "--length", "24"]
    argv = ["pretrain", str(folder), "--tokenizer", str(tmp_path / "bpe.json"), "--out", str(out), *TINY, *common]
    assert main([*argv, "--steps", "2"]) == 2
    assert "rows.jsonl, line 61: body is missing" in capsys.readouterr().err
    argv += ["--on-bad-record", "skip", "--validation", str(tmp_path / "validation.txt")]
    assert main([*argv, "--steps", "30", "--lr", "0.01", "--eval-every", "15"]) == 0
    first = capsys.readouterr().out
    assert "bad.txt is not UTF-8" in first and "line 61" in first
    samples = [json.loads(line) for line in (tmp_path / "palm.samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [15, 15, 30, 30]
    assert PaLM.from_checkpoint(out).num_tokens == 300
    other = tmp_path / "other.pt"
    argv = ["pretrain", str(folder), "--from", str(out), "--out", str(other), "--tokens", str(tmp_path / "palm.tokens")]
    argv += ["--on-bad-record", "skip", "--validation", str(tmp_path / "validation.txt"), "--steps", "1", *common]
    assert main(argv) == 0
    second = capsys.readouterr().out
    assert printed_bits(second, "before") == printed_bits(first, "after")
    assert "line 61" not in second  # nothing was read again
    assert (tmp_path / "other.tokenizer.json").exists()
    assert main([*argv, "--dim", "32"]) == 2
    assert "--dim 32: the model of --from" in capsys.readouterr().err
