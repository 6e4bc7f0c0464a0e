"""What must hold before people judge, and while they do: the database whole, counts right, the secret a secret."""

import stat
from collections.abc import Iterator
from typing import NamedTuple

from django.apps import apps
from django.conf import settings
from django.core.checks import WARNING, run_checks
from django.db import connection
from django.db.models import Count, F, Q

from palm_rlhf_pytorch.feedback.accounts import any_user
from palm_rlhf_pytorch.feedback.codes import State
from palm_rlhf_pytorch.feedback.environment import SECRET_FILE, data_dir
from palm_rlhf_pytorch.feedback.models import Assignment, Item

TLS = {"security.W004", "security.W008", "security.W012", "security.W016"}  # what a proxy with TLS settles


class Finding(NamedTuple):
    """One thing looked at; `ok` None where it only depends on who can reach the server."""

    name: str
    ok: bool | None
    detail: str


def findings() -> list[Finding]:
    """Everything that is looked at, in order; nothing is changed."""
    return [_users(), _secret(), _database(), _counts(), *_django()]


def _users() -> Finding:
    return Finding("users", any_user(), "somebody can log in" if any_user() else "nobody can log in: add a user")


def _secret() -> Finding:
    path = data_dir() / SECRET_FILE
    if not path.exists():
        return Finding("secret", True, "from the environment")
    mode = stat.S_IMODE(path.stat().st_mode)
    return Finding("secret", not mode & 0o077, f"{path} has mode {mode:04o}; 0600 hides it from others")


def _database() -> Finding:
    with connection.cursor() as cursor:
        if connection.vendor != "sqlite":
            cursor.execute("SELECT 1")
            return Finding("database", True, f"{connection.vendor} answers")
        cursor.execute("PRAGMA integrity_check")
        said = [str(row[0]) for row in cursor.fetchall()]
        cursor.execute("PRAGMA foreign_key_check")
        broken = len(cursor.fetchall())
    return Finding("database", said == ["ok"] and not broken, f"SQLite: {said[0]}, {broken} references to nothing")


def _counts() -> Finding:
    judged = Count("assignments__judgement")
    wrong = Item.objects.annotate(judged=judged).exclude(done=F("judged")).count()
    done = Q(state=State.DONE) & Q(judgement=None) | ~Q(state=State.DONE) & Q(judgement__isnull=False)
    torn = Assignment.objects.filter(done).count()
    detail = f"{wrong} items whose count is not that of their judgements, {torn} assignments at odds with theirs"
    return Finding("counts", not wrong and not torn, detail)


def _django() -> Iterator[Finding]:
    messages = run_checks(app_configs=list(apps.get_app_configs()), include_deployment_checks=True)
    for message in messages:
        if message.level >= WARNING and message.id not in settings.SILENCED_SYSTEM_CHECKS:
            open_to_all = message.id in TLS and not settings.BEHIND_TLS
            detail = "plain HTTP: fine on this machine; elsewhere put TLS in front and add --behind-tls"
            text = " ".join(str(message.msg).split())
            yield Finding(str(message.id), None if open_to_all else False, detail if open_to_all else text)
    if not messages:
        yield Finding("deployment", True, "Django finds nothing")
