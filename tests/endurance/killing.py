"""Starts the worker again and again, ends it, and looks at what it left."""

import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint
from palm_rlhf_pytorch.training.manifest import read_manifest
from tests.endurance import worker


class Processes:
    """The workers of one start, one a rank: each does `work(folder, **options)`, and writes into a log of its own."""

    def __init__(self, folder, *, ranks=1, work=worker.run, **options):
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        port = _free_port() if ranks > 1 else None
        self.codes = {_fork(work, folder, rank, ranks, port, options): None for rank in range(ranks)}
        self.folder = folder

    def wait(self, *, seconds=None):
        """Whether all have ended, after so many seconds at most."""
        end = None if seconds is None else time.monotonic() + seconds
        while running := [child for child, code in self.codes.items() if code is None]:
            for child in running:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    self.codes[child] = os.waitstatus_to_exitcode(status)
            if end is not None and time.monotonic() > end:
                break
            time.sleep(0.002)
        return None not in self.codes.values()

    def kill(self, *, only_first=False):
        """SIGKILL to those that still run, and wait for their end."""
        running = [child for child, code in self.codes.items() if code is None]
        for child in running[:1] if only_first else running:
            os.kill(child, signal.SIGKILL)
        self.wait(seconds=1.0)
        if only_first:
            self.kill()

    def must_succeed(self):
        """Wait for a good end of all."""
        self.wait()
        logs = [Path(f"{self.folder}.rank-{rank}.log").read_text() for rank in range(len(self.codes))]
        assert set(self.codes.values()) == {0}, "\n".join([f"exit codes {[*self.codes.values()]}", *logs])


def _fork(work, folder, rank, ranks, port, options):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(f"{folder}.rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))  # not pytest's own
        # the process that forked may have had an accelerator of its own
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
            )  # fmt: skip
        work(folder, **options)
        if torch.distributed.is_initialized():
            # else a process that ends first may end the other's connections in the middle of their last exchange
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def whole_checkpoints(folder):
    """How many checkpoints stand in a run's folder; each of them must load, whatever had happened to the writer."""
    checkpoints = Path(folder) / "checkpoints"
    paths = sorted(checkpoints.glob("step-*")) if checkpoints.exists() else []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            kind = load_checkpoint(path, kind=read_manifest(path).kind).kind
        if paths:
            assert Checkpoints(checkpoints).latest(kind=kind) is not None
    return len(paths)


def uninterrupted(folder, *, ranks=1, **options):
    """Digests of a run that nobody disturbs, and the seconds that it took."""
    started = time.monotonic()
    Processes(folder, ranks=ranks, **options).must_succeed()
    return worker.digest(folder), time.monotonic() - started


def killed_at_random(work, *, kills, ranks=1, seed=0, **options):
    """Kill runs at random moments until that many kills are done, and let each go on to its end.

    Returns:
        A report: kills, runs that ended, checkpoints that were looked at, and differences, which must be none.
    """
    work, draw = Path(work), random.Random(seed)
    expected, seconds = uninterrupted(work / "alone", ranks=ranks, **options)
    report = {"kills": 0, "runs": 0, "checkpoints": 0, "one rank alone": 0, "differences": [], "seconds alone": seconds}
    while report["kills"] < kills:
        folder = work / f"killed-{report['runs']}"
        while not (folder / "done").exists():
            processes, enough = Processes(folder, ranks=ranks, **options), report["kills"] >= kills
            if enough or processes.wait(seconds=draw.uniform(0.02, 0.7) * seconds):
                processes.must_succeed()
            else:
                alone = ranks > 1 and draw.random() < 0.5  # one rank dies, as by its machine; the others are then ended
                processes.kill(only_first=alone)
                report["one rank alone"] += alone
                report["kills"] += 1
            report["checkpoints"] += whole_checkpoints(folder)
        report["runs"] += 1
        found = worker.digest(folder)
        report["differences"] += [f"{folder.name}: {name}" for name in expected if found[name] != expected[name]]
        shutil.rmtree(folder)
    return report


def ended_at_boundaries(work, *, number, places=None, ranks=1, **options):
    """End a run by a signal right after a checkpoint, for each of the places; a second worker goes on to the end."""
    work = Path(work)
    expected, _ = uninterrupted(work / "alone", ranks=ranks, **options)
    saves = int(max((work / "alone" / "checkpoints").glob("step-*")).name.split("-")[1])
    report = {"places": 0, "checkpoints of a run": saves, "differences": []}
    for place in range(1, saves) if places is None else places:
        folder = work / f"ended-{place}"
        processes = Processes(folder, ranks=ranks, end_at=place, signal=number, **options)
        if number == signal.SIGKILL:
            processes.wait(seconds=60.0)  # a rank whose fellow is gone ends by an error of its own, or never
            processes.kill()
        else:
            processes.must_succeed()  # a clean exit
        assert not (folder / "done").exists()
        Processes(folder, ranks=ranks, **options).must_succeed()
        found = worker.digest(folder)
        report["differences"] += [f"place {place}: {name}" for name in expected if found[name] != expected[name]]
        report["places"] += 1
        shutil.rmtree(folder)
    return report
