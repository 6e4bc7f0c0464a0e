"""8 and 32 people at once, threads and processes, SQLite and PostgreSQL: the counts are right, nothing fails."""

import json
import subprocess
import sys

import pytest

from tests.feedback.databases import database_variables

pytest.importorskip("django", reason="needs the extra [feedback]")

ITEMS, REQUIRED = 24, 3


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.parametrize(("users", "by"), [(8, "thread"), (32, "process")])
def test_every_item_is_judged_as_often_as_asked_and_nothing_is_lost(tmp_path, database, users, by):
    options = {"--users": users, "--items": ITEMS, "--required": REQUIRED, "--by": by}
    command = [sys.executable, "-m", "tests.feedback.racing", *(str(word) for pair in options.items() for word in pair)]
    with database_variables(database, tmp_path) as variables:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("errors") == []
    assert found.pop("people_who_judged") > REQUIRED  # a race of several
    assert found == {
        "judgements_of_an_item": [REQUIRED],
        "counts_that_are_wrong": 0,
        "judgements": ITEMS * REQUIRED,
        "submits_in_the_log": ITEMS * REQUIRED,  # the second of two submits is none
        "same_item_twice": 0,
        "left_over": 0,
    }
