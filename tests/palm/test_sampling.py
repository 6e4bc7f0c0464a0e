"""Sampling: the distribution, greedy choice, and what is refused; the cuts are truncation's."""

import math

import pytest
import torch

from palm_rlhf_pytorch.palm.sampling import check_sampling, sample_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# mass 0.4, 0.3, 0.15, 0.1, 0.05
FIVE = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()


def draw(logits: torch.Tensor, rows: int, **settings) -> torch.Tensor:
    settings.setdefault("generator", torch.Generator().manual_seed(0))
    return sample_tokens(logits.expand(rows, -1), **settings).tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_follows_the_distribution_by_chi_square(dtype):
    logits = torch.tensor([0.0, -0.5, -1.0, 0.5, -4.0], dtype=dtype)  # exact in every dtype
    probabilities = [math.exp(x) for x in logits.tolist()]
    expected = torch.tensor(probabilities) / sum(probabilities) * 200_000
    counts = draw(logits, 200_000).bincount(minlength=5)
    assert float(((counts - expected).square() / expected).sum()) < 18.5  # p = 0.001 at 4 degrees of freedom


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_is_uniform_over_a_large_vocabulary(dtype):
    tokens = draw(torch.zeros(20_000, dtype=dtype), 400).double()
    assert abs(float(tokens.mean()) - 9999.5) < 4 * 20_000 / math.sqrt(12 * 400)
    assert tokens.max() > 19_500 and tokens.min() < 500


def test_sample_divides_by_the_temperature():
    counts = draw(FIVE, 100_000, temperature=0.5).bincount(minlength=5)
    squares = torch.tensor([0.01, 0.16, 0.0025, 0.09, 0.0225])
    expected = squares / squares.sum() * 100_000
    assert float(((counts - expected).square() / expected).sum()) < 18.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1e-10, 1e-45])
def test_sample_is_greedy_at_temperature_zero_in_every_dtype(dtype, temperature):
    tokens = draw(torch.tensor([1.0, 5.0, 2.0], dtype=dtype), 64, temperature=temperature)
    assert tokens.tolist() == [1] * 64


def test_sample_reports_the_logprob_it_drew_with():
    tokens, logprobs = sample_tokens(FIVE.expand(50, -1), temperature=0.5, top_k=2)
    # of 0.4^2 and 0.3^2
    expected = {1: math.log(0.16 / 0.25), 3: math.log(0.09 / 0.25)}
    assert logprobs.tolist() == pytest.approx([expected[token] for token in tokens.tolist()], abs=1e-5)
    assert set(tokens.tolist()) == {1, 3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_sample_reports_float32_logprobs_of_logits_in_any_dtype(dtype, temperature):
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens, logprobs = sample_tokens(logits, temperature=temperature)
    exact = (logits.double() / (temperature or 1.0)).log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, exact.float(), atol=1e-5, rtol=0)


def test_sample_reports_the_logprob_at_temperature_one_when_greedy():
    assert float(sample_tokens(FIVE[None], temperature=0).logprobs) == pytest.approx(math.log(0.4), abs=1e-5)


def test_sample_never_draws_what_has_no_mass():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0, -math.inf])
    assert set(draw(logits, 5000).tolist()) == {1, 3}


def test_sample_survives_a_uniform_number_next_to_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, dtype, **_: torch.ones(size, dtype=dtype))
    assert sample_tokens(torch.tensor([[0.0, 1.0, -math.inf]])).tokens.tolist() == [1]


def test_sample_takes_any_leading_dimensions():
    out = sample_tokens(torch.randn(2, 3, 7), top_k=4, top_p=0.8)
    assert out.tokens.shape == out.logprobs.shape == (2, 3)


def test_sample_is_nan_where_logits_are():
    out = sample_tokens(torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, 2.0]]))
    assert out.logprobs.isnan().tolist() == [True, False]
    assert all(0 <= token < 3 for token in out.tokens.tolist())


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0}, {"top_k": -3},
     {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": -0.1}, {"top_p": math.nan}],
)  # fmt: skip
def test_settings_that_name_no_distribution_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        check_sampling(**({"temperature": 1.0, "top_k": None, "top_p": None} | setting))


def test_top_k_that_is_a_share_is_refused():
    with pytest.raises(TypeError, match=r"top_k \(0.9\).*int"):
        check_sampling(temperature=1.0, top_k=0.9, top_p=None)
