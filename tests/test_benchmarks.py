"""The arithmetic of the benchmarks: by hand. Nothing is timed here."""

import json

import pytest
import torch

from palm_rlhf_pytorch import ActorCritic, PaLM
from tests.benchmarks.counts import README, Shape
from tests.benchmarks.harness import interleave, parse_options
from tests.benchmarks.memory import distinct_bytes
from tests.benchmarks.models import check_decoding, make_endable
from tests.benchmarks.ppo import generation_floor
from tests.benchmarks.report import Ceilings, Work, counted_rows, json_line, spread_of, table, timed_rows

# two layers; in: 3 queries of 2, a key, a value, 2 x 8 for the feedforward; out: 6 and 8
SMALL = Shape("small", num_tokens=11, dim=4, depth=2, heads=3, dim_head=2, ff_mult=2)


def small_palm() -> PaLM:
    return PaLM(num_tokens=11, dim=4, depth=2, heads=3, dim_head=2, ff_mult=2)


def test_spread_is_median_low_and_high() -> None:
    assert spread_of([5.0, 1.0, 2.0]) == (2.0, 1.0, 5.0, 3)
    assert spread_of([4.0, 1.0, 3.0, 10.0]).median == 3.5


def test_interleave_alternates_and_drops_warmups() -> None:
    calls: list[str] = []

    def competitor(name: str) -> dict[str, float]:
        calls.append(name)
        return {"call": float(len(calls))}

    samples = interleave({"a": lambda: competitor("a"), "b": lambda: competitor("b")}, rounds=2, warmups=1)
    assert calls == ["a", "b"] * 3
    assert samples == {"call": {"a": [3.0, 5.0], "b": [4.0, 6.0]}}


def test_shares_of_the_ceilings() -> None:
    samples = {"ours": [2.0, 2.0, 9.0], "peer": [5.0, 4.0, 5.0]}
    work = Work(bytes=100.0, flops=30.0, tokens=8)
    ours, peer = timed_rows("c", "m", samples, ceilings=Ceilings(bandwidth=200.0, matrix_rate=60.0), work=work)
    assert (ours.mbu, ours.mfu, ours.ratio, ours.tokens_per_second) == (0.25, 0.25, 1.0, 4.0)
    assert (peer.mbu, peer.mfu, peer.ratio, peer.tokens_per_second) == (0.1, 0.1, 2.5, 1.6)


def test_a_difference_below_zero_is_marked_and_has_no_share() -> None:
    (row,) = timed_rows("c", "m", {"ours": [-1.0]}, ceilings=Ceilings(1.0, 1.0), work=Work(bytes=1.0, tokens=1))
    assert "noise" in row.note
    assert (row.mbu, row.tokens_per_second) == (None, None)


def test_weights_by_hand_and_by_torch() -> None:
    assert SMALL.head_weights == 11 * 4
    assert SMALL.layer_weights == 2 * (4 * (6 + 2 + 2 + 16) + 4 * (6 + 8))
    matrices = sum(parameter.numel() for parameter in small_palm().parameters() if parameter.ndim == 2)
    assert SMALL.weights == matrices == 364
    assert round(README.weights / 1e6, 1) == 55.1


def test_decoding_reads_each_weight_once_and_each_rows_cache() -> None:
    cache = 5 * 7 * 2 * (2 + 2)  # rows, tokens, layers, a key and a value of 2
    assert SMALL.decode_bytes(batch=5, context=7, itemsize=2) == 2 * (364 + cache)


def test_flops_by_hand() -> None:
    assert SMALL.attention_flops(context=7) == 2 * 3 * (2 * 2 * 7 + 2 * 7 * 2)  # layers, heads, scores and sums
    assert SMALL.decode_flops(batch=5, context=7) == 5 * (2 * 364 + 336)
    seen = (1 + 2 + 3) / 3  # of three tokens in a causal pass, on average
    trunk = 3 * (2 * 320 + 48 * seen)
    assert SMALL.prefill_flops(batch=2, length=3) == 2 * (trunk + 2 * 44)
    assert SMALL.train_flops(batch=2, length=3) == 3 * 2 * (trunk + 3 * 2 * 44)
    assert SMALL.observe_flops(batch=2, length=3, response=1) == 2 * (3 * trunk + 2 * 2 * 44)


def test_generation_floor_takes_the_larger_of_bytes_and_flops() -> None:
    ceilings = Ceilings(bandwidth=4.0, matrix_rate=float("inf"))
    floor = generation_floor(SMALL, ceilings, dtype=torch.float32, count=1, prompt=3, new=3)
    assert floor == (364 + 4 * 8) + (364 + 5 * 8)  # two steps read weights and 4, then 5 tokens; 4 bytes at 4 a second
    ceilings = Ceilings(bandwidth=float("inf"), matrix_rate=2.0)
    floor = generation_floor(SMALL, ceilings, dtype=torch.float32, count=1, prompt=1, new=2)
    assert floor == (2 * 320 + 48 + 2 * 44) / 2 + (2 * 364 + 48 * 2) / 2


def test_distinct_bytes_counts_shared_memory_once() -> None:
    shared = torch.zeros(6)
    assert distinct_bytes([shared, shared[:2], shared.view(2, 3), torch.zeros(5, dtype=torch.bfloat16)]) == 24 + 10


def test_table_and_json_say_the_same() -> None:
    rows = timed_rows("case", "step", {"ours": [0.002, 0.001, 0.004], "peer": [0.003]}, work=Work(tokens=4))
    rows += counted_rows("case", "peak", {"ours": 2e6}, unit="bytes")
    lines = table(rows).splitlines()
    assert lines[1].split() == ["case", "step", "ours", "2", "ms", "1..4", "1.00x", "2,000"]
    assert lines[2].split()[:3] == ["peer", "3", "ms"]
    assert lines[3].split() == ["case", "peak", "ours", "2", "MB", "1.00x"]
    found = json.loads(json_line(rows, {"machine": "m"}))
    assert found["machine"] == "m"
    assert found["rows"][0]["spread"] == {"median": 0.002, "low": 0.001, "high": 0.004, "rounds": 3}
    assert found["rows"][0]["tokens_per_second"] == 2000


def test_gate_lets_a_sound_model_pass() -> None:
    check_decoding(small_palm().eval())


def test_gate_names_greedy_tokens_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    palm = small_palm().eval()
    generate = PaLM.generate
    monkeypatch.setattr(PaLM, "generate", lambda *given, **options: (generate(*given, **options) + 1) % 11)
    with pytest.raises(SystemExit, match="greedy tokens"):
        check_decoding(palm)


def test_gate_names_log_probabilities_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = ActorCritic.observe

    def wrong(*given: object) -> object:
        seen = observe(*given)
        return seen._replace(logprobs=seen.logprobs + 1e-4)

    monkeypatch.setattr(ActorCritic, "observe", wrong)
    with pytest.raises(SystemExit, match="observe differ by 0.0001"):
        check_decoding(small_palm().eval())


def test_endable_model_ends_about_when_it_should() -> None:
    palm = PaLM(num_tokens=500, dim=64, depth=2).eval()
    make_endable(palm.token_emb.weight, palm.embed, eos_token=1, mean_length=10)
    prompts = torch.randint(2, 500, (64, 20))
    tokens = palm.generate(60, prompts, eos_token=1, pad_value=-1)
    lengths = (tokens >= 0).sum(dim=-1).float()
    assert 5 < lengths.mean() < 20  # of 40, with mean 10 and a deviation of the mean of 1
    assert len(lengths.unique()) > 8


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--upstream-python", "/no/such/python"]])
def test_options_that_cannot_be_met_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert arguments[1] in capsys.readouterr().err
