"""Demonstrations: dialogues and prompts with the responses to imitate, from files or rows, and as token ids.

    a dialogue   messages, conversations, conversation, dialogue or turns: a list of {role, content} or {from, value}
    two texts    prompt with completion or response, each text or turns
    one text     text or chosen, a dialogue written out ("Human:", "Assistant:")
    any          group: records of one group stay together in a split

Plain text with a plain prompt stays as it is; turns are written by the tokenizer's chat template. Knows no model.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from palm_rlhf_pytorch.text.chats import chat_example, chat_prompt
from palm_rlhf_pytorch.text.datasets import BadRecord, read_each, source_rows, stop_at_bad_record
from palm_rlhf_pytorch.text.dialogues import (
    FieldError,
    Turn,
    read_parts,
    read_turns,
    render_prompt,
    split_text,
    split_turns,
    turns_of_text,
)
from palm_rlhf_pytorch.text.records import Text
from palm_rlhf_pytorch.text.tokenizer import Tokenizer

DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "turns")
RESPONSES = ("completion", "response")
WRITTEN_OUT = ("text", "chosen")


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A dialogue to learn from, or a plain prompt and its response.

    Attributes:
        turns: of a dialogue, the last the assistant's; empty for plain text.
        plain: prompt, which may be empty, and response; None for a dialogue.
        group: records of one group stay together in a split; None to go by the prompt.
        line: where it stood in its file, counted from 1; 0 for none.
    """

    turns: tuple[Turn, ...] = ()
    plain: Text | None = None
    group: str | None = None
    line: int = 0

    @property
    def texts(self) -> tuple[Text, ...]:
        """The last response and all before it, written out plainly."""
        return (Text(*split_turns(self.turns, field="turns")) if self.plain is None else self.plain,)


@dataclass
class Demonstrations:
    """What was read, and what happened to the rest.

    Attributes:
        records: in the order of their rows.
        bad: records left out.
        rows: how many rows were read, bad ones included.
        unread: columns that nothing was read from, and in how many rows they stand.
    """

    records: list[Demonstration] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    rows: int = 0
    unread: Counter[str] = field(default_factory=Counter)


def read_demonstrations(
    source: str | Path | Iterable[str | Path | Mapping[str, object]],
    *,
    on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record,
) -> Demonstrations:
    """Demonstrations of files or rows; the module says which columns hold them.

    Args:
        source: a path, several, or rows (mappings of columns). Files are JSON lines, a JSON array, CSV or TSV with a
            header, in UTF-8, plain or .gz, as their names end.
        on_bad_record: is told of each record that cannot be read, and may raise; see `read_labels`.

    Raises:
        TypeError: if source is a single row, or holds something else than rows and paths.
        FileNotFoundError, ValueError: if a file is missing, of no known kind, or not one record can be read.
    """
    found = Demonstrations()
    for read in read_each(source_rows(source), _read_row, on_bad_record):
        found.rows += 1
        if isinstance(read, BadRecord):
            found.bad.append(read)
            continue
        record, unread = read
        found.records.append(record)
        found.unread.update(unread)
    if not found.records:
        first = f"; the first of {len(found.bad):,} bad records: {found.bad[0]}" if found.bad else ""
        raise ValueError(f"source holds no dialogue{first}")
    return found


def example_of(record: Demonstration, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Ids of a demonstration (n,), and a mask (n,), True on what is to be imitated, the tokens that end it included.

    A plain prompt is encoded apart from its response, as it is when a model answers it.

    Raises:
        ImportError: if the tokenizer has a chat template and transformers is not installed.
        ValueError: if its template refuses the turns.
    """
    if record.plain is None:
        return chat_example(record.turns, tokenizer)
    prompt = tokenizer.encode(record.plain.prompt)
    response = tokenizer.encode(record.plain.response, eos=tokenizer.eos_token is not None)
    ids = torch.cat((prompt, response))
    return ids, torch.arange(len(ids)) >= len(prompt)


def prompt_of(record: Demonstration, tokenizer: Tokenizer) -> Tensor | None:
    """Ids (n,) that ask for the last response of a demonstration; None where nothing stands before it."""
    if record.plain is None:
        asked = record.turns[:-1]
        return chat_prompt(asked, tokenizer) if asked and asked[-1].role == "user" else None
    return tokenizer.encode(record.plain.prompt) if record.plain.prompt else None


def _read_row(columns: Mapping[str, object], line: int) -> tuple[Demonstration, list[str]]:
    """The record of a row, and the columns that nothing was read from."""
    record, read = _demonstration(columns, line=line)
    return record, [str(name) for name in columns if name not in read]


def _demonstration(columns: Mapping[str, object], *, line: int) -> tuple[Demonstration, set[str]]:
    """The record of a row, and the columns it was read from."""
    here = {str(name): value for name, value in columns.items() if value is not None and value != ""}
    group = here.get("group")
    if group is not None and (isinstance(group, bool) or not isinstance(group, str | int)):
        raise FieldError("group", f"is of type {type(group).__name__}; give text or a whole number")
    common = {"group": None if group is None else str(group), "line": line}
    name = _one_of(here)
    value, prompt = here[name], None if name in DIALOGUES else here.get("prompt")  # chats often repeat theirs there
    read = {name, "group"} | ({"prompt"} if prompt is not None else set())
    if name in RESPONSES and isinstance(value, str) and isinstance(prompt, str | None):
        found = _written_out(value, name) if prompt is None else None
        if found is None:
            plain = read_parts(prompt, value, field=name)
            return Demonstration(plain=Text(plain.prompt, plain.response), **common), read  # type: ignore[arg-type]
        turns = found
    else:
        turns = _turns(prompt, value, name)
    _check_turns(turns, name)
    last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
    return Demonstration(turns=turns[: last + 1], **common), read  # type: ignore[arg-type]


def _turns(prompt: object, value: object, name: str) -> tuple[Turn, ...]:
    """Turns of a value, behind those of the prompt where it does not begin with them itself."""
    before: tuple[Turn, ...] = ()
    if prompt is not None:
        before = (
            turns_of_text(prompt, field="prompt") if isinstance(prompt, str) else read_turns(prompt, field="prompt")
        )
        render_prompt(before, field="prompt")  # refuses a prompt that the assistant ends
    if not isinstance(value, str):
        turns = read_turns(value, field=name)
    elif name in RESPONSES:
        turns = (Turn("assistant", value.removeprefix(" ")),)
    else:
        found = _written_out(value, name)
        if found is None:
            raise FieldError(name, "is plain text, not a dialogue: give prompt and response, or `pretrain` on it")
        turns = found
    return turns if turns[: len(before)] == before else (*before, *turns)


def _written_out(text: str, name: str) -> tuple[Turn, ...] | None:
    """Turns of a dialogue in plain text, which ends with the assistant's; None if it is none."""
    found = split_text(text, field=name)
    if found is None:
        return None
    return (*turns_of_text(found[0], field=name), Turn("assistant", found[1].removeprefix(" ")))


def _check_turns(turns: Sequence[Turn], name: str) -> None:
    if not any(turn.content.strip() for turn in turns if turn.role == "assistant"):
        raise FieldError(name, "holds nothing that the assistant says")
    for turn in turns:
        try:
            turn.content.encode()
        except UnicodeEncodeError as error:
            raise FieldError(name, "holds half of a surrogate pair, which is no character") from error


def _one_of(here: Mapping[str, object]) -> str:
    """The column that holds the dialogue or the response."""
    for names in (DIALOGUES, RESPONSES, WRITTEN_OUT):
        found = [name for name in names if name in here]
        if len(found) > 1:
            raise FieldError(", ".join(found), "could each be meant; keep one and leave the others out")
        if found:
            return found[0]
    known = ", ".join((*DIALOGUES, *RESPONSES, *WRITTEN_OUT))
    raise FieldError("", f"has none of {known}; its columns are {', '.join(here) or 'all empty'}")
