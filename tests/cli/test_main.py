"""The entry `palm-rlhf`: its commands, its exit codes."""

import argparse
import subprocess
import sys

import pytest

from palm_rlhf_pytorch.cli import main as entry


def fake_command(run):
    def add_parser(subparsers):
        subparsers.add_parser("fake").set_defaults(run=run)

    return argparse.Namespace(add_parser=add_parser)


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("command", ["demo", "pretrain", "generate", "chat"])
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main([command, "--help"])
    assert stop.value.code == 0
    assert f"palm-rlhf {command}" in capsys.readouterr().out


def test_help_says_whose_the_name_on_pypi_is(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(["--help"])
    assert stop.value.code == 0
    assert "PyPI belongs to the original project" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("argv", [[], ["unknown"], ["generate"]])
def test_wrong_usage_exits_with_two(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        entry.main(argv)
    assert stop.value.code == 2
    assert "usage: palm-rlhf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("dim (0)\nmust be positive"), FileNotFoundError("dim (0) must be positive")]
)
def test_a_mistake_of_the_user_is_one_line_and_two(error, monkeypatch, capsys):
    monkeypatch.setattr(entry, "COMMANDS", (fake_command(raising(error)),))
    assert entry.main(["fake"]) == 2
    assert capsys.readouterr().err == "palm-rlhf fake: error: dim (0) must be positive\n"


def test_interrupt_exits_with_130(monkeypatch, capsys):
    monkeypatch.setattr(entry, "COMMANDS", (fake_command(raising(KeyboardInterrupt())),))
    assert entry.main(["fake"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_output_that_nobody_reads_on_is_no_mistake(monkeypatch, capsys):
    monkeypatch.setattr(entry, "COMMANDS", (fake_command(raising(BrokenPipeError())),))
    assert entry.main(["fake"]) == 141
    assert capsys.readouterr().err == ""


def test_our_own_mistake_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(entry, "COMMANDS", (fake_command(raising(AssertionError("ours"))),))
    with pytest.raises(AssertionError, match="ours"):
        entry.main(["fake"])


def test_exit_code_is_that_of_the_command(monkeypatch):
    monkeypatch.setattr(entry, "COMMANDS", (fake_command(lambda args: 7),))
    assert entry.main(["fake"]) == 7


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "palm_rlhf_pytorch", "generate", str(tmp_path / "none.pt"), "a"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("palm-rlhf generate: error: ") and "none.pt" in done.stderr
