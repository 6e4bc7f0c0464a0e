"""Words become token ids: what a tokenizer is here, a byte tokenizer, and any other one behind one function.

It knows no model: ids in, ids out. Hugging Face tokenizers (`hf_tokenizer.py`) are accepted, never imported.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.tensors import pad_ragged

NUM_BYTES = 256


class Decoder(Protocol):
    """A tokenizer, as far as reading needs one."""

    def decode(self, ids: list[int], /) -> str:
        """Text of ids."""
        ...


class Tokenizer(Protocol):
    """What the library asks of a tokenizer: `ByteTokenizer` is one, `HFTokenizer` (hf_tokenizer.py) another.

    Ids go from 0 to num_tokens - 1. `bos_token` begins a text, `eos_token` ends it, `pad_token` fills a batch; a
    tokenizer that has no such token says None. A user's text never becomes one of them.
    """

    @property
    def num_tokens(self) -> int:
        """Ids that it may give; a model's vocabulary has as many, or more."""
        ...

    @property
    def bos_token(self) -> int | None:
        """Id that begins a text."""
        ...

    @property
    def eos_token(self) -> int | None:
        """Id that ends a text."""
        ...

    @property
    def pad_token(self) -> int | None:
        """Id that fills a batch."""
        ...

    def __call__(self, texts: str | Sequence[str]) -> Tensor | list[Tensor]:
        """Ids of a text (n,), or a list of them for a sequence of texts."""
        ...

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> Tensor:
        """Ids of a text (n,), with bos_token first and eos_token last where they are asked for."""
        ...

    def decode(self, ids: Tensor | Sequence[int], /) -> str:
        """Text of ids (n,), without special tokens; bytes that are no character become U+FFFD."""
        ...

    def batch(self, texts: Sequence[str], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids (b, n) of texts, padded on the right or the left, and the mask (b, n), True on text."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and three ids that stand for no byte.

    bos_token 256 begins a text, eos_token 257 ends it, pad_token 258 fills a batch; num_tokens is 259. Any text
    survives encode and decode unchanged.
    """

    bos_token = NUM_BYTES
    eos_token = NUM_BYTES + 1
    pad_token = NUM_BYTES + 2
    num_tokens = NUM_BYTES + 3

    def __call__(self, texts: str | Sequence[str]) -> Tensor | list[Tensor]:
        """Ids of a text (n,), or a list of them for a sequence of texts."""
        return self.encode(texts) if isinstance(texts, str) else [self.encode(text) for text in texts]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> Tensor:
        """Ids of a text.

        Args:
            text: any text.
            bos: put bos_token first.
            eos: put eos_token last.

        Returns:
            Long tensor (n,), n the number of UTF-8 bytes and of the special tokens asked for.

        Raises:
            TypeError: if text is not a str.
            ValueError: if text holds a lone surrogate, which UTF-8 cannot write.
        """
        content = utf8(text)
        ids = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).astype(np.int64))
        return F.pad(F.pad(ids, (int(bos), 0), value=self.bos_token), (0, int(eos)), value=self.eos_token)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of ids (n,); special tokens are skipped, bytes that are not UTF-8 become U+FFFD.

        Raises:
            TypeError: if ids are not integers.
            ValueError: if ids are not one row, or one of them is outside 0 to 258.
        """
        tokens = row_of_ids(ids)
        wrong = tokens[(tokens < 0) | (tokens >= self.num_tokens)]
        if len(wrong) > 0:
            raise ValueError(f"ids hold {int(wrong[0])}, outside 0 to {self.num_tokens - 1}: not ids of ByteTokenizer")
        return bytes(tokens[tokens < NUM_BYTES].tolist()).decode("utf-8", errors="replace")

    def batch(self, texts: Sequence[str], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids (b, n) of several texts, padded with pad_token, and the mask (b, n), True on text.

        Args:
            texts: b texts, n the length in bytes of the longest.
            left: pad on the left, so that every text ends in the last column.

        Raises:
            TypeError: if texts is a single str.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of str; for one text, pass [text]")
        return pad_ragged([self.encode(text) for text in texts], pad_value=self.pad_token, left=left)


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text.

    Raises:
        TypeError: if text is not a str.
        ValueError: if it holds a lone surrogate, which UTF-8 cannot write.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {type(text).__name__}; call the tokenizer itself on several texts")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = text[error.start]
        raise ValueError(f"text holds a lone surrogate {character!r} at character {error.start}") from error


def encode_with(tokenizer: object, texts: Sequence[str]) -> list[Tensor]:
    """Ids of each text under any tokenizer, without padding.

    The tokenizer is called with one text at a time; one that takes only lists (it raises TypeError, or returns a row
    for each character) is called once with the list. An object that cannot be called serves by its `encode`.

    Args:
        tokenizer: gives ids as a dict or BatchEncoding (`input_ids`, and `attention_mask`, 0 on padding on either
            side), a `tokenizers` Encoding, a tensor or array (n,), (1, n) or (b, n), or lists of int. Rows that come
            without an attention mask are taken whole.
        texts: b texts.

    Returns:
        b long tensors (n,), each of its own length.

    Raises:
        TypeError: if texts is a single str, the tokenizer has neither call nor `encode`, or ids are not integers.
        ValueError: if a text gives no id or a negative one, or the rows are not one for each text.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a list of str; for one text, pass [text]")
    encode = tokenizer if callable(tokenizer) else getattr(tokenizer, "encode", None)
    if not callable(encode):
        raise TypeError(f"tokenizer ({type(tokenizer).__name__}) must be a callable, or have a method encode(text)")
    if len(texts) == 0:
        return []
    # the longest, because on a text of one character both readings of a tokenizer agree
    if _takes_one_text(encode, max(texts, key=len)):
        rows = [row for text in texts for row in _rows(encode(text))]
    else:
        rows = _rows(encode(list(texts)))
    if len(rows) != len(texts):
        raise ValueError(f"tokenizer gave {len(rows)} rows of ids for {len(texts)} texts; it must give one for each")
    for index, row in enumerate(rows):
        if len(row) == 0:
            raise ValueError(f"tokenizer gave no token for texts[{index}] ({texts[index]!r}); leave that text out")
        if int(row.min()) < 0:
            raise ValueError(f"tokenizer gave the negative id {int(row.min())} for texts[{index}] ({texts[index]!r})")
    return rows


def response_tokenizer(tokenizer: object) -> object:
    """What makes ids of responses, as `encode_with` takes it: the tokenizer's own `responses`, or itself."""
    return getattr(tokenizer, "responses", tokenizer)


def row_of_ids(ids: Any) -> Tensor:
    """Long tensor (n,) of one row of ids, which may be empty.

    Raises:
        TypeError: if ids are not integers.
        ValueError: if they are not one row.
    """
    tokens = _as_ids(ids)
    if tokens.ndim != 1:
        raise ValueError(f"ids must be one row (n,), not of shape {tuple(tokens.shape)}; decode each row by itself")
    return tokens


def _takes_one_text(encode: Callable[..., Any], text: str) -> bool:
    try:
        output = encode(text)
    except TypeError:
        # a tokenizer for lists; if it is another mistake, the call with the list raises it
        return False
    return len(_rows(output)) == 1


def _rows(output: Any) -> list[Tensor]:
    """Real tokens of each row of a tokenizer's output."""
    if isinstance(output, Mapping):
        if "input_ids" not in output:
            raise ValueError(f"tokenizer's output has no input_ids, only {sorted(map(str, output))}")
        return _masked_rows(output["input_ids"], output.get("attention_mask"))
    if hasattr(output, "input_ids"):
        return _masked_rows(output.input_ids, getattr(output, "attention_mask", None))
    if hasattr(output, "ids"):
        return _masked_rows(output.ids, getattr(output, "attention_mask", None))
    if isinstance(output, Sequence) and len(output) > 0 and not isinstance(output[0], int | np.integer):
        if isinstance(output, str) or isinstance(output[0], str):
            raise TypeError("tokenizer must give ids (int), not text; pass a function that also converts tokens to ids")
        return [row for part in output for row in _rows(part)]
    return _masked_rows(output, None)


def _masked_rows(ids: Any, mask: Any) -> list[Tensor]:
    if isinstance(ids, Sequence) and len(ids) > 0 and not isinstance(ids[0], int | np.integer):
        masks = [None] * len(ids) if mask is None else mask
        return [row for part, kept in zip(ids, masks, strict=True) for row in _masked_rows(part, kept)]
    tokens = _as_ids(ids)
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokenizer's ids must have shape (n,) or (b, n), not {tuple(tokens.shape)}")
    tokens = torch.atleast_2d(tokens)
    if mask is None:
        return list(tokens)
    keep = torch.atleast_2d(torch.as_tensor(mask)).bool()
    if keep.shape != tokens.shape:
        raise ValueError(f"attention_mask {tuple(keep.shape)} must have the shape of input_ids {tuple(tokens.shape)}")
    return [row[kept.to(row.device)] for row, kept in zip(tokens, keep, strict=True)]


def _as_ids(ids: Any) -> Tensor:
    """Long tensor of ids; an empty list is an empty row."""
    tokens = torch.as_tensor(ids) if not isinstance(ids, Sequence) or len(ids) > 0 else torch.zeros(0, dtype=torch.long)
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, not {tokens.dtype}")
    return tokens.detach().long()
