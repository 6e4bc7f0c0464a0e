"""What importing the package takes, beside torch and accelerate alone: a process each, in turn, bytecode written.

A process's own clock of CPU seconds is read, which other work on the machine moves less than the time of day.
"""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.report import Row, timed_rows

ALONE = "torch and accelerate"
MODULES = {"ours": "palm_rlhf_pytorch", ALONE: "torch, accelerate"}
MEASURE = "import time; begun = time.process_time(); import {}; print(time.process_time() - begun)"


def seconds(modules: str) -> float:
    """CPU seconds of an import statement in a new interpreter, which may keep bytecode."""
    command = [sys.executable, "-c", MEASURE.format(modules)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "."}  # without PYTHONDONTWRITEBYTECODE
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def timed(modules: str) -> dict[str, float]:
    """The same as one measure."""
    return {"import": seconds(modules)}


def cases(bench: Bench) -> Iterator[Case]:
    """One case."""

    def run() -> list[Row]:
        competitors = {who: partial(timed, names) for who, names in MODULES.items()}
        return timed_rows("import", "cpu seconds", bench.interleave(competitors)["import"])

    yield Case("import", run)


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
