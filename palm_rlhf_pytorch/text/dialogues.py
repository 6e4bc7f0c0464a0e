r"""Dialogues as plain text: how turns of role and content are written out, and where a prompt ends.

One template, that of the HH files (Bai et al., https://arxiv.org/abs/2204.05862), so that chats and HH look alike:

    "\n\nHuman: " content    "\n\nAssistant: " content    "\n\nSystem: " content

A prompt ends with "\n\nAssistant:"; the response begins with the space behind it. Knows no label and no file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MARKS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:", "system": "\n\nSystem:"}
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt"), "assistant"),
    "system": "system",
}
_KEYS = (("role", "content"), ("from", "value"))
_BEGINNING = re.compile(r"\s*(Human|System):")
_TURNS_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']""")
_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant|System):")


class FieldError(ValueError):
    """What is wrong with a record, and in which of its fields."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason


class Turn(NamedTuple):
    """What one side said: `role` is "user", "assistant" or "system"."""

    role: str
    content: str


class Parts(NamedTuple):
    """A prompt, the response to it, and what is worth counting about how they were found."""

    prompt: str
    response: str
    notes: tuple[str, ...] = ()


def read_parts(prompt: object, value: object, *, field: str) -> Parts:
    """Prompt and response of one judged text.

    Without a prompt of its own, a dialogue's is all before its last turn; other text is a response alone. Plain text
    with a plain prompt stays as it is; where either is a list of turns, both are rendered.

    Args:
        prompt: text, or turns; None or empty for none.
        value: text or turns; turns may be the whole dialogue, prompt included.
        field: of the value, named when something is wrong.

    Raises:
        FieldError: if either cannot be read, the two do not go together, or the response is empty.
    """
    for name, given in (("prompt", prompt), (field, value)):
        if isinstance(given, str) and _TURNS_AS_TEXT.match(given):
            raise FieldError(name, "is a list of turns written as text; give the list itself")
    parts = _explicit(prompt, value, field) if prompt else _implicit(value, field)
    for name, text in (("prompt", parts.prompt), (field, parts.response)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FieldError(name, "holds half of a surrogate pair, which is no character") from error
    if not parts.response.strip():
        raise FieldError(field, "is an empty response")
    return parts


def read_turns(value: object, *, field: str) -> tuple[Turn, ...]:
    """Turns of a list of {role, content}, or of ShareGPT's {from, value}.

    Args:
        value: the list; roles are those of ROLES, in any case.
        field: named when something is wrong.

    Raises:
        FieldError: if it is no list of such turns, a role is unknown, or a content is no string.
    """
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise FieldError(field, f"is {_type(value)}; give text or a list of turns with role and content")
    if not value:
        raise FieldError(field, "holds no turn")
    return tuple(_read_turn(turn, f"{field}[{number}]") for number, turn in enumerate(value))


def render_prompt(turns: Sequence[Turn], *, field: str) -> str:
    """Text that asks the assistant for its next turn.

    Raises:
        FieldError: if the last turn is not the user's.
    """
    if turns[-1].role != "user":
        raise FieldError(f"{field}[{len(turns) - 1}].role", f"is {turns[-1].role}; a prompt ends with the user's turn")
    return _render(turns) + MARKS["assistant"]


def split_turns(turns: Sequence[Turn], *, field: str) -> tuple[str, str]:
    """Prompt and response of a dialogue: all turns before the last, and the last one, which is the assistant's.

    A turn that stands alone has an empty prompt.

    Raises:
        FieldError: if the last turn is not the assistant's.
    """
    last = turns[-1]
    if last.role != "assistant":
        raise FieldError(f"{field}[{len(turns) - 1}].role", f"is {last.role}; the last turn must be the assistant's")
    if len(turns) == 1:
        return "", last.content
    return _render(turns[:-1]) + MARKS["assistant"], f" {last.content}"


def split_text(text: str, *, field: str) -> tuple[str, str] | None:
    """Prompt and response of a dialogue in plain text, cut behind its last mark; None if the text is no dialogue.

    A dialogue begins with "Human:" or "System:". The two parts together are the text, unchanged.

    Raises:
        FieldError: if the last turn is not the assistant's.
    """
    if _BEGINNING.match(text) is None:
        return None
    last = list(_MARK.finditer(text))[-1]
    if last[1] != "Assistant":
        raise FieldError(field, f"ends with a turn of {last[1]}; the last turn must be the Assistant's")
    return text[: last.end()], text[last.end() :]


def split_dialogue(text: str) -> list[Turn]:
    """Turns of a dialogue in plain text, without the space around them; none if the text is no dialogue.

    An empty last turn, which asks the assistant to speak, is left out.
    """
    if _BEGINNING.match(text) is None:
        return []
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    roles = {mark.strip(" \n:"): role for role, mark in MARKS.items()}
    turns = [Turn(roles[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return turns if turns[-1].content else turns[:-1]


def open_prompt(prompt: str, *, field: str) -> str:
    r"""A prompt in plain text made to end with "\n\nAssistant:"; one without marks is a single turn of the user.

    Raises:
        FieldError: if it is a dialogue that ends with something the assistant said.
    """
    if _BEGINNING.match(prompt) is None:
        return render_prompt([Turn("user", prompt)], field=field)
    last = list(_MARK.finditer(prompt))[-1]
    if last[1] == "Human":
        return prompt + MARKS["assistant"]
    if last[1] == "Assistant" and not prompt[last.end() :].strip():
        return prompt[: last.end()]
    raise FieldError(field, f"ends with a turn of {last[1]}; a prompt ends with the Human's turn")


def turns_of_text(prompt: str, *, field: str) -> tuple[Turn, ...]:
    """Turns of a prompt in plain text, the last of them the user's; one without marks is a single turn of the user.

    Raises:
        FieldError: if it is a dialogue that ends with something the assistant said.
    """
    text = open_prompt(prompt, field=field)
    marks = list(_MARK.finditer(text)) if _BEGINNING.match(prompt) else []
    if not marks:
        return (Turn("user", prompt),)
    ends = [mark.start() for mark in marks[1:]]  # the last mark asks for what is not there yet
    roles = [ROLES[mark[1].lower()] for mark in marks]
    said = [text[mark.end() : end].removeprefix(" ") for mark, end in zip(marks, ends, strict=False)]
    return tuple(Turn(role, content) for role, content in zip(roles, said, strict=False))


def opening_of(prompt: str) -> str:
    """A dialogue's prompt up to where the assistant first speaks, which its later prompts share; other text whole."""
    marks = _MARK.finditer(prompt) if _BEGINNING.match(prompt) else ()
    return next((prompt[: mark.end()] for mark in marks if mark[1] == "Assistant"), prompt)


def _implicit(value: object, field: str) -> Parts:
    if not isinstance(value, str):
        return Parts(*split_turns(read_turns(value, field=field), field=field), ("with an implicit prompt",))
    found = split_text(value, field=field)
    return Parts("", value, ("without a prompt",)) if found is None else Parts(*found, ("with an implicit prompt",))


def _explicit(prompt: object, value: object, field: str) -> Parts:
    if isinstance(prompt, str) and isinstance(value, str):
        repeats = bool(prompt) and value.startswith(prompt)
        return Parts(prompt, value, ("with a text that repeats its prompt",) if repeats else ())
    if isinstance(prompt, str):
        turns = read_turns(value, field=field)
        own, response = split_turns(turns, field=field)
        if not own:
            return Parts(open_prompt(prompt, field="prompt"), f" {response}")
        if prompt not in [turn.content for turn in turns[:-1] if turn.role == "user"]:
            raise FieldError(field, "has turns before the last, and none of the user's is the prompt")
        return Parts(own, response)
    before = read_turns(prompt, field="prompt")
    if isinstance(value, str):
        return Parts(render_prompt(before, field="prompt"), value if value[:1].isspace() else f" {value}")
    turns = read_turns(value, field=field)
    if turns[: len(before)] != before:
        render_prompt(before, field="prompt")  # refuses a prompt that the assistant ends
        turns = before + turns
    return Parts(*split_turns(turns, field=field))


def _read_turn(turn: object, place: str) -> Turn:
    if not isinstance(turn, Mapping):
        raise FieldError(place, f"is {_type(turn)}; a turn has role and content")
    keys = [pair for pair in _KEYS if pair[0] in turn]
    if len(keys) != 1:
        raise FieldError(place, f"has the fields {', '.join(map(str, turn))}; a turn has role and content")
    role_key, content_key = keys[0]
    role, content = turn[role_key], turn.get(content_key)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise FieldError(f"{place}.{role_key}", f"({str(role)[:40]!r}) is none of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise FieldError(f"{place}.{content_key}", f"is {_type(content)}; give text")
    return Turn(ROLES[role.lower()], content)


def _render(turns: Sequence[Turn]) -> str:
    return "".join(f"{MARKS[turn.role]} {turn.content}" for turn in turns)


def _type(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
