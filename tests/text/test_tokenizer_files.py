"""Tokenizers by name, and beside checkpoints."""

import json

import pytest
from transformers import AutoTokenizer

from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.text.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_digest, tokenizer_of
from tests.text.tiny_bpe import CHATML, tiny_bpe

TEXT = "né the cat <|im_end|>"


def own():
    """One whose special tokens and template no file of `tokenizers` tells."""
    return HFTokenizer(tiny_bpe(), bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHATML)


@pytest.mark.parametrize("name", ["palm.pt", "folder"])
def test_what_is_saved_beside_a_checkpoint_comes_back(tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = save_tokenizer(own(), tmp_path / name)
    assert path == {"palm.pt": tmp_path / "palm.tokenizer.json", "folder": tmp_path / "folder" / "tokenizer.json"}[name]
    for found in (tokenizer_of(tmp_path / name, num_tokens=304), load_tokenizer(path)):
        assert isinstance(found, HFTokenizer)
        assert found.encode(TEXT, eos=True).tolist() == own().encode(TEXT, eos=True).tolist()
        assert (found.bos_token, found.eos_token, found.pad_token, found.chat_template) == (1, 2, None, CHATML)
        assert tokenizer_digest(found) == tokenizer_digest(own())


def test_a_folder_is_one_that_transformers_reads(tmp_path):
    save_tokenizer(own(), tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert (found.bos_token, found.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == (
        "<|im_start|>user\na<|im_end|>\n"
    )
    found.save_pretrained(tmp_path / "theirs")
    assert tokenizer_digest(load_tokenizer(tmp_path / "theirs")) == tokenizer_digest(own())


def test_bytes_are_told_from_nothing(tmp_path):
    assert isinstance(tokenizer_of(tmp_path / "palm.pt", num_tokens=259), ByteTokenizer)
    with pytest.raises(ValueError, match=r"num_tokens=304.*--tokenizer"):
        tokenizer_of(tmp_path / "palm.pt", num_tokens=304)
    save_tokenizer(own(), tmp_path / "palm.pt")
    save_tokenizer(ByteTokenizer(), tmp_path / "palm.pt")
    assert isinstance(tokenizer_of(tmp_path / "palm.pt", num_tokens=304), ByteTokenizer)
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_a_file_of_tokenizers_is_taken_as_it_is(tmp_path):
    tiny_bpe().save(str(tmp_path / "any.json"))
    found = load_tokenizer(tmp_path / "any.json")
    assert found.encode(TEXT).tolist() == own().encode(TEXT).tolist() and found.eos_token == 0
    assert tokenizer_digest(found) != tokenizer_digest(own())  # texts end otherwise


def test_mistakes_are_named(tmp_path):
    save_tokenizer(own(), tmp_path / "palm.pt")
    with pytest.raises(ValueError, match="275 tokens.*num_tokens=259"):
        tokenizer_of(tmp_path / "palm.pt", num_tokens=259)
    with pytest.raises(FileNotFoundError, match="none.json"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="function"):
        save_tokenizer(lambda text: [1], tmp_path / "palm.pt")
    for content, message in (("{", "not JSON"), ("[1]", "list"), ('{"a": 1}', "tokenizers")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=f"bad.json.*{message}"):
            load_tokenizer(tmp_path / "bad.json")
    saved = json.loads((tmp_path / "palm.tokenizer.json").read_text())
    (tmp_path / "palm.tokenizer.json").write_text(json.dumps({**saved, "special_tokens": None}))
    with pytest.raises(ValueError, match="damaged.*special_tokens"):
        tokenizer_of(tmp_path / "palm.pt", num_tokens=304)


@pytest.mark.parametrize("reachable", [True, False])
def test_without_a_network_the_cache_is_asked_at_once(tmp_path, monkeypatch, reachable):
    asked = []

    def model_info(self, name, **options):
        if not reachable:
            raise OSError("Name or service not known")

    def from_pretrained(name, *, local_files_only):
        asked.append((name, local_files_only))
        raise OSError("\nnot in the cache\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="no tokenizer owner/name could be loaded: not in the cache$"):
        load_tokenizer("owner/name")
    assert asked == [("owner/name", not reachable)]


def test_a_checkpoint_names_the_tokenizer_saved_beside_it(tmp_path):
    (tmp_path / "palm.pt").write_bytes(b"weights")
    save_tokenizer(ByteTokenizer(), tmp_path / "palm.pt")
    assert isinstance(load_tokenizer(tmp_path / "palm.pt"), ByteTokenizer)
