"""More of decoding: an adapter's price, prompts of many lengths that end early, what the k-th token costs."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.palm.rows import Rows
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from tests.benchmarks.counts import README
from tests.benchmarks.harness import Bench, Case
from tests.benchmarks.machine import seconds, wait
from tests.benchmarks.models import check_decoding, fill_adapter, llama, llama_generate, make_endable, our_model
from tests.benchmarks.report import Row, Spread, counted_rows, spread_of, timed_rows

PROMPT, WINDOW = 512, 32


def cases(bench: Bench) -> Iterator[Case]:
    """Each at the README's shape."""
    single, half = torch.float32, torch.bfloat16
    for dtype in (single,) if bench.quick else (single, half):
        kind = str(dtype).removeprefix("torch.")
        for batch in (1,) if bench.quick else (1, 8):
            name = f"decode scope {kind} batch {batch}"
            yield Case(name, partial(scope_price, bench, name, dtype=dtype, batch=batch))
        yield Case(f"decode ragged {kind}", partial(ragged, bench, f"decode ragged {kind}", dtype=dtype))
    yield Case("decode text", partial(streamed, bench, "decode text"))
    for dtype in (single,) if bench.quick else (single, half):
        name = f"decode growth {str(dtype).removeprefix('torch.')}"
        yield Case(name, partial(growth, bench, name, dtype=dtype))


def scope_price(bench: Bench, name: str, *, dtype: torch.dtype, batch: int) -> list[Row]:
    """The actor's adapter on and off; its price in percent, from the pairs of each round."""
    palm = our_model(README, dtype=dtype, device=bench.device)
    palm.add_finetune_params("actor")
    fill_adapter(palm, "actor")
    prompt, short, long = (64, 14, 26) if bench.quick else (PROMPT, 16, 80)
    prompts = torch.randint(0, README.num_tokens, (batch, prompt), device=bench.device)

    def times(scope: str | None) -> dict[str, float]:
        brief, whole = (
            seconds(partial(palm.generate, prompt + new, prompts, finetune_scope=scope), bench.device)
            for new in (short, long)
        )
        return {"token": (whole - brief) / (long - short), "call": whole}

    samples = bench.interleave(
        {"ours": partial(times, None), "ours again": partial(times, None), "ours with actor": partial(times, "actor")}
    )
    rows = timed_rows(name, "a token", samples["token"]) + timed_rows(name, "whole call", samples["call"])
    for measure in ("token", "call"):
        plain, scoped = samples[measure]["ours"], samples[measure]["ours with actor"]
        prices = [100 * (dear / cheap - 1) for cheap, dear in zip(plain, scoped, strict=True)]
        rows.append(
            Row(case=name, measure=f"price, {measure}", who="ours with actor", unit="%", spread=spread_of(prices))
        )
    return rows


class Letters(ByteTokenizer):
    """A character for each id of the README's model, and no end."""

    num_tokens, eos_token = README.num_tokens, None  # type: ignore[assignment]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Letters of ids (n,)."""
        return "".join(chr(0x4E00 + int(each)) for each in ids)


def streamed(bench: Bench, name: str) -> list[Row]:
    """Text that comes piece by piece and looks for a stop string, beside ids from `generate`; its price in percent."""
    palm = our_model(README, dtype=torch.float32, device=bench.device)
    prompt, short, long = (64, 14, 26) if bench.quick else (PROMPT, 16, 80)
    ids = torch.randint(0, README.num_tokens, (prompt,), device=bench.device)
    text = {"tokenizer": Letters(), "stop": "a stop string that never comes"}

    def times(run: Callable[[int], object]) -> dict[str, float]:
        brief, whole = (seconds(partial(run, new), bench.device) for new in (short, long))
        return {"token": (whole - brief) / (long - short), "call": whole}

    runs: dict[str, Callable[[int], object]] = {
        "ours": lambda new: palm.generate(prompt + new, ids),
        "ours streaming": lambda new: list(palm.stream(ids, max_new_tokens=new, **text)),
    }
    samples = bench.interleave({who: partial(times, run) for who, run in runs.items()})
    rows = timed_rows(name, "a token", samples["token"]) + timed_rows(name, "whole call", samples["call"])
    pairs = zip(samples["call"]["ours"], samples["call"]["ours streaming"], strict=True)
    prices = [100 * (dear / cheap - 1) for cheap, dear in pairs]
    rows.append(Row(case=name, measure="price, call", who="ours streaming", unit="%", spread=spread_of(prices)))
    return rows


def ragged(bench: Bench, name: str, *, dtype: torch.dtype) -> list[Row]:
    """Prompts of 64 to 512 tokens (12 to 96 in the quick run), responses that end one by one.

    A sample is the time of a call over the real tokens that came out, prefill included.
    """
    batch, longest, limit, mean_length = (4, 96, 16, 8) if bench.quick else (16, PROMPT, 256, 64)
    eos_token = 1
    palm = our_model(README, dtype=dtype, device=bench.device)
    model = llama(README, dtype=dtype, device=bench.device)
    make_endable(palm.token_emb.weight, palm.embed, eos_token=eos_token, mean_length=mean_length)
    make_endable(
        model.model.embed_tokens.weight, lambda ids: model.model(ids).last_hidden_state, eos_token=eos_token,
        mean_length=mean_length,
    )  # fmt: skip
    check_decoding(palm)
    prompts, mask = _ragged_prompts(batch, longest, bench.device)
    generator = torch.Generator(bench.device)

    def ours() -> Tensor:
        tokens = palm.generate(
            longest + limit, prompts, prompt_mask=mask, max_new_tokens=limit, eos_token=eos_token, pad_value=-1,
            generator=generator.manual_seed(1),
        )  # fmt: skip
        return (tokens >= 0).sum(dim=-1)

    def peer() -> Tensor:
        torch.manual_seed(1)
        tokens = llama_generate(model, prompts, mask=mask, new_tokens=limit, eos_token_id=eos_token)
        ended = (tokens == eos_token).cumsum(dim=-1)
        return ((ended == 0) | ((ended == 1) & (tokens == eos_token))).sum(dim=-1)

    def times(run: Callable[[], Tensor], counts: list[Tensor]) -> dict[str, float]:
        whole = seconds(lambda: counts.append(run()), bench.device)
        return {"token": whole / int(counts[-1].sum())}

    counts: dict[str, list[Tensor]] = {"ours": [], "ours again": [], "hf dynamic": []}
    runs = {"ours": ours, "ours again": ours, "hf dynamic": peer}
    samples = bench.interleave({who: partial(times, run, counts[who]) for who, run in runs.items()})
    lasts = {who: found[-1] for who, found in counts.items() if who != "ours again"}
    real = {who: float(found.sum()) for who, found in lasts.items()}
    note = "; ".join(f"{who}: responses of {int(each.min())}..{int(each.max())}" for who, each in lasts.items())
    rows = timed_rows(name, "a real token", samples["token"], note=note)
    rows += counted_rows(name, "real tokens", real, unit="count", compare=False)
    if bench.device.type == "cpu":  # a CUDA graph replays without calling
        kind = type(palm.new_decoder(batch=1, room=1, adapter=None, steps=1))
        rows += _row_steps(name, ours, kind, longest=int(lasts["ours"].max()), batch=batch)
    return rows


def _row_steps(name: str, run: Callable[[], Tensor], kind: type, *, longest: int, batch: int) -> list[Row]:
    """How many tokens of rows were embedded while decoding, beside the fewest possible and those of a full batch."""
    embedded: list[int] = []
    call = kind.__call__

    def counting(self: Rows, tokens: Tensor, *, span: int) -> Tensor:
        embedded.append(len(tokens))
        return call(self, tokens, span=span)

    with patch.object(kind, "__call__", counting):
        lengths = run()
    counts = {
        "ours": float(sum(embedded)), "fewest possible": float((lengths - 1).sum()),
        "if none left": float(batch * (longest - 1)),
    }  # fmt: skip
    return counted_rows(name, "row-steps", counts, unit="count")


def _ragged_prompts(batch: int, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of lengths spread evenly from an eighth of the longest, padded on the left."""
    lengths = torch.linspace(longest // 8, longest, batch, device=device).long()
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return torch.randint(2, README.num_tokens, (batch, longest), device=device).masked_fill(~mask, 0), mask


def growth(bench: Bench, name: str, *, dtype: torch.dtype) -> list[Row]:
    """Seconds of the k-th token in windows of 32, k from 64 to 2048 (160 in the quick run), batch 1."""
    last = 160 if bench.quick else 2048
    palm = our_model(README, dtype=dtype, device=bench.device)
    prompt = torch.randint(0, README.num_tokens, (1, 64), device=bench.device)
    samples = bench.interleave({"ours": partial(_window_times, palm, prompt, last - 64, bench.device)})
    windows = {measure: found["ours"] for measure, found in samples.items()}
    rows = []
    for measure in (next(iter(windows)), next(reversed(windows))):
        rows += timed_rows(name, measure, {"ours": windows[measure]})
    first, *others = (spread_of(values).median for values in windows.values())
    final, most = others[-1] / first, max(others) / first
    rows.append(Row(case=name, measure="last / first", who="ours", unit="x", spread=Spread(final, final, final, 1)))
    rows.append(Row(case=name, measure="dearest / first", who="ours", unit="x", spread=Spread(most, most, most, 1)))
    if bench.upstream is not None and dtype == torch.float32 and not bench.quick:
        rows += _upstream_growth(bench, name, last)
    return rows


def _window_times(palm: PaLM, prompt: Tensor, new_tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds a token within each window; the first step, which reads the prompt's end, is in none."""
    marks: list[float] = []
    steps = 0

    def mark() -> None:
        nonlocal steps
        if steps % WINDOW == 0:
            wait(device)
            marks.append(time.perf_counter())
        steps += 1

    generate_responses(palm, prompt, max_new_tokens=new_tokens, on_step=mark)
    return {
        f"token {prompt.shape[1] + WINDOW * number + 1} on": (later - earlier) / WINDOW
        for number, (earlier, later) in enumerate(zip(marks, marks[1:], strict=False))
    }


def _upstream_growth(bench: Bench, name: str, last: int) -> list[Row]:
    assert bench.upstream is not None, "asked for only where there is one"
    sizes = [README.num_tokens, README.dim, README.depth]
    rows = []
    for length in (64, last - 1):
        bench.upstream.ask("generate", shape=sizes, length=length, new_tokens=1)
        found = [bench.upstream.ask("generate", shape=sizes, length=length, new_tokens=1)["seconds"] for _ in range(3)]
        rows += timed_rows(name, f"token {length + 1}", {"upstream": found})
    return rows
