"""Steps of decoding alone, at larger batches: each model's token and its draw, over caches filled with random numbers.

A whole call at batch 64 reads 32,768 tokens of prompts first, which takes minutes and measures something else.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.responses import Responses
from tests.benchmarks.counts import README
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.models import check_decoding, hugging_face, llama, our_model
from tests.benchmarks.report import Row, Work, timed_rows

CONTEXT, STEPS = 512, 8


def cases(bench: Bench) -> Iterator[Case]:
    """Batches of 8 and 64 on a CPU; a step on CUDA is part of a graph, and measured by whole calls alone."""
    if bench.device.type == "cuda":
        return
    for dtype in (torch.bfloat16,) if bench.quick else (torch.float32, torch.bfloat16):
        for batch in (8,) if bench.quick else (8, 64):
            name = f"decode steps {str(dtype).removeprefix('torch.')} batch {batch}"
            yield Case(name, partial(steps, bench, name, dtype=dtype, batch=batch))


def steps(bench: Bench, name: str, *, dtype: torch.dtype, batch: int) -> list[Row]:
    """Ours twice, and transformers with both caches."""
    palm, model = our_model(README, dtype=dtype, device=bench.device), llama(README, dtype=dtype, device=bench.device)
    check_decoding(palm)
    samples = bench.interleave(
        {
            "ours": partial(_ours, palm, batch), "ours again": partial(_ours, palm, batch),
            "hf dynamic": partial(_peer, model, batch, static=False),
            "hf static": partial(_peer, model, batch, static=True),
        }
    )  # fmt: skip
    context = CONTEXT + STEPS / 2
    work = Work(
        README.decode_bytes(batch=batch, context=context, itemsize=dtype.itemsize),
        README.decode_flops(batch=batch, context=context), tokens=batch,
    )  # fmt: skip
    note = f"context {context:.0f}"
    return timed_rows(name, "a step", samples["step"], ceilings=bench.ceilings(dtype), work=work, note=note)


@torch.inference_mode()
def _ours(palm: PaLM, batch: int) -> dict[str, float]:
    decoder = palm.new_decoder(batch=batch, room=CONTEXT + STEPS + 1, adapter=None, steps=100)
    decoder.filled = CONTEXT
    decoder.place.fill_(CONTEXT)
    decoder.positions.fill_(CONTEXT)
    responses = Responses(
        torch.full((batch,), STEPS + 1), STEPS + 1, greedy=False, eos_token=None, generator=None, sampling={}
    )
    responses.refill()

    def step() -> None:
        responses.record(decoder(responses.current, span=decoder.span))
        decoder.filled += 1

    return _seconds(step)


@torch.inference_mode()
def _peer(model: torch.nn.Module, batch: int, *, static: bool) -> dict[str, float]:
    transformers = hugging_face()
    config = model.config
    cache = (
        transformers.StaticCache(config=config, max_cache_len=CONTEXT + STEPS + 1)
        if static
        else transformers.DynamicCache(config=config)
    )
    dtype = model.model.embed_tokens.weight.dtype
    for layer in range(README.depth):
        kept = torch.randn(batch, 1, CONTEXT, README.dim_head, dtype=dtype)
        cache.update(kept, kept.clone(), layer, {"cache_position": torch.arange(CONTEXT)})
    state: dict[str, Tensor] = {"ids": torch.zeros(batch, 1, dtype=torch.long)}
    mask = torch.ones(batch, CONTEXT + STEPS + 1, dtype=torch.long)
    place = [CONTEXT]

    def step() -> None:
        place[0] += 1
        found = model(
            state["ids"], attention_mask=mask[:, : place[0]], past_key_values=cache, use_cache=True,
            cache_position=torch.tensor([place[0] - 1]),
        )  # fmt: skip
        state["ids"] = torch.multinomial(found.logits[:, -1].float().softmax(dim=-1), 1)

    return _seconds(step)


def _seconds(step: Callable[[], None]) -> dict[str, float]:
    """Of a step, after one that is not counted."""
    step()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return {"step": (time.perf_counter() - started) / STEPS}


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
