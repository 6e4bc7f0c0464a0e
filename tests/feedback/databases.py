"""Databases for tests that start programs: an empty SQLite directory, or an empty database of PALM_TEST_PG's server."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def database_variables(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """Variables of a program whose database is empty; one of PostgreSQL is dropped in the end.

    Args:
        kind: "sqlite" or "postgresql"; the latter skips the test where PALM_TEST_PG names no server.
        folder: data directory.
    """
    variables = {**os.environ, "PALM_FEEDBACK_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    variables.pop("PALM_FEEDBACK_DATABASE", None)
    if kind == "sqlite":
        yield variables
        return
    server = os.environ.get("PALM_TEST_PG")
    if not server:
        pytest.skip("PALM_TEST_PG names no PostgreSQL database: postgresql://USER@HOST:PORT/NAME")
    psycopg = pytest.importorskip("psycopg", reason="needs the extra [feedback-postgres]")
    name = f"palm_test_{secrets.token_hex(6)}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        try:
            yield variables | {"PALM_FEEDBACK_DATABASE": f"{server.rsplit('/', 1)[0]}/{name}"}
        finally:
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
