"""A Hugging Face tokenizer behind `encode / decode / batch`: a `tokenizers` file, or a fast tokenizer of transformers.

What it would do behind one's back is off: no BOS or EOS that was not asked for, no truncation, no padding, no spaces
tidied away, and a text that spells a special token stays text. Needs the extra [hf].
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text.tokenizer import Tokenizer, row_of_ids, utf8

# what a `tokenizers` file calls its special tokens, which does not say which is which; the first that is there counts
BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]")
PAD_NAMES = ("<pad>", "<|pad|>", "<|padding|>", "[PAD]")
TIMEOUT = 10.0  # seconds until the Hub counts as out of reach


def as_tokenizer(tokenizer: object) -> Tokenizer:
    """The tokenizer itself, or one of Hugging Face's behind `HFTokenizer`.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(getattr(tokenizer, "num_tokens", None), int):
        return cast(Tokenizer, tokenizer)
    return HFTokenizer(tokenizer)


class HFTokenizer:
    """Ids of a `tokenizers.Tokenizer`, with the ids that begin and end a text, and a template for chats.

    bos_token, eos_token and pad_token are ids, or None where the tokenizer has none; num_tokens is the largest id plus
    one; chat_template is Jinja text or None. Nothing changes after construction: threads may share one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Take a tokenizer over; the one given stays as it is.

        Args:
            tokenizer: a `tokenizers.Tokenizer`, or a fast tokenizer of transformers, whose own special tokens and
                template stand where none is given here. A `tokenizers.Tokenizer` does not know which of its special
                tokens is which: those called by the names in BOS_NAMES, EOS_NAMES and PAD_NAMES are taken.
            bos_token: the token that begins a text, as it is written ("<s>").
            eos_token: the token that ends one.
            pad_token: the token that fills a batch.
            chat_template: Jinja, as in tokenizer_config.json.

        Raises:
            TypeError: if the tokenizer is neither; those of transformers that are not fast are not.
            ValueError: if a token is not in the vocabulary.

        Warns:
            UserWarning: if it is a byte-level tokenizer that does not have all bytes, and so loses characters.
        """
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "encode_special_tokens"):
            raise TypeError(
                f"tokenizer ({type(tokenizer).__name__}) must be a tokenizers.Tokenizer or a fast tokenizer of"
                " transformers (use_fast=True)"
            )
        _warn_of_lost_bytes(backend)
        self._plain, self._marked = _copied(backend, specials=False), _copied(backend, specials=True)
        specials = _specials(backend)
        self.special_tokens, self.special_ids = frozenset(specials), frozenset(specials.values())
        self.num_tokens = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        given = {"bos_token": bos_token, "eos_token": eos_token, "pad_token": pad_token}
        names = {
            role: name or (_own(tokenizer, role) if tokenizer is not backend else _known(backend, role))
            for role, name in given.items()
        }
        self.token_names = {role: name for role, name in names.items() if name is not None}
        self.bos_token, self.eos_token, self.pad_token = (self._id(role) for role in given)
        self.chat_template = chat_template if chat_template is not None else _template(tokenizer)

    def _id(self, role: str) -> int | None:
        name = self.token_names.get(role)
        found = None if name is None else self._marked.token_to_id(name)
        if name is not None and found is None:
            raise ValueError(f"{role} ({name!r}) is not in the tokenizer's vocabulary of {self.num_tokens}")
        return found

    def __call__(self, texts: str | Sequence[str]) -> Tensor | list[Tensor]:
        """Ids of a text (n,), or a list of them for a sequence of texts."""
        if isinstance(texts, str):
            return self.encode(texts)
        for text in texts:
            utf8(text)
        found = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [torch.tensor(encoding.ids, dtype=torch.long) for encoding in found]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> Tensor:
        """Ids of a text, none of them special: "<|endoftext|>" in it is eleven or so characters like others.

        Args:
            text: any text.
            bos: put bos_token first.
            eos: put eos_token last.

        Returns:
            Long tensor (n,).

        Raises:
            TypeError: if text is not a str.
            ValueError: if text holds a lone surrogate, or the token asked for does not exist.
        """
        utf8(text)
        return self._framed(self._plain.encode(text, add_special_tokens=False).ids, bos=bos, eos=eos)

    def encode_marked(self, text: str) -> Tensor:
        """Ids (n,) of text in which special tokens are written out, as in a rendered template; never a user's text."""
        utf8(text)
        return self._framed(self._marked.encode(text, add_special_tokens=False).ids, bos=False, eos=False)

    def _framed(self, ids: list[int], *, bos: bool, eos: bool) -> Tensor:
        for asked, role in ((bos, "bos_token"), (eos, "eos_token")):
            if asked and getattr(self, role) is None:
                raise ValueError(f"the tokenizer has no {role}: name the one to use, HFTokenizer(..., {role}=...)")
        tokens = torch.tensor(ids, dtype=torch.long)
        return F.pad(F.pad(tokens, (int(bos), 0), value=self.bos_token), (0, int(eos)), value=self.eos_token)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of ids (n,), spaces as they are; special tokens, and ids above the vocabulary, stand for no text.

        A model's vocabulary is often padded to a round number, so that it may give ids the tokenizer does not know.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if ids are not one row, or one is negative.
        """
        tokens = row_of_ids(ids).tolist()
        if tokens and min(tokens) < 0:
            raise ValueError(f"ids hold {min(tokens)}, which is negative: leave padding out before decoding")
        framing = (self.bos_token, self.eos_token, self.pad_token)
        return self._plain.decode([token for token in tokens if token not in framing], skip_special_tokens=True)

    def batch(self, texts: Sequence[str], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids (b, n) of several texts, and the mask (b, n), True on text.

        Padding is pad_token; without one eos_token, or 0: the mask, not the id, says what is padding.

        Args:
            texts: b texts.
            left: pad on the left, so that every text ends in the last column.

        Raises:
            TypeError: if texts is a single str.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of str; for one text, pass [text]")
        fill = next((token for token in (self.pad_token, self.eos_token) if token is not None), 0)
        return pad_ragged([self.encode(text) for text in texts], pad_value=fill, left=left)

    def to_json(self) -> str:
        """The `tokenizers` file, without special roles and template: those are `token_names` and `chat_template`."""
        return self._plain.to_str()

    def __reduce__(self) -> tuple[Callable[..., "HFTokenizer"], tuple[Any, ...]]:
        """Copies and other processes get what `tokenizers` itself forgets when it is pickled."""
        return tokenizer_from_json, (self.to_json(), self.token_names, self.chat_template)


def tokenizer_from_json(
    content: str, token_names: dict[str, str], chat_template: str | None, *, where: str | Path = "the tokenizer"
) -> HFTokenizer:
    """A tokenizer from the text of a `tokenizers` file.

    Args:
        content: JSON, as `tokenizers` writes it.
        token_names: of bos_token, eos_token and pad_token, where they are known.
        chat_template: Jinja, or None.
        where: the text is from, for messages.

    Raises:
        ImportError: if tokenizers is not installed.
        ValueError: if the text is no such file.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(needs(str(where), "tokenizers", extra="hf")) from error
    try:
        backend = Tokenizer.from_str(content)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{where} is no file of `tokenizers`: {error}") from error
    return HFTokenizer(backend, **token_names, chat_template=chat_template)


def tokenizer_from_hub(name: str) -> HFTokenizer:
    """The tokenizer of a repository on the Hugging Face Hub, or of a folder in its layout; cached by transformers.

    Args:
        name: such as "EleutherAI/gpt-neox-20b".

    Raises:
        ImportError: if transformers is not installed.
        OSError, ValueError: if there is none of that name, or it cannot be fetched.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(needs(f"the tokenizer {name}", "transformers", extra="hf")) from error
    try:
        offline = not Path(name).is_dir() and not _answers(name)
        found: Any = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    except (OSError, ValueError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"no tokenizer {name} could be loaded: {reason}") from error
    return HFTokenizer(found)


def _answers(name: str) -> bool:
    """Whether the Hub can be reached: without it transformers would try for minutes before it looks in its cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # what its HTTP client raises; ValueError if it is no repository's name
    unreachable = cast("tuple[type[Exception], ...]", (ValueError, *HfHubHTTPError.__bases__))
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except HfHubHTTPError:  # a refusal, which transformers words
        return True
    except unreachable:
        return False
    return True


def _copied(backend: Any, *, specials: bool) -> Any:
    """The same tokenizer without truncation and padding, that reads written special tokens or takes them for text."""
    found = copy.deepcopy(backend)
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = not specials  # this flag is what tokenizers does not copy or save
    return found


def _warn_of_lost_bytes(backend: Any) -> None:
    """Warn of a byte-level BPE trained without its whole alphabet: tokenizers leaves out what it does not know."""
    if type(backend.decoder).__name__ != "ByteLevel" or getattr(backend.model, "unk_token", None) is not None:
        return
    from tokenizers.pre_tokenizers import ByteLevel

    leads = [*range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)]  # with those below, all bytes of UTF-8
    every = "".join(map(chr, [*range(0x800), *leads]))
    symbols = set("".join(part for part, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(every)))
    vocabulary = backend.get_vocab(with_added_tokens=False)
    missing = sum(symbol not in vocabulary for symbol in symbols)
    if missing:
        warnings.warn(
            f"the tokenizer lacks {missing} of the {len(symbols)} bytes of UTF-8: characters with them vanish from"
            " texts; train it with initial_alphabet=ByteLevel.alphabet()",
            stacklevel=3,
        )


def _specials(backend: Any) -> dict[str, int]:
    return {token.content: number for number, token in backend.get_added_tokens_decoder().items() if token.special}


def _known(backend: Any, role: str) -> str | None:
    names = {"bos_token": BOS_NAMES, "eos_token": EOS_NAMES, "pad_token": PAD_NAMES}[role]
    specials = _specials(backend)
    return next((name for name in names if name in specials), None)


def _own(tokenizer: Any, role: str) -> str | None:
    """How a tokenizer of transformers writes its special token; None where it has none."""
    found = getattr(tokenizer, role, None)
    return None if found is None else str(found)


def _template(tokenizer: Any) -> str | None:
    found = getattr(tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found
