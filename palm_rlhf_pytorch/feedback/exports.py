"""Judgements out of the database: as records (records.py), and as files that trainers read."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.models import Judgement, Project
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
    found = found.select_related("assignment__item", "assignment__user")
    found = found.prefetch_related("assignment__item__completions")
    for judgement in found.iterator(chunk_size=BATCH):
        yield judged_of(judgement, project.kind)


def judged_of(judgement: Judgement, kind: int) -> Judged:
    """A stored judgement by the places of its item's completions."""
    assignment, item = judgement.assignment, judgement.assignment.item
    completions = list(item.completions.all())
    place = {completion.pk: completion.place for completion in completions}
    order = tuple(place[pk] for pk in assignment.order)
    choice = judgement.choice
    if choice is not None and order[0] == 1:
        choice = -choice
    said = judgement.ratings
    return Judged(
        item=item.pk,
        kind=kind,
        prompt=item.prompt,
        texts=tuple(completion.text for completion in completions),
        sources=tuple(completion.source for completion in completions),
        scores=tuple(completion.score for completion in completions),
        order=order,
        choice=choice,
        ratings=tuple(said[str(completion.pk)] for completion in completions) if said else (),
        ranking=tuple(place[pk] for pk in judgement.ranking),
        rules=tuple(judgement.rules.get(str(completion.pk), {}) for completion in completions),
        note=judgement.note,
        annotator=assignment.user.get_username(),
        group=item.group,
        gold=item.gold,
        ms=judgement.ms,
        at=judgement.at,
        round=item.round,
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
