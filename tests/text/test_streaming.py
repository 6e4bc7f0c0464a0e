"""Text of tokens as they come."""

import pytest
import torch

from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.streaming import TextStream
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from tests.text.tiny_bpe import tiny_bpe


class Words:
    """A tokenizer of words that eats the space before the first, as SentencePiece's do."""

    def decode(self, ids):
        return "".join([" a", " cat", "s", " sat"][number] for number in ids).removeprefix(" ")


def test_a_character_is_given_once_its_last_byte_is_there():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.add(byte) for byte in "né€!".encode()]
    assert pieces == ["n", "", "é", "", "", "€", "!"] and stream.finish() == ""


def test_what_stays_broken_is_given_at_the_end_and_another_text_may_begin():
    stream = TextStream(ByteTokenizer())
    assert stream.add([0x61, 0xE2, 0x82]) == "a"  # two bytes of three
    assert stream.finish() == "\ufffd" and stream.finish() == ""
    assert stream.add(torch.tensor([0xFF, 0x62])) == "\ufffdb"
    assert stream.add([]) == ""


def test_spaces_between_words_survive():
    stream = TextStream(Words())
    assert [stream.add([number]) for number in (0, 1, 2, 3)] == ["a", " cat", "s", " sat"]


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), HFTokenizer(tiny_bpe())], ids=["bytes", "bpe"])
def test_pieces_together_are_the_text_of_any_ids(tokenizer):
    chance = torch.Generator().manual_seed(0)
    for length in (1, 7, 60):
        ids = torch.randint(tokenizer.num_tokens, (length,), generator=chance)
        stream = TextStream(tokenizer)
        pieces = [stream.add(part) for part in ids.split(3)]
        assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)
