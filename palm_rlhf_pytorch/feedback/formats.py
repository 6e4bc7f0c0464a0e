"""Rows of files: what is to be judged on the way in, what was said on the way out. Knows no database.

In, a prompt (text, or a list of turns) with

    two texts     response_a + response_b, response_0 + response_1, response_1 + response_2, or chosen + rejected
    a list        completions or responses
    one text      completion or response, where ratings are asked for
    nothing       prompts alone: completions are written later

and, where known: `source` of each (`sources`, or source_a + source_b ...), `scores` of a reward model, `group`,
`priority` (high first; a `gain` under `expected` likewise), and `gold`, the known answer: a place ("a", "tie", 0), a
rating or a list of them, or ranks (low is best).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.text.columns import LISTS, PAIR, TWO
from palm_rlhf_pytorch.text.dialogues import FieldError, Turn, read_parts, read_turns, render_prompt, split_dialogue

ONE = ("completion", "response")
MAX_COMPLETIONS = 9  # a key each
MAX_GROUP = 200
MAX_SOURCE = 200
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class NewCompletion:
    """A response, the name of what wrote it, and a reward model's score of it."""

    text: str
    source: str = ""
    score: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """What is to be judged; see models.Item for `gold`."""

    prompt: Prompt
    completions: tuple[NewCompletion, ...] = ()
    group: str = ""
    priority: float = 0.0
    gold: Mapping[str, Any] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of prompt and completions, in whichever order these stand."""
        said = json.dumps([self.prompt, sorted(completion.text for completion in self.completions)])
        return hashlib.sha256(said.encode()).hexdigest()


def read_item(columns: Mapping[str, object], kind: int) -> NewItem:
    """What one row asks people to judge.

    Raises:
        FieldError: if something is missing, wrong, or does not suit the kind of question.
    """
    row = {name: value for name, value in columns.items() if value is not None and value != ""}
    names, values = _texts(row)
    _check_number(names, len(values), kind)
    prompt, texts = _prompt_and_texts(row.get("prompt"), names, values)
    sources, scores, group = _sources(row, names), _scores(row, len(names)), _short(row, "group", MAX_GROUP)
    said = [("prompt", plain(prompt)), *zip(names, texts, strict=True), ("group", group)]
    for name, text in [*said, *(("source", source) for source in sources)]:
        if fault := fault_of(text):
            raise FieldError(name, fault)
    parts = zip(texts, sources, scores, strict=True)
    expected = row.get("expected")
    gain = expected.get("gain", 0.0) if isinstance(expected, Mapping) else 0.0
    return NewItem(
        prompt=prompt,
        completions=tuple(NewCompletion(text=text, source=source, score=score) for text, source, score in parts),
        group=group,
        priority=_number(row.get("priority", gain), "priority"),
        gold=None if "gold" not in row else _gold(row["gold"], names, kind),
    )


def fault_of(text: str) -> str:
    """What keeps a database from holding a text; empty for one that it takes."""
    if "\0" in text:
        return "holds a null character; leave it out"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "holds half of a pair of surrogates, which is no character; leave it out"
    return ""


def plain(prompt: Prompt) -> str:
    """All that a prompt says, as one text."""
    return prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)


def _texts(row: Mapping[str, object]) -> tuple[list[str], list[object]]:
    """Names and values of the texts to judge, in the order of their places."""
    found = [list(names) for names in (*TWO, PAIR) if all(name in row for name in names)]
    found += [[name] for name in (*LISTS, *ONE) if name in row]
    if len(found) > 1:
        named = ", ".join(name for names in found for name in names)
        raise FieldError(named, "could each be what is to be judged; leave the others out")
    if not found:
        half = [name for names in (*TWO, PAIR) for name in names if name in row]
        if half:
            raise FieldError(half[0], "stands alone; a pair takes two responses")
        return [], []
    names = found[0]
    if names[0] not in LISTS:
        return names, [row[name] for name in names]
    value = row[names[0]]
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise FieldError(names[0], "must be a list of responses that is not empty")
    return [f"{names[0]}[{place}]" for place in range(len(value))], list(value)


def _check_number(names: Sequence[str], number: int, kind: int) -> None:
    """Refuse a number of completions that the kind of question does not take; none is taken by all."""
    least, most = {Kind.PAIR: (2, 2), Kind.RATING: (1, MAX_COMPLETIONS), Kind.RANKING: (2, MAX_COMPLETIONS)}[Kind(kind)]
    if number and not least <= number <= most:
        asked = f"{least}" if least == most else f"{least} to {most}"
        field = names[0].partition("[")[0]
        raise FieldError(field, f"({number}) must be {asked} responses, as the project asks for {Kind(kind).name}S")


def _prompt_and_texts(given: object, names: Sequence[str], values: Sequence[object]) -> tuple[Prompt, list[str]]:
    """The prompt as it is stored, and the completions' texts; without a prompt of its own it stands in each text."""
    if not values:
        if not given:
            raise FieldError("prompt", "is missing, and nothing else is there to judge")
        if not isinstance(given, str):
            render_prompt(read_turns(given, field="prompt"), field="prompt")  # ends with the user's turn
        read_parts(given, "text", field="prompt")
        return _stored(given), []
    prompts: list[Prompt] = []
    texts = []
    for name, value in zip(names, values, strict=True):
        parts = read_parts(given, value, field=name)
        if isinstance(value, str):
            prompts.append(_stored(given) if given else parts.prompt)
            texts.append(value if given else parts.response)
        else:
            prompt, text = _from_turns(given, _turns(value, name))
            prompts.append(prompt)
            texts.append(text)
    if any(prompt != prompts[0] for prompt in prompts):
        raise FieldError(", ".join(names), "answer different prompts; what is compared must share one")
    return prompts[0], texts


def _from_turns(given: object, turns: list[dict[str, str]]) -> tuple[Prompt, str]:
    """Prompt and response of a response in turns, which may repeat the prompt, go on from it, or hold it."""
    before = _turns(given, "prompt") if given and not isinstance(given, str) else []
    whole = turns if turns[: len(before)] == before else before + turns
    if isinstance(given, str) and given and len(turns) == 1:
        return given, turns[0]["content"]
    return whole[:-1] or "", whole[-1]["content"]


def turns_of(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as turns {"role", "content"}: of a dialogue in plain text its own, of other text one of the user's."""
    if not isinstance(prompt, str):
        return prompt
    turns = split_dialogue(prompt) or ([Turn("user", prompt)] if prompt else [])
    return [turn._asdict() for turn in turns]


def _stored(prompt: object) -> Prompt:
    return prompt if isinstance(prompt, str) else _turns(prompt, "prompt")


def _turns(value: object, field: str) -> list[dict[str, str]]:
    return [turn._asdict() for turn in read_turns(value, field=field)]


def _sources(row: Mapping[str, object], names: Sequence[str]) -> list[str]:
    several = row.get("sources")
    if several is not None:
        if not isinstance(several, list) or len(several) != len(names):
            raise FieldError("sources", f"must be a list of {len(names)}, one for each response")
        given = ["" if source is None else str(source) for source in several]
    else:
        own = [name.replace("response", "source") if name.startswith("response_") else "source" for name in names]
        given = [str(row.get(name, row.get("source", ""))) for name in own]
    for source in given:
        if len(source) > MAX_SOURCE:
            raise FieldError("source", f"is {len(source)} characters long; {MAX_SOURCE} fit")
    return given


def _scores(row: Mapping[str, object], number: int) -> list[float | None]:
    scores = row.get("scores", [None] * number)
    if not isinstance(scores, list) or len(scores) != number:
        raise FieldError("scores", f"must be a list of {number}, one for each response")
    return [None if score is None else _number(score, "scores") for score in scores]


def _gold(value: object, names: Sequence[str], kind: int) -> dict[str, Any]:
    """A known answer as it is stored, by place."""
    if not names:
        raise FieldError("gold", "stands alone; an answer is known of responses that are there")
    if kind == Kind.PAIR:
        said = str(value).strip().lower()
        place = {"a": 0, "b": 1, names[0]: 0, names[1]: 1, "0": 0, "1": 1}.get(said)
        if said != "tie" and place is None:
            raise FieldError("gold", f"({said[:40]!r}) must be a, b, tie, or the column of the better response")
        return {"choice": 0 if place is None else (-1, 1)[place]}
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) != len(names) or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise FieldError("gold", f"must be {len(names)} whole numbers, one for each response")
    if kind == Kind.RATING:
        if not set(numbers) <= {1, 2, 3, 4, 5}:
            raise FieldError("gold", "must be ratings from 1 to 5")
        return {"ratings": numbers}
    return {"ranks": numbers}


def _short(row: Mapping[str, object], name: str, limit: int) -> str:
    value = row.get(name, "")
    if not isinstance(value, str | int) or len(str(value)) > limit:
        raise FieldError(name, f"must be a text of up to {limit} characters")
    return str(value)


def _number(value: object, name: str) -> float:
    try:
        number = float(str(value))
    except ValueError:
        raise FieldError(name, f"({str(value)[:40]!r}) must be a number") from None
    if not math.isfinite(number):
        raise FieldError(name, f"({number}) must be finite")
    return number
