"""Hugging Face tokenizers behind the byte tokenizer's methods."""

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.tokenizer import encode_with
from tests.text.tiny_bpe import CHATML, SPECIAL, tiny_bpe

TEXTS = ["the cat", "né \U0001f600\n\x00  中文", "<|endoftext|> and <|im_end|>", " the  hat\t"]


@pytest.mark.parametrize("text", ["", *TEXTS])
def test_any_text_survives_and_none_of_its_ids_is_special(text):
    tokenizer = HFTokenizer(tiny_bpe())
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == torch.long and not set(ids.tolist()) & {0, 1, 2}


def test_words_of_the_training_text_take_fewer_tokens_than_bytes():
    tokenizer = HFTokenizer(tiny_bpe())
    assert tokenizer.num_tokens == 275
    assert len(tokenizer.encode("the cat sat")) < len("the cat sat")


def test_bos_and_eos_come_only_when_asked_for():
    backend = tiny_bpe()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    tokenizer = HFTokenizer(backend, bos_token="<|im_start|>")
    assert backend.encode("a").ids[0] == 1
    plain = tokenizer.encode("a").tolist()
    assert len(plain) == 1 and tokenizer("a").tolist() == plain and tokenizer(["a"])[0].tolist() == plain
    assert tokenizer.encode("a", bos=True, eos=True).tolist() == [1, *plain, 0]
    assert tokenizer.decode([1, *plain, 0]) == "a"


def test_truncation_and_padding_of_the_file_are_off():
    backend = tiny_bpe()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    tokenizer = HFTokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("a long text")) == "a long text"
    assert len(tokenizer.encode("a")) == 1
    assert backend.truncation is not None  # the one given stays as it is


def test_batch_masks_padding_whatever_id_it_is():
    tokenizer = HFTokenizer(tiny_bpe())
    assert tokenizer.pad_token is None
    long, short = tokenizer.encode("xyzq").tolist(), tokenizer.encode("w").tolist()
    ids, mask = tokenizer.batch(["xyzq", "w"])
    assert ids.tolist() == [long, short + [tokenizer.eos_token] * 3]
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    ids, mask = HFTokenizer(tiny_bpe(), pad_token="<|im_end|>").batch(["xyzq", "w"], left=True)
    assert ids.tolist() == [long, [2] * 3 + short] and mask[1].tolist() == [False, False, False, True]


def test_special_tokens_come_from_transformers_names_or_the_caller():
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tiny_bpe(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML
    )
    tokenizer = HFTokenizer(fast)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (1, 2, None)
    assert tokenizer.chat_template == CHATML
    plain = HFTokenizer(tiny_bpe())
    assert (plain.bos_token, plain.eos_token, plain.chat_template) == (None, 0, None)
    assert HFTokenizer(tiny_bpe(), eos_token="<|im_end|>").eos_token == 2


def test_ids_above_the_vocabulary_are_no_text():
    tokenizer = HFTokenizer(tiny_bpe())
    assert tokenizer.decode([*tokenizer.encode("hat").tolist(), 275, 300]) == "hat"


@pytest.mark.parametrize("again", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["copy", "pickle"])
def test_copies_still_take_special_tokens_in_text_for_text(again):
    tokenizer = HFTokenizer(tiny_bpe(), pad_token="<|im_end|>", chat_template=CHATML)
    found = again(tokenizer)
    assert found.encode(TEXTS[2]).tolist() == tokenizer.encode(TEXTS[2]).tolist()
    assert found.encode_marked(SPECIAL[2]).tolist() == [2]
    assert (found.pad_token, found.chat_template) == (2, CHATML)


def test_threads_may_share_one():
    tokenizer = HFTokenizer(tiny_bpe())

    def both(text):
        return tokenizer.encode(text).tolist(), tokenizer.encode_marked(text).tolist()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(both, TEXTS * 50))
    assert found == [both(text) for text in TEXTS] * 50


def test_encode_with_takes_it():
    tokenizer = HFTokenizer(tiny_bpe())
    assert [ids.tolist() for ids in encode_with(tokenizer, TEXTS)] == [tokenizer.encode(t).tolist() for t in TEXTS]


def test_a_tokenizer_that_loses_characters_is_warned_of():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(["abc"], trainers.BpeTrainer(show_progress=False))
    with pytest.warns(UserWarning, match="lacks 240 of the 243 bytes"):
        tokenizer = HFTokenizer(backend)
    assert tokenizer.decode(tokenizer.encode("aéb")) == "ab"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HFTokenizer(tiny_bpe())


def test_added_tokens_that_are_not_special_are_found_in_text():
    backend = tiny_bpe()
    backend.add_tokens([AddedToken("    ", normalized=False)])  # runs of spaces, as in GPT-NeoX's
    tokenizer = HFTokenizer(backend)
    assert tokenizer.num_tokens == 276 and tokenizer.encode("a    b").tolist()[1] == 275
    assert tokenizer.decode(tokenizer.encode("a    b")) == "a    b"


def test_mistakes_are_named():
    tokenizer = HFTokenizer(tiny_bpe())
    with pytest.raises(ValueError, match=r"no bos_token.*bos_token="):
        tokenizer.encode("a", bos=True)
    with pytest.raises(ValueError, match=r"eos_token \('</s>'\).*275"):
        HFTokenizer(tiny_bpe(), eos_token="</s>")
    with pytest.raises(TypeError, match=r"int.*fast"):
        HFTokenizer(3)
    with pytest.raises(TypeError, match="list"):
        tokenizer.encode(TEXTS)
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer(["a\ud800"])
    with pytest.raises(TypeError, match=r"\[text\]"):
        tokenizer.batch("a")
    with pytest.raises(ValueError, match="-1.*negative"):
        tokenizer.decode([4, -1])
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        tokenizer.decode(torch.tensor([[4, 5]]))
