"""One row of named columns becomes the labels it holds; which kind of label, its columns say.

    two texts     chosen + rejected, with `preference` (of chosen), `tie`, or a `label` of "tie"
                  response_a + response_b, or response_0 + response_1, or response_1 + response_2, with `choice`
                  ("a", the column's name, its number, "tie"), or `preference` (of the first), or `tie`
                  both with `margin`, or `strength`: a number, or words, which become the margins of STRENGTHS
    a list        completions or responses, best first, or with `ranks` (low is best), `scores` or `ratings` (high is
                  best), or `choice` (place of the best, from 0)
    one text      completion, response, text or messages, with `label`, `rating` or `score`, `ratings` (one of each of
                  `annotators`), or `vote`, `thumbs`, `thumbs_up`; a bool is a vote, a number a rating
    any           prompt, annotator (annotator_id, worker, worker_id), group, weight

Texts are strings or lists of turns (text/dialogues.py); numbers may be written as text; a null is missing.
What could be read in two ways is refused, never guessed. Knows no file.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import NamedTuple, TypedDict

import numpy as np

from palm_rlhf_pytorch.text.dialogues import FieldError, read_parts
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Rating, Text, Vote

PAIR = ("chosen", "rejected")
TWO = (("response_a", "response_b"), ("response_0", "response_1"), ("response_1", "response_2"))
LISTS = ("completions", "responses")
ONE = ("completion", "response", "text", "messages")
ANNOTATORS = ("annotator", "annotator_id", "worker", "worker_id")
VOTES = ("vote", "thumbs", "thumbs_up")
TEXTS = {*PAIR, *ONE, *(name for names in TWO for name in names)}  # empty, they are wrong; other columns are missing
# margins of four grades of preference: Touvron et al., https://arxiv.org/abs/2307.09288, table 27
STRENGTHS = {
    "significantly better": 3.0,
    "much better": 3.0,
    "better": 2.0,
    "slightly better": 1.0,
    "negligibly better": 0.0,
    "unsure": 0.0,
}
_SAID = {"up": True, "down": False, "true": True, "false": False, "1": True, "+1": True, "-1": False}


class Read(NamedTuple):
    """Labels of one row, what happened on the way (what, how often), and the columns nobody asked for."""

    labels: list[Label]
    notes: Counter[str]
    unread: list[str]


class _Common(TypedDict):
    annotator: str | None
    group: str | None
    weight: float
    line: int


def read_columns(columns: Mapping[str, object], *, line: int = 0, bins: Callable[[float], float] | None = None) -> Read:
    """Labels that one row holds: one, or one of each annotator.

    Args:
        columns: of the row.
        line: where it stands in its file.
        bins: changes the value of every rating, raising a ValueError where it cannot (`whole_bins`, `even_bins`).

    Raises:
        FieldError: if something is missing, wrong, or could be read in two ways.
    """
    row = _Row(columns, bins)
    read, names = _shape(row)
    try:
        common = _common(row, line)
        labels = read(row, names, common)
    except FieldError:
        raise
    except ValueError as error:  # from the record's own checks; they begin with the field's name
        field, _, reason = str(error).partition(" ")
        raise FieldError(field, reason) from error
    return Read(labels, row.notes, sorted(set(row.columns) - row.asked))


class _Row:
    """Columns without what is missing, which of them were asked for, and notes."""

    def __init__(self, columns: Mapping[str, object], bins: Callable[[float], float] | None) -> None:
        lists = {str(name): _as_list(value) for name, value in columns.items()}
        self.columns = {
            name: value for name, value in lists.items() if value is not None and (value != "" or name in TEXTS)
        }
        self.bins = bins
        self.asked: set[str] = set()
        self.notes: Counter[str] = Counter()

    def get(self, name: str) -> object:
        self.asked.add(name)
        return self.columns.get(name)

    def one_of(self, names: Sequence[str]) -> str | None:
        """The one of these columns that is there, or None."""
        found = [name for name in names if name in self.columns]
        self.asked.update(found)
        if len(found) > 1:
            raise FieldError(", ".join(found), "could each be meant; keep one and leave the others out")
        return found[0] if found else None

    def text(self, name: str, *, value: object = None) -> Text:
        """The text of a column, or one of those in its list, with its prompt."""
        prompt, response, notes = read_parts(self.get("prompt"), self.get(name) if value is None else value, field=name)
        self.notes.update(note for note in notes if note not in self.notes)  # once a row
        return Text(prompt, response)

    def same_prompt(self, texts: Sequence[Text]) -> None:
        """Count what is unusual about texts that are compared."""
        self.notes["whose prompts differ before the last turn"] += len({text.prompt for text in texts}) > 1
        self.notes["with equal texts"] += len(set(texts)) < len(texts)

    def rating(self, value: object, name: str) -> float:
        number = _number(value, name)
        try:
            return number if self.bins is None else self.bins(number)
        except ValueError as error:
            raise FieldError(name, str(error)) from error


_Reader = Callable[[_Row, tuple[str, ...], _Common], list[Label]]


def _shape(row: _Row) -> tuple[_Reader, tuple[str, ...]]:
    """Which kind of label the columns hold, and in which of them the texts are."""
    here = row.columns
    found: list[tuple[_Reader, tuple[str, ...]]] = []
    if "chosen" in here or "rejected" in here:
        found.append((_read_pair, PAIR))
    found += [(_read_two, names) for names in TWO if all(name in here for name in names)]
    found += [(_read_ranking, (name,)) for name in LISTS if name in here]
    # some files of pairs repeat the chosen text in a column of its own
    copies = [here.get(name) for name in PAIR]
    found += [(_read_one, (name,)) for name in ONE if name in here and here[name] not in copies]
    if not found:
        raise FieldError("", f"has no text to judge; its columns are {', '.join(map(str, here)) or 'all empty'}")
    if len(found) > 1:
        names = [name for _, columns in found for name in columns]
        raise FieldError(", ".join(dict.fromkeys(names)), "could each be the judged text; leave the others out")
    return found[0]


def _common(row: _Row, line: int) -> _Common:
    annotator = row.one_of(ANNOTATORS)
    weight = row.get("weight")
    return {
        "annotator": None if annotator is None else _name(row.get(annotator), annotator),
        "group": None if row.get("group") is None else _name(row.get("group"), "group"),
        "weight": 1.0 if weight is None else _number(weight, "weight"),
        "line": line,
    }


def _read_pair(row: _Row, names: tuple[str, ...], common: _Common) -> list[Label]:
    for name in names:
        if name not in row.columns:
            raise FieldError(name, "is missing")
    if row.get("choice") is not None:
        raise FieldError("choice", "says again, or otherwise, what chosen and rejected say")
    label = row.get("label")
    if label is not None and not _is_tie(label):
        raise FieldError("label", 'beside chosen and rejected can only be "tie"')
    preference = _preference(row, tie=label is not None)
    chosen, rejected = (row.text(name) for name in names)
    return [_pair(row, chosen, rejected, 1.0 if preference is None else preference, common)]


def _read_two(row: _Row, names: tuple[str, ...], common: _Common) -> list[Label]:
    choice = row.one_of(("choice", "label"))
    value = None if choice is None else row.get(choice)
    tie = choice is not None and _is_tie(value)
    preference = _preference(row, tie=tie)
    if preference in (0, 1) and str(row.get("preference")).strip() in ("0", "1"):
        raise FieldError("preference", "could be a probability or a place; write 1.0 or 0.0, or give choice")
    if choice is not None and not tie:
        if preference is not None:
            raise FieldError(f"{choice}, preference, tie", "say the same thing twice; keep one of them")
        preference = 1.0 - _choice(value, choice, names)
    if preference is None:
        raise FieldError("choice", f"is missing: which of {names[0]} and {names[1]} is preferred")
    first, second = (row.text(name) for name in names)
    return [_pair(row, first, second, preference, common)]


def _pair(row: _Row, chosen: Text, rejected: Text, preference: float, common: _Common) -> Pair:
    """A pair whose chosen text is the likelier one, also where the file says that it is the rejected one."""
    if preference < 0.5:
        chosen, rejected, preference = rejected, chosen, 1.0 - preference
    margin = _margin(row)
    if preference == 0.5 and margin:
        raise FieldError("margin, strength", f"({margin}) must be 0 or left out in a tie")
    row.same_prompt((chosen, rejected))
    row.notes["ties"] += preference == 0.5
    row.notes["with a margin"] += margin is not None
    row.notes["with a probability"] += preference not in (0.0, 0.5, 1.0)
    return Pair(chosen=chosen, rejected=rejected, preference=preference, margin=margin, **common)


def _preference(row: _Row, *, tie: bool) -> float | None:
    """Probability of the first text by `preference` and `tie`; None where neither is given."""
    flag, said = row.get("tie"), row.get("preference")
    tie = tie or (flag is not None and _bool(flag, "tie"))
    preference = None if said is None else 0.5 if _is_tie(said) else _number(said, "preference")
    if preference is not None and not 0 <= preference <= 1:
        raise FieldError("preference", f"({preference}) must lie in [0, 1]: the probability of the first text")
    if tie and preference not in (None, 0.5):
        raise FieldError("tie, preference", f"contradict each other: a tie is 0.5, not {preference}")
    return 0.5 if tie else preference


def _choice(value: object, field: str, names: tuple[str, ...]) -> int:
    """Place of the preferred text; columns with letters are also counted from 0."""
    words = [{name, name.removeprefix("response_"), name.replace("response_", "model_")} for name in names]
    if names == TWO[0]:
        words = [words[0] | {"0"}, words[1] | {"1"}]
    number = value if isinstance(value, str) or _is_bool(value) else f"{_number(value, field):g}"
    said = [place for place, allowed in enumerate(words) if str(number).strip().lower() in allowed]
    if not said:
        known = ", ".join(sorted(words[0] | words[1]))
        raise FieldError(field, f"({str(value)[:40]!r}) must be one of {known}, tie")
    return said[0]


def _margin(row: _Row) -> float | None:
    name = row.one_of(("margin", "strength"))
    if name is None:
        return None
    value = row.get(name)
    if name == "strength" and isinstance(value, str) and value.strip().lower() in STRENGTHS:
        return STRENGTHS[value.strip().lower()]
    margin = _number(value, name)
    if margin < 0:
        raise FieldError(name, f"({margin}) must be 0 or above: by how much the first text is better")
    return margin


def _read_ranking(row: _Row, names: tuple[str, ...], common: _Common) -> list[Label]:
    (name,) = names
    values = _list(row.get(name), name)
    if len(values) < 2:
        raise FieldError(name, "holds one text; a ranking takes two or more")
    order = row.one_of(("ranks", "scores", "ratings", "choice", "ranking", "order", "label", "labels"))
    if order in ("ranking", "order", "label", "labels"):
        raise FieldError(order, "could be read in two ways; give ranks (low is best) or scores (high is best)")
    texts = tuple(row.text(f"{name}[{place}]", value=value) for place, value in enumerate(values))
    if order is None:
        row.notes["rankings taken as best first"] += 1
        ranks = tuple(range(len(texts)))
    elif order == "choice":
        best = _number(row.get(order), order)
        if best not in range(len(texts)):
            raise FieldError(order, f"({best:g}) must be a place in the list, from 0 to {len(texts) - 1}")
        ranks = tuple(int(place != best) for place in range(len(texts)))
    else:
        numbers = [_number(value, f"{order}[{place}]") for place, value in enumerate(_list(row.get(order), order))]
        if len(numbers) != len(texts):
            raise FieldError(order, f"({len(numbers)}) must be as many as {name} ({len(texts)})")
        better = sorted(set(numbers), reverse=order != "ranks")
        ranks = tuple(better.index(number) for number in numbers)
    row.same_prompt(texts)
    row.notes["ties"] += len(set(ranks)) < len(ranks)
    return [Ranking(texts=texts, ranks=ranks, **common)]


def _read_one(row: _Row, columns: tuple[str, ...], common: _Common) -> list[Label]:
    judged = row.one_of(("label", "rating", "score", "ratings", *VOTES))
    if judged is None:
        raise FieldError("label", f"is missing; its columns are {', '.join(row.columns)}")
    text, value = row.text(*columns), row.get(judged)
    if judged in VOTES[:2]:
        return [Vote(text=text, up=_vote(value, judged), **common)]
    if judged == "thumbs_up" or judged == "label" and (_is_bool(value) or str(value).lower() in ("true", "false")):
        return [Vote(text=text, up=_bool(value, judged), **common)]
    if judged != "ratings":
        return [Rating(text=text, value=row.rating(value, judged), **common)]
    values, people = _list(value, judged), row.get("annotators")
    names = [common["annotator"]] * len(values)
    if people is not None:
        names = [_name(person, "annotators") for person in _list(people, "annotators")]
    if len(names) != len(values):
        raise FieldError("annotators", f"({len(names)}) must be as many as {judged} ({len(values)})")
    numbers = [None if value is None else row.rating(value, f"{judged}[{at}]") for at, value in enumerate(values)]
    if all(number is None for number in numbers):
        raise FieldError(judged, "holds no rating")
    return [
        Rating(text=text, value=number, **(common | {"annotator": name}))
        for number, name in zip(numbers, names, strict=True)
        if number is not None
    ]


def _as_list(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _list(value: object, field: str) -> list[object]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence) or not value:
        raise FieldError(field, "must be a list that is not empty")
    return list(value)


def _number(value: object, field: str) -> float:
    if _is_bool(value) or not isinstance(value, str | Real):
        raise FieldError(field, f"is of type {type(value).__name__}; give a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise FieldError(field, f"({str(value)[:40]!r}) must be a number") from None
    if not math.isfinite(number):
        raise FieldError(field, f"({number}) must be finite")
    return number


def _name(value: object, field: str) -> str:
    if _is_bool(value) or not isinstance(value, str | int | np.integer):
        raise FieldError(field, f"is of type {type(value).__name__}; give text or a whole number")
    return str(value)


def _bool(value: object, field: str) -> bool:
    if _is_bool(value):
        return bool(value)
    if str(value).strip().lower() not in ("true", "false", "0", "1"):
        raise FieldError(field, f"({str(value)[:40]!r}) must be true or false")
    return str(value).strip().lower() in ("true", "1")


def _vote(value: object, field: str) -> bool:
    said = _SAID.get(str(value).strip().lower())
    if said is None:
        raise FieldError(field, f"({str(value)[:40]!r}) must be true or false, up or down, 1 or -1")
    return said


def _is_bool(value: object) -> bool:
    return isinstance(value, bool | np.bool_)


def _is_tie(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() == "tie"
