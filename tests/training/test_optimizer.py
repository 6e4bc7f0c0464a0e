"""AdamW and its schedules against numbers by hand."""

import math

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.training.optimizer import (
    adamw,
    linear_to_zero,
    parameter_groups,
    scale_learning_rates,
    warmup_cosine,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_first_two_steps_are_the_papers(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.tensor([[2.0, -1.0]], dtype=dtype))
    optimizer = adamw([{"params": [weight]}], lr=0.1, betas=(0.8, 0.9), eps=0.5, weight_decay=0.25)
    assert bool(optimizer.defaults["fused"]) == (dtype == torch.float32)
    expected, m, v = [2.0, -1.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradients in enumerate(([3.0, 0.5], [-1.0, 2.0]), start=1):
        weight.grad = torch.tensor([gradients], dtype=dtype)
        optimizer.step()
        for place, g in enumerate(gradients):
            m[place] = 0.8 * m[place] + 0.2 * g
            v[place] = 0.9 * v[place] + 0.1 * g * g
            update = (m[place] / (1 - 0.8**step)) / (math.sqrt(v[place] / (1 - 0.9**step)) + 0.5)
            expected[place] -= 0.1 * (update + 0.25 * expected[place])
        assert weight[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_parameter_groups_decay_matrices_only_in_order() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False))
    model[2].weight.requires_grad_(False)
    extra = nn.Parameter(torch.ones(2, 3, 4))
    named = [*model.named_parameters(), ("extra", extra), ("again", extra)]
    matrices, vectors = parameter_groups(named, lr=0.5, weight_decay=0.25)
    assert [id(parameter) for parameter in matrices["params"]] == [id(model[0].weight), id(extra)]
    assert [id(parameter) for parameter in vectors["params"]] == [
        id(model[0].bias),
        id(model[1].weight),
        id(model[1].bias),
    ]
    assert (matrices["lr"], matrices["weight_decay"]) == (0.5, 0.25)
    assert (vectors["lr"], vectors["weight_decay"]) == (0.5, 0.0)


def test_parameter_groups_leave_out_empty_groups() -> None:
    (group,) = parameter_groups([("a", nn.Parameter(torch.ones(3)))], lr=0.5, weight_decay=0.25)
    assert group["weight_decay"] == 0.0


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="requires a gradient"):
        parameter_groups([("a", nn.Parameter(torch.ones(3), requires_grad=False))], lr=0.5, weight_decay=0.0)
    with pytest.raises(ValueError, match="no parameter"):
        adamw([], lr=0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lr": -1.0}, r"lr \(-1.0\)"),
        ({"lr": math.nan}, r"lr \(nan\)"),
        ({"weight_decay": -0.5}, r"weight_decay \(-0.5\)"),
        ({"betas": (0.9, 1.0)}, r"betas \(\(0.9, 1.0\)\)"),
        ({"eps": 0.0}, r"eps \(0.0\)"),
    ],
)
def test_adamw_names_a_number_out_of_range(change: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        adamw([{"params": [nn.Parameter(torch.ones(1))]}], **({"lr": 0.1} | change))  # type: ignore[arg-type]


def test_scale_learning_rates_keeps_the_ratio_of_groups() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.5, 0.25)]
    optimizer = adamw(groups, lr=9.0)
    for factor in (0.5, 0.25, 1.0):
        scale_learning_rates(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.25 * factor]


def test_linear_to_zero_starts_at_one_and_never_trains_at_zero() -> None:
    assert [linear_to_zero(step, 4) for step in range(1, 7)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert linear_to_zero(1, 1) == 1.0


def test_warmup_cosine_rises_falls_and_stays() -> None:
    factors = [warmup_cosine(step, 8, warmup_steps=4, final=0.1) for step in range(1, 11)]
    half = math.sqrt(0.5)
    falling = [0.1 + 0.45 * (1 + cosine) for cosine in (half, 0.0, -half, -1.0)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, *falling, 0.1, 0.1])
    assert warmup_cosine(1, 5) == 1.0
    assert warmup_cosine(5, 5) == pytest.approx(0.1)
    assert warmup_cosine(1, 1) == 1.0
    assert warmup_cosine(3, 3, warmup_steps=3) == 1.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0, 4), r"step \(0\)"), ((1, 0), r"total \(0\)"), ((1, -3), r"total \(-3\)")],
)
def test_schedules_name_an_odd_step(arguments: tuple[int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        linear_to_zero(*arguments)
    with pytest.raises(ValueError, match=match):
        warmup_cosine(*arguments)


def test_warmup_cosine_names_an_odd_shape() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps \(5\)"):
        warmup_cosine(1, 4, warmup_steps=5)
    with pytest.raises(ValueError, match=r"final \(1.5\)"):
        warmup_cosine(1, 4, final=1.5)
