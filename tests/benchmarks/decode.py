"""Decoding: seconds a token, to the first token and for a whole call, at several batch sizes, against the peers.

Time per token is the difference of two lengths, so that the prefill drops out, and with it what a call prepares once;
the time to the first token is what is left of the shorter call. Sampling is from all tokens, at temperature 1.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.decoding import Decoder
from tests.benchmarks import decode_cases
from tests.benchmarks.counts import EIGHT_BILLION, ONE_BILLION, README, Shape
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.machine import seconds
from tests.benchmarks.models import check_decoding, llama, llama_generate, our_model
from tests.benchmarks.report import Row, Work, timed_rows

Times = Callable[[], dict[str, float]]
REPEATS = 10


def cases(bench: Bench) -> Iterator[Case]:
    """Peers at each batch size, then what only some of them can do."""
    for shape, dtype, batch, prompt in _sizes(bench):
        name = f"decode {shape.name} {str(dtype).removeprefix('torch.')} batch {batch} prompt {prompt}"
        yield Case(name, partial(against_peers, bench, name, shape=shape, dtype=dtype, batch=batch, prompt=prompt))
    yield from decode_cases.cases(bench)


def _sizes(bench: Bench) -> list[tuple[Shape, torch.dtype, int, int]]:
    """Shape, dtype, rows, and tokens of each prompt: 512, fewer in the quick run."""
    single, half = torch.float32, torch.bfloat16
    if bench.quick:
        return [(README, single, 1, 128), (README, half, 1, 128)]
    batches = (1, 8, 64) if bench.device.type == "cpu" else (1, 8, 64, 256)
    sizes = [(README, dtype, batch) for dtype in (single, half) for batch in batches]
    if bench.device.type == "cuda":
        sizes += [(ONE_BILLION, half, batch) for batch in batches]
        sizes += [(EIGHT_BILLION, half, batch) for batch in (1, 64) if bench.options.large]
    return [(*size, 512) for size in sizes]


def against_peers(bench: Bench, name: str, *, shape: Shape, dtype: torch.dtype, batch: int, prompt: int) -> list[Row]:
    """Ours twice, transformers with both caches, and upstream where it can: batch 1 in float32."""
    short, long = lengths(bench)
    palm = our_model(shape, dtype=dtype, device=bench.device)
    check_decoding(palm)
    prompts = torch.randint(0, shape.num_tokens, (batch, prompt), device=bench.device)

    def ours(new_tokens: int) -> None:
        palm.generate(prompt + new_tokens, prompts)

    model = llama(shape, dtype=dtype, device=bench.device)
    competitors = {
        "ours": partial(two_lengths, bench, ours),
        "ours again": partial(two_lengths, bench, ours),
        "hf dynamic": partial(two_lengths, bench, lambda new: llama_generate(model, prompts, new_tokens=new)),
    }
    if not bench.quick:
        competitors["hf static"] = partial(
            two_lengths, bench, lambda new: llama_generate(model, prompts, new_tokens=new, static=True)
        )
    if bench.device.type == "cpu":
        competitors["torch's products"] = products_alone(bench, palm, batch)
    if shape == README and dtype == torch.float32 and batch == 1 and bench.upstream is not None:
        competitors["upstream"] = partial(_upstream_times, bench, shape, prompt)
    samples = bench.interleave(competitors)
    context = prompt + (short + long) / 2
    token = Work(
        shape.decode_bytes(batch=batch, context=context, itemsize=dtype.itemsize),
        shape.decode_flops(batch=batch, context=context), tokens=batch,
    )  # fmt: skip
    first = Work(flops=shape.prefill_flops(batch=batch, length=prompt))
    ceilings = bench.ceilings(dtype)
    rows = timed_rows(name, "a token", samples["token"], ceilings=ceilings, work=token, note=f"context {context:.0f}")
    rows += timed_rows(name, "first token", samples["first"], ceilings=ceilings, work=first, note=f"prompt {prompt}")
    call = {who: Work(tokens=batch * long) for who in samples["call"]}
    return rows + timed_rows(name, "whole call", samples["call"], work=call, note=f"{prompt} + {long} tokens")


def products_alone(bench: Bench, palm: PaLM, batch: int) -> Times:
    """Seconds a token of torch's products with the weights and nothing else: what bounds a decoder made of them."""
    with torch.inference_mode():
        decoder = Decoder(palm, batch=batch, room=1, adapter=None, steps=100)
        weight = palm.layers[0].out_proj.weight
        narrow, wide = (torch.randn(batch, width).to(decoder.dtype) for width in weight.shape)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(REPEATS):
            for layer in decoder.layers:
                layer.project_in(narrow)
                layer.project_out(wide)
            decoder.read_out(narrow)

    return lambda: {"token": seconds(run, bench.device) / REPEATS}


def lengths(bench: Bench) -> tuple[int, int]:
    """New tokens of the two calls; both are long enough to be prepared for alike."""
    if bench.device.type == "cuda":
        return 16, 144
    return (14, 26) if bench.quick else (16, 80)


def two_lengths(
    bench: Bench, generate: Callable[[int], object], sizes: tuple[int, int] | None = None
) -> dict[str, float]:
    """Seconds a token, to the first token, and of the longer call."""
    short, long = lengths(bench) if sizes is None else sizes
    brief, whole = (seconds(partial(generate, new), bench.device) for new in (short, long))
    token = (whole - brief) / (long - short)
    return {"token": token, "first": brief - (short - 1) * token, "call": whole}


def _upstream_times(bench: Bench, shape: Shape, prompt: int) -> dict[str, float]:
    """The same for upstream, whose every token reads the whole text again: few are enough; no whole call."""
    upstream = bench.upstream
    assert upstream is not None, "asked for only where there is one"
    sizes = [shape.num_tokens, shape.dim, shape.depth]
    more = 2 if bench.quick else 5
    brief, whole = (
        upstream.ask("generate", shape=sizes, length=prompt, new_tokens=new)["seconds"] for new in (1, 1 + more)
    )
    return {"token": (whole - brief) / more, "first": brief}


if __name__ == "__main__":
    main([cases], description=__doc__ or "")
