"""One whole PPO iteration by phase: generate, score, log-probabilities and values, learn; at 1 and at 4 epochs.

Upstream's phases are two: rollout (all but learn, one sample after the other) and learn. Same prompts, response
lengths, epochs and minibatches of 16; a reward model over a trunk of the same size. Both learn low-rank adapters.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from palm_rlhf_pytorch import RewardModel, RLHFTrainer
from palm_rlhf_pytorch.policy.rollout import Rollout
from tests.benchmarks.counts import ONE_BILLION, PPO_SMALL, Shape
from tests.benchmarks.harness import Bench, Case, interleave, main
from tests.benchmarks.machine import seconds
from tests.benchmarks.models import check_decoding, our_model
from tests.benchmarks.report import Ceilings, Row, Work, counted_rows, spread_of, timed_rows

EPOCHS = (1, 4)


def cases(bench: Bench) -> Iterator[Case]:
    """On a CPU 16 prompts of 64 + 64 (16 + 16 in the quick run) at 256 x 4, vocabulary 256 and 20,000.

    256 is what upstream does in reasonable time. On a GPU 256 prompts of 512 + 512 at 1B.
    """
    shapes = [PPO_SMALL] if bench.quick else [PPO_SMALL, Shape("256x4 v20000", num_tokens=20_000, dim=256, depth=4)]
    tokens = 16 if bench.quick else 64
    sizes = [(shape, torch.float32, 16, tokens, tokens) for shape in shapes]
    if bench.device.type == "cuda":
        sizes = [(ONE_BILLION, torch.bfloat16, 256, 512, 512)]
    for shape, dtype, count, prompt, new in sizes:
        name = f"ppo {shape.name} {str(dtype).removeprefix('torch.')} {count} x ({prompt} + {new})"
        yield Case(name, partial(iteration, bench, name, shape=shape, dtype=dtype, count=count, prompt=prompt, new=new))


def iteration(
    bench: Bench, name: str, *, shape: Shape, dtype: torch.dtype, count: int, prompt: int, new: int
) -> list[Row]:
    """Phases and whole iterations; ours, ours again and upstream (CPU, float32)."""
    run = our_iteration(shape, dtype=dtype, count=count, prompt=prompt, new=new, device=bench.device, check=True)
    competitors: dict[str, Callable[[], dict[str, float]]] = {"ours": run, "ours again": run}
    upstream = bench.upstream
    if upstream is not None:
        sizes = {"shape": [shape.num_tokens, shape.dim, shape.depth], "prompts": count, "prompt_length": prompt}

        def ask() -> dict[str, float]:
            return _upstream_phases(upstream.ask("ppo", **sizes, new_tokens=new, epochs=list(EPOCHS)))

        competitors["upstream"] = ask
    rounds, warmups = bench.rounds, bench.warmups
    if bench.quick or bench.device.type == "cuda":  # where an iteration takes many seconds, fewer must do
        rounds, warmups = (2, 0) if bench.quick else (3, 1)
    run()
    samples = interleave(competitors, rounds=rounds, warmups=warmups)
    rows = []
    for measure, found in samples.items():
        work = _work(measure, shape=shape, dtype=dtype, count=count, prompt=prompt, new=new)
        ceilings = bench.ceilings(dtype) if measure == "generate" else None
        rows += timed_rows(name, measure, found, work=work, ceilings=ceilings)
        if measure == "generate" and bench.device.type == "cuda" and ceilings is not None:
            floor = generation_floor(shape, ceilings, dtype=dtype, count=count, prompt=prompt, new=new)
            rows += counted_rows(name, "generate, floor", {"bytes and flops": floor}, unit="s")
            share = spread_of(found["ours"]).median / floor
            rows += counted_rows(name, "generate / floor", {"ours": share}, unit="x", compare=False)
    return rows


def _work(measure: str, *, shape: Shape, dtype: torch.dtype, count: int, prompt: int, new: int) -> Work:
    if measure != "generate":
        return Work(tokens=count * new)
    context = prompt + new / 2
    decoding = shape.decode_bytes(batch=count, context=context, itemsize=dtype.itemsize)
    flops = shape.decode_flops(batch=count, context=context)
    prefill = shape.prefill_flops(batch=count, length=prompt)
    return Work(bytes=(new - 1) * decoding, flops=(new - 1) * flops + prefill, tokens=count * new)


def generation_floor(
    shape: Shape, ceilings: Ceilings, *, dtype: torch.dtype, count: int, prompt: int, new: int
) -> float:
    """Seconds that the machine needs at least: the prefill's products, then for each step bytes or products."""
    steps = (
        max(
            shape.decode_bytes(batch=count, context=context, itemsize=dtype.itemsize) / ceilings.bandwidth,
            shape.decode_flops(batch=count, context=context) / ceilings.matrix_rate,
        )
        for context in range(prompt + 1, prompt + new)
    )
    return shape.prefill_flops(batch=count, length=prompt) / ceilings.matrix_rate + sum(steps)


def our_trainer(
    shape: Shape, *, dtype: torch.dtype, count: int, prompt: int, epochs: int, device: torch.device, check: bool = False
) -> RLHFTrainer:
    """A trainer whose four models stand on one trunk, after the gate if asked for."""
    palm = our_model(shape, dtype=dtype, device=device)
    if check:
        check_decoding(palm)
    ids = torch.randint(1, shape.num_tokens, (count, prompt))
    limits: dict[str, Any] = {"max_batch_size": 256, "max_batch_tokens": 32_768} if device.type == "cuda" else {}
    return RLHFTrainer(
        palm=palm, reward_model=RewardModel(palm), prompt_token_ids=ids, minibatch_size=16, epochs=epochs,
        accelerate_kwargs={"cpu": device.type == "cpu"}, **limits,
    )  # fmt: skip


def our_iteration(
    shape: Shape, *, dtype: torch.dtype, count: int, prompt: int, new: int, device: torch.device,
    epochs: tuple[int, ...] = EPOCHS, check: bool = False,
) -> Callable[[], dict[str, float]]:  # fmt: skip
    """One iteration, by phase; the same rollout is learnt from once by a trainer of each number of epochs."""
    sizes: dict[str, Any] = {"dtype": dtype, "count": count, "prompt": prompt, "device": device}
    trainers = [our_trainer(shape, epochs=number, check=check, **sizes) for number in epochs]
    collector = trainers[0]

    def run() -> dict[str, float]:
        times, kept = {}, []
        generate, spent = collector.actor_critic.generate, []

        def clocked(*arguments: Any, **options: Any) -> Any:
            found: list[Any] = []
            spent.append(seconds(lambda: found.append(generate(*arguments, **options)), device))
            return found[0]

        def collect() -> None:
            kept.append(collector.rollout(*collector.next_prompts(count), max_new_tokens=new))

        with patch.object(collector.actor_critic, "generate", clocked):
            rollout = seconds(collect, device)
        times["generate"] = sum(spent)
        times["log-probabilities and values"] = rollout - sum(spent)
        times["score"] = seconds(lambda: kept.append(collector.score(kept[-1])), device)
        times["rollout"] = rollout + times["score"]
        for number, trainer in zip(epochs, trainers, strict=True):
            _learn(times, trainer, kept[-1], number, device)
        return times

    return run


def _learn(times: dict[str, float], trainer: RLHFTrainer, rollout: Rollout, epochs: int, device: torch.device) -> None:
    """Add the time to learn, and that of the iteration that it ends."""
    learn = seconds(lambda: trainer.learn(rollout), device)
    times[f"learn, {_epochs(epochs)}"] = learn
    times[f"iteration, {_epochs(epochs)}"] = times["rollout"] + learn


def _upstream_phases(answer: dict[str, float]) -> dict[str, float]:
    """Upstream's times by the names of ours."""
    times = {"rollout": answer["rollout"]}
    for number in EPOCHS:
        times[f"learn, {_epochs(number)}"] = answer[f"learn {number}"]
        times[f"iteration, {_epochs(number)}"] = answer["rollout"] + answer[f"learn {number}"]
    return times


def _epochs(number: int) -> str:
    return f"{number} epoch" + ("s" if number > 1 else "")


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
