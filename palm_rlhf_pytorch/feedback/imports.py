"""Items into the queue: from files, or made here. What is there already is left as it is."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from django.db import connection, transaction
from django.utils.text import slugify

from palm_rlhf_pytorch.feedback import events
from palm_rlhf_pytorch.feedback.claims import draw_order
from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem, fault_of, plain, read_item
from palm_rlhf_pytorch.feedback.models import Assignment, Completion, Item, Project
from palm_rlhf_pytorch.text.datasets import BadRecord, read_each, read_prompts, stop_at_bad_record
from palm_rlhf_pytorch.text.rows import check_table, is_table, read_rows

BATCH = 1000  # items of a transaction: others wait as long as it takes
SETTINGS = ("instructions", "rules", "required", "lease_seconds", "gold_every")
LARGEST = {"required": 2**15 - 1, "gold_every": 2**15 - 1, "lease_seconds": 2**31 - 1}  # what their columns hold


class Added(NamedTuple):
    """How many items are new, and how many were there already."""

    new: int
    known: int


def make_project(name: str, kind: int | None = None, **settings: Any) -> Project:
    """The project of a name, made if need be, with these settings; those not given stay as they are.

    Args:
        name: up to 100 characters.
        kind: of question; of a project that is there it cannot be changed. None for that, or for pairs.
        settings: of SETTINGS.

    Raises:
        ValueError: if a setting is out of range, or the project asks another kind of question.
    """
    if fault := fault_of(name):
        raise ValueError(f"project ({name[:40]!r}) {fault}")
    project = Project.objects.filter(name=name).first()
    if project is None:
        slug = slugify(name)
        if not slug or len(name) > 100:
            raise ValueError(f"project ({name[:40]!r}) must have a name of 1 to 100 characters, one of them a letter")
        if Project.objects.filter(slug=slug).exists():
            raise ValueError(f"project ({name!r}) is in its address the same as another one: {slug}")
        project = Project(name=name, slug=slug, kind=Kind.PAIR.value if kind is None else kind)
    elif kind is not None and kind != project.kind:
        raise ValueError(f"project ({name!r}) asks for {Kind(project.kind).name}S, not {Kind(kind).name}S")
    for key, value in settings.items():
        assert key in SETTINGS, key
        setattr(project, key, value)
    _check_settings(project)
    project.save()
    events.record("project", None, subject=name, **{key: getattr(project, key) for key in ("kind", *SETTINGS)})
    return project


def read_items(
    path: str | Path, kind: int, *, on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record
) -> tuple[list[NewItem], list[BadRecord]]:
    """Items of a file, and the rows that could not be read.

    Args:
        path: a table (text/rows.py), or plain text, one prompt a line.
        kind: of question.
        on_bad_record: is told of each row that cannot be read, and may raise; the default does.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, of no known kind, or holds no item.
    """
    path = Path(path)
    if path.suffix == ".txt":
        return [NewItem(prompt=prompt) for prompt in read_prompts(path)], []
    check_table(path)
    assert is_table(path)
    items: list[NewItem] = []
    bad: list[BadRecord] = []
    rows = ((str(path), row) for row in read_rows(path))
    for read in read_each(rows, lambda columns, _: read_item(columns, kind), on_bad_record):
        if isinstance(read, BadRecord):
            bad.append(read)
        else:
            items.append(read)
    if not items:
        raise ValueError(f"{path} holds nothing to judge" + (f"; the first bad row: {bad[0]}" if bad else ""))
    return items, bad


def add_items(project: Project, items: Iterable[NewItem], *, round: int = 0) -> Added:
    """Put items into a project's queue; one whose prompt and completions are there already is passed over.

    Args:
        project: whose queue.
        items: those without completions wait until `add_completions`.
        round: of sampling; 0 for imports.

    Raises:
        ValueError: if a prompt holds a character that no database takes; nothing is added then.
    """
    unique = {item.key: item for item in items}
    for item in unique.values():
        if fault := fault_of(plain(item.prompt)):
            raise ValueError(f"prompt ({plain(item.prompt)[:40]!r}) {fault}")
    keys, known = list(unique), set[str]()
    for start in range(0, len(keys), BATCH):
        known |= set(project.items.filter(key__in=keys[start : start + BATCH]).values_list("key", flat=True))
    new = [(key, item) for key, item in unique.items() if key not in known]
    for start in range(0, len(new), BATCH):
        with transaction.atomic():
            _insert(project, new[start : start + BATCH], round)
    if new:
        _measure()
    events.record("import", None, subject=project.name, new=len(new), known=len(known), round=round)
    return Added(len(new), len(known))


@transaction.atomic
def add_completions(item: Item, completions: Sequence[NewCompletion]) -> None:
    """Give an item, whose prompt was waiting, its completions; who holds it is shown them in an order of their own.

    An item that has some already, from a process that was faster, keeps those.
    """
    locked = Item.objects.select_for_update(no_key=True).get(pk=item.pk)
    if locked.ready:
        return
    Completion.objects.bulk_create(_completions(locked, completions))
    locked.ready = True
    locked.save(update_fields=["ready"])
    for assignment in Assignment.objects.filter(item=locked, order=[]):
        assignment.order = draw_order(locked)
        assignment.save(update_fields=["order"])


def _measure() -> None:
    """Let the database count its rows: until it has, PostgreSQL sorts the whole queue for every claim."""
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA optimize" if connection.vendor == "sqlite" else f"ANALYZE {Item._meta.db_table}")


def _insert(project: Project, items: Sequence[tuple[str, NewItem]], round: int) -> None:
    rows = Item.objects.bulk_create(
        Item(
            project=project, key=key, prompt=item.prompt, group=item.group, priority=item.priority,
            gold=item.gold, meta=dict(item.meta), round=round, ready=bool(item.completions),
        )
        for key, item in items
    )  # fmt: skip
    parts = (_completions(row, item.completions) for row, (_, item) in zip(rows, items, strict=True))
    Completion.objects.bulk_create([completion for part in parts for completion in part], batch_size=BATCH)


def _completions(item: Item, completions: Sequence[NewCompletion]) -> list[Completion]:
    return [
        Completion(item=item, place=place, text=new.text, source=new.source, score=new.score, meta=dict(new.meta))
        for place, new in enumerate(completions)
    ]


def _check_settings(project: Project) -> None:
    for name in ("required", "lease_seconds"):
        if not getattr(project, name) >= 1:
            raise ValueError(f"{name} ({getattr(project, name)}) must be 1 or more")
    if project.gold_every < 0:
        raise ValueError(f"gold_every ({project.gold_every}) must be 0 or more; 0 shows no known answers")
    for name, most in LARGEST.items():
        if getattr(project, name) > most:
            raise ValueError(f"{name} ({getattr(project, name)}) must be {most} or less")
    rules: object = project.rules
    if not isinstance(rules, list) or not all(isinstance(rule, str) and 0 < len(rule) <= 200 for rule in rules):
        raise ValueError("rules must be texts of 1 to 200 characters")
    if len(set(rules)) < len(rules):
        raise ValueError("rules holds one twice")
    for name, text in [("instructions", project.instructions), *(("rules", rule) for rule in rules)]:
        if fault := fault_of(text):
            raise ValueError(f"{name} {fault}")
