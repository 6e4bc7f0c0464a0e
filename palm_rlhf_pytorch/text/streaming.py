"""Text of tokens as they come: a character is given once all its bytes are there, and never taken back.

Knows no model, and of a tokenizer no more than that it decodes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from palm_rlhf_pytorch.text.tokenizer import Decoder

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are no character yet


class TextStream:
    """Tokens in, text out, piece by piece; the pieces together are the text of all tokens.

    Tokens are decoded with some that came before them, because what a token says may hang on its neighbours (a space
    at the beginning, a character in several tokens). So a piece costs as much late in a text as early.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        """Begin a text.

        Args:
            tokenizer: anything with `decode(ids) -> str` that gives U+FFFD for bytes that are no character.
        """
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those that a next token may hang on
        self._finished = 0  # of them, those whose text was given whole
        self._given = 0  # characters of their text that were given

    def add(self, ids: Tensor | Sequence[int] | int) -> str:
        """What is finished by these tokens, and was not before; often nothing.

        Args:
            ids: the next tokens, (n,), or one.
        """
        new = (
            torch.as_tensor(ids).reshape(-1).tolist() if isinstance(ids, Tensor | int) else [int(each) for each in ids]
        )
        if not new:
            return ""
        self._ids += new
        text = self._tokenizer.decode(self._ids)
        piece = text.rstrip(UNFINISHED)[self._given :]
        if text.endswith(UNFINISHED):
            self._given += len(piece)
            return piece
        self._ids = self._ids[self._finished :]
        self._finished = len(self._ids)
        self._given = len(self._tokenizer.decode(self._ids))
        return piece

    def finish(self) -> str:
        """What is left: bytes that no token has made a character of, as U+FFFD. Another text may begin then."""
        rest = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._finished, self._given = [], 0, 0
        return rest
