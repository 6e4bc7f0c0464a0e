"""examples/accelerate: the script under torchrun, and its settings as accelerate reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"


DIES = """
import os, signal, sys
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
save = Checkpoints.save

def save_and_die(self, step, **state):
    save(self, step, **state)
    if step == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save = save_and_die
sys.path.insert(0, {folder!r})
import train
train.main()
"""


def by_torchrun(script, run_dir, *, episodes, ends_well=True):
    """What two processes of a script said, and the lines of their metrics without times."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), "--cpu", "--run-dir", str(run_dir), "--episodes", str(episodes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert (ended.returncode == 0) is ends_well, ended.stderr
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return ended, [{name: line[name] for name in line if not name.startswith("perf/")} for line in lines]


def test_the_script_runs_in_two_processes(tmp_path):
    ended, lines = by_torchrun(FOLDER / "train.py", tmp_path / "run", episodes=64)
    assert ended.stdout.count("2 processes, scores of the updates: [") == ended.stdout.count("an answer: [") == 1
    assert [(line["step"], line["episodes"]) for line in lines] == [(1, 64)]


@pytest.mark.slow
def test_the_script_goes_on_when_a_process_dies(tmp_path):
    (tmp_path / "dies.py").write_text(DIES.format(folder=str(FOLDER)))
    _, alone = by_torchrun(FOLDER / "train.py", tmp_path / "alone", episodes=128)
    _, lines = by_torchrun(tmp_path / "dies.py", tmp_path / "run", episodes=128, ends_well=False)
    assert lines == alone[:1]  # the other process did not go on alone
    _, lines = by_torchrun(FOLDER / "train.py", tmp_path / "run", episodes=128)
    assert lines == alone and [line["step"] for line in lines] == [1, 2]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_say_whether_they_are_tested_and_accelerate_reads_them(path):
    assert path.read_text().startswith(("# tested: ", "# untested: "))
    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.num_processes >= 1
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
