"""Django made ready in this process: variables, settings, tables up to date. Imports Django when called, not before."""

import os
from pathlib import Path

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.feedback import environment

SETTINGS = "palm_rlhf_pytorch.feedback.settings"


def begin(*, data_dir: Path | None = None, database: str | None = None) -> None:
    """Set up Django and bring the tables up to date.

    Args:
        data_dir: directory of the database and the secret; None for $PALM_FEEDBACK_DIR or ./palm-feedback.
        database: URL of another database; None for $PALM_FEEDBACK_DATABASE or SQLite in the directory.

    Raises:
        ValueError: if a variable is wrong, or the database cannot be reached.
    """
    if data_dir is not None:
        os.environ[environment.PREFIX + "DIR"] = str(data_dir)
    if database is not None:
        os.environ[environment.PREFIX + "DATABASE"] = database
    environment.make_data_dir(environment.data_dir())
    entry = environment.database(environment.data_dir())
    if entry["ENGINE"].endswith("sqlite3"):
        environment.make_file(Path(entry["NAME"]))
    if entry["ENGINE"].endswith("postgresql"):
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise ValueError(needs("a PostgreSQL database", "psycopg", extra="feedback-postgres")) from error
    os.environ["DJANGO_SETTINGS_MODULE"] = SETTINGS
    import django
    from django.core.management import call_command
    from django.db import DatabaseError

    django.setup()
    try:
        call_command("migrate", verbosity=0, interactive=False)
    except DatabaseError as error:
        raise ValueError(f"the database cannot be used: {' '.join(str(error).split())}") from error
