"""The plan of a run beside the run: peak memory of a process, seconds of an update's rollout and of its learning.

Each is taken in a process of its own, in turn: one makes the plan and learns nothing, the other trains for two updates,
or as many more as old responses are kept, and gives the last one's times. Responses are of full length. What should be
near 1 is planned / measured.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from palm_rlhf_pytorch import RewardModel, RLHFTrainer
from palm_rlhf_pytorch.policy.plan import UPDATES, plan
from tests.benchmarks.counts import PPO_SMALL, Shape
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.memory import _resident
from tests.benchmarks.models import our_model
from tests.benchmarks.report import Row, timed_rows
from tests.processor import cap_instruction_set

TINY = Shape("128x4", num_tokens=256, dim=128, depth=4)
WIDE = Shape("256x4 v2000", num_tokens=2000, dim=256, depth=4)


@dataclass(frozen=True)
class Job:
    """What is planned and run: `count` prompts of `prompt` tokens in an update, responses of `new`."""

    shape: Shape
    count: int = 16
    prompt: int = 64
    new: int = 64
    lora: bool = True
    checkpointing: bool = False
    staleness: int = 0
    held_out: bool = False

    @property
    def sampling(self) -> dict[str, int]:
        """Arguments of `train` and of `plan`."""
        return {"max_seq_len": self.prompt + self.new, "update_timesteps": self.count}

    @property
    def episodes(self) -> int:
        """Of a run whose last update is like all that would follow."""
        return (2 + self.staleness) * self.count


JOBS = {
    "128x4": Job(TINY),
    "128x4 whole": Job(TINY, lora=False),
    "128x4 long": Job(TINY, count=32, prompt=32, new=224),
    "128x4 stale": Job(TINY, staleness=1),
    "128x4 held out": Job(TINY, held_out=True),
    "256x4 v2000": Job(WIDE),
    "256x4 v2000 checkpointing": Job(WIDE, checkpointing=True),
    "256x4 v2000 whole": Job(WIDE, lora=False),
    "256x4": Job(PPO_SMALL, prompt=33, new=95),
}


def cases(bench: Bench) -> Iterator[Case]:
    """All jobs; the first one alone in the quick run."""
    for name in [*JOBS][: 1 if bench.quick else None]:
        yield Case(f"plan {name}", partial(_compared, bench, name))


def _compared(bench: Bench, name: str) -> list[Row]:
    """Planned and measured, three times in turn (once in the quick run)."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(1 if bench.quick else 3):
        for who in ("measured", "planned"):
            for measure, value in _apart(who, name, bench.device).items():
                found.setdefault(measure, {}).setdefault(who, []).append(value)
    rows = []
    for measure, samples in found.items():
        made = timed_rows(f"plan {name}", measure, samples)
        rows += [replace(row, unit="bytes") if measure == "peak" else row for row in made]
    return rows


def _apart(who: str, name: str, device: torch.device) -> dict[str, float]:
    """What a new process finds, which prints it last."""
    command = [sys.executable, "-m", "tests.benchmarks.plan", "--measure", who, name, device.type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _trainer(job: Job, device: torch.device) -> RLHFTrainer:
    palm = our_model(job.shape, dtype=torch.float32, device=device)
    ids = torch.randint(1, job.shape.num_tokens, (job.count, job.prompt))
    other = RewardModel(our_model(job.shape, dtype=torch.float32, device=device)) if job.held_out else None
    return RLHFTrainer(
        palm=palm, reward_model=RewardModel(palm), prompt_token_ids=ids, actor_lora=job.lora, critic_lora=job.lora,
        activation_checkpointing=job.checkpointing, max_staleness=job.staleness, held_out_judge=other,
        accelerate_kwargs={"cpu": device.type == "cpu"},
    )  # fmt: skip


def _planned(job: Job, device: torch.device) -> dict[str, float]:
    many = UPDATES * job.count  # of which the first ones, with fewer old responses, are few
    found = plan(_trainer(job, device), many if job.staleness else job.episodes, **job.sampling)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    rollout = sum(seconds[name] for name in ("generate", "observe", "score"))
    return _named(peak=found.peak_bytes, rollout=rollout, learn=seconds["learn"])


def _measured(job: Job, device: torch.device) -> dict[str, float]:
    *_, last = _trainer(job, device).train(job.episodes, use_tqdm=False, **job.sampling)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident("VmHWM")
    return _named(peak=peak, rollout=last["perf/rollout_seconds"], learn=last["perf/learn_seconds"])


def _named(*, peak: float, rollout: float, learn: float) -> dict[str, Any]:
    return {"peak": peak, "rollout": rollout, "learn": learn, "update": rollout + learn}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        cap_instruction_set()
        run = {"planned": _planned, "measured": _measured}[sys.argv[2]]
        print(json.dumps(run(JOBS[sys.argv[3]], torch.device(sys.argv[4]))))
    else:
        main([cases], description=__doc__ or "")
