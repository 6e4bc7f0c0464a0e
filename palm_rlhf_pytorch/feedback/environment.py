"""What PALM_FEEDBACK_* variables say: data directory, secret key, database, hosts. Knows no Django.

PALM_FEEDBACK_DIR          data directory; ./palm-feedback
PALM_FEEDBACK_DATABASE     sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME; feedback.sqlite3 beside
PALM_FEEDBACK_SECRET_KEY   secret of sessions and forms; the directory's secret.key, made when first asked for
PALM_FEEDBACK_HOSTS        names the server answers to, beside those of this machine's loopback; separated by commas
PALM_FEEDBACK_BEHIND_TLS   1: a proxy in front speaks TLS
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

PREFIX = "PALM_FEEDBACK_"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
SQLITE_FILE = "feedback.sqlite3"
SECRET_FILE = "secret.key"
POSTGRES = ("postgres", "postgresql")
MIN_SECRET = 50  # characters; what Django's deployment check asks for


def value(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """What a variable says, named without its prefix; empty where it is not set."""
    return environ.get(PREFIX + name, "").strip()


def data_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The data directory, which need not exist."""
    return Path(value("DIR", environ) or "palm-feedback").absolute()


def make_data_dir(path: Path) -> Path:
    """Make the data directory, for its owner's eyes alone (0700); one that exists keeps its mode.

    Raises:
        ValueError: if path is no folder.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is no folder; name another data directory")
    if not path.exists():
        path.mkdir(parents=True, mode=0o700)
    return path


def make_file(path: Path) -> None:
    """Make an empty file for its owner's eyes alone (0600); one that exists keeps its mode.

    Raises:
        ValueError: if it cannot be made there.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def secret_key(directory: Path, environ: Mapping[str, str] = os.environ) -> str:
    """The secret of the environment, else of the directory's file, which is made (0600) when it is not there.

    Raises:
        ValueError: if the secret is shorter than MIN_SECRET.
    """
    given = value("SECRET_KEY", environ)
    place = PREFIX + "SECRET_KEY" if given else str(directory / SECRET_FILE)
    key = given or _key_of_file(make_data_dir(directory) / SECRET_FILE)
    if len(key) < MIN_SECRET:
        raise ValueError(f"{place} holds {len(key)} characters; a secret has {MIN_SECRET} or more")
    return key


def _key_of_file(path: Path) -> str:
    """Content of a file that is made if need be; of two processes that make it at once, both read the same."""
    if not path.exists():
        beside = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(64))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)  # fails where another was faster; a half-written file is never seen
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    return path.read_text(encoding="ascii").strip()


def database(directory: Path, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Django's entry for the database that the environment names.

    Raises:
        ValueError: if the URL is none of sqlite:///FILE and postgresql://...
    """
    return database_of(value("DATABASE", environ) or f"sqlite:///{quote(str(directory / SQLITE_FILE))}")


def database_of(url: str) -> dict[str, Any]:
    """Django's entry for a URL; user, password and name may be percent-encoded, a query holds the driver's options.

    A file is relative to the working directory (sqlite:///x.db), or absolute (sqlite:////var/x.db).

    SQLite takes its write lock when a transaction begins (IMMEDIATE) and lets reading go on meanwhile (WAL): with
    Django's default a transaction that reads first and then writes fails when another has written in between.

    Raises:
        ValueError: if the URL is none of sqlite:///FILE and postgresql://...
    """
    parts = urlsplit(url)
    if parts.scheme == "sqlite" and not parts.netloc and parts.path.strip("/"):
        return {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": unquote(parts.path[1:]),
            "CONN_MAX_AGE": None,  # a connection for each of the server's threads
            "OPTIONS": {
                "transaction_mode": "IMMEDIATE",
                "timeout": 30,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL",
            },
        }
    if parts.scheme in POSTGRES and parts.path.strip("/"):
        return {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": unquote(parts.path.lstrip("/")),
            "USER": unquote(parts.username or ""),
            "PASSWORD": unquote(parts.password or ""),
            "HOST": unquote(parts.hostname or ""),
            "PORT": str(parts.port or ""),
            "CONN_MAX_AGE": 600,
            "CONN_HEALTH_CHECKS": True,
            "OPTIONS": dict(parse_qsl(parts.query)),
        }
    shown = f"{parts.scheme}://..." if parts.scheme else url  # a password is in no message
    raise ValueError(f"database ({shown}) is none of sqlite:///FILE and postgresql://USER:PASSWORD@HOST:PORT/NAME")


def hosts(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names the server answers to."""
    return [*LOOPBACK, *(name.strip() for name in value("HOSTS", environ).split(",") if name.strip())]


def behind_tls(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a proxy in front speaks TLS.

    Raises:
        ValueError: if the variable is neither empty, 0 nor 1.
    """
    said = value("BEHIND_TLS", environ)
    if said not in ("", "0", "1"):
        raise ValueError(f"{PREFIX}BEHIND_TLS ({said!r}) must be 1, 0 or empty")
    return said == "1"
