"""`palm-rlhf feedback`: people judge in a browser. Serves the pages; imports, exports and counts what they judged.

Needs the extra [feedback]: Django is imported when one of these commands runs, and by no other.
"""

import argparse
import getpass
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.cli.feedback_data import add_data_actions
from palm_rlhf_pytorch.cli.feedback_loop import add_live_arguments, add_loop_actions, start_writer
from palm_rlhf_pytorch.extras import needs

PACKAGES = "Django, django-htmx, waitress and whitenoise"
Run = Callable[[argparse.Namespace], int]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its own commands."""
    parser = subparsers.add_parser(
        "feedback",
        help="people judge responses in a browser; import, export and statistics of what they say",
        description="People judge responses in a browser. Everything stays in one directory on this machine.",
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_serve(commands)
    add_adduser(commands)
    add_data_actions(partial(add_action, commands))
    add_loop_actions(partial(add_action, commands))


def add_action(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: Run, help: str
) -> argparse.ArgumentParser:
    """A command of `feedback`, with the options that say where its data is; `run` is called once Django is set up."""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", default=argparse.SUPPRESS,
        help="database and secret; $PALM_FEEDBACK_DIR, else ./palm-feedback",
    )  # fmt: skip
    parser.add_argument(
        "--database", metavar="URL", default=argparse.SUPPRESS,
        help="postgresql://USER:PASSWORD@HOST:PORT/NAME; $PALM_FEEDBACK_DATABASE, else SQLite in the directory",
    )  # fmt: skip
    parser.set_defaults(run=lambda args: _with_django(args, run))
    return parser


def add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `serve`."""
    parser = add_action(commands, "serve", serve, "open the pages in which people judge")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 for all of this machine's")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    parser.add_argument(
        "--allowed-host", action="append", metavar="NAME", default=argparse.SUPPRESS,
        help="a name by which browsers reach it, as the proxy in front passes it on; may be given again",
    )  # fmt: skip
    parser.add_argument("--behind-tls", action="store_true", help="a proxy in front speaks TLS: secure cookies alone")
    parser.add_argument("--trusted-proxy", default="127.0.0.1", metavar="ADDRESS", help="of that proxy")
    add_live_arguments(parser)


def add_adduser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `adduser`."""
    parser = add_action(commands, "adduser", adduser, "add a person who judges; the password is asked for")
    parser.add_argument("name", metavar="NAME", help="to log in by")
    parser.add_argument(
        "--password-stdin", action="store_true", help="take the password from the first line of standard input"
    )


def _with_django(args: argparse.Namespace, run: Run) -> int:
    """Set Django up, then run.

    Raises:
        ImportError: if one of the packages is not installed.
        ValueError: if a variable is wrong, or the database cannot be used.
    """
    try:
        import django  # noqa: F401
        import django_htmx  # noqa: F401
        import waitress  # noqa: F401
        import whitenoise  # noqa: F401
    except ImportError as error:
        raise ImportError(needs("the feedback app", PACKAGES, extra="feedback")) from error
    _set_variables(args)
    from palm_rlhf_pytorch.feedback.begin import begin

    begin(data_dir=getattr(args, "data_dir", None), database=getattr(args, "database", None))
    return run(args)


def _set_variables(args: argparse.Namespace) -> None:
    """What `serve` says about hosts and TLS, for the settings to read."""
    from palm_rlhf_pytorch.feedback import environment
    from palm_rlhf_pytorch.feedback.server import names_of

    if args.action == "serve":
        names = [*names_of(args.host), *getattr(args, "allowed_host", [])]
        known = [name for name in environment.hosts() if name not in environment.LOOPBACK]
        os.environ[environment.PREFIX + "HOSTS"] = ",".join([*known, *names])
    if getattr(args, "behind_tls", False):
        os.environ[environment.PREFIX + "BEHIND_TLS"] = "1"


def serve(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        ValueError: if nobody could log in from elsewhere, or the port is taken.
    """
    from palm_rlhf_pytorch.feedback.accounts import any_user
    from palm_rlhf_pytorch.feedback.environment import LOOPBACK, behind_tls, data_dir
    from palm_rlhf_pytorch.feedback.server import make_server

    if not any_user():
        if args.host not in (*LOOPBACK, "::1"):
            raise ValueError(f"--host {args.host} needs a user first: palm-rlhf feedback adduser NAME")
        _first_user()
    writer = start_writer(args)
    server = make_server(args.host, args.port, trusted_proxy=args.trusted_proxy if behind_tls() else None)
    if args.host not in (*LOOPBACK, "::1") and not behind_tls():
        print("passwords and judgements cross the network in the clear: put a proxy with TLS in front, and add")
        print("--behind-tls --allowed-host NAME")
    print(f"data in {data_dir()}")
    print(f"judge at http://{args.host}:{server.effective_port}/ (Ctrl+C ends it)", flush=True)
    signal.signal(signal.SIGTERM, _stop)
    try:
        server.run()
    finally:
        server.close()
        if writer is not None:
            writer.close()
    return 0


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(0)


def _first_user() -> None:
    """Ask for somebody who can log in.

    Raises:
        ValueError: if there is no terminal to ask on.
    """
    from palm_rlhf_pytorch.feedback.accounts import add_user

    if not sys.stdin.isatty():
        raise ValueError("nobody can log in yet: palm-rlhf feedback adduser NAME")
    print("Nobody can log in yet. The first person who judges:")
    while True:
        name = input("name: ").strip()
        try:
            add_user(name, _asked_password())
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        return


def adduser(args: argparse.Namespace) -> int:
    """Add a person.

    Raises:
        ValueError: if the name is taken, or the password too weak.
    """
    from palm_rlhf_pytorch.feedback.accounts import add_user

    password = sys.stdin.readline().rstrip("\r\n") if args.password_stdin else _asked_password()
    add_user(args.name, password)
    print(f"added {args.name}")
    return 0


def _asked_password() -> str:
    """A password typed twice, unseen.

    Raises:
        ValueError: if the two differ, or there is no terminal.
    """
    if not sys.stdin.isatty():
        raise ValueError("there is no terminal to ask for a password on: give it by --password-stdin")
    password = getpass.getpass("password: ")
    if password != getpass.getpass("again: "):
        raise ValueError("the two passwords differ")
    return password
