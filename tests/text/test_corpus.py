"""Corpora: files found, read in pieces, written as tokens, and read back."""

import gzip
import json
import os

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.text import sources
from palm_rlhf_pytorch.text.corpus import Corpus, open_or_write, write_tokens
from palm_rlhf_pytorch.text.excerpts import Excerpt, Windows, read_windows, split_corpus
from palm_rlhf_pytorch.text.sources import find_sources, read_pieces
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    """A folder of texts of every kind, and some that are none."""
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "z.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    (root / "b" / "code.py").write_text("x = 1\n")
    (root / "rows.jsonl").write_text('{"text": "first"}\n{"text": ""}\n{"text": "second\\r\\n"}\n')
    (root / "zipped.md.gz").write_bytes(gzip.compress("é".encode()))
    (root / "photo.png").write_bytes(b"\x89PNG")
    (root / "bad.txt").write_bytes(b"good, then \xff")
    (root / "sixteen.txt").write_bytes("abc".encode("utf-16-le"))
    (root / "empty.txt").touch()
    (root / ".hidden" / "a.txt").write_text("hidden")
    (root / "link.txt").symlink_to(root / "z.txt")
    return root


EXPECTED = b"x = 1\n", b"first", b"second\n", b"one\ntwo\nthree", "é".encode()


def test_a_folder_becomes_documents_and_what_is_no_text_is_named(folder, tmp_path):
    corpus = write_tokens([folder], ByteTokenizer(), tmp_path / "tokens", progress=False)
    expected = [[256, *text, 257] for text in EXPECTED]
    assert corpus.tokens.tolist() == sum(expected, [])
    assert corpus.tokens.dtype == np.uint16
    assert np.diff([*corpus.starts, len(corpus.tokens)]).tolist() == [len(text) for text in expected]
    assert [(file.documents, file.text_bytes) for file in corpus.files] == [(1, 6), (2, 12), (1, 13), (1, 2)]
    left_out = "\n".join(corpus.left_out)
    assert "bad.txt is not UTF-8: byte 0xff at offset 11" in left_out
    assert "sixteen.txt holds a zero byte at offset 1" in left_out and "empty.txt is empty" in left_out
    assert len(corpus.left_out) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"ab\xc3", "bad.txt is not UTF-8: byte 0xc3 at offset 2"),
        ("cut.txt.gz", gzip.compress(os.urandom(5000))[:900], "cut.txt.gz ends early"),
        ("empty.md", b"", "empty.md is empty"),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "rows.jsonl, line 2: text is missing"),
    ],
)
def test_a_named_file_that_is_no_text_is_an_error_and_nothing_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_tokens([tmp_path / name], ByteTokenizer(), tmp_path / "tokens", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_rows_without_text_can_be_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\nnonsense\n{"text": "c"}\n')
    bad = []
    corpus = write_tokens([path], ByteTokenizer(), tmp_path / "t", on_bad_record=bad.append, progress=False)
    assert [record.line for record in bad] == [2, 3]
    assert corpus.tokens.tolist() == [256, 97, 257, 256, 99, 257]


@pytest.mark.parametrize("piece", [7, 90])
def test_pieces_join_to_the_text_and_are_cut_at_lines_and_characters(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sources, "PIECE", piece)
    monkeypatch.setattr(sources, "CHUNK", 5)
    text = "Zwölf Boxkämpfer\n\njagen Viktor  \nquer 🙂🙂 über\nden großen\r\nSylter Deich.\n" * 9
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(read_pieces(path))
    assert "".join(piece.text for piece in pieces) == text.replace("\r\n", "\n")
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1) and len(pieces) > 3
    if piece == 90:  # every stretch of 45 characters has a line that ends and begins with a letter
        good = sum(piece.text[-1] == "\n" and not piece.text[-2].isspace() for piece in pieces)
        assert good == len(pieces)


def test_a_bpe_tokenizer_gives_a_cut_text_the_ids_of_the_whole(tmp_path, monkeypatch):
    tokenizers = pytest.importorskip("tokenizers")
    from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer

    lines = "".join(f"def f{n}(x):\n    return x + {n}  \n\n\n# a note on {n * n}, and more\n" for n in range(80))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([lines], trainer)
    tokenizer = HFTokenizer(backend, eos_token="<|end|>")
    path = tmp_path / "code.py"
    path.write_text(lines)
    whole = tokenizer.encode(lines, eos=True).tolist()
    monkeypatch.setattr(sources, "PIECE", 200)
    assert len(list(read_pieces(path))) > 10
    corpus = write_tokens([path], tokenizer, tmp_path / "tokens", progress=False)
    assert corpus.tokens.tolist() == whole


def test_a_corpus_is_written_again_only_when_something_changed(tmp_path, monkeypatch):
    path, tokens = tmp_path / "a.txt", tmp_path / "tokens"
    path.write_text("abc")
    first = open_or_write([path], ByteTokenizer(), tokens, progress=False)
    (tokens / "manifest.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr("palm_rlhf_pytorch.text.corpus.read_pieces", None)
        assert open_or_write([path], ByteTokenizer(), tokens).digest == first.digest
    path.write_text("abcd")
    assert open_or_write([path], ByteTokenizer(), tokens, progress=False).tokens.tolist() == [256, *b"abcd", 257]
    tokenizer = ByteTokenizer()
    tokenizer.eos_token = 258
    assert open_or_write([path], tokenizer, tokens, progress=False).tokens.tolist() == [256, *b"abcd", 258]


def test_what_a_kill_left_is_cleared_away_and_another_folder_is_never_replaced(tmp_path):
    path, tokens = tmp_path / "a.txt", tmp_path / "tokens"
    path.write_text("abc")
    (tmp_path / ".tokens.partial").mkdir()
    (tmp_path / ".tokens.partial" / "tokens.bin").write_bytes(b"half")
    assert write_tokens([path], ByteTokenizer(), tokens, progress=False).files[0].tokens == 5
    assert not (tmp_path / ".tokens.partial").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear")
    for write in (write_tokens, open_or_write):
        with pytest.raises(ValueError, match="mine is no corpus"):
            write([path], ByteTokenizer(), mine, progress=False)
    assert (mine / "diary.txt").read_text() == "dear"


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")

    class Slow(ByteTokenizer):
        def __call__(self, texts):
            with path.open("a") as file:
                file.write("x")
            return super().__call__(texts)

    with pytest.raises(ValueError, match="a.txt changed while it was read"):
        write_tokens([path], Slow(), tmp_path / "tokens", progress=False)
    assert not (tmp_path / "tokens").exists()


def test_a_damaged_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    tokens = tmp_path / "tokens"
    write_tokens([tmp_path / "a.txt"], ByteTokenizer(), tokens, progress=False)
    (tokens / "tokens.bin").write_bytes(b"ab")
    with pytest.raises(ValueError, match="tokens.bin has 2 bytes, not 10"):
        Corpus.open(tokens)
    manifest = json.loads((tokens / "manifest.json").read_text())
    (tokens / "manifest.json").write_text(json.dumps(manifest | {"version": 9}))
    with pytest.raises(ValueError, match="version 9"):
        Corpus.open(tokens)


def test_find_sources_refuses_what_is_not_there(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="a folder without text"):
        find_sources([tmp_path])
    with pytest.raises(FileNotFoundError, match="none.txt"):
        find_sources([tmp_path / "none.txt"])
    with pytest.raises(TypeError, match="list of paths"):
        find_sources("a.txt")


def test_tails_of_files_are_held_out_and_rows_stay_whole(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefg")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in ("kl", "mnopq", "rs")))
    corpus = write_tokens([tmp_path / "a.txt", tmp_path / "b.jsonl"], ByteTokenizer(), tmp_path / "t", progress=False)
    train, tails = split_corpus(corpus, 0.3)  # of a: 6.3 of 9 tokens; of b: 10.5 of 15, where rows begin at 4 and 11
    ids, begins = train.read(0, len(train))
    assert ids.tolist() == [256, *b"abcde", 256, *b"kl", 257, 256, *b"mnopq", 257]
    assert begins.nonzero()[0].tolist() == [0, 6, 10]
    ids, begins = tails.read(0, len(tails))
    assert ids.tolist() == [*b"fg", 257, 256, *b"rs", 257]
    assert begins.nonzero()[0].tolist() == [0, 3]
    assert train.read(4, 6)[0].tolist() == [*b"de", 256, *b"kl", 257] and train.digest != tails.digest


def test_an_excerpt_of_an_array_reads_every_window_as_the_array_has_it():
    tokens = torch.tensor([5, 1, 9, 2, 2, 9, 4, 9])
    excerpt = Excerpt.of(tokens, eos_token=9)
    for place in range(6):
        ids, begins = excerpt.read(place, 3)
        assert ids.tolist() == tokens[place : place + 3].tolist()
        assert begins.tolist() == [at in (0, 3, 6) for at in range(place, place + 3)]
    assert "begins" not in read_windows(excerpt, [0, 3], 3)
    assert read_windows(excerpt, [0, 1], 3)["begins"].tolist() == [[True, False, False], [False, False, True]]


def test_weights_of_windows_average_to_one_target_each():
    tokens = torch.tensor(([1] * 5 + [9] + [2] * 3 + [9]) * 500)
    windows = iter(Windows(Excerpt.of(tokens, eos_token=9), length=7, batch_size=400, seed=1))
    batch = next(windows)
    targets = 400 * 6 - int(batch["begins"][:, 1:].sum())
    assert batch["weight"] == pytest.approx(targets / (400 * 6 * 0.8))  # two tokens of ten begin a document
    assert batch["weight"] == pytest.approx(1, abs=0.03)
    assert next(iter(Windows(Excerpt.of(tokens), length=7, batch_size=2, seed=1)))["weight"] == pytest.approx(
        1, abs=1e-3
    )


def test_windows_of_several_processes_are_those_of_one():
    excerpt = Excerpt.of(torch.arange(50) % 11, eos_token=10)
    one = Windows(excerpt, length=5, batch_size=6, seed=3)
    parts = [Windows(excerpt, length=5, batch_size=2, seed=3, rank=rank, ranks=3) for rank in range(3)]
    whole = next(iter(one))["seq"]
    found = torch.stack([next(iter(part))["seq"] for part in parts], dim=1).flatten(0, 1)
    assert torch.equal(found, whole)
    assert len({window.digest for window in [one, *parts]}) == 4
    with pytest.raises(ValueError, match=r"length \(51\)"):
        Windows(excerpt, length=51, batch_size=1, seed=0)
