"""The server as a program of its own, for tests that talk HTTP to it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# arguments: project, number of pairs, password, names of people
SETUP = """
import sys
from palm_rlhf_pytorch.feedback.begin import begin
begin()
from palm_rlhf_pytorch.feedback.accounts import add_user
from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem
from palm_rlhf_pytorch.feedback.imports import add_items, make_project
project, number, password, *names = sys.argv[1:]
texts = (NewCompletion(text="a"), NewCompletion(text="b"))
add_items(make_project(project), [NewItem(prompt=f"prompt {n}", completions=texts) for n in range(int(number))])
for name in names:
    add_user(name, password)
"""


def run_program(program: str, variables: dict[str, str], *arguments: str) -> str:
    """What a program in Python prints; it must end well."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(data_dir: Path, *options: str, variables: dict[str, str] | None = None) -> tuple[subprocess.Popen, str]:
    """Start `serve` on a free port; gives the process and its address once it listens."""
    command = [
        sys.executable,
        "-m",
        "palm_rlhf_pytorch",
        "feedback",
        "serve",
        "--data-dir",
        str(data_dir),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        [*command, *options], env={**os.environ, **(variables or {})}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"http://[^/]+:\d+", line)
        if found:
            return process, found[0]
    raise AssertionError(f"the server ended with {process.wait()}")


@contextmanager
def serving(data_dir: Path, *options: str, variables: dict[str, str] | None = None) -> Iterator[str]:
    """Address of a server that ends with the block."""
    process, address = start(data_dir, *options, variables=variables)
    try:
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)
