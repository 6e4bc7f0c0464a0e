"""Experience on disk: bytes a token, writing, reading in random minibatches, learning, and memory that stays flat.

Two sizes, one ten times the other, each in a process of its own. Memory is the process's anonymous memory (RssAnon):
pages of the file that the system keeps are given back when anyone needs them, and are not in it. Its peak in each phase
is counted above what there was after a rehearsal: every phase once, with few rows, so that what is imported and made
once is in neither size. Flat means that ten times the tokens take no more of it while learning but for an index, some
tens of bytes a response; short responses, where there are most of them, show that. What is read back has just been
written, so it comes from those pages; how fast a disk is, is not measured. `append` waits for the disk.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.diagnostics import lesson_from
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import Rollout, row_batches
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.training.ranks import Ranks
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.report import Row, Work, counted_rows, timed_rows
from tests.processor import cap_instruction_set

CASES = {"512": (512, 512), "64": (64, 512), "short": (64, 96)}  # tokens of a prompt, and of the longest response
PHASES = {"write": 1, "read": 2, "score": 1, "survey": 1, "learn": 1}  # and how often each goes through all tokens
APPENDED, MINIBATCH = 64, 16
EVERY = 0.01  # seconds between two looks at the memory
FILES = 4
NUM_TOKENS = 256


def cases(bench: Bench) -> Iterator[Case]:
    """Long and short prompts, and short responses; 10 million response tokens, a tenth of that in the quick run."""
    tokens = 1_000_000 if bench.quick else 10_000_000
    for name in ["512"] if bench.quick else CASES:
        yield Case(f"experience {name}", partial(_compare, name, tokens))


def _compare(name: str, tokens: int) -> list[Row]:
    """Both sizes; times are of the larger."""
    small, large = (_measured_apart(name, count) for count in (tokens // 10, tokens))
    case, note = f"experience {name}", f"{large['responses']:,.0f} responses, {large['tokens']:,.0f} tokens of them"
    every = large["tokens"] + large["responses"] * CASES[name][0]
    counts = {"a response token": large["bytes"] / large["tokens"], "a token": large["bytes"] / every}
    rows = counted_rows(case, "bytes on disk", counts, unit="count", note=note, compare=False)
    for phase, passes in PHASES.items():
        work = Work(bytes=passes * large["bytes"], tokens=passes * large["tokens"])
        speed = f"{work.bytes / large[phase] / 1e6:,.0f} MB/s"
        rows += timed_rows(case, phase, {"ours": [large[phase]]}, work=work, note=f"{speed}; {note}")
    for phase in PHASES:
        peaks = {f"{found['tokens']:,.0f} tokens": found[f"{phase} memory"] for found in (small, large)}
        rows += counted_rows(case, f"anonymous memory, {phase}", peaks, unit="bytes")
    more = {key: large[key] - small[key] for key in small}
    grown = {"ours": more["learn memory"], "held in memory": more["bytes"]}
    rows += counted_rows(case, "its growth while learning", grown, unit="bytes", note="between those two")
    each = {who: count / more["responses"] for who, count in grown.items()}
    return rows + counted_rows(case, "the same, bytes a response", each, unit="count")


def _measured_apart(name: str, tokens: int) -> dict[str, float]:
    """What a new process measures, and prints last."""
    command = [sys.executable, "-m", "tests.benchmarks.experience", "--measure", name, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(name: str, tokens: int) -> dict[str, float]:
    """What so many response tokens take in each phase, after a rehearsal."""
    _run(name, 1)
    gc.collect()
    before = _anonymous()
    found = _run(name, tokens)
    return {key: value - before if key.endswith("memory") else value for key, value in found.items()}


def _run(name: str, tokens: int) -> dict[str, float]:
    """Write so many response tokens, read all of them in random order, more than once, and learn from them once."""
    generator, found = torch.Generator().manual_seed(0), {"tokens": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        files = [RolloutFile(Path(folder) / f"{number}") for number in range(FILES)]
        with _watched(found, "write"):
            wrote = 0.0
            for file in files:
                for count, seconds in _appends(file, *CASES[name], tokens // FILES, generator):
                    found["tokens"], wrote = found["tokens"] + count, wrote + seconds
        found["write"] = wrote  # without making the rollouts
        experience = Experience(files)
        with _watched(found, "read"):
            read = _read(experience, generator)
        assert read == PHASES["read"] * found["tokens"], "every response is read"
        _learn(experience, found)
        size = sum(os.stat(file.path).st_size for file in files)
        return found | {"responses": len(experience), "bytes": size}


def _read(experience: Experience, generator: torch.Generator) -> int:
    """Read all responses in random order, as often as PHASES says; the tokens that came."""
    read, spans = 0, experience.spans()
    for _ in range(PHASES["read"]):
        for rows in torch.randperm(len(spans), generator=generator).split(MINIBATCH):
            batch = next(row_batches(spans, rows.tolist(), device=rows.device))
            read += int(experience.select(batch).lengths.sum())
    return read


def _learn(experience: Experience, found: dict[str, float]) -> None:
    """Scores, diagnostics and one epoch of PPO on all of it, with a model too small to matter."""
    settings = PPOSettings(epochs=1, minibatch_size=64)
    accelerator = Accelerator(cpu=True)
    palm = PaLM(num_tokens=NUM_TOKENS, dim=8, depth=1, heads=1, dim_head=8)
    learner = Learner(
        ActorCritic(palm), accelerator, loss=PPOLoss(**settings.loss_arguments()), **settings.learner_arguments()
    )
    with _watched(found, "score"):
        experience.rescore(_score, max_batch_tokens=settings.max_batch_tokens)
    with _watched(found, "survey"):
        lesson, _ = lesson_from(
            experience, settings, ranks=Ranks(accelerator), normalizer=ScoreNormalizer(), kl_coef=0.05, version=0
        )
    with _watched(found, "learn"):
        learner.update(lesson, random=lambda *_: torch.Generator().manual_seed(0))


def _score(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
    """A judge that costs nothing: the mean id, (b,)."""
    return (sequences * mask).sum(dim=-1) / mask.sum(dim=-1)


@contextmanager
def _watched(found: dict[str, float], phase: str) -> Iterator[None]:
    """Note how long the block takes, and the most anonymous memory within it, looked at by a thread of its own."""
    ended, memory, start = threading.Event(), [_anonymous()], time.perf_counter()

    def look() -> None:
        while not ended.wait(EVERY):
            memory[0] = max(memory[0], _anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    found[phase], found[f"{phase} memory"] = time.perf_counter() - start, max(memory[0], _anonymous())


def _appends(
    file: RolloutFile, prompt: int, response: int, tokens: int, generator: torch.Generator
) -> Iterator[tuple[int, float]]:
    """Append rollouts until there are so many response tokens; how many came with each, and how long it took."""
    while True:
        rollout = _rollout(prompt, response, generator)
        count = int(rollout.lengths.sum())
        start = time.perf_counter()
        file.append(rollout)
        yield count, time.perf_counter() - start
        tokens -= count
        if tokens <= 0:
            return


def _rollout(prompt: int, response: int, generator: torch.Generator) -> Rollout:
    """Responses of every length from half of the longest on."""
    lengths = torch.randint(response // 2, response + 1, (APPENDED,), generator=generator)
    mask = torch.arange(response) < lengths[:, None]
    numbers = torch.randn(5, APPENDED, response, generator=generator).masked_fill(~mask, 0.0)
    ids = torch.randint(1, NUM_TOKENS, (APPENDED, prompt + response), generator=generator)
    ids[:, prompt:] *= mask
    unknown = torch.full_like(lengths, -1)
    return Rollout(
        ids.int(), torch.full_like(lengths, prompt), lengths, *numbers, ended=lengths < response, prompt_rows=unknown,
        versions=torch.zeros_like(unknown), temperature=1.0, eos_token=0,
    )  # fmt: skip


def _anonymous() -> float:
    """Bytes of anonymous memory resident now; nan where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), float("nan"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        cap_instruction_set()
        print(json.dumps(_measure(sys.argv[2], int(sys.argv[3]))))
    else:
        main([cases], description=__doc__ or "")
