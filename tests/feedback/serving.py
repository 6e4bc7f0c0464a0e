"""The server as a program of its own, for tests that talk HTTP to it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
