"""Experience on disk: bytes a token, writing, reading in random minibatches, learning, and memory that stays flat.

Two sizes, one ten times the other, each in a process of its own. Memory is the process's anonymous memory (RssAnon):
pages of the file that the system keeps are given back when anyone needs them, and are not in it. What is read back has
just been written, so it comes from those pages; how fast a disk is, is not measured. `append` waits for the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.diagnostics import lesson_from
from palm_rlhf_pytorch.policy.experience import Experience, RolloutFile
from palm_rlhf_pytorch.policy.learning import Learner, Progress
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import Rollout, row_batches
from palm_rlhf_pytorch.policy.scores import ScoreNormalizer
from palm_rlhf_pytorch.training.ranks import Ranks
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.report import Row, Work, counted_rows, timed_rows
from tests.processor import cap_instruction_set

PROMPTS = (512, 64)  # tokens of a prompt, a case each
RESPONSE = 512  # tokens of the longest
APPENDED, MINIBATCH, PASSES = 64, 16, 2
FILES = 4
NUM_TOKENS = 256


def cases(bench: Bench) -> Iterator[Case]:
    """Long and short prompts; the larger size has 10 million response tokens, a tenth of that in the quick run."""
    tokens = 1_000_000 if bench.quick else 10_000_000
    for prompt in PROMPTS[:1] if bench.quick else PROMPTS:
        yield Case(f"experience {prompt}", partial(_compare, prompt, tokens))


def _compare(prompt: int, tokens: int) -> list[Row]:
    """Both sizes; times are of the larger."""
    small, large = (_measured_apart(prompt, count) for count in (tokens // 10, tokens))
    case, note = f"experience {prompt}", f"{large['responses']:,.0f} responses, {large['tokens']:,.0f} tokens of them"
    every = large["tokens"] + large["responses"] * prompt
    counts = {"a response token": large["bytes"] / large["tokens"], "a token": large["bytes"] / every}
    rows = counted_rows(case, "bytes on disk", counts, unit="count", note=note, compare=False)
    for measure, amount in (("write", 1), ("read", PASSES), ("learn", 1)):
        work = Work(bytes=amount * large["bytes"], tokens=amount * large["tokens"])
        speed = f"{amount * large['bytes'] / large[measure] / 1e6:,.0f} MB/s"
        rows += timed_rows(case, measure, {"ours": [large[measure]]}, work=work, note=f"{speed}; {note}")
    peaks = {f"{found['tokens']:,.0f} tokens": found["peak"] for found in (small, large)}
    rows += counted_rows(case, "anonymous memory, above the imports'", peaks, unit="bytes")
    grown = {"ours": large["peak"] - small["peak"], "held in memory": large["bytes"] - small["bytes"]}
    return rows + counted_rows(case, "its growth", grown, unit="bytes", note="between those two")


def _measured_apart(prompt: int, tokens: int) -> dict[str, float]:
    """What a new process measures, and prints last."""
    command = [sys.executable, "-m", "tests.benchmarks.experience", "--measure", str(prompt), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(prompt: int, tokens: int) -> dict[str, float]:
    """Write so many response tokens, read all of them in random order, more than once, and learn from them once."""
    generator = torch.Generator().manual_seed(0)
    before = peak = _anonymous()
    written, read, wrote = 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        files = [RolloutFile(Path(folder) / f"{number}") for number in range(FILES)]
        for file in files:
            for count, seconds in _appends(file, prompt, tokens // FILES, generator):
                written, wrote, peak = written + count, wrote + seconds, max(peak, _anonymous())
        start, experience = time.perf_counter(), Experience(files)
        spans = experience.spans()
        for _ in range(PASSES):
            for rows in torch.randperm(len(spans), generator=generator).split(MINIBATCH):
                batch = next(row_batches(spans, rows.tolist(), device=rows.device))
                read += int(experience.select(batch).lengths.sum())
                peak = max(peak, _anonymous())
        assert read == PASSES * written, "every response is read"
        took = time.perf_counter() - start
        learnt, peak_learnt = _learn(experience, generator)
        size = sum(os.stat(file.path).st_size for file in files)
    found = {"tokens": written, "responses": len(spans), "bytes": size, "write": wrote, "read": took, "learn": learnt}
    return found | {"peak": max(peak, peak_learnt) - before}


def _learn(experience: Experience, generator: torch.Generator) -> tuple[float, float]:
    """Seconds and most anonymous memory of one epoch of PPO on all of it, with a model too small to matter."""
    settings = PPOSettings(epochs=1, minibatch_size=64)
    accelerator = Accelerator(cpu=True)
    palm = PaLM(num_tokens=NUM_TOKENS, dim=8, depth=1, heads=1, dim_head=8)
    learner = Learner(
        ActorCritic(palm), accelerator, loss=PPOLoss(**settings.loss_arguments()), **settings.learner_arguments()
    )
    for file in experience.files:
        file.set_scores(torch.randn(len(file), generator=generator))
    start, peak = time.perf_counter(), 0.0

    def watch(progress: Progress) -> None:
        nonlocal peak
        peak = max(peak, _anonymous())

    lesson, _ = lesson_from(
        experience, settings, ranks=Ranks(accelerator), normalizer=ScoreNormalizer(), kl_coef=0.05, version=0
    )
    learner.update(lesson, random=lambda *_: torch.Generator().manual_seed(0), on_step=watch)
    return time.perf_counter() - start, peak


def _appends(file: RolloutFile, prompt: int, tokens: int, generator: torch.Generator) -> Iterator[tuple[int, float]]:
    """Append rollouts until there are so many response tokens; how many came with each, and how long it took."""
    while tokens > 0:
        rollout = _rollout(prompt, generator)
        count = int(rollout.lengths.sum())
        start = time.perf_counter()
        file.append(rollout)
        yield count, time.perf_counter() - start
        tokens -= count


def _rollout(prompt: int, generator: torch.Generator) -> Rollout:
    """Responses of every length from half of the longest on."""
    lengths = torch.randint(RESPONSE // 2, RESPONSE + 1, (APPENDED,), generator=generator)
    mask = torch.arange(RESPONSE) < lengths[:, None]
    numbers = torch.randn(5, APPENDED, RESPONSE, generator=generator).masked_fill(~mask, 0.0)
    ids = torch.randint(1, NUM_TOKENS, (APPENDED, prompt + RESPONSE), generator=generator)
    ids[:, prompt:] *= mask
    unknown = torch.full_like(lengths, -1)
    return Rollout(
        ids.int(), torch.full_like(lengths, prompt), lengths, *numbers, ended=lengths < RESPONSE, prompt_rows=unknown,
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
        print(json.dumps(_measure(*map(int, sys.argv[2:4]))))
    else:
        main([cases], description=__doc__ or "")
