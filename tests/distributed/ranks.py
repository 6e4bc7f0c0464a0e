"""Starts the processes of a test, and brings home what each of them returns."""

import os
import pickle
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from tests.endurance.killing import Processes

PATIENCE = 120  # seconds after which processes are taken to wait for one another, and are ended


def in_ranks(folder, work, *, ranks=2, fsdp=False, **options):
    """What `work(folder, **options)` returns on each of some gloo processes, by rank; theirs are logs beside folder."""
    folder = Path(folder)
    processes = Processes(folder, ranks=ranks, work=_worker, task=work, fsdp=fsdp, options=options)
    ended = processes.wait(seconds=PATIENCE)
    processes.kill()
    logs = [Path(f"{folder}.rank-{rank}.log").read_text() for rank in range(ranks)]
    assert ended and set(processes.codes.values()) == {0}, "\n".join(["ended" if ended else "stuck", *logs])
    return [pickle.loads(Path(f"{folder}.rank-{rank}.result").read_bytes()) for rank in range(ranks)]


def _worker(folder, *, task, fsdp, options):
    # the process that forked may have had an accelerator of its own
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    if fsdp:
        os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    found = task(folder, **options)
    Path(f"{folder}.rank-{os.environ.get('RANK', 0)}.result").write_bytes(pickle.dumps(found))
