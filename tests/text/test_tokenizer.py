"""Byte tokenizer, and foreign tokenizers behind `encode_with`."""

from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, encode_with

TEXTS = ["abc", "de", "fghij"]
IDS = [[97, 98, 99], [100, 101], [102, 103, 104, 105, 106]]


def codes(text):
    return [ord(character) for character in text]


def padded(texts, *, left, pad=0):
    """A Hugging Face tokenizer's output for a list, made by hand."""
    width = max(map(len, texts)) + 2
    rows, masks = [], []
    for text in texts:
        fill = width - len(text)
        rows.append([pad] * fill + codes(text) if left else codes(text) + [pad] * fill)
        masks.append([0] * fill + [1] * len(text) if left else [1] * len(text) + [0] * fill)
    return rows, masks


def assert_rows(rows, expected=IDS):
    assert [row.tolist() for row in rows] == expected
    assert all(row.dtype == torch.long and row.ndim == 1 for row in rows)


@pytest.mark.parametrize("text", ["", "plain", "né \U0001f600\n\x00", "中文"])
def test_bytes_survive_encode_and_decode(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


def test_encode_puts_special_tokens_at_the_ends():
    assert ByteTokenizer().encode("hi", bos=True, eos=True).tolist() == [256, 104, 105, 257]
    assert ByteTokenizer().encode("").dtype == torch.long


def test_decode_skips_specials_and_replaces_broken_bytes():
    assert ByteTokenizer().decode([256, 104, 0xC3, 257, 105, 258]) == "h\ufffdi"
    assert ByteTokenizer().decode(torch.tensor([], dtype=torch.long)) == ""


def test_batch_pads_either_side():
    ids, mask = ByteTokenizer().batch(["abc", "d"])
    assert ids.tolist() == [[97, 98, 99], [100, 258, 258]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    ids, mask = ByteTokenizer().batch(["abc", "d"], left=True)
    assert ids.tolist() == [[97, 98, 99], [258, 258, 100]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


def test_call_takes_a_text_or_a_list():
    assert ByteTokenizer()("abc").tolist() == IDS[0]
    assert_rows(ByteTokenizer()(TEXTS))


def test_byte_tokenizer_refuses_what_it_cannot_mean():
    tokenizer = ByteTokenizer()
    with pytest.raises(TypeError, match="list"):
        tokenizer.encode(TEXTS)
    with pytest.raises(TypeError, match=r"\[text\]"):
        tokenizer.batch("abc")
    with pytest.raises(ValueError, match="surrogate.*character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="259, outside 0 to 258"):
        tokenizer.decode([97, 259])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        tokenizer.decode(torch.tensor([[97, 98]]))
    with pytest.raises(TypeError, match="float32"):
        tokenizer.decode(torch.tensor([97.0]))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_encode_with_drops_padding_of_dict_and_batch_encoding(left, as_tensor):
    convert = torch.tensor if as_tensor else list

    def tokenizer(texts):
        if isinstance(texts, str):
            raise TypeError("a list, please")
        rows, masks = padded(texts, left=left)
        return UserDict(input_ids=convert(rows), attention_mask=convert(masks))

    assert_rows(encode_with(tokenizer, TEXTS))


@pytest.mark.parametrize("convert", [list, torch.tensor, np.array, lambda ids: torch.tensor([ids]), lambda ids: [ids]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_encode_with_takes_every_form_of_ids(convert, wrapped):
    def tokenizer(text):
        ids = convert(codes(text))
        return {"input_ids": ids} if wrapped else ids

    assert_rows(encode_with(tokenizer, TEXTS))


def test_encode_with_keeps_a_real_token_that_equals_the_padding():
    def tokenizer(text):
        return {"input_ids": torch.tensor([[0, 5, 0, 6, 0]]), "attention_mask": torch.tensor([[0, 1, 1, 1, 0]])}

    assert_rows(encode_with(tokenizer, ["x", "y"]), [[5, 0, 6], [5, 0, 6]])


def test_encode_with_calls_a_tokenizer_of_lists_once():
    calls = []

    def tokenizer(texts):
        calls.append(texts)
        return torch.tensor([[ord(text[0]), len(text)] for text in texts])

    texts = ["a", "bcd"]
    assert_rows(encode_with(tokenizer, texts), [[97, 1], [98, 3]])
    assert calls == ["bcd", texts]


def test_encode_with_takes_objects_with_encode_and_their_encodings():
    def encode(text):
        return SimpleNamespace(ids=[0, *codes(text)], attention_mask=[0, *[1] * len(text)])

    assert_rows(encode_with(SimpleNamespace(encode=encode), TEXTS))
    assert_rows(encode_with(lambda texts: [encode(text) for text in texts], TEXTS))


def test_encode_with_byte_tokenizer_equals_its_encode():
    assert_rows(encode_with(ByteTokenizer(), TEXTS))
    assert encode_with(ByteTokenizer(), []) == []


def test_encode_with_names_what_is_wrong():
    with pytest.raises(TypeError, match=r"\[text\]"):
        encode_with(ByteTokenizer(), "abc")
    with pytest.raises(TypeError, match=r"\(int\).*encode"):
        encode_with(3, TEXTS)
    with pytest.raises(TypeError, match="float32"):
        encode_with(lambda text: torch.ones(3), TEXTS)
    with pytest.raises(TypeError, match="not text"):
        encode_with(lambda text: text.split(), TEXTS)
    with pytest.raises(ValueError, match=r"texts\[1\] \(''\)"):
        encode_with(ByteTokenizer(), ["abc", ""])
    with pytest.raises(ValueError, match=r"negative id -1 for texts\[0\]"):
        encode_with(lambda text: [-1, 2], TEXTS)
    with pytest.raises(ValueError, match="2 rows of ids for 3 texts"):
        encode_with(lambda text: [[1], [2]], TEXTS)
    with pytest.raises(ValueError, match="no input_ids, only"):
        encode_with(lambda text: {"tokens": [1]}, TEXTS)
    with pytest.raises(ValueError, match="attention_mask"):
        encode_with(lambda text: {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)}, TEXTS)
