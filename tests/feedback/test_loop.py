"""The walk of examples/8_feedback.md at small size, command by command as it is written there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")
pytest.importorskip("waitress", reason="needs the extra [feedback]")

ROOT = Path(__file__).parents[2]
WALK = ROOT / "examples" / "8_feedback.md"
# what the page says, and what this test runs in its place
SMALLER = {
    "max_bytes=1_000_000": "max_bytes=30_000",
    "paragraphs[:1200]": "paragraphs[:60]",
    "[:600]": "[:31]",
    "paragraphs[1200:]": "paragraphs[60:]",
    "--steps 400 --length 128 --batch-size 16": "--steps 12 --length 64 --batch-size 4 --dim 16 --depth 1 --heads 2",
    "--count 300": "--count 29",
    "--count 150": "--count 7",
    "--max-new-tokens 48": "--max-new-tokens 24",
    "--members 3 --epochs 4": "--members 2 --epochs 1 --held-out 0.4",
    "--episodes 1024": "--episodes 16 --update-timesteps 8 --minibatch-size 8",
}


def commands():
    """All that the page has people type."""
    text = "".join(re.findall(r"^```bash\n(.*?)^```", WALK.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    for written, run in SMALLER.items():
        assert written in text, f"{WALK} no longer says {written}"
        text = text.replace(written, run)
    return text


def run(text, folder, **variables):
    """Run a script in a folder; gives what it printed."""
    found = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr[-4000:]}"
    return found.stdout


@pytest.mark.slow
def test_sample_judge_export_reward_ppo_and_the_next_sample(tmp_path):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "bin").mkdir()
    for name, command in (("python", ""), ("palm-rlhf", " -m palm_rlhf_pytorch")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable}{command} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    end = "trap 'kill ${server:-} 2> /dev/null || true' EXIT\n"
    out = run(end + commands(), tmp_path, **path)

    assert [int(number) for number in re.findall(r"judged (\d+) pairs", out)] == [29, 29, 7, 7]
    status = "palm-rlhf feedback status --json --data-dir loop/feedback --round "
    first, second = (json.loads(run(status + number, tmp_path, **path)) for number in "12")
    assert [first[name] for name in ("judgements", "wanted", "finished", "annotators")] == [58, 58, 29, 2]
    assert (first["new"], first["old"], first["reward_accuracy"], first["win_rate"]) == ("loop/palm.pt", "", None, None)
    assert (second["new"], second["old"]) == ("loop/run-1/improved_palm.pt", "loop/palm.pt")
    assert (second["judgements"], second["win_rate"]["of"], second["agreement"]["items"]) == (14, 14, 7)
    assert second["reward_accuracy"]["of"] <= 14

    # what was exported is what the judges said, by text: both like short words, and err in 1 of 20
    sys.path.insert(0, str(ROOT / "examples"))
    from feedback_judge import Taste

    sys.path.pop(0)
    taste = Taste(errs=0.0, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "loop" / "labels.jsonl").read_text().splitlines()]
    assert rows and all(row["strength"] in (1, 2, 3) for row in rows)
    along = [taste.choice(row["rejected"].strip(), row["chosen"].strip()) == row["strength"] for row in rows]
    assert sum(along) / len(along) > 0.7
    assert {row["annotator"] for row in rows} == {"anna", "ben"}
    assert (tmp_path / "loop" / "run-1" / "improved_palm.pt").exists()
