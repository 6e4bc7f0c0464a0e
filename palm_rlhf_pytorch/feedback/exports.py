"""Judgements out of the database: as records (records.py), and as files that trainers read."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from django.contrib.auth import get_user_model

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.models import Completion, Judgement, Project
from palm_rlhf_pytorch.feedback.records import FORMATS, WITH_TIES, Judged
from palm_rlhf_pytorch.training.atomic import check_target, replacing

BATCH = 500
DEFAULT = {Kind.PAIR: "preferences", Kind.RATING: "ratings", Kind.RANKING: "preferences"}
# what a format can say of each kind of question
TAKES = {
    "preferences": (Kind.PAIR, Kind.RANKING),
    "conversational": (Kind.PAIR, Kind.RANKING),
    "unpaired": (Kind.PAIR, Kind.RATING),
    "ratings": (Kind.RATING,),
    "rankings": (Kind.RANKING,),
    "judgements": tuple(Kind),
}


def judged(project: Project, *, gold: bool | None = False, round: int | None = None) -> Iterator[Judged]:
    """Judgements of a project in the order in which they were submitted.

    Args:
        project: whose.
        gold: False without items whose answer is known, True with these alone, None with both.
        round: of sampling; None for all.
    """
    found = Judgement.objects.filter(assignment__item__project=project).order_by("at", "pk")
    if gold is not None:
        found = found.filter(assignment__item__gold__isnull=not gold)
    if round is not None:
        found = found.filter(assignment__item__round=round)
    name = f"assignment__user__{get_user_model().USERNAME_FIELD}"
    said = found.values_list(*_COLUMNS, name).iterator(chunk_size=BATCH)  # rows: objects take five times as long
    while batch := list(islice(said, BATCH)):
        texts: dict[int, list[_Text]] = {}
        shown = Completion.objects.filter(item__in={row[0] for row in batch}).order_by("place")
        for item, *text in shown.values_list("item_id", "pk", "place", "text", "source", "score"):
            texts.setdefault(item, []).append(_Text(*text))
        for row in batch:
            yield _judged(row, texts[row[0]], project.kind)


class _Text(NamedTuple):
    """A completion."""

    pk: int
    place: int
    text: str
    source: str
    score: float | None


_COLUMNS = (
    "assignment__item_id", "assignment__item__prompt", "assignment__item__group", "assignment__item__gold",
    "assignment__item__round", "assignment__order", "choice", "ratings", "ranking", "rules", "note", "ms", "at",
)  # fmt: skip


def _judged(row: tuple[Any, ...], texts: Sequence[_Text], kind: int) -> Judged:
    """A row of _COLUMNS and the annotator's name, by the places of its item's completions."""
    item, prompt, group, gold, round, order, choice, ratings, ranking, rules, note, ms, at, annotator = row
    place = {text.pk: text.place for text in texts}
    places = tuple(place[pk] for pk in order)
    return Judged(
        item=item,
        kind=kind,
        prompt=prompt,
        texts=tuple(text.text for text in texts),
        sources=tuple(text.source for text in texts),
        scores=tuple(text.score for text in texts),
        order=places,
        choice=-choice if choice is not None and places[0] == 1 else choice,
        ratings=tuple(ratings[str(text.pk)] for text in texts) if ratings else (),
        ranking=tuple(place[pk] for pk in ranking),
        rules=tuple(rules.get(str(text.pk), {}) for text in texts),
        note=note,
        annotator=annotator,
        group=group,
        gold=gold,
        ms=ms,
        at=at,
        round=round,
    )


def rows(project: Project, format: str | None = None, *, ties: bool = False, gold: bool = False,
         round: int | None = None) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of one of FORMATS; None takes the one that says what the project asks.

    Args:
        project: whose judgements.
        format: a name of FORMATS.
        ties: also tied pairs, with a column `tie`.
        gold: also items whose answer is known.
        round: of sampling; None for all.

    Raises:
        ValueError: if the format is unknown, or cannot say what the project asks.
    """
    name = DEFAULT[Kind(project.kind)] if format is None else format
    if name not in FORMATS:
        raise ValueError(f"format ({name!r}) is none of {', '.join(FORMATS)}")
    if project.kind not in TAKES[name]:
        fitting = ", ".join(format for format, kinds in TAKES.items() if project.kind in kinds)
        raise ValueError(f"format ({name!r}) cannot say {Kind(project.kind).name}S; {fitting} can")
    if ties and name not in WITH_TIES:
        raise ValueError(f"ties are asked for, and format {name!r} has none")
    options = {"ties": True} if ties else {}
    for one in judged(project, gold=None if gold else False, round=round):
        yield from FORMATS[name](one, **options)


def write(project: Project, path: str | Path, format: str | None = None, **options: Any) -> int:
    """Write rows as JSON lines, or as CSV where the name ends so; the file is there whole or not at all.

    Args:
        project: whose judgements.
        path: ends with .jsonl or .csv.
        format: as in `rows`.
        **options: as in `rows`.

    Returns:
        How many rows.

    Raises:
        ValueError: as `rows`; or if the name ends otherwise, a row does not fit into CSV, or there is no row.
    """
    path = Path(path)
    check_target(path)
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"{path} must end with .jsonl or .csv")
    found = list(rows(project, format, **options))
    if not found:
        raise ValueError(f"project {project.name!r} has no judgement to write yet")
    with replacing(path) as file:
        if path.suffix == ".csv":
            file.write(_as_csv(found).encode())
        else:
            for row in found:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return len(found)


def _as_csv(found: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in found for name in row))
    for row in found:
        if not isinstance(row["prompt"], str):
            raise ValueError(f"item {row['item']} has a prompt in turns, which CSV cannot hold; write .jsonl")
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in found:
        nested = {name: json.dumps(value) for name, value in row.items() if isinstance(value, list | dict | bool)}
        writer.writerow(row | nested)
    return text.getvalue()
