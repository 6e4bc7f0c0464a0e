"""The studies in examples/ run: at their smallest size, and without their data they say what to do."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples" / "studies"


def said(script, *options, **environment):
    """Exit code, and what a script prints and complains of."""
    known = {name: value for name, value in os.environ.items() if name != "PALM_DATA_DIR"}
    ended = subprocess.run(
        [sys.executable, str(FOLDER / script), *options], capture_output=True, text=True, check=False, timeout=240,
        env=known | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


def test_arithmetic_runs_and_counts_what_is_right_before_and_after():
    code, printed, error = said("arithmetic.py", "--quick")
    assert code == 0, error
    rows = [line.split() for line in printed.splitlines() if line.startswith(("sampled", "its likeliest"))]
    assert len(rows) == 2 and all(0 <= float(share) <= 1 for row in rows for share in row[-2:])


def test_examples_on_sentiment_name_the_data_and_the_files_they_need(tmp_path):
    for script in ("judge_of_sentiment.py", "sentiment.py"):
        code, _, error = said(script)
        assert code == 2 and "PALM_DATA_DIR must name the folder" in error
    code, _, error = said("sentiment.py", "--judges", str(tmp_path / "none"), PALM_DATA_DIR=str(tmp_path))
    assert code == 2 and "judge_of_sentiment.py --seeds 0 1" in error
