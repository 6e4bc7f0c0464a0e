"""Options from a YAML file, and back: `--config FILE`, and the configuration a run was started with beside its results.

    palm-rlhf ppo --config ppo.yaml --seed 3          # options on the command line stand above the file's
    palm-rlhf ppo --config palm-run/config.yaml       # the same run again

Names are those of the options, with - or _; those of arguments without a name are as the help shows them, in small
letters. Knows parsers, not what their options mean.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from palm_rlhf_pytorch.training.atomic import replacing

CONFIG = "config.yaml"  # its name in the folder of a run
COMMAND = "command"
NOT_KEPT = {"help", "config", "resume", "run"}  # of one call, not of the run
FLAG = "--config"


class ConfigError(ValueError):
    """What is wrong with a configuration file."""


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` to a command; `take_config` reads it."""
    parser.add_argument(
        FLAG,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="YAML file of options; those on the command line stand above it",
    )


def take_config(parser: argparse.ArgumentParser, argv: Sequence[str], *, command: str) -> None:
    """Make the options of the YAML file that argv names the parser's defaults, for the parsing that follows.

    Args:
        parser: of one command; a required argument that the file gives is required no longer.
        argv: the command's arguments, without its name.
        command: its name; a file may say `command: ppo`, and is then refused by others.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigError: if it is no YAML mapping, names an option that the command has not, or gives it no value it takes.
    """
    path = _path_in(parser, argv) if FLAG in parser._option_string_actions else None
    if path is None:
        return
    actions = {name: action for action in parser._actions for name in _names(action)}
    for name, value in _read(path).items():
        key = str(name).replace("-", "_")
        if key == COMMAND:
            if value != command:
                raise ConfigError(f"{path} is a configuration of `palm-rlhf {value}`, not of `{command}`")
            continue
        if key not in actions or key in NOT_KEPT - {"resume"}:
            known = ", ".join(sorted(actions.keys() - NOT_KEPT))
            raise ConfigError(f"{path}: {name} is no option of `palm-rlhf {command}`; there are {known}")
        _give(parser, actions[key], value, place=f"{path}: {name}")


def config_beside(out: Path) -> Path:
    """Where the configuration of a run stands whose result is one file: palm.config.yaml beside palm.pt."""
    return out.with_name(f"{out.stem}.config.yaml")


def save_config(args: argparse.Namespace, path: str | Path) -> None:
    """Write the options of a call, defaults included, as a file that `--config` reads; atomically."""
    kept = {name: _plain(value) for name, value in vars(args).items() if name not in NOT_KEPT}
    ordered = {COMMAND: kept.pop(COMMAND), **dict(sorted(kept.items()))}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(path)) as file:
        file.write(yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True).encode())


def _path_in(parser: argparse.ArgumentParser, argv: Sequence[str]) -> Path | None:
    """The last file that the flag names; the parser takes its beginning too, as long as no other option has it."""
    flags = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    found = None
    for place, word in enumerate(argv):
        if word == "--":
            break
        name, given, value = word.partition("=")
        if name != FLAG and [flag for flag in flags if flag.startswith(name)] != [FLAG]:
            continue
        if given:
            found = Path(value)
        elif place + 1 < len(argv):
            found = Path(argv[place + 1])
    return found


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    except (yaml.YAMLError, ValueError) as error:  # not UTF-8, or no path
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must map options to values, a line each: `seed: 3`")
    return content


def _names(action: argparse.Action) -> list[str]:
    """What a file may call an option: its place in the namespace, and its long names."""
    long = [name.removeprefix("--").replace("-", "_") for name in action.option_strings if name.startswith("--")]
    return [action.dest, *long]


def _give(parser: argparse.ArgumentParser, action: argparse.Action, value: object, *, place: str) -> None:
    """Make a value the default of an option, after the checks that the command line would make."""
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{place} is a switch: give true or false, not {value!r}")
        if value:
            parser.set_defaults(**{action.dest: action.const})
        return
    several = action.nargs in ("+", "*") or isinstance(action.nargs, int) or isinstance(action, argparse._AppendAction)
    if isinstance(value, list) != several or isinstance(value, dict):
        raise ConfigError(f"{place} takes {'a list' if several else 'one value'}, not {value!r}")
    if value is None:
        raise ConfigError(f"{place} is empty: give a value, or leave the line out")
    items = [_checked(parser, action, item, place) for item in (value if isinstance(value, list) else [value])]
    parser.set_defaults(**{action.dest: items if several else items[0]})
    action.required = False
    if not action.option_strings and action.nargs in (None, "+"):  # the command line may leave it to the file
        action.nargs = "?" if action.nargs is None else "*"


def _checked(parser: argparse.ArgumentParser, action: argparse.Action, item: object, place: str) -> Any:
    if isinstance(item, bool | list | dict) or item is None:
        raise ConfigError(f"{place} takes a number or a text, not {item!r}")
    try:
        taken = parser._get_value(action, str(item))
    except argparse.ArgumentError as error:
        raise ConfigError(f"{place}: {error.message}") from error
    if action.choices is not None and taken not in action.choices:
        raise ConfigError(f"{place} must be one of {', '.join(map(str, action.choices))}, not {item!r}")
    return taken


def _plain(value: object) -> Any:
    """A value as YAML writes it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
