"""The log: one line is added in the transaction of what it tells of. Throttles count its lines."""

from datetime import timedelta
from typing import Any, NamedTuple

from django.utils import timezone

from palm_rlhf_pytorch.feedback.models import Assignment, Event


class Limit(NamedTuple):
    """So many events of one verb, by one person or subject, in so many seconds."""

    number: int
    seconds: int


LOGIN_FAILURES = Limit(10, 600)  # of one name, and of one address
JUDGEMENTS = Limit(120, 60)  # of one person: two a second for a minute is no reading


class ThrottledError(Exception):
    """Too much in too short a time; `seconds` until the next try makes sense."""

    def __init__(self, message: str, seconds: int) -> None:
        super().__init__(message)
        self.seconds = seconds


def record(verb: str, user: Any = None, *, subject: str = "", **payload: Any) -> Event:
    """Add a line to the log.

    Args:
        verb: what happened ("submit", "login_failed").
        user: who did it; None for nobody known.
        subject: what `check` counts by where nobody is known: a name, an address.
        payload: what JSON can hold.
    """
    return Event.objects.create(at=timezone.now(), user=user, verb=verb, subject=subject[:150], payload=payload)


def check(verb: str, limit: Limit, *, user: Any = None, subject: str = "") -> None:
    """Raise if a person, or a subject, has reached a limit.

    Raises:
        ThrottledError: naming when it ends.
    """
    since = timezone.now() - timedelta(seconds=limit.seconds)
    events = Event.objects.filter(verb=verb, at__gt=since)
    events = events.filter(subject=subject[:150]) if user is None else events.filter(user=user)
    # the limit is reached while the event that far back is still within the time
    times = list(events.order_by("-at").values_list("at", flat=True)[limit.number - 1 : limit.number])
    if times:
        seconds = max(1, int((times[0] - since).total_seconds()) + 1)
        raise ThrottledError(f"too many in a short time; try again in {seconds} s", seconds)


def last_undone(assignment: Assignment) -> dict[str, Any] | None:
    """What a person had said of an item before they took it back; None where that was not the last they took back."""
    event = Event.objects.filter(user=assignment.user_id, verb="undo").order_by("-at", "-pk").first()
    return event.payload if event is not None and event.payload["assignment"] == assignment.pk else None
