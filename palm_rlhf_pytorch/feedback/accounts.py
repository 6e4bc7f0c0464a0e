"""People who judge: added from the terminal, their passwords checked by Django's validators."""

import unicodedata
from typing import Any

from django.contrib.auth import get_user_model
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.db import transaction

from palm_rlhf_pytorch.feedback import events


@transaction.atomic
def add_user(name: str, password: str) -> Any:
    """Add a person.

    Args:
        name: letters, digits and @.+-_; up to 150.
        password: that Django's validators accept.

    Raises:
        ValueError: if the name is taken or no name, or the password too weak.
    """
    users = get_user_model()
    user = users(username=name)
    try:
        user.clean_fields(exclude=["password"])
        user.validate_unique()
        validate_password(password, user)
    except ValidationError as error:
        raise ValueError(f"user {name!r}: {' '.join(error.messages)}") from error
    user = users.objects.create_user(name, password=password)
    events.record("adduser", user)
    return user


def any_user() -> bool:
    """Whether somebody can log in."""
    return bool(get_user_model().objects.filter(is_active=True).exists())


def check_login(name: str, address: str) -> None:
    """Refuse a try to log in after too many that failed, by the same name or from the same address.

    Raises:
        events.ThrottledError: naming when it ends.
    """
    for subject in _subjects(name, address):
        events.check("login_failed", events.LOGIN_FAILURES, subject=subject)


def login_failed(name: str, address: str) -> None:
    """Count a try that failed against the name and the address."""
    for subject in _subjects(name, address):
        events.record("login_failed", subject=subject)


def _subjects(name: str, address: str) -> tuple[str, str]:
    """What failed tries are counted by. A name is the one that it logs in as, however it is typed."""
    typed = unicodedata.normalize("NFKC", name.replace("\0", "")).strip().lower()
    return f"name {typed}", f"address {address}"
