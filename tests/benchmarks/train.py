"""A training step: loss, gradients, one step of AdamW; float32, and bfloat16 by autocast over float32 weights."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.training.optimizer import adamw, parameter_groups
from tests.benchmarks.counts import ONE_BILLION, README, Shape
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.machine import seconds
from tests.benchmarks.models import llama, our_model
from tests.benchmarks.report import Row, Work, timed_rows

Step = Callable[[], None]


def cases(bench: Bench) -> Iterator[Case]:
    """Batch 1 at two lengths; on a GPU also a batch that fills it, and the 1B shape."""
    single, half = torch.float32, torch.bfloat16
    sizes = [(README, dtype, 1, length) for dtype in (single, half) for length in (512, 2048)]
    if bench.quick:
        sizes = [(README, dtype, 1, 128) for dtype in (single, half)]
    if bench.device.type == "cuda":
        sizes += [(README, half, 16, 2048), (ONE_BILLION, half, 1, 2048), (ONE_BILLION, half, 8, 2048)]
    for shape, dtype, batch, length in sizes:
        name = f"train {shape.name} {str(dtype).removeprefix('torch.')} batch {batch} length {length}"
        yield Case(name, partial(against_peers, bench, name, shape=shape, dtype=dtype, batch=batch, length=length))


def against_peers(bench: Bench, name: str, *, shape: Shape, dtype: torch.dtype, batch: int, length: int) -> list[Row]:
    """Ours twice, transformers with torch's fused AdamW as its Trainer has it, and upstream in float32."""
    tokens = torch.randint(0, shape.num_tokens, (batch, length), device=bench.device)
    ours, peer = (make(shape, tokens, dtype=dtype) for make in (our_step, llama_step))
    competitors = {
        "ours": partial(_timed, bench, ours),
        "ours again": partial(_timed, bench, ours),
        "hf": partial(_timed, bench, peer),
    }
    upstream = bench.upstream
    if upstream is not None and dtype == torch.float32 and shape == README:
        sizes = [shape.num_tokens, shape.dim, shape.depth]
        competitors["upstream"] = lambda: {"step": upstream.ask("train", shape=sizes, length=length)["seconds"]}
    samples = bench.interleave(competitors)
    work = Work(flops=shape.train_flops(batch=batch, length=length), tokens=batch * length)
    return timed_rows(name, "a step", samples["step"], ceilings=bench.ceilings(dtype), work=work)


def _timed(bench: Bench, step: Step) -> dict[str, float]:
    return {"step": seconds(step, bench.device)}


def our_step(shape: Shape, tokens: Tensor, *, dtype: torch.dtype) -> Step:
    """One step of this library's model and optimizer."""
    palm = our_model(shape, dtype=torch.float32, device=tokens.device).train()
    optimizer = adamw(parameter_groups(palm.named_parameters(), lr=1e-4), lr=1e-4)
    return _step(palm, optimizer, lambda: palm(tokens, return_loss=True), dtype=dtype)


def llama_step(shape: Shape, tokens: Tensor, *, dtype: torch.dtype) -> Step:
    """One step of transformers' model."""
    model = llama(shape, dtype=torch.float32, device=tokens.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return _step(model, optimizer, lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, dtype=dtype)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], *, dtype: torch.dtype
) -> Step:
    device = next(model.parameters()).device

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
