"""Options from a YAML file: the command line above it, mistakes named, and what a run writes read back."""

import argparse

import pytest
import shtab
import yaml

from palm_rlhf_pytorch.cli import main as entry
from palm_rlhf_pytorch.cli.config import ConfigError, add_config_argument, save_config, take_config


def parser_of():
    parser = argparse.ArgumentParser()
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--palm", required=True, default=argparse.SUPPRESS)
    parser.add_argument("--actor-lr", "--lr", type=float, default=0.1)
    parser.add_argument("--loss", choices=("dpo", "ipo"), default="dpo")
    parser.add_argument("--column", action="append", default=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", default=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3)
    add_config_argument(parser)
    return parser


def parsed(tmp_path, text, *argv):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    parser, argv = parser_of(), [*argv, "--config", str(path)]
    take_config(parser, argv, command="fit")
    return vars(parser.parse_args(argv)) | {"config": None}


def test_file_gives_defaults_and_the_command_line_stands_above_it(tmp_path):
    text = "command: fit\ntexts: [a, b]\npalm: p.pt\nlr: 1e-3\nloss: ipo\ncolumn: [x=y]\nsteps: 7\n"
    expected = {"texts": ["a", "b"], "palm": "p.pt", "actor_lr": 0.001, "loss": "ipo", "column": ["x=y"], "steps": 7}
    assert parsed(tmp_path, text) == {**expected, "config": None}
    found = parsed(tmp_path, text, "c", "--actor-lr", "5", "--steps", "2")
    assert (found["texts"], found["actor_lr"], found["steps"], found["palm"]) == (["c"], 5.0, 2, "p.pt")


@pytest.mark.parametrize("flag", ["--config", "--conf"])
@pytest.mark.parametrize("joined", [False, True])
def test_file_is_read_however_the_parser_takes_the_flag(tmp_path, flag, joined):
    path = tmp_path / "run.yaml"
    path.write_text("palm: p.pt\nsteps: 7\n")
    parser, argv = parser_of(), ["a", *([f"{flag}={path}"] if joined else [flag, str(path)])]
    take_config(parser, argv, command="fit")
    assert parser.parse_args(argv).steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "stepz is no option of `palm-rlhf fit`; there are actor_lr, column"),
        ("steps: many", "steps: invalid int value: 'many'"),
        ("steps: [1]", "steps takes one value"),
        ("texts: a", "texts takes a list"),
        ("steps: true", "steps takes a number or a text, not True"),
        ("steps:", "steps is empty"),
        ("loss: hinge", "loss must be one of dpo, ipo"),
        ("resume: 3", "resume is a switch"),
        ("config: other.yaml", "config is no option"),
        ("command: ppo", "a configuration of `palm-rlhf ppo`"),
        ("- 3", "must map options to values"),
        ("a: [", "is no YAML"),
    ],
)
def test_mistake_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match="run.yaml") as raised:
        parsed(tmp_path, text, "a", "--palm", "p")
    assert message in str(raised.value)


def test_what_is_written_gives_the_same_options_again(tmp_path):
    parser = parser_of()
    args = parser.parse_args(["a", "b", "--palm", "ü.pt", "--lr", "0.25", "--column", "x=y", "--column", "z="])
    args.command, args.run = "fit", print
    save_config(args, tmp_path / "config.yaml")
    again, argv = parser_of(), ["--config", str(tmp_path / "config.yaml")]
    take_config(again, argv, command="fit")
    kept = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    assert vars(again.parse_args(argv)) == {**kept, "config": argv[1]}


def test_a_run_begins_from_its_file_and_leaves_it_resolved(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one two three four five six seven " * 40)
    (tmp_path / "ours.yaml").write_text(
        f"texts: [{tmp_path}/text.txt]\ndim: 16\ndepth: 1\nheads: 2\ndim-head: 8\nlength: 24\nsteps: 3\n"
    )
    argv = ["pretrain", "--config", str(tmp_path / "ours.yaml"), "--out", str(tmp_path / "palm.pt"), "--steps", "2"]
    assert entry.main(argv) == 0, capsys.readouterr().err
    written = yaml.safe_load((tmp_path / "palm.config.yaml").read_text())
    assert (written["command"], written["dim"], written["steps"], written["batch_size"]) == ("pretrain", 16, 2, 8)


def test_a_mistake_in_a_file_is_one_line_and_two(tmp_path, capsys):
    (tmp_path / "ours.yaml").write_text("seeds: 3\n")
    assert entry.main(["ppo", "--config", str(tmp_path / "ours.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("palm-rlhf ppo: error: ") and "seeds is no option" in error and error.count("\n") == 1
    assert entry.main(["ppo", f"--config={tmp_path}/none.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_command_of_commands_takes_no_file(tmp_path, capsys):
    (tmp_path / "ours.yaml").write_text("action: stats\n")
    with pytest.raises(SystemExit) as stop:
        entry.main(["feedback", "--config", str(tmp_path / "ours.yaml")])
    assert stop.value.code == 2 and "usage: palm-rlhf feedback" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_each_command(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["--print-completion", shell])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in ("pretrain", "evaluate", "max-new-tokens"))


@pytest.mark.parametrize(
    ("command", "option"),
    [("plot", "runs"), ("finetune", "dialogues"), ("reward", "data"), ("pretrain", "out"), ("dpo", "tokenizer")],
)
def test_completion_offers_files_where_files_are_taken(command, option, capsys):
    parser = entry.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    with pytest.raises(SystemExit):
        parser.parse_args(["--print-completion", "bash"])
    (action,) = (action for action in commands.choices[command]._actions if action.dest == option)
    assert action.complete == shtab.FILE
