"""LoRA: the formula by hand, its cost, its initial state, and its dtype."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from palm_rlhf_pytorch.lora import Adapter, LoRA


def test_lora_is_x_a_b_scaled_by_alpha_over_r():
    lora = LoRA(3, 2, r=1, alpha=5.0)
    with torch.no_grad():
        lora.A.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        lora.B.copy_(torch.tensor([[0.5, -3.0]]))
    # x A = 1 + 4 - 3 = 2; times B = (1, -6); times 5 / 1
    assert lora(torch.tensor([1.0, 2.0, 3.0])).tolist() == [5.0, -30.0]
    assert lora.delta().tolist() == [[2.5, 5.0, -2.5], [-15.0, -30.0, 15.0]]


def test_lora_scale_is_one_without_alpha():
    lora = LoRA(4, 3, r=2)
    nn.init.ones_(lora.A), nn.init.ones_(lora.B)
    assert lora(torch.ones(4)).tolist() == [8.0] * 3


def test_lora_never_multiplies_a_with_b_first():
    dim, dim_out, r, tokens = 64, 96, 4, 3
    with FlopCounterMode(display=False) as counter:
        LoRA(dim, dim_out, r=r)(torch.randn(tokens, dim))
    assert counter.get_total_flops() == 2 * tokens * r * (dim + dim_out)


def test_lora_starts_at_zero_with_a_scaled_to_its_fan_in():
    lora = LoRA(512, 7, r=64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(1))
    assert torch.equal(lora(x), torch.zeros(40, 7))
    assert float(lora.A.detach().std()) == pytest.approx(512**-0.5, rel=0.05)
    assert float((x @ lora.A.detach()).std()) == pytest.approx(1.0, rel=0.05)


def test_lora_learns_in_its_first_step():
    lora = LoRA(5, 4, r=2)
    lora(torch.randn(3, 5)).sum().backward()
    assert lora.B.grad.abs().max() > 0
    assert torch.equal(lora.A.grad, torch.zeros_like(lora.A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_stays_float32_to_the_last_bit_in_a_half_precision_model(dtype):
    lora = LoRA(6, 5, r=3)
    before = lora.A.detach().clone()
    wrapped = nn.Sequential(nn.Linear(6, 6), lora).to(dtype)
    assert wrapped[0].weight.dtype == dtype
    assert torch.equal(lora.A, before)
    assert lora(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_lora_is_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        lora = LoRA(4, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert lora.A.dtype == lora.B.dtype == torch.float32


@pytest.mark.parametrize(("wrong", "named"), [({"r": 0}, "r"), ({"alpha": 0.0}, "alpha"), ({"alpha": -1.0}, "alpha")])
def test_lora_refuses_settings_that_adapt_nothing(wrong, named):
    with pytest.raises(ValueError, match=rf"^{named} \("):
        LoRA(4, 3, **wrong)


def test_adapter_covers_the_last_layers_only():
    adapter = Adapter(depth=5, dim=6, dim_head=4, heads=3, r=2, last_layers=2)
    assert [adapter.layer(index) is not None for index in range(5)] == [False, False, False, True, True]
    shapes = [tuple(parameter.shape) for parameter in adapter.layer(4).parameters()]
    assert shapes == [(6, 2), (2, 12), (6, 2), (2, 4), (6, 2), (2, 4), (12, 2), (2, 6)]


@pytest.mark.parametrize("last_layers", [0, 6])
def test_adapter_refuses_layers_there_are_not(last_layers):
    with pytest.raises(ValueError, match=rf"last_layers \({last_layers}\).*depth \(5\)"):
        Adapter(depth=5, dim=6, dim_head=4, heads=3, last_layers=last_layers)


def test_adapter_is_drawn_from_the_generator():
    def drawn(seed: int) -> Adapter:
        return Adapter(depth=2, dim=6, dim_head=4, heads=3, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    first, again, other = (list(drawn(seed).parameters())[0] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
