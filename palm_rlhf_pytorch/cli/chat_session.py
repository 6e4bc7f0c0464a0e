"""What a talk with a model consists of: turns so far, what of them fits the context, and the next answer.

`Chat` asks by the tokenizer's chat template; `RawText` goes on with plain text. Knows no terminal.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from palm_rlhf_pytorch.cli.generate import unindented
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.chats import chat_prompt, end_token, stop_strings
from palm_rlhf_pytorch.text.dialogues import Turn
from palm_rlhf_pytorch.text.stops import check_stops
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.atomic import replacing

SUFFIX = ".jsonl"


class Voice:
    """A model that speaks: what it draws with, and how much it may read and say."""

    def __init__(
        self, palm: PaLM, tokenizer: Tokenizer, *, context: int, max_new_tokens: int, generator: torch.Generator,
        stop: Sequence[str] = (), temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    ) -> None:  # fmt: skip
        """Check the sizes.

        Args:
            palm: the model.
            tokenizer: its tokenizer.
            context: tokens that question and answer may have together; no more than palm.max_length are taken.
            max_new_tokens: tokens of an answer at most.
            generator: random state, on the model's device.
            stop: strings that end an answer, besides the template's own.
            temperature: 0 is greedy.
            top_k: draw among the k most likely tokens.
            top_p: draw among the most likely tokens of this mass.

        Raises:
            ValueError: if context is below 2, max_new_tokens below 1, or a setting names no distribution.
        """
        if context < 2:
            raise ValueError(f"--context {context}: must be at least 2 tokens, one to read and one to write")
        if max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
        sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        check_sampling(**sampling)
        check_stops(stop)
        self.palm, self.tokenizer, self.generator = palm, tokenizer, generator
        self.context = int(min(context, palm.max_length))
        self.max_new_tokens, self.stop, self.sampling = max_new_tokens, tuple(stop), sampling

    @property
    def most_read(self) -> int:
        """Tokens that leave room for an answer: one of max_new_tokens, or half the context where that is less."""
        return self.context - min(self.max_new_tokens, self.context // 2)

    def speak(self, ids: Tensor, *, stop: Sequence[str], eos_token: int | None) -> Generator[str, None, None]:
        """Pieces of what follows ids (n,).

        Raises:
            ValueError: if they fill the context.
        """
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"the message has {len(ids)} tokens with what stands around it; the context of {self.context} leaves"
                " no room for an answer: write less, or raise --context"
            )
        return self.palm.stream(
            ids, tokenizer=self.tokenizer, max_new_tokens=min(room, self.max_new_tokens), stop=(*stop, *self.stop),
            eos_token=eos_token, generator=self.generator, **self.sampling,
        )  # fmt: skip


class Session(Protocol):
    """A talk that can be gone on with, begun anew and written down."""

    @property
    def forgotten(self) -> bool:
        """Whether something of it no longer fits the context."""
        ...

    def answer(self, message: str) -> Generator[str, None, None]:
        """Pieces of the answer; what was given of it is kept, also when it is left early."""
        ...

    def reset(self) -> None:
        """Begin anew."""
        ...

    def record(self) -> Mapping[str, object] | None:
        """A row of columns that says all of it; None if nothing was said."""
        ...


class Chat:
    """Turns of a user and a model; the oldest are left out of the question once they no longer fit."""

    def __init__(self, voice: Voice, *, system: str | None = None) -> None:
        """Begin, with a system turn if there is one; it is never left out."""
        self.voice, self.stops, self.end = voice, stop_strings(voice.tokenizer), end_token(voice.tokenizer)
        self.opening = () if system is None else (Turn("system", system),)
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the same system turn."""
        self.turns: list[Turn] = []
        self.left_out = 0  # turns at the beginning that no longer fit

    @property
    def forgotten(self) -> bool:
        """Whether turns were left out of the last question."""
        return self.left_out > 0

    def answer(self, message: str) -> Generator[str, None, None]:
        """Pieces of the model's answer, without blanks before it.

        Both turns are kept with what was given of the answer, also if it is left early; neither if that is nothing.

        Raises:
            ValueError: if the message leaves no room for an answer, or cannot be encoded.
        """
        asked = [*self.turns, Turn("user", message)]
        pieces = self.voice.speak(self._fitting(asked), stop=self.stops, eos_token=self.end)
        said = ""
        try:
            for piece in unindented(pieces):
                said += piece
                yield piece
        finally:
            if said.strip():
                self.turns = [*asked, Turn("assistant", said.strip())]

    def record(self) -> Mapping[str, object] | None:
        """All turns, also those that no longer fit, as `messages` of role and content."""
        return {"messages": [turn._asdict() for turn in (*self.opening, *self.turns)]} if self.turns else None

    def _fitting(self, asked: Sequence[Turn]) -> Tensor:
        """Ids of the question, without the oldest turns, a question and its answer at a time, where they are many."""
        while True:
            ids = chat_prompt((*self.opening, *asked[self.left_out :]), self.voice.tokenizer)
            if len(ids) <= self.voice.most_read or self.left_out == len(asked) - 1:
                return ids
            self.left_out += 2


class RawText:
    """Text that a model continues; a message begins another, an empty one goes on with the last."""

    def __init__(self, voice: Voice) -> None:
        """Begin without text."""
        self.voice = voice
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.text, self.forgotten = "", False

    def answer(self, message: str) -> Generator[str, None, None]:
        """Pieces of the continuation, which are added to the text.

        Raises:
            ValueError: if the text cannot be encoded, or is empty and the tokenizer has no BOS to begin from.
        """
        begun = message or self.text
        tokenizer = self.voice.tokenizer
        ids = tokenizer.encode(begun, bos=not begun and tokenizer.bos_token is not None)
        self.forgotten = len(ids) > self.voice.most_read
        ids = ids[-self.voice.most_read :]
        pieces = self.voice.speak(ids, stop=(), eos_token=tokenizer.eos_token)
        self.text = begun
        for piece in pieces:
            self.text += piece
            yield piece

    def record(self) -> Mapping[str, object] | None:
        """The text."""
        return {"text": self.text} if self.text else None


class Book:
    """Lines of JSON that a talk is written to; saving it again to the same file replaces its line."""

    def __init__(self) -> None:
        self.lines: dict[Path, bytes] = {}

    def save(self, record: Mapping[str, object], path: Path) -> None:
        """Add the record to the file, or put it in place of what the same talk was when it was last saved there.

        Raises:
            ValueError: if the file's name does not end with .jsonl: another kind of file would be spoilt.
            OSError: if it cannot be written; it is then as it was.
        """
        if path.suffix != SUFFIX:
            raise ValueError(f"{path}: a talk is saved as a line of JSON; name a file that ends with {SUFFIX}")
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        before = path.read_bytes() if path.exists() else b""
        if path in self.lines:
            before = before.removesuffix(self.lines[path])
        if before and not before.endswith(b"\n"):
            before += b"\n"
        with replacing(path) as file:
            file.write(before + line)
        self.lines[path] = line

    def turn_page(self) -> None:
        """From now on it is another talk."""
        self.lines.clear()
