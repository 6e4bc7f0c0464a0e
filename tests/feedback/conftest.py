"""Django for this room's tests: one SQLite file a process, emptied after each test that asks for `database`."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")
pytest.importorskip("django_htmx", reason="needs the extra [feedback]")

PASSWORD = "seven grey herons"


@pytest.fixture(scope="session")
def django_ready() -> Iterator[Path]:
    """Django set up on a data directory of this process; gives the directory."""
    from palm_rlhf_pytorch.feedback.begin import begin

    with tempfile.TemporaryDirectory(prefix="palm-feedback-") as folder:
        os.environ["PALM_FEEDBACK_HOSTS"] = "testserver"
        begin(data_dir=Path(folder), database=os.environ.get("PALM_FEEDBACK_TEST_DATABASE"))
        from django.conf import settings
        from django.test.utils import setup_test_environment, teardown_test_environment

        settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]  # a real one takes 0.2 s
        setup_test_environment()
        yield Path(folder)
        teardown_test_environment()
        from django.db import connections

        connections.close_all()


@pytest.fixture
def database(django_ready: Path) -> Iterator[Path]:
    """An empty database; gives the data directory."""
    yield django_ready
    from django.core.management import call_command

    call_command("flush", verbosity=0, interactive=False)


@pytest.fixture
def people(database: Path) -> Callable[..., list[Any]]:
    """Makes people who judge, by name; their password is PASSWORD."""
    from palm_rlhf_pytorch.feedback.accounts import add_user

    return lambda *names: [add_user(name, PASSWORD) for name in names]


@pytest.fixture
def make_project(database: Path) -> Callable[..., Any]:
    """Makes a project with items of two completions each, or of `completions`; fields by keyword."""
    from palm_rlhf_pytorch.feedback.models import Completion, Item, Project

    def make(*, items: int = 3, completions: int = 2, name: str = "birds", **fields: Any) -> Any:
        project = Project.objects.create(name=name, slug=name, **{"gold_every": 0} | fields)
        for number in range(items):
            item = Item.objects.create(project=project, key=f"{number:064}", prompt=f"What is bird {number}?")
            for place in range(completions):
                text, source = f"{number}: answer {place}", f"source{place}"
                Completion.objects.create(item=item, place=place, text=text, source=source)
        return project

    return make
