"""Attention: against a loop over heads and queries, fused against plain, masks, and the key/value cache."""

import math

import pytest
import torch

from palm_rlhf_pytorch import attention
from palm_rlhf_pytorch.attention import KVCache, attend, attention_mask, place_tokens


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, 5, 4, generator=generator)
    k = torch.randn(2, 5, 4, generator=generator)
    v = torch.randn(2, 5, 4, generator=generator)
    return q, k, v


def attended_by_loop(q, k, v, allowed):
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[1]) if allowed[b, i, j]]
                weights = [math.exp(0.5 * float(q[b, h, i] @ k[b, j])) for j in keys]
                for weight, j in zip(weights, keys, strict=True):
                    out[b, h, i] += weight / sum(weights) * v[b, j]
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_half_precision_attends_in_float32_and_is_rounded_once(qkv, monkeypatch, dtype):
    monkeypatch.setattr(attention, "float32_rows", lambda dtype: 2)
    narrow = tuple(x.to(dtype) for x in qkv)
    allowed = attention_mask(None, 5, 5, causal=True).expand(2, 5, 5)
    exact = attended_by_loop(*(x.double() for x in narrow), allowed)
    with torch.autocast("cpu", dtype=dtype):  # which would make it half precision again
        out = attend(*narrow, scale=0.5, causal=True, fused=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact.to(dtype).double(), atol=0, rtol=torch.finfo(dtype).eps)
    assert (out == exact.to(dtype)).double().mean() > 0.95  # in half precision most would be off by its rounding


@pytest.mark.parametrize("fused", [False, True])
def test_attend_equals_a_loop_over_heads_and_queries(qkv, fused):
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]]).bool()
    allowed = attention_mask(mask, 5, 5, causal=True)
    out = attend(*qkv, scale=0.5, mask=allowed, fused=fused)
    torch.testing.assert_close(out, attended_by_loop(*qkv, allowed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_attend_causal_equals_the_causal_mask(qkv, fused):
    allowed = torch.ones(2, 5, 5).tril().bool()
    out = attend(*qkv, scale=0.5, causal=True, fused=fused)
    torch.testing.assert_close(out, attended_by_loop(*qkv, allowed), atol=1e-5, rtol=0)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_fused_equals_plain_in_values_and_gradients(qkv, queries, masked):
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]).bool() if masked else None
    allowed = attention_mask(mask, queries, 5, causal=True) if masked else None
    results = []
    for fused in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in (qkv[0][:, :, -queries:], *qkv[1:]))
        out = attend(q, k, v, scale=0.5, mask=allowed, fused=fused)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(plain, fast, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_attend_products_are_float32_in_bfloat16(fused):
    # products 1024 and 1025: bfloat16 knows only 1024 and 1032
    q = torch.tensor([32.0, 1.0]).reshape(1, 1, 1, 2).bfloat16()
    k = torch.tensor([[32.0, 0.0], [32.0, 1.0]]).reshape(1, 2, 2).bfloat16()
    v = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).reshape(1, 2, 2).bfloat16()
    out = attend(q, k, v, scale=1.0, fused=fused)
    assert out.dtype == torch.bfloat16
    assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + math.exp(-1)), abs=5e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_attend_dropout_drops_and_rescales(qkv, fused):
    q, k, v = qkv
    torch.manual_seed(0)
    draws = torch.stack([attend(q, k, v, scale=0.5, dropout=0.4, fused=fused) for _ in range(3000)])
    expected = attend(q, k, v, scale=0.5)
    assert (draws[0] - draws[1]).abs().max() > 0.1
    torch.testing.assert_close(draws.mean(dim=0), expected, atol=0.1, rtol=0)


def test_attention_mask_by_hand():
    key_mask = torch.tensor([[False, True, True], [True, True, False]])
    causal = attention_mask(key_mask, 3, 3, causal=True).int().tolist()
    # a padded query sees itself, so that its softmax is not over nothing
    assert causal[0] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert causal[1] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    both_ways = attention_mask(key_mask, 3, 3, causal=False).int().tolist()
    assert both_ways[0] == [[1, 1, 1], [0, 1, 1], [0, 1, 1]]
    assert attention_mask(None, 2, 4, causal=True).int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]]]


def cache_for(batch: int, room: int) -> KVCache:
    return KVCache(
        depth=2, batch=batch, max_length=room, dim_head=4, dtype=torch.float32, device=torch.device("cpu")
    )  # fmt: skip


def test_cache_counts_each_rows_own_positions():
    cache = cache_for(2, 6)
    assert cache.admit(torch.tensor([[0, 0, 1], [1, 1, 1]]).bool(), 3).tolist() == [[0, 0, 0], [0, 1, 2]]
    assert cache.admit(None, 1).tolist() == [[1], [3]]
    assert cache.admit(torch.tensor([[1, 0], [1, 1]]).bool(), 2).tolist() == [[2, 2], [4, 5]]
    assert cache.lengths.tolist() == [3, 6]


def test_cache_shows_new_tokens_what_is_real_before_them():
    cache = cache_for(2, 5)
    cache.admit(torch.tensor([[0, 1, 1], [1, 1, 1]]).bool(), 3)
    cache.admit(None, 1)
    assert cache.visible(1).int().tolist() == [[[0, 1, 1, 1]], [[1, 1, 1, 1]]]
    cache.admit(None, 1)
    assert cache.visible(2).int().tolist() == [
        [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]


def test_cache_without_padding_needs_no_mask_but_for_a_later_chunk():
    cache = cache_for(1, 6)
    cache.admit(None, 3)
    assert cache.visible(3) is None
    cache.admit(None, 1)
    assert cache.visible(1) is None
    cache.admit(None, 2)
    assert cache.visible(2).int().tolist() == [[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]]


def test_cache_keeps_what_each_layer_stored():
    cache = cache_for(1, 3)
    cache.admit(None, 2)
    first = torch.arange(8.0).reshape(1, 2, 4)
    cache.store(0, first, -first)
    cache.store(1, first * 10, first)
    cache.admit(None, 1)
    keys, values = cache.store(0, torch.full((1, 1, 4), 9.0), torch.zeros(1, 1, 4))
    assert torch.equal(keys, torch.cat((first, torch.full((1, 1, 4), 9.0)), dim=1))
    assert torch.equal(values[:, :2], -first)


def test_cache_refuses_more_than_it_has_room_for():
    cache = cache_for(1, 3)
    cache.admit(None, 2)
    with pytest.raises(ValueError, match="3 tokens that holds 2 cannot take 2 more"):
        cache.admit(None, 2)


@pytest.mark.parametrize("left", [False, True])
def test_place_tokens_counts_real_tokens_on_either_side_of_padding(left):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    mask = mask.flip(-1) if left else mask
    positions, allowed = place_tokens(5, mask, None, causal=True, device=mask.device)
    assert positions[mask].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    if left:
        assert torch.equal(allowed, attention_mask(mask, 5, 5, causal=True))
    else:
        assert allowed is None  # what comes later is not seen, padding or not
    assert place_tokens(3, None, None, causal=True, device=mask.device)[0].tolist() == [0, 1, 2]
