r"""Chats as ids: turns written out by the tokenizer's own chat template, or as plain text, and which tokens answer.

A tokenizer with a `chat_template` (hf_tokenizer.py) writes turns by it, rendered by transformers in Jinja's sandbox.
Any other writes the plain template of dialogues.py, with eos_token behind each of the assistant's turns:

    "\n\nHuman: hi"  "\n\nAssistant:" | " hello" EOS | "\n\nHuman: ..."  "\n\nAssistant:"

What the assistant says is encoded apart from what stands around it, as when a model writes it. So the ids of a prompt
begin those of every example that goes on from it, unless a template rewrites earlier turns.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.text.dialogues import MARKS, FieldError, Turn, render_prompt, split_turns, turns_of_text
from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.tokenizer import Tokenizer

_PRIVATE = range(0xE000, 0xF8FF)  # characters without a meaning: one that no turn holds marks a place
_REWRITTEN = "is written differently by chat_template once other turns follow it: train on dialogues of one answer"


class RewrittenTurnsError(FieldError):
    """A chat template writes a turn of the assistant differently once others follow it."""


def chat_prompt(turns: Sequence[Turn], tokenizer: Tokenizer) -> Tensor:
    """Ids (n,) that ask the assistant for its next turn.

    Args:
        turns: of a dialogue; the last is the user's.
        tokenizer: with a `chat_template` or without one.

    Raises:
        ImportError: if a template is to be rendered and transformers is not installed.
        ValueError: if there is no turn, the last is not the user's, or the template refuses them.
    """
    if not turns:
        raise ValueError("turns is empty: a prompt takes at least the user's turn")
    render_prompt(turns, field="turns")  # refuses what is no prompt
    try:
        return torch.cat([piece.ids for piece in _pieces(turns, tokenizer)])
    except RewrittenTurnsError:  # some templates leave out of earlier turns what the assistant thought
        assert isinstance(tokenizer, HFTokenizer)
        guard = _guard(turns)
        shown = [turn._replace(content=_guarded(turn.content, tokenizer, guard)) for turn in turns]
        return _encoded(_render(shown, tokenizer, asks=True), tokenizer, guard)


def chat_example(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids (n,) of a dialogue, and a mask (n,), True on the assistant's turns, the tokens that end them included.

    Args:
        turns: of a dialogue; the last is the assistant's.
        tokenizer: with a `chat_template` or without one; one without an eos_token ends no turn of the plain template.

    Raises:
        ImportError: if a template is to be rendered and transformers is not installed.
        ValueError: if there is no turn, the last is not the assistant's, or the template refuses them or writes a turn
            differently once others follow.
    """
    if not turns:
        raise ValueError("turns is empty: an example takes at least the assistant's turn")
    split_turns(turns, field="turns")  # refuses what ends otherwise
    pieces = _pieces(turns, tokenizer)
    ids = torch.cat([piece.ids for piece in pieces])
    mask = torch.cat([torch.arange(len(piece.ids)) < piece.answered for piece in pieces])
    return ids, mask


def stop_strings(tokenizer: Tokenizer) -> tuple[str, ...]:
    r"""What in the text says that the assistant's turn is over: "\n\nHuman:" for the plain template.

    A tokenizer with a template of its own ends turns with a token, see `end_token`.
    """
    return () if _template_of(tokenizer) is not None else (MARKS["user"],)


def end_token(tokenizer: Tokenizer) -> int | None:
    """Id that ends the assistant's turn in a chat: the template's, where that is another than eos_token."""
    if _template_of(tokenizer) is None:
        return tokenizer.eos_token
    assert isinstance(tokenizer, HFTokenizer)
    ids, mask = chat_example((Turn("user", "a"), Turn("assistant", "b")), tokenizer)
    last = tokenizer.decode(ids[mask][-1:])
    return int(ids[mask][-1]) if last == "" else tokenizer.eos_token


class ChatTokenizer:
    """A tokenizer for whoever gives prompts as text: each becomes a chat that asks the assistant.

    A text of the plain template is read as the turns it holds, any other is one turn of the user. What ends a text is
    what ends the assistant's turn.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Stand before a tokenizer, whose ids these are."""
        self.tokenizer = tokenizer
        self.num_tokens, self.bos_token, self.pad_token = tokenizer.num_tokens, tokenizer.bos_token, tokenizer.pad_token
        self.eos_token = end_token(tokenizer)

    def __call__(self, text: str) -> Tensor:
        """Ids (n,) of a prompt."""
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}: one at a time")
        return chat_prompt(turns_of_text(text, field="prompt"), self.tokenizer)

    def responses(self, text: str) -> Tensor:
        """Ids (n,) of what the assistant says to such a prompt, without the token that ends it.

        Text of the plain template begins with the space behind its mark; a template of another kind has none there.
        """
        said = text.removeprefix(" ")
        return self.tokenizer.encode(said if _template_of(self.tokenizer) is not None else f" {said}")

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of ids (n,), without special tokens."""
        return self.tokenizer.decode(ids)


class _Piece(NamedTuple):
    """A stretch of ids (n,), and how many of its first tokens the assistant says; 0 in what stands between."""

    ids: Tensor
    answered: int


def _pieces(turns: Sequence[Turn], tokenizer: Tokenizer) -> list[_Piece]:
    """What the assistant says and what stands around it, in turn; a generation prompt at the end if it speaks next."""
    if _template_of(tokenizer) is not None:
        assert isinstance(tokenizer, HFTokenizer)
        return _template_pieces(turns, tokenizer)
    pieces, begun = [], ""
    for turn in turns:
        if turn.role == "assistant":
            before = tokenizer.encode(begun + MARKS["assistant"])
            said = tokenizer.encode(f" {turn.content}", eos=tokenizer.eos_token is not None)
            pieces += [_Piece(before, 0), _Piece(said, len(said))]
            begun = ""
        else:
            begun += f"{MARKS[turn.role]} {turn.content}"
    return [*pieces, _Piece(tokenizer.encode(begun + MARKS["assistant"]), 0)] if begun else pieces


def _template_pieces(turns: Sequence[Turn], tokenizer: HFTokenizer) -> list[_Piece]:
    pieces: list[_Piece] = []
    guard = _guard(turns)
    shown = [turn._replace(content=_guarded(turn.content, tokenizer, guard)) for turn in turns]
    done = ""
    places = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    for place in places:
        before = _render(shown[:place], tokenizer, asks=True)
        after = _render(shown[: place + 1], tokenizer, asks=False)
        if not before.startswith(done) or not after.startswith(before):
            raise RewrittenTurnsError(f"turns[{place}]", _REWRITTEN)
        said = _encoded(after[len(before) :], tokenizer, guard)
        pieces += [_Piece(_encoded(before[len(done) :], tokenizer, guard), 0), _Piece(said, _answered(said, tokenizer))]
        done = after
    if turns[-1].role != "assistant":
        whole = _render(shown, tokenizer, asks=True)
        if not whole.startswith(done):
            raise RewrittenTurnsError(f"turns[{places[-1]}]", _REWRITTEN)
        pieces.append(_Piece(_encoded(whole[len(done) :], tokenizer, guard), 0))
    return pieces


def _answered(said: Tensor, tokenizer: HFTokenizer) -> int:
    """Tokens up to the last special one, which ends the turn; all of them where there is none."""
    special = [place for place, token in enumerate(said.tolist()) if token in tokenizer.special_ids]
    return special[-1] + 1 if special else len(said)


def _template_of(tokenizer: Tokenizer) -> str | None:
    return tokenizer.chat_template if isinstance(tokenizer, HFTokenizer) else None


def _render(turns: Sequence[Turn], tokenizer: HFTokenizer, *, asks: bool) -> str:
    """Text of a chat by the tokenizer's template."""
    try:
        from jinja2 import TemplateError
        from transformers.utils import chat_template_utils
    except ImportError as error:
        raise ImportError(needs("a chat template", "transformers", extra="hf")) from error
    render: Any = chat_template_utils.render_jinja_template  # annotated as giving less than it does
    messages = [turn._asdict() for turn in turns]
    options = {"chat_template": tokenizer.chat_template, "add_generation_prompt": asks, **tokenizer.token_names}
    try:
        return str(render([messages], **options)[0][0])
    except (TemplateError, TypeError, ValueError, LookupError) as error:  # what a template raises, or fails with
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(f"chat_template refuses the turns {roles}: {error}") from error


def _guard(turns: Sequence[Turn]) -> str:
    """A character that none of the turns holds."""
    return next(chr(code) for code in _PRIVATE if not any(chr(code) in turn.content for turn in turns))


def _guarded(content: str, tokenizer: HFTokenizer, guard: str) -> str:
    """Text with a mark before and behind every special token that it spells."""
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    return (
        re.sub("|".join(map(re.escape, names)), lambda found: f"{guard}{found[0]}{guard}", content)
        if names
        else content
    )


def _encoded(text: str, tokenizer: HFTokenizer, guard: str) -> Tensor:
    """Ids of rendered text, in which the template's special tokens count and those of the turns are text."""
    parts = text.split(guard)  # every second one stood between two marks
    return torch.cat([(tokenizer.encode if at % 2 else tokenizer.encode_marked)(part) for at, part in enumerate(parts)])
