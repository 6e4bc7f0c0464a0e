"""Rotary factors: hand-made angles, distance alone, xPos decay, precision, range."""

import math

import pytest
import torch

from palm_rlhf_pytorch.rotary import longest_position, rotary_factors, rotate


def turned(x: torch.Tensor, y: torch.Tensor, i: int, j: int, scale_base: int | None) -> float:
    """Product of x as a query at position i and y as a key at j."""
    factors = rotary_factors(torch.tensor([i, j]), len(x), scale_base=scale_base)
    query = rotate(x, factors.query_cos[0, 0], factors.query_sin[0, 0])
    key = rotate(y, factors.key_cos[0, 1], factors.key_sin[0, 1])
    return float(query @ key)


def test_rotate_turns_each_pair_by_its_own_angle():
    factors = rotary_factors(torch.tensor([3]), 4)
    turned_x = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]), factors.query_cos[0, 0], factors.query_sin[0, 0])
    # features 0 and 2 are a pair of frequency 1, features 1 and 3 one of frequency 10000^(-1/2) = 0.01
    expected = [math.cos(3.0), -2 * math.sin(0.03), math.sin(3.0), 2 * math.cos(0.03)]
    torch.testing.assert_close(turned_x, torch.tensor(expected))


@pytest.mark.parametrize("scale_base", [None, 512, 7])
def test_product_depends_on_the_distance_alone(scale_base):
    x, y = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    near, far = turned(x, y, 5, 2, scale_base), turned(x, y, 45, 42, scale_base)
    assert near == pytest.approx(far, abs=1e-4)
    assert abs(near - turned(x, y, 6, 2, scale_base)) > 1e-3


def test_xpos_shrinks_each_pair_with_distance():
    # one pair at a time; base 10, distance 20: ((2k/d + 0.4) / 1.4)^2 with 2k/d = 0 and 0.5
    for pair, zeta in ((0, 0.4 / 1.4), (1, 0.9 / 1.4)):
        x = torch.zeros(4)
        x[pair], x[pair + 2] = 0.6, -1.1
        y = x * 2
        decayed, plain = turned(x, y, 27, 7, 10), turned(x, y, 27, 7, None)
        assert decayed == pytest.approx(plain * zeta**2, rel=1e-4)


def test_neighbouring_angles_differ_at_all_positions_for_a_bfloat16_query():
    factors = rotary_factors(torch.arange(4096), 2)
    angles = torch.atan2(factors.query_sin[0, :, 1], factors.query_cos[0, :, 1])
    steps = angles.diff() % (2 * math.pi)
    torch.testing.assert_close(steps, torch.ones(4095), atol=1e-3, rtol=0)
    assert rotate(torch.ones(4096, 2, dtype=torch.bfloat16), factors.query_cos[0], factors.query_sin[0]).dtype == (
        torch.bfloat16
    )
    assert factors.query_cos.dtype == factors.key_sin.dtype == torch.float32


def test_factors_of_a_position_never_change():
    before = rotary_factors(torch.tensor([[3, 4]]), 8, scale_base=512)
    among = rotary_factors(torch.arange(9000), 8, scale_base=512)
    after = rotary_factors(torch.tensor([[3, 4]]), 8, scale_base=512)
    for first, long, last in zip(before, among, after, strict=True):
        assert torch.equal(first, last)
        torch.testing.assert_close(first[0], long[0, 3:5], rtol=1e-6, atol=0)


def test_positions_may_differ_from_row_to_row():
    both = rotary_factors(torch.tensor([[0, 1, 2], [5, 5, 6]]), 4, scale_base=9)
    row = rotary_factors(torch.tensor([5, 5, 6]), 4, scale_base=9)
    assert both.key_sin.shape == (2, 3, 4)
    assert torch.equal(both.key_sin[1:], row.key_sin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_up_to_the_longest_position_are_representable(dtype):
    limit = longest_position(dtype, scale_base=512)
    factors = rotary_factors(torch.tensor([0, limit - 1]), 4, scale_base=512)
    key = rotate(torch.ones(2, 4, dtype=dtype), factors.key_cos[0], factors.key_sin[0])
    query = rotate(torch.ones(2, 4, dtype=dtype), factors.query_cos[0], factors.query_sin[0])
    assert key.isfinite().all() and (query != 0).all()


def test_longest_position_allows_8k_in_bfloat16_and_refuses_what_overflows():
    assert longest_position(torch.bfloat16, scale_base=512) > 8192
    # 3.5^(75000 / 512) is beyond float32's 3.4e38, 3.5^(32768 / 512) beyond float16's 65504
    assert longest_position(torch.float32, scale_base=512) < 75_000
    assert longest_position(torch.float16, scale_base=512) < 32_768
    assert longest_position(torch.float16, scale_base=None) == math.inf
