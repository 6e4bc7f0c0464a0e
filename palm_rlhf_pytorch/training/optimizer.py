"""AdamW over parameter groups, and learning-rate schedules as plain functions of the step.

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101
Knows no model and no loss; a schedule is a factor, and whoever steps applies it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(
    groups: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-5,
    weight_decay: float = 0.0,
) -> AdamW:
    """AdamW, in torch's fused form where there is one (float32 on CPU and CUDA).

    w <- w - lr * (m / (sqrt(v) + eps) + weight_decay * w),  m and v without bias

    Args:
        groups: what `parameter_groups` gives; a group's own lr and weight_decay come first.
        lr: learning rate of the groups that have none, kept as `initial_lr` for `scale_learning_rates`.
        betas: decay of the running means of the gradient and of its square; Adam's paper.
        eps: 1e-5 as in Ziegler et al. 2019; Adam's paper has 1e-8, and so large an eps slows big models down.
        weight_decay: of the groups that have none, per unit of learning rate.

    Raises:
        ValueError: if a number is out of range, or there is no parameter.
    """
    _check_numbers(lr=lr, weight_decay=weight_decay)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas ({betas}) must each be at least 0 and below 1")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps ({eps}) must be positive and finite")
    listed = [dict(group) for group in groups]
    parameters = [parameter for group in listed for parameter in group["params"]]
    if not parameters:
        raise ValueError("groups hold no parameter; give at least one that requires a gradient")
    fused = all(
        parameter.dtype == torch.float32 and parameter.device.type in ("cpu", "cuda") for parameter in parameters
    )
    optimizer = AdamW(listed, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Sort the parameters that require a gradient into those that decay (matrices) and those that do not.

    Gains, biases and other vectors are never decayed. The order is the one given, so a saved optimizer state fits; a
    parameter under two names counts once.

    Args:
        named_parameters: `module.named_parameters()`, or any part of it.
        lr: learning rate of both groups.
        weight_decay: of the parameters with two dimensions or more.

    Returns:
        One or two dicts with params, param_names, lr and weight_decay.

    Raises:
        ValueError: if none requires a gradient, or a number is out of range.
    """
    _check_numbers(lr=lr, weight_decay=weight_decay)
    unique: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            unique.setdefault(id(parameter), (name, parameter))
    if not unique:
        raise ValueError("named_parameters hold nothing that requires a gradient; unfreeze what is to be trained")
    decayed = [named for named in unique.values() if named[1].ndim >= 2]
    plain = [named for named in unique.values() if named[1].ndim < 2]
    return [
        {
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "lr": lr,
            "weight_decay": decay,
        }
        for members, decay in ((decayed, weight_decay), (plain, 0.0))
        if members
    ]


def scale_learning_rates(optimizer: Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times the one `adamw` made it with."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def linear_to_zero(step: int, total: int) -> float:
    """Factor 1 - (step - 1) / total: 1 at the first step, 1 / total at the last, 0 only after it.

    PPO's schedule in Ziegler et al. 2019, https://arxiv.org/abs/1909.08593.

    Args:
        step: counted from 1.
        total: number of steps planned.

    Raises:
        ValueError: if step or total is below 1. A step beyond total gives 0.
    """
    _check_step(step, total)
    return max(0.0, 1 - (step - 1) / total)


def warmup_cosine(step: int, total: int, *, warmup_steps: int = 0, final: float = 0.1) -> float:
    """Factor that rises linearly to 1 at step `warmup_steps`, then falls along half a cosine to `final` at the end.

    Hoffmann et al. 2022 (https://arxiv.org/abs/2203.15556) decay to 10 %, hence `final`.

    Args:
        step: counted from 1; a step beyond total gives `final`.
        total: number of steps planned.
        warmup_steps: step w <= warmup_steps gets w / warmup_steps; 0 and 1 start at the full rate.
        final: factor of the last step.

    Raises:
        ValueError: if step or total is below 1, warmup_steps is not in 0..total, or final not in 0..1.
    """
    _check_step(step, total)
    if not 0 <= warmup_steps <= total:
        raise ValueError(f"warmup_steps ({warmup_steps}) must be between 0 and the number of steps ({total})")
    if not 0 <= final <= 1:
        raise ValueError(f"final ({final}) must be between 0 and 1")
    if step < warmup_steps:
        return step / warmup_steps
    peak = max(warmup_steps, 1)
    progress = min(1.0, (step - peak) / (total - peak)) if total > peak else float(step > peak)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _check_step(step: int, total: int) -> None:
    if total < 1:
        raise ValueError(f"total ({total}) must be at least 1 step")
    if step < 1:
        raise ValueError(f"step ({step}) counts from 1")


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} ({number}) must be at least 0 and finite")
