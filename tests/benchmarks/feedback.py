"""The feedback app under load: each person judges an item every two seconds, over HTTP, and waits for the next page.

    python -m tests.benchmarks.feedback [--people 8 32] [--seconds 30] [--items 1000] [--database URL]

Server and people share this machine. Prints a line for each number of people: requests, median, 99th percentile, worst,
in milliseconds; then the same as JSON. A database that is named must be empty.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from tests.feedback.http_judge import Judge
from tests.feedback.serving import SETUP, run_program, serving

PASSWORD = "seven grey herons"
PAUSE = 2.0  # seconds between two judgements of one person: faster than anybody reads


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--database", default="")
    args = parser.parse_args()
    print(f"{'people':>7}{'requests':>10}{'p50 ms':>9}{'p99 ms':>9}{'worst ms':>10}{'failed':>8}")
    results = []
    names = [f"person{number}" for number in range(max(args.people))]
    with tempfile.TemporaryDirectory() as folder:
        variables = {**os.environ, "PALM_FEEDBACK_DIR": folder, "PALM_FEEDBACK_DATABASE": args.database}
        run_program(SETUP, variables, "load", str(args.items), PASSWORD, *names)
        with serving(Path(folder), variables=variables) as address:
            judges = [Judge(address, name, PASSWORD, htmx=True) for name in names]
            for people in args.people:
                results.append(load(judges[:people], args.seconds))
                print("{people:>7}{requests:>10}{p50:>9.0f}{p99:>9.0f}{worst:>10.0f}{failed:>8}".format(**results[-1]))
    print(json.dumps(results))


def load(judges: list[Judge], seconds: float) -> dict[str, float]:
    """Times of all requests of these people."""
    times: list[float] = []
    failures: list[Exception] = []
    ends = time.monotonic() + seconds

    def work(judge: Judge) -> None:
        page = judge.open("/projects/load/")
        time.sleep(random.uniform(0, PAUSE))
        while time.monotonic() < ends:
            begun = time.perf_counter()
            try:
                done = judge.judge("load", page, choice=str(random.randint(-3, 3)))
            except OSError as error:  # refused, or no answer
                failures.append(error)
                return
            if done is None:
                return
            times.append(time.perf_counter() - begun)
            page = done[1]
            time.sleep(max(0.0, PAUSE - times[-1]))

    threads = [threading.Thread(target=work, args=(judge,)) for judge in judges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if not times:
        raise ValueError(f"no request was answered; the first failure: {failures[:1]}")
    p50, p99 = (float(value) * 1000 for value in np.percentile(times, [50, 99]))
    numbers = {"people": len(judges), "requests": len(times), "failed": len(failures)}
    return {**numbers, "p50": p50, "p99": p99, "worst": max(times) * 1000}


if __name__ == "__main__":
    main()
