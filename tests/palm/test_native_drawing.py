"""The native draw: tokens by hand, against torch's, and what it leaves to torch."""

import math

import pytest
import torch

from palm_rlhf_pytorch.palm import sampling
from palm_rlhf_pytorch.palm.native import draw_tokens
from palm_rlhf_pytorch.palm.sampling import sample_tokens

BELOW_ONE = 1 - 2.0**-53  # the largest number that is drawn


def test_tokens_and_logprobs_by_hand(native_build):
    logits = torch.tensor([0.5, 0.125, 0.0, 0.375]).log().expand(8, 4)
    uniform = torch.tensor([0, 0.499, 0.501, 0.624, 0.626, 0.999, BELOW_ONE, 0.5], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, uniform, temperature=1.0)
    assert tokens.tolist() == [0, 0, 1, 1, 3, 3, 3, 1]
    expected = [math.log([0.5, 0.125, 0, 0.375][token]) for token in tokens.tolist()]
    torch.testing.assert_close(logprobs, torch.tensor(expected), atol=1e-6, rtol=0)


def test_a_temperature_divides_logits(native_build):
    logits, uniform = torch.tensor([[0.0, math.log(3)]]), torch.tensor([0.2], dtype=torch.float64)
    (token,), (logprob,) = draw_tokens(logits, uniform, temperature=0.5)  # weights 1 and 9
    assert token == 1 and float(logprob) == pytest.approx(math.log(0.9), abs=1e-6)
    (token,), (logprob,) = draw_tokens(logits, uniform * 0.4, temperature=1e-30)
    assert token == 1 and float(logprob) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 255, 257, 2003])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_it_draws_what_torch_draws(native_build, monkeypatch, dtype, vocabulary, temperature):
    logits = (3 * torch.randn(97, vocabulary)).to(dtype)
    uniform = torch.rand(97, dtype=torch.float64)
    found = sample_tokens(logits, temperature=temperature, uniform=uniform)
    monkeypatch.setattr(sampling, "draw_tokens", lambda *_, **__: None)
    expected = sample_tokens(logits, temperature=temperature, uniform=uniform)
    same = found.tokens == expected.tokens  # but where rounding moves a number across the border of two tokens
    assert same.float().mean() > 0.97
    torch.testing.assert_close(found.logprobs[same], expected.logprobs[same], atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 0.3, BELOW_ONE])
def test_tokens_of_probability_0_never_come(native_build, uniform):
    logits = torch.full((3, 700), -torch.inf)
    logits[0, 256], logits[1, 255], logits[2, 511:513] = -1e4, 70.0, 3.0
    tokens, logprobs = draw_tokens(logits, torch.full((3,), uniform, dtype=torch.float64), temperature=1.0)
    assert tokens.tolist() == [256, 255, 511 if uniform < 0.5 else 512]
    torch.testing.assert_close(logprobs, torch.tensor([0.0, 0.0, -math.log(2)]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_give_a_logprob_that_is_none(native_build, bad):
    logits = torch.zeros(2, 300)
    logits[1, 290] = bad
    tokens, logprobs = draw_tokens(logits, torch.full((2,), 0.4, dtype=torch.float64), temperature=1.0)
    assert logprobs.isfinite().tolist() == [True, False] and bool((tokens < 300).all())


def test_frequencies_are_the_probabilities(native_build):
    probabilities = torch.tensor([0.05, 0.3, 0.15, 0.5])
    draws = 40_000
    uniform = torch.rand(draws, dtype=torch.float64)
    tokens, _ = draw_tokens(probabilities.log().expand(draws, 4), uniform, temperature=1.0)
    shares = tokens.bincount(minlength=4) / draws
    assert ((shares - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / draws).sqrt()).all()


def test_what_it_leaves_to_torch(native_build):
    uniform = torch.rand(3, dtype=torch.float64)
    assert draw_tokens(torch.zeros(3, 5, dtype=torch.float16), uniform, temperature=1.0) is None
    assert draw_tokens(torch.zeros(2, 3, 5), uniform.expand(2, 3), temperature=1.0) is None
    assert draw_tokens(torch.zeros(3, 5, requires_grad=True), uniform, temperature=1.0) is None
    assert draw_tokens(torch.zeros(3, 5), uniform.float(), temperature=1.0) is None
    assert draw_tokens(torch.zeros(0, 5), uniform[:0], temperature=1.0) is None
    for shape in ((), (1,), (2,), (3, 1)):
        assert draw_tokens(torch.zeros(3, 5), torch.zeros(shape, dtype=torch.float64), temperature=1.0) is None
    assert draw_tokens(torch.zeros(3, 5), uniform.to("meta"), temperature=1.0) is None
    negated = torch.complex(torch.zeros(3, 5), torch.ones(3, 5)).conj().imag
    assert draw_tokens(negated, uniform, temperature=1.0) is None
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(torch.zeros(3, 5), torch.ones(3, 5))
        assert draw_tokens(moving, uniform, temperature=1.0) is None
    logits = torch.randn(3, 2, 5)
    mapped = torch.vmap(lambda x: sample_tokens(x, uniform=uniform[:2]).tokens)(logits)
    assert mapped.tolist() == [sample_tokens(each, uniform=uniform[:2]).tokens.tolist() for each in logits]
    columns = torch.randn(5, 3).T  # laid out anew, not left
    assert draw_tokens(columns, uniform, temperature=1.0)[0].equal(
        draw_tokens(columns.contiguous(), uniform, temperature=1.0)[0]
    )


def test_without_it_torch_draws(without):
    uniform = torch.tensor([0.1, 0.9], dtype=torch.float64)
    assert draw_tokens(torch.zeros(2, 2), uniform, temperature=1.0) is None
    assert sample_tokens(torch.zeros(2, 2), uniform=uniform).tokens.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_default_dtype_is_not_its_own(native_build, dtype):
    logits, uniform = torch.randn(5, 700), torch.rand(5, dtype=torch.float64)
    expected = draw_tokens(logits, uniform, temperature=1.0)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = draw_tokens(logits, uniform, temperature=1.0)
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
