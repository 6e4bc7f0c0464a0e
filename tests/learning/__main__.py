"""All that must learn, five seeds of each: `python -m tests.learning`, about ten minutes on one thread.

Optima that are known of online methods (`bandits`) and of those that learn from texts (`direct`), and tasks (`tasks`).
Prints a table, and ends with 1 if a run did not beat its own start; what it has written then is whole all the same.
"""

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tests.benchmarks.machine import facts
from tests.learning import bandits, direct, tasks
from tests.learning.direct import Outcome
from tests.processor import cap_instruction_set

ROOT = Path(__file__).parents[2]
Run = Callable[[int], Outcome]
Row = tuple[Outcome, float]  # of one seed, and the seconds it took the processor


def runs() -> dict[str, Run]:
    """What there is to run, by name: functions of a seed."""
    found: dict[str, Run] = {}
    for name, case in bandits.CASES.items():
        found[f"bandit: {name}"] = lambda seed, case=case: bandits.run(case, seed).outcome
    for name in (*direct.PAIR_LOSSES, *direct.OTHERS):
        found[f"texts: {name}"] = partial(direct.run, name)
    for task in tasks.TASKS:
        for method in tasks.METHODS:
            found[f"{task}: {method}"] = partial(tasks.run, task, method)
    return found


def timed(name: str, run: Run, seed: int) -> Row:
    make = tasks.TASKS.get(name.partition(":")[0])
    if make is not None:
        make(seed)  # once for all methods, in a time that is not theirs
    started = time.process_time()
    outcome = run(seed)
    return outcome._replace(name=name, seed=seed), time.process_time() - started


def machine() -> dict[str, Any]:
    """Which machine, torch and commit this is."""
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
        told = f"{commit}, with changes that are not committed" if changes else commit
    except (OSError, subprocess.CalledProcessError):
        told = "unknown"
    return facts(torch.device("cpu"), instruction_cap=cap_instruction_set()) | {"commit": told}


def summary(rows: Sequence[Row]) -> str:
    """Markdown, a line for each algorithm: means over the seeds, and the worst distance."""
    lines = [
        "| | score before | after | KL, nats | distance before | after, worst | tokens | seconds | learnt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(outcome.name for outcome, _ in rows):
        own = [outcome for outcome, _ in rows if outcome.name == name]
        before, after, kl, tokens = (
            mean(getattr(outcome, field) for outcome in own)
            for field in ("score_before", "score_after", "kl", "num_tokens")
        )
        distances = "- | -"
        if own[0].distance_before is not None:
            worst = max(outcome.distance_after or 0.0 for outcome in own)
            distances = f"{mean(outcome.distance_before or 0.0 for outcome in own):.3f} | {worst:.4f}"
        seconds = mean(seconds for outcome, seconds in rows if outcome.name == name)
        lines.append(
            f"| {name} | {before:.3f} | {after:.3f} | {kl:.2f} | {distances} | {tokens:,.0f} | {seconds:.1f} |"
            f" {sum(outcome.learnt for outcome in own)} of {len(own)} |"
        )
    return "\n".join(lines)


def each_seed(rows: Sequence[Row]) -> str:
    """Markdown, a line for each run."""
    lines = [
        "| | seed | score before | after | KL, nats | distance before | after | tokens | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome, seconds in rows:
        distances = [
            "-" if value is None else f"{value:.4f}" for value in (outcome.distance_before, outcome.distance_after)
        ]
        lines.append(
            f"| {outcome.name} | {outcome.seed} | {outcome.score_before:.3f} | {outcome.score_after:.3f} |"
            f" {outcome.kl:.2f} | {' | '.join(distances)} | {outcome.num_tokens:,} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def page(rows: Sequence[Row], told: dict[str, Any], command: str) -> str:
    listed = "\n".join(f"- {name}: {value}" for name, value in told.items())
    return f"""# What learns, and how far

Written by `{command}`. Scores, distances (total variation to the optimum, where that is known) and KL to the start are
measured on the model before and after. Tokens are those sampled or read to learn, prompts included; seconds are the
processor's, on one thread, without what several methods share. First the means over the seeds, then each seed.

{listed}

{summary(rows)}

{each_seed(rows)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="of each, 0 and up")
    parser.add_argument("--only", metavar="NAME", default="", help="what has this in its name: sort, GRPO, bandit: PPO")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, a line of JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables, Markdown")
    args = parser.parse_args(arguments)
    chosen = {name: run for name, run in runs().items() if args.only in name}
    if not chosen or args.seeds < 1:
        parser.error(f"--only {args.only!r}, --seeds {args.seeds}: nothing to run; there are {', '.join(runs())}")
    threads, told = torch.get_num_threads(), machine() | {"threads": 1}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # tokenizers of these tasks have no end token, and other things meant so
    rows: list[Row] = []
    try:
        for name, run in chosen.items():
            for seed in range(args.seeds):
                rows.append(timed(name, run, seed))
                print(each_seed(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        torch.set_num_threads(threads)
    print("\n" + summary(rows))
    if args.json:
        listed = [outcome._asdict() | {"learnt": outcome.learnt, "seconds": seconds} for outcome, seconds in rows]
        args.json.write_text(json.dumps(told | {"rows": listed}) + "\n", encoding="utf-8")
    if args.write:
        command = f"python -m tests.learning --seeds {args.seeds}" + f" --only {args.only!r}" * bool(args.only)
        args.write.write_text(page(rows, told, command), encoding="utf-8")
    failed = [f"{outcome.name}, seed {outcome.seed}" for outcome, _ in rows if not outcome.learnt]
    if failed:
        print(f"no better than at the start: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
