"""`palm-rlhf --print-completion SHELL`: a script by which a shell completes commands, options and files.

Needs the extra [completion].
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from palm_rlhf_pytorch.extras import needs

SHELLS = ("bash", "zsh", "tcsh", "fish")
FOLDERS = {"DIR", "FOLDER"}
# or folders of them
FILES = {"FILE", "RUN", "TEXT", "PALM", "CHECKPOINT", "A", "B", "SOURCE", "OUT", "DATA", "DIALOGUES", "NAME_OR_PATH"}


class PrintCompletion(argparse.Action):
    """Prints the script of one shell, and ends the program."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Print the script.

        Raises:
            SystemExit: always; with code 2 if shtab is not installed.
        """
        try:
            import shtab
        except ImportError:
            parser.exit(2, f"palm-rlhf: error: {needs('completion', 'shtab', extra='completion')}\n")
        for action in _all_actions(parser):
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
            if FOLDERS & set(names):
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
            elif FILES & set(names):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell=values))
        parser.exit(0)


def add_completion_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--print-completion SHELL`."""
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        default=argparse.SUPPRESS,
        help='print a script for bash, zsh, tcsh or fish: eval "$(palm-rlhf --print-completion bash)"',
    )


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every action of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            choices: Sequence[argparse.ArgumentParser] = list(action.choices.values())
            for choice in choices:
                yield from _all_actions(choice)
