"""`palm-rlhf`: one entry, a subcommand for each file of this room.

A user's mistake (a ValueError, a file that cannot be read or written) is one line on stderr and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence

from palm_rlhf_pytorch.cli import (
    chat,
    check,
    convert,
    demo,
    dpo,
    evaluate,
    feedback,
    finetune,
    generate,
    grpo,
    inspect,
    plan,
    plot,
    ppo,
    pretrain,
    reward,
)
from palm_rlhf_pytorch.cli.completion import add_completion_argument
from palm_rlhf_pytorch.cli.config import ConfigError, add_config_argument, take_config

COMMANDS = (
    demo,
    pretrain,
    finetune,
    reward,
    check,
    plan,
    ppo,
    grpo,
    dpo,
    generate,
    chat,
    evaluate,
    plot,
    inspect,
    convert,
    feedback,
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
CUT_OFF = 141  # 128 + SIGPIPE
ORIGIN = (
    "The name palm-rlhf-pytorch on PyPI belongs to the original project, another program: install this one from its"
    " repository."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None takes them from the command line.

    Returns:
        Exit code: 0 done, 2 a mistake in the input, 130 interrupted, 141 nobody reads on. A run that a signal stops
        saves first, and gives 0: it can be gone on with.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    try:
        _take_config(parser, argv)
        args = parser.parse_args(argv)
    except (ConfigError, OSError) as error:
        print(f"palm-rlhf {argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        return args.run(args)
    except BrokenPipeError:  # whoever read what is printed (`| head`) has enough of it
        return CUT_OFF
    except (ValueError, OSError, ImportError) as error:  # an extra that is not installed is named
        print(f"palm-rlhf {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\npalm-rlhf {args.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands; each sets `run`, which takes the arguments and returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="palm-rlhf",
        description="RLHF on a PaLM language model: train or take a model, train a judge, improve the model by it.",
        epilog=f"`palm-rlhf COMMAND --help` tells more. Begin with `palm-rlhf demo`. {ORIGIN}",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        if subparser.formatter_class is argparse.ArgumentDefaultsHelpFormatter:
            subparser.formatter_class = _Defaults
        if not any(isinstance(action, argparse._SubParsersAction) for action in subparser._actions):
            add_config_argument(subparser)  # commands of a command have options of their own
    add_completion_argument(parser)
    return parser


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not that a flag is off or an option has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def _take_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Read the file that `--config` names among a command's arguments into the defaults of that command."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    if argv and argv[0] in commands.choices:
        take_config(commands.choices[argv[0]], argv[1:], command=argv[0])


if __name__ == "__main__":
    sys.exit(main())
