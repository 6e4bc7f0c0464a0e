"""What PPO records of a rollout: log-probabilities under policy and reference, their exact KL, and values.

`ActorCritic.observe` beside what one writes by hand with transformers: full logits of two passes, log_softmax, gather,
the KL of the whole distributions, and a value head on a third pass. A sample is the time of one of the three passes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch import ActorCritic
from tests.benchmarks.counts import ONE_BILLION, README, Shape
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.machine import seconds
from tests.benchmarks.models import check_decoding, llama, our_model
from tests.benchmarks.report import Row, Work, timed_rows

PASSES = 3  # actor, critic, reference


def cases(bench: Bench) -> Iterator[Case]:
    """A rollout of equal lengths, half of it response."""
    single, half = torch.float32, torch.bfloat16
    sizes = [(README, dtype, 8, 512) for dtype in (single, half)]
    if bench.quick:
        sizes = [(README, single, 2, 128)]
    if bench.device.type == "cuda":
        sizes += [(README, half, 64, 1024), (ONE_BILLION, half, 16, 1024)]
    for shape, dtype, batch, length in sizes:
        name = f"logprobs {shape.name} {str(dtype).removeprefix('torch.')} batch {batch} length {length}"
        yield Case(name, partial(against_peer, bench, name, shape=shape, dtype=dtype, batch=batch, length=length))


def against_peer(bench: Bench, name: str, *, shape: Shape, dtype: torch.dtype, batch: int, length: int) -> list[Row]:
    """Ours twice, and transformers."""
    sequences = torch.randint(0, shape.num_tokens, (batch, length), device=bench.device)
    ours = our_observation(shape, sequences, dtype=dtype, check=True)
    peer = llama_observation(shape, sequences, dtype=dtype)

    def times(run: Callable[[], object]) -> dict[str, float]:
        return {"pass": seconds(run, bench.device) / PASSES}

    runs = {"ours": ours, "ours again": ours, "hf": peer}
    samples = bench.interleave({who: partial(times, run) for who, run in runs.items()})
    flops = shape.observe_flops(batch=batch, length=length, response=length - length // 2) / PASSES
    work = Work(flops=flops, tokens=batch * length)
    return timed_rows(name, "a pass", samples["pass"], ceilings=bench.ceilings(dtype), work=work)


def our_observation(
    shape: Shape, sequences: Tensor, *, dtype: torch.dtype, check: bool = False
) -> Callable[[], object]:
    """The three passes by this library, after the gate if asked for."""
    palm = our_model(shape, dtype=dtype, device=sequences.device)
    if check:
        check_decoding(palm)
    actor_critic = ActorCritic(palm).eval()
    batch, length = sequences.shape
    prompt_lengths = torch.full((batch,), length // 2, device=sequences.device)
    return partial(actor_critic.observe, sequences, prompt_lengths, length - length // 2)


def llama_observation(shape: Shape, sequences: Tensor, *, dtype: torch.dtype) -> Callable[[], object]:
    """The three passes by transformers, and all logits."""
    model = llama(shape, dtype=dtype, device=sequences.device)
    value_head = nn.Linear(shape.dim, 1, device=sequences.device)
    start = sequences.shape[1] // 2

    @torch.no_grad()
    def observe() -> tuple[Tensor, ...]:
        actor, reference = (
            model(sequences, use_cache=False).logits[:, start - 1 : -1].float().log_softmax(dim=-1) for _ in range(2)
        )
        chosen = sequences[:, start:, None]
        kl = (actor.exp() * (actor - reference)).sum(dim=-1)
        hidden = model.model(sequences, use_cache=False).last_hidden_state[:, start - 1 : -1]
        return actor.gather(-1, chosen), reference.gather(-1, chosen), kl, value_head(hidden.float())

    return observe


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
