"""Token windows, files of text."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.text.datasets import BadRecord, TokenStream, read_each, read_prompts, read_texts
from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.rows import Row


def test_stream_yields_windows_of_the_tokens():
    tokens = torch.arange(11) * 10
    for batch in islice(TokenStream(tokens, length=3, batch_size=5, seed=0), 4):
        assert batch["seq"].shape == (5, 3) and batch["seq"].dtype == torch.long
        assert (batch["seq"].diff(dim=1) == 10).all()


def test_stream_reaches_every_start_equally():
    batch = next(iter(TokenStream(torch.arange(7), length=3, batch_size=5000, seed=1)))
    shares = batch["seq"][:, 0].bincount(minlength=5) / 5000
    assert len(shares) == 5
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.03)


def test_stream_repeats_with_its_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    stream = TokenStream(torch.arange(100), length=4, batch_size=3, seed=5)
    first, second = ([batch["seq"] for batch in islice(stream, 3)] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], first[1])
    other = next(iter(TokenStream(torch.arange(100), length=4, batch_size=3, seed=6)))
    assert not torch.equal(first[0], other["seq"])
    assert torch.equal(state, torch.get_rng_state())


def test_stream_of_a_memory_map_equals_that_of_a_tensor(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", dtype=np.uint16, mode="r")
    routes = [
        next(iter(TokenStream(tokens, length=6, batch_size=2, seed=3)))["seq"] for tokens in (mapped, torch.arange(50))
    ]
    assert torch.equal(*routes)


def test_stream_of_exactly_one_window_works():
    batch = next(iter(TokenStream(torch.arange(4), length=4, batch_size=2, seed=0)))
    assert batch["seq"].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("tokens", "length", "batch_size", "error", "message"),
    [
        (torch.arange(3), 4, 1, ValueError, r"tokens \(3\).*length \(4\)"),
        (torch.arange(3), 0, 1, ValueError, r"length \(0\)"),
        (torch.arange(3), 2, 0, ValueError, r"batch_size \(0\)"),
        (torch.zeros(2, 3).long(), 2, 1, ValueError, r"\(2, 3\)"),
        (torch.zeros(3), 2, 1, TypeError, "float32"),
    ],
)
def test_stream_refuses_bad_input(tokens, length, batch_size, error, message):
    with pytest.raises(error, match=message):
        TokenStream(tokens, length=length, batch_size=batch_size, seed=0)


def test_read_prompts_skips_blank_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffhello\r\n\n   \n world \u2028 wide\x0c\n".encode())
    assert read_prompts(path) == ["hello", " world \u2028 wide\x0c"]


def test_read_prompts_refuses_a_file_without_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt"):
        read_prompts(path)


def test_read_texts_keeps_the_order_of_paths(tmp_path):
    for name, text in (("b.txt", "première\n"), ("a.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_texts([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == ["première\n", ""]


def test_read_texts_names_the_file_and_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xe9 at offset 3"):
        read_texts([path])
    with pytest.raises(FileNotFoundError, match=r"missing\.txt"):
        read_texts([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="is a folder"):
        read_texts([tmp_path])
    with pytest.raises(TypeError, match=r"\[path\]"):
        read_texts(str(path))


def test_read_prompts_takes_the_column_of_a_table(tmp_path):
    turns = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": "Once upon"}, {"prompt": turns, "chosen": "a"}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_prompts(path) == ["Once upon", "\n\nHuman: Hi\n\nAssistant:"]
    (tmp_path / "prompts.csv").write_text("prompt,label\nTwo words,1\n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.csv") == ["Two words"]
    for line, reason in (('{"chosen": "a"}', "prompt: is missing"), ('{"prompt": 3}', "prompt: is missing"), ("{", "")):
        path.write_text('{"prompt": "a"}\n' + line, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"prompts.jsonl, line 2: .*{reason}"):
            read_prompts(path)


def test_each_row_is_read_or_is_a_bad_record_that_is_told_first():
    rows = [("a.jsonl", Row(3, {"n": 4})), ("", Row(1, {"n": 5})), ("b.csv", Row(7, FieldError("", "is not CSV")))]
    told = []

    def read_row(columns, line):
        if columns["n"] == 5:
            raise FieldError("n", "is odd")
        return columns["n"], line

    found = read_each(iter(rows), read_row, told.append)
    assert next(found) == (4, 3) and not told
    bad = [BadRecord("", 1, "n", "is odd"), BadRecord("b.csv", 7, "", "is not CSV")]
    assert list(found) == bad == told
    assert list(read_each([("", Row(9, {"n": 2}))], read_row, told.append)) == [(2, 0)]  # no file, no line
