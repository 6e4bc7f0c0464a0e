"""One layer: against a loop over tokens, heads and features, and the merge of an adapter."""

import math

import pytest
import torch

from palm_rlhf_pytorch.lora import LayerAdapter
from palm_rlhf_pytorch.palm.block import ParallelTransformerBlock, Pass
from palm_rlhf_pytorch.rotary import rotary_factors


def make_block(seed: int = 0, **changes) -> ParallelTransformerBlock:
    torch.manual_seed(seed)
    sizes = {"dim": 10, "dim_head": 4, "heads": 3, "ff_mult": 2, "qk_rmsnorm": False, "qk_scale": 8.0, "fused": False}
    return ParallelTransformerBlock(**(sizes | changes))


def common_of(length: int, scale_base: int | None = 512, **changes) -> Pass:
    rotary = rotary_factors(torch.arange(length), 4, scale_base=scale_base)
    return Pass(rotary, **({"causal": True, "mask": None, "attn_dropout": 0.0, "ff_dropout": 0.0} | changes))


def layer_norm(x):
    return (x - x.mean()) / math.sqrt(float(x.var(unbiased=False)) + 1e-5)


def turn(x, position, decay):
    """Rotary position of one head's features, pair by pair, with the xPos scale to the power +-1."""
    out = torch.zeros(4)
    for pair, frequency in ((0, 1.0), (1, 10_000**-0.5)):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        scale = ((pair / 2 + 0.4) / 1.4) ** (decay * position / 512)
        out[pair] = scale * (x[pair] * cos - x[pair + 2] * sin)
        out[pair + 2] = scale * (x[pair + 2] * cos + x[pair] * sin)
    return out


def layer_by_loop(block, x):
    """The paper's parallel layer for one row, one token and head at a time."""
    normed = [layer_norm(token) * block.norm.weight for token in x]
    wq, wk, wv, wf, wg = block.in_proj.weight.split([12, 4, 4, 20, 20])
    keys = [turn(wk @ token, j, -1) for j, token in enumerate(normed)]
    out = []
    for i, token in enumerate(normed):
        heads = []
        for h in range(3):
            query = turn(wq[4 * h : 4 * h + 4] @ token, i, 1)
            weights = torch.stack([query @ keys[j] / 2 for j in range(i + 1)]).softmax(0)
            heads.append(sum(weight * (wv @ normed[j]) for j, weight in enumerate(weights)))
        gate = wg @ token
        feedforward = gate * torch.sigmoid(gate) * (wf @ token)
        out.append(block.out_proj.weight @ torch.cat((*heads, feedforward)))
    return torch.stack(out)


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_block_equals_a_loop_over_tokens_and_heads(fused):
    block = make_block(fused=fused)
    x = torch.randn(2, 5, 10)
    expected = torch.stack([layer_by_loop(block, row) for row in x])
    torch.testing.assert_close(block(x, common_of(5)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_qk_rmsnorm_bounds_the_products_by_its_scale():
    """With unit queries and keys a token that matches one key perfectly gives the product qk_scale."""
    block = make_block(qk_rmsnorm=True, qk_scale=6.0)
    q, k = torch.randn(1, 3, 7, 4) * 50, torch.randn(1, 7, 4) * 0.1
    q, k = block._place(q, k, rotary_factors(torch.zeros(7, dtype=torch.long), 4))
    torch.testing.assert_close(q.norm(dim=-1), torch.ones(1, 3, 7), atol=1e-3, rtol=0)
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(1, 7), atol=1e-2, rtol=0)
    assert block.scale == 6.0


@torch.no_grad()
def test_qk_rmsnorm_scale_sharpens_attention():
    x = torch.randn(1, 9, 10)
    outputs = [make_block(qk_rmsnorm=True, qk_scale=scale)(x, common_of(9)) for scale in (1.0, 8.0, 100.0)]
    assert (outputs[0] - outputs[1]).abs().max() > 0.01
    assert (outputs[1] - outputs[2]).abs().max() > 0.01


@torch.no_grad()
def test_qk_rmsnorm_normalises_small_features_in_bfloat16_too():
    block = make_block(qk_rmsnorm=True).bfloat16()
    q, _ = block._place(
        torch.full((1, 3, 1, 4), 0.03).bfloat16(), torch.ones(1, 1, 4).bfloat16(), rotary_factors(torch.arange(1), 4)
    )
    torch.testing.assert_close(q.norm(dim=-1).float(), torch.ones(1, 3, 1), atol=0.01, rtol=0)


def test_dropout_is_that_of_the_pass():
    block = make_block()
    x = torch.randn(1, 6, 10)
    with torch.no_grad():
        still = [block(x, common_of(6)) for _ in range(2)]
        for name in ("attn_dropout", "ff_dropout"):
            moved = [block(x, common_of(6, **{name: 0.5})) for _ in range(2)]
            assert not torch.equal(*moved)
    assert torch.equal(*still)


@torch.no_grad()
def test_merged_adapter_equals_the_unmerged_one():
    block = make_block()
    lora = LayerAdapter(10, 4, 3, r=2, alpha=3.0, generator=None)
    for parameter in lora.parameters():
        parameter.normal_()
    x = torch.randn(2, 5, 10)
    apart, without = block(x, common_of(5), lora=lora), block(x, common_of(5))
    block.merge(lora)
    torch.testing.assert_close(block(x, common_of(5)), apart, atol=1e-4, rtol=1e-4)
    assert (apart - without).abs().max() > 1


def test_adapter_updates_only_attention_columns():
    block = make_block()
    into, out = block.in_proj.weight.detach().clone(), block.out_proj.weight.detach().clone()
    lora = LayerAdapter(10, 4, 3, r=2, alpha=None, generator=None)
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter)
    block.merge(lora)
    assert torch.equal(block.in_proj.weight[20:], into[20:]) and torch.equal(block.out_proj.weight[:, 12:], out[:, 12:])
    assert (block.in_proj.weight[:20] != into[:20]).all() and (block.out_proj.weight[:, :12] != out[:, :12]).all()
