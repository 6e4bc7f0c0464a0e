"""The original package in a process of its own, which answers one request at a time over pipes.

It stays alive between requests, so that its rounds can be interleaved with ours. It times itself.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("upstream_worker.py")


class Upstream:
    """A running worker."""

    def __init__(self, python: str) -> None:
        """Start it; -P and no PYTHONPATH, so that it imports the installed package and not this repository's."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [python, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=environment, cwd=tempfile.gettempdir(),
        )  # fmt: skip

    def ask(self, request: str, **arguments: Any) -> dict[str, float]:
        """Have something done; times come back by name.

        Raises:
            SystemExit: if the worker died; the end of what it wrote to its error stream is in the message.
        """
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        try:
            self.process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"upstream's process ended on {request} {arguments}:\n{self.errors.read()[-2000:]}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it by closing its input, and wait."""
        self.process.communicate()
        self.errors.close()
