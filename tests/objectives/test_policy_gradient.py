"""Clipped losses, KL estimators and their controller: the worked example, exact expectations, microbatches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.policy_gradient import (
    adaptive_kl_coef,
    explained_variance,
    kl_abs,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    value_loss,
)

NAN = float("nan")


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def all_true(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


OLD, REFERENCE = row(-1, -0.5, -2), row(-1.2, -0.4, -1.5)
WHITENED = row(0.974924383, 0.399747162, -1.374671545)


def close(x: Tensor, expected: float | Tensor) -> None:
    torch.testing.assert_close(x.detach(), torch.as_tensor(expected, dtype=x.dtype), rtol=0, atol=1e-8)


def random_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old, moved, advantages = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=generator) < 0.6
    mask[3] = False
    return {"logprobs": old + 0.3 * moved, "old_logprobs": old, "advantages": advantages, "mask": mask}


# PPO's surrogate


def test_policy_loss_matches_the_worked_example() -> None:
    result = policy_loss(row(-0.8, -0.5, -2.5), OLD, WHITENED, all_true(1, 3))
    close(result.loss, -0.156639729)
    close(result.clipped_fraction, 2 / 3)
    close(result.approx_kl, 0.042644473)
    close(result.approx_kl_k2, 0.048333333)
    close(result.ratio_mean, (1.221402758 + 1 + 0.606530660) / 3)
    close(result.ratio_max, 1.221402758)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, -1.169909259), (1, -0.399747162), (2, 1.099737236)],
    ids=["clipped", "one", "clipped low"],
)
def test_policy_loss_of_single_tokens_matches_the_worked_example(step: int, expected: float) -> None:
    mask = torch.arange(3)[None] == step
    close(policy_loss(row(-0.8, -0.5, -2.5), OLD, WHITENED, mask).loss, expected)


def test_policy_loss_counts_as_clipped_only_where_the_clip_costs() -> None:
    logprobs = row(-0.8, -0.5, -1.5)
    result = policy_loss(logprobs, OLD, WHITENED, all_true(1, 3))
    close(result.loss, 0.232264598)
    # Two ratios leave the trust region, but at the third the unclipped loss is the larger one.
    close(result.clipped_fraction, 1 / 3)
    close(policy_loss(logprobs, OLD, WHITENED, row(0, 0, 1).bool()).loss, 2.266450222)


def test_estimators_between_old_and_new_match_the_worked_example() -> None:
    new = row(-0.8, -0.5, -2.5)
    close(kl_k1(OLD, new).mean(), 0.1)
    close(kl_k2(OLD, new).mean(), 0.048333333)
    close(kl_k3(OLD, new).mean(), 0.042644473)


def test_dual_clip_caps_the_loss_of_negative_advantages_only() -> None:
    ten = torch.log(row(10, 10))
    advantages = row(-1, 1)
    close(policy_loss(ten, row(0, 0), advantages, torch.tensor([[True, False]])).loss, 10)
    close(policy_loss(ten, row(0, 0), advantages, torch.tensor([[True, False]]), dual_clip=3.0).loss, 3)
    close(policy_loss(ten, row(0, 0), advantages, torch.tensor([[False, True]]), dual_clip=3.0).loss, -1.2)


def test_upper_clip_may_be_wider_than_the_lower_one() -> None:
    ratios, advantages = torch.log(row(1.25, 1.5, 0.5)), row(1, 1, -1)
    # 1.25 is inside 1.28, 1.5 is cut to 1.28, 0.5 to 0.8.
    close(
        policy_loss(ratios, row(0, 0, 0), advantages, all_true(1, 3), eps_clip_high=0.28).loss, (-1.25 - 1.28 + 0.8) / 3
    )
    close(policy_loss(ratios, row(0, 0, 0), advantages, all_true(1, 3)).loss, (-1.2 - 1.2 + 0.8) / 3)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage() -> None:
    logprobs = OLD.clone().requires_grad_()
    result = policy_loss(logprobs, OLD, WHITENED, torch.tensor([[True, True, False]]))
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    close(grad, row(-0.974924383 / 2, -0.399747162 / 2, 0))
    assert result.ratio_mean.item() == result.ratio_max.item() == 1
    assert result.approx_kl.item() == result.clipped_fraction.item() == 0


def test_policy_loss_stops_the_gradient_of_a_clipped_token() -> None:
    logprobs = row(-0.8, -0.5, -1.5).requires_grad_()
    (grad,) = torch.autograd.grad(policy_loss(logprobs, OLD, WHITENED, all_true(1, 3)).loss, logprobs)
    close(grad, row(0, -0.399747162 / 3, 2.266450222 / 3))


def test_policy_loss_gives_a_gradient_to_the_policy_only() -> None:
    logprobs, old, advantages = (x.clone().requires_grad_() for x in (row(-0.9, -0.5, -2), OLD, WHITENED))
    result = policy_loss(logprobs, old, advantages, all_true(1, 3))
    result.loss.backward()
    assert old.grad is None and advantages.grad is None
    assert not any(metric.requires_grad for metric in result[1:])


def test_padding_gets_no_gradient_and_does_not_dilute() -> None:
    short = policy_loss(row(-0.8, -0.5), OLD[:, :2], WHITENED[:, :2], all_true(1, 2))
    logprobs = row(-0.8, -0.5, -300, NAN, float("-inf")).requires_grad_()
    pad = row(-2, NAN, float("-inf"))
    mask = torch.tensor([[True, True, False, False, False]])
    result = policy_loss(logprobs, torch.cat([OLD[:, :2], pad], 1), torch.cat([WHITENED[:, :2], pad], 1), mask)
    (grad,) = torch.autograd.grad(result.loss, logprobs)
    torch.testing.assert_close(tuple(result), tuple(short))
    assert grad[0, 2:].eq(0).all() and grad[0, 1].item() != 0


def test_losses_without_any_token_are_zero_with_zero_gradient() -> None:
    x = torch.full((2, 3), -1.0, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    for num_tokens in (None, 0, torch.tensor(0), 5.0):
        policy = policy_loss(x, x.detach(), x.detach(), mask, num_tokens=num_tokens)
        value = value_loss(x, x.detach(), x.detach(), mask, num_tokens=num_tokens)
        assert not any(metric.item() for metric in (*policy, *value))
        assert torch.autograd.grad(policy.loss + value.loss, x)[0].eq(0).all()


def test_policy_diagnostics_are_those_worked_by_hand() -> None:
    # ratios e^.2, 1, e^-.5; advantages of either sign: the first is clipped above, the last below
    new, old = torch.tensor([[-0.8, -0.5, -2.5]]), torch.tensor([[-1.0, -0.5, -2.0]])
    found = policy_loss(new, old, torch.tensor([[0.97, 0.40, -1.37]]), all_true(1, 3))
    assert found.clipped_fraction_high.item() == pytest.approx(1 / 3)
    assert found.clipped_fraction_low.item() == pytest.approx(1 / 3)
    assert found.clipped_fraction.item() == pytest.approx(2 / 3)
    assert found.approx_kl_k1.item() == pytest.approx(0.1)
    assert found.ratio_var.item() == pytest.approx((0.221402758**2 + 0.393469340**2) / 3)


def test_extreme_log_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[0.0, -900.0]], requires_grad=True)
    result = policy_loss(logprobs, torch.tensor([[-900.0, 0.0]]), torch.tensor([[-1.0, -1.0]]), all_true(1, 2))
    assert all(metric.isfinite() for metric in result)
    assert torch.autograd.grad(result.loss, logprobs)[0].isfinite().all()
    assert kl_k3(torch.tensor(-900.0), torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_microbatches_add_up_to_the_whole_step(size: int) -> None:
    batch = random_batch()
    num_tokens = batch["mask"].sum()
    whole_leaf = batch["logprobs"].clone().requires_grad_()
    whole = policy_loss(**{**batch, "logprobs": whole_leaf})
    leaf = batch["logprobs"].clone().requires_grad_()
    parts = []
    for start in range(0, 8, size):
        rows = {name: x[start : start + size] for name, x in {**batch, "logprobs": leaf}.items()}
        parts.append(policy_loss(**rows, num_tokens=num_tokens))
        parts[-1].loss.backward()
    whole.loss.backward()
    torch.testing.assert_close(leaf.grad, whole_leaf.grad)
    for name in ("loss", "clipped_fraction", "approx_kl", "approx_kl_k2", "ratio_mean"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


def test_microbatches_of_values_add_up_to_the_whole_step() -> None:
    batch = random_batch()
    fields = (batch["logprobs"], batch["old_logprobs"], batch["advantages"], batch["mask"])
    whole = value_loss(*fields)
    parts = [value_loss(*(x[i : i + 1] for x in fields), num_tokens=float(batch["mask"].sum())) for i in range(8)]
    torch.testing.assert_close(tuple(torch.stack(column).sum() for column in zip(*parts, strict=True)), tuple(whole))


def test_losses_divide_by_a_count_below_one() -> None:
    # One real token over two ranks whose gradients are averaged: each rank divides by one half.
    close(policy_loss(row(0), row(0), row(-3), all_true(1, 1), num_tokens=torch.tensor(0.5)).loss, 6)


def test_policy_loss_refuses_bad_input() -> None:
    mask = all_true(2, 3)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"advantages \(2, 1\), mask \(2, 3\)"):
        policy_loss(x, x, x[:, :1], mask)
    with pytest.raises(TypeError, match="torch.bool"):
        policy_loss(x, x, x, mask.float())
    with pytest.raises(ValueError, match=r"eps_clip \(0\)"):
        policy_loss(x, x, x, mask, eps_clip=0)
    with pytest.raises(ValueError, match=r"eps_clip_high \(-0.1\)"):
        policy_loss(x, x, x, mask, eps_clip_high=-0.1)
    with pytest.raises(ValueError, match=r"dual_clip \(1.0\)"):
        policy_loss(x, x, x, mask, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"num_tokens \(-2\)"):
        policy_loss(x, x, x, mask, num_tokens=-2)


# The critic


def test_value_loss_matches_the_worked_example() -> None:
    values, old, returns = row(0.6, 0.1, 0.7), row(0.3, 0.4, 0.6), row(0.9683125, 1.00875, 1.025)
    result = value_loss(values, old, returns, all_true(1, 3), value_clip=0.2)
    close(result.loss, 0.191794693)
    close(result.clipped_fraction, 1 / 3)
    # Squared errors .3683125^2, .90875^2, .325^2.
    close(result.error, (0.13565409765625 + 0.8258265625 + 0.105625) / 3)


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    result = value_loss(row(3, 5), row(0, 0), row(1, 2), all_true(1, 2), value_clip=None)
    close(result.loss, (4 + 9) / 4)
    close(result.clipped_fraction, 0)


def test_perfect_values_cost_nothing_and_shapes_never_broadcast() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert value_loss(values, values, values, all_true(2, 3)).loss.item() == 0
    with pytest.raises(ValueError, match=r"returns \(2, 1\), mask \(2, 3\)"):
        value_loss(values, values, values[:, :1], all_true(2, 3))
    with pytest.raises(ValueError, match=r"values \(6,\).*returns \(2, 1\)"):
        value_loss(values.reshape(6), values, values[:, :1], all_true(2, 3))
    with pytest.raises(ValueError, match=r"value_clip \(0\)"):
        value_loss(values, values, values, all_true(2, 3), value_clip=0)


def test_value_loss_gives_a_gradient_to_the_values_only() -> None:
    values, old, returns = (x.clone().requires_grad_() for x in (row(0.6, 0.1), row(0.3, 0.4), row(1, 1)))
    result = value_loss(values, old, returns, all_true(1, 2))
    result.loss.backward()
    assert old.grad is None and returns.grad is None
    # The first has moved further than the clip towards its return and earns no more; the second moved away.
    assert values.grad is not None
    close(values.grad, row(0, (0.1 - 1) / 2))
    assert not any(metric.requires_grad for metric in result[1:])


def test_values_of_padding_get_no_gradient() -> None:
    values = torch.tensor([[1.0, NAN, 9.0]], requires_grad=True)
    other = torch.tensor([[0.0, NAN, 1.0]])
    result = value_loss(values, other, other, torch.tensor([[True, False, False]]), value_clip=None)
    (grad,) = torch.autograd.grad(result.loss, values)
    assert result.loss.item() == 0.5 and grad.tolist() == [[1, 0, 0]]


def test_explained_variance_is_the_share_of_variance_explained() -> None:
    returns, mask = row(1, 3, NAN), torch.tensor([[True, True, False]])
    close(explained_variance(row(1.5, 2.5, NAN), returns, mask), 1 - 0.25 / 1.00001)
    close(explained_variance(row(1, 3, 0), returns, mask), 1)
    close(explained_variance(row(7, 7, 0), returns, mask), 1 - 1 / 1.00001)
    close(explained_variance(row(3, 1, 0), returns, mask), 1 - 4 / 1.00001)


def test_explained_variance_of_constant_or_no_returns_is_zero() -> None:
    close(explained_variance(row(1, 2), row(5, 5), all_true(1, 2)), 0)
    close(explained_variance(row(1, 2), row(1, 2), ~all_true(1, 2)), 0)


# KL


def test_estimators_match_the_worked_example() -> None:
    close(kl_k1(OLD, REFERENCE), row(0.2, -0.1, -0.5))
    close(kl_k2(OLD, REFERENCE), row(0.02, 0.005, 0.125))
    close(kl_k3(OLD, REFERENCE), row(0.018730753, 0.005170918, 0.148721271))
    close(kl_abs(OLD, REFERENCE), row(0.2, 0.1, 0.5))


PROBABILITIES = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
REFERENCE_PROBABILITIES = torch.tensor([0.1, 0.3, 0.15, 0.25, 0.2], dtype=torch.float64)
OLD_PROBABILITIES = torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1], dtype=torch.float64)


def expected_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], sampler: Tensor) -> Tensor:
    """Gradient by the policy's logits of the expectation of a token's loss when `sampler` draws the token, exactly."""
    logits = PROBABILITIES.log().requires_grad_()
    losses = loss(logits.log_softmax(dim=-1), REFERENCE_PROBABILITIES.log(), sampler.log())
    return torch.autograd.grad((sampler * losses).sum(), logits)[0]


def gradient_of_kl(*, reverse: bool) -> Tensor:
    """By the policy's logits, in closed form: KL(policy || reference) when reverse, else KL(reference || policy)."""
    if not reverse:
        return PROBABILITIES - REFERENCE_PROBABILITIES
    log_ratio = (PROBABILITIES / REFERENCE_PROBABILITIES).log()
    return PROBABILITIES * (log_ratio - (PROBABILITIES * log_ratio).sum())


def test_estimators_k1_and_k3_are_unbiased() -> None:
    kl = (PROBABILITIES * (PROBABILITIES / REFERENCE_PROBABILITIES).log()).sum()
    for estimator in (kl_k1, kl_k3):
        close((PROBABILITIES * estimator(PROBABILITIES.log(), REFERENCE_PROBABILITIES.log())).sum(), kl)
    close(kl_exact(PROBABILITIES.log() + 3, REFERENCE_PROBABILITIES.log() - 1), kl)
    k2 = (PROBABILITIES * kl_k2(PROBABILITIES.log(), REFERENCE_PROBABILITIES.log())).sum()
    assert abs(k2 - kl) > 0.01


def test_k3_is_oriented_towards_the_policy() -> None:
    # Policy (.8, .1, .1), reference (.3, .3, .4). KL(policy || reference) = .8 ln(8/3) + .1 ln(1/3) + .1 ln(1/4).
    policy = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    kl = 0.536172737
    close((policy * kl_k3(policy.log(), reference.log())).sum(), kl)
    # The wrong way round it is sum(p p / q) - 1 - KL: 2.191666667 - 1 - .536172737.
    wrong = (policy * kl_k3(reference.log(), policy.log())).sum()
    torch.testing.assert_close(wrong.item(), 0.655493930, rtol=0, atol=1e-8)


def test_gradient_of_k1_as_a_loss_is_zero() -> None:
    close(expected_gradient(lambda new, ref, old: kl_k1(new, ref), PROBABILITIES), torch.zeros(5))


def test_gradient_of_k2_as_a_loss_is_that_of_the_kl() -> None:
    close(expected_gradient(lambda new, ref, old: kl_k2(new, ref), PROBABILITIES), gradient_of_kl(reverse=True))


def test_gradient_of_k3_as_a_loss_is_that_of_the_other_kl() -> None:
    close(expected_gradient(lambda new, ref, old: kl_k3(new, ref), PROBABILITIES), gradient_of_kl(reverse=False))


@pytest.mark.parametrize("sampler", [PROBABILITIES, OLD_PROBABILITIES], ids=["on-policy", "off-policy"])
def test_gradients_times_the_ratio_are_that_of_the_kl(sampler: Tensor) -> None:
    expected = gradient_of_kl(reverse=True)
    close(expected_gradient(lambda new, ref, old: (new - old).exp() * kl_k3(new, ref), sampler), expected)
    close(expected_gradient(lambda new, ref, old: (new - old).exp() * kl_k1(new, ref), sampler), expected)
    close(expected_gradient(lambda new, ref, old: (new - old).exp().detach() * kl_k2(new, ref), sampler), expected)


def test_gradients_off_policy_are_wrong_without_the_ratio() -> None:
    expected = gradient_of_kl(reverse=True)
    losses: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda new, ref, old: kl_k2(new, ref),
        lambda new, ref, old: kl_k3(new, ref),
        lambda new, ref, old: (new - old).exp() * kl_k2(new, ref),
    ]
    for loss in losses:
        assert (expected_gradient(loss, OLD_PROBABILITIES) - expected).abs().max() > 0.01


def test_exact_kl_of_equal_half_precision_distributions_is_zero() -> None:
    logits = torch.tensor([[0.0, -60.0, 5.0]], dtype=torch.float16)
    assert kl_exact(logits, logits).item() == 0


def test_estimators_refuse_other_shapes() -> None:
    for estimator in (kl_k1, kl_k2, kl_k3, kl_abs):
        with pytest.raises(ValueError, match=r"logprobs \(1, 3\), ref_logprobs \(3,\)"):
            estimator(OLD, REFERENCE[0])
    with pytest.raises(ValueError, match=r"logits \(1, 3\), ref_logits \(3,\)"):
        kl_exact(OLD, REFERENCE[0])


@pytest.mark.parametrize(("kl", "expected"), [(3, 0.197952), (6, 0.2), (20, 0.202048), (6.3, 0.200512)])
def test_kl_controller_moves_the_coefficient_towards_the_target(kl: float, expected: float) -> None:
    # 6.3 is off by a twentieth, inside the clip: .2 (1 + .05 512 / 10000).
    new = adaptive_kl_coef(0.2, kl, target_kl_nats_per_response=6, num_episodes=512)
    assert new == pytest.approx(expected, rel=1e-12)


def test_kl_controller_refuses_bad_input() -> None:
    good = {"target_kl_nats_per_response": 6.0, "num_episodes": 512}
    with pytest.raises(ValueError, match=r"kl \(nan\)"):
        adaptive_kl_coef(0.2, NAN, **good)
    with pytest.raises(ValueError, match=r"kl_coef \(0\)"):
        adaptive_kl_coef(0, 3.0, **good)
    with pytest.raises(ValueError, match=r"target_kl_nats_per_response \(-1\)"):
        adaptive_kl_coef(0.2, 3.0, target_kl_nats_per_response=-1, num_episodes=512)
    with pytest.raises(ValueError, match=r"num_episodes \(50000\)"):
        adaptive_kl_coef(0.2, 3.0, target_kl_nats_per_response=6.0, num_episodes=50_000)
