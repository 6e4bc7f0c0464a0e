"""Who judges what next: an item is leased to one person for a while, never to more people than are asked for.

One transaction: the person's own live lease (a reload resumes), else the first item with room that they have not
judged or skipped. SQLite takes its write lock at the start (IMMEDIATE), which makes claims serial. PostgreSQL locks the
person, lists candidates, locks one that nobody else holds, and counts again: what was listed may have been taken since.

A lease that ran out keeps nobody out. Whoever held it may still submit while there is room.
"""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.db import transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from palm_rlhf_pytorch.feedback.codes import State
from palm_rlhf_pytorch.feedback.models import Assignment, Item, Project

PAUSES = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # seconds before each try
FIRST_PAGE, LAST_PAGE = 64, 4096  # items of the queue that are looked at together
_CLOSED = (State.DONE, State.SKIPPED)


class BusyError(Exception):
    """There are items left, and others held all of them locked for seconds: try again."""


def claim(project: Project, user: Any, *, live: bool = False) -> Assignment | None:
    """Lease an item to a person, or give back the one they hold, its time begun anew.

    Args:
        project: whose items.
        user: who will judge.
        live: also items whose completions are still to be written.

    Returns:
        The assignment, or None when nothing is left for them.

    Raises:
        BusyError: if the database was too busy for seconds.
    """
    for pause in PAUSES:
        time.sleep(pause)
        assignment, busy = _try_to_claim(project, user, live)
        if not busy:
            return assignment
    raise BusyError("the queue is busy; try again in a moment")


def release(assignment_id: int, user: Any) -> None:
    """Give a lease back before its time; nothing happens if the person holds none of this id."""
    with transaction.atomic():
        lock_user(user)
        Assignment.objects.filter(pk=assignment_id, user=user, state=State.LEASED).delete()


def lock_user(user: Any) -> None:
    """Make what one person does serial, until the transaction ends; SQLite's transactions are serial anyway."""
    get_user_model().objects.select_for_update(no_key=True).values_list("pk").get(pk=user.pk)


def has_room(item: Item, required: int, *, besides: Any, now: datetime) -> bool:
    """Whether an item, which is locked, waits for more judgements than others are giving."""
    leases = Assignment.objects.filter(item=item, state=State.LEASED, expires__gt=now).exclude(user=besides).count()
    return bool(item.gold is not None or item.done + leases < required)


def draw_order(item: Item) -> list[int]:
    """Ids of an item's completions, shuffled."""
    order = list(item.completions.values_list("pk", flat=True))
    random.SystemRandom().shuffle(order)
    return order


def gold_is_due(user: Any, number: int, every: int) -> bool:
    """Whether a person's n-th item is one with a known answer: one in `every`, at places they cannot foresee."""
    digest = hashlib.sha256(f"{user.pk}\n{user.password}\n{number}".encode()).digest()
    return every > 0 and int.from_bytes(digest[:8]) % every == 0


@transaction.atomic
def _try_to_claim(project: Project, user: Any, live: bool) -> tuple[Assignment | None, bool]:
    """The assignment, if any; and whether there are items that could not be had because others were taking them."""
    lock_user(user)
    now = timezone.now()
    ends = now + timedelta(seconds=project.lease_seconds)
    own = Assignment.objects.filter(user=user, item__project=project, state=State.LEASED).select_related("item")
    leases = list(own.order_by("-undone", "pk"))
    held = next((lease for lease in leases if lease.expires > now), None)
    if held is not None:
        held.item.project, held.expires = project, ends
        held.save(update_fields=["expires"])
        return held, False
    listed = 0
    for item_id in _candidates(project, user, now, live):
        listed += 1
        locked = Item.objects.select_for_update(skip_locked=True, no_key=True).filter(pk=item_id).first()
        if locked is None or not has_room(locked, project.required, besides=user, now=now):
            continue
        locked.project = project
        # a lease that ran out keeps its order: a page that is still open shows that
        mine = next((lease for lease in leases if lease.item_id == item_id), None)
        assignment = mine or Assignment(user=user, state=State.LEASED, order=draw_order(locked))
        assignment.item, assignment.started, assignment.expires = locked, now, ends
        assignment.save()
        return assignment, False
    return None, listed > 0


def _candidates(project: Project, user: Any, now: datetime, live: bool) -> Iterator[int]:
    """Ids of items with room that are new to the person, the first first; before them a known answer in its turn."""
    closed = Assignment.objects.filter(item=OuterRef("pk"), user=user, state__in=_CLOSED)
    items = Item.objects.filter(~Exists(closed), project=project).order_by("-priority", "id")
    items = items if live else items.filter(ready=True)
    seen = Assignment.objects.filter(user=user, item__project=project, state__in=_CLOSED)
    if project.gold_every and gold_is_due(user, seen.count(), project.gold_every):
        yield from items.filter(gold__isnull=False).values_list("pk", flat=True)[:1]
    wanted = items.filter(gold__isnull=True, done__lt=project.required).values_list("pk", "done")
    start, size = 0, FIRST_PAGE
    while page := dict(wanted[start : start + size]):  # counting the leases of the whole queue would be slow
        yield from _with_room(page, project.required, user, now)
        start, size = start + size, min(4 * size, LAST_PAGE)


def _with_room(page: Mapping[int, int], required: int, user: Any, now: datetime) -> Iterator[int]:
    """Of items and how often they are judged, those that wait for more judgements than others are giving."""
    leases = Assignment.objects.filter(item__in=list(page), state=State.LEASED, expires__gt=now).exclude(user=user)
    leased = Counter(leases.values_list("item", flat=True))
    yield from (item for item, done in page.items() if done + leased[item] < required)
