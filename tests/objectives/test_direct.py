"""DPO and its kin, and KTO: worked examples, soft labels, lengths, and what is refused."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.direct import (
    PairLogprobs,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_baseline,
    kto_loss,
    length_normalised_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
    with_nll,
)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def example(**changes: Tensor | None) -> PairLogprobs:
    """The worked pair: D = (-10 + 12) - (-14 + 15) = 1, of 5 and 4 tokens."""
    sums = [numbers(value) for value in (-10, -14, -12, -15)]
    return PairLogprobs(*sums, torch.tensor([5]), torch.tensor([4]))._replace(**changes)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dpo_loss, 0.6443966601),
        (partial(dpo_loss, label_smoothing=0.1), 0.6543966601),
        (partial(robust_dpo_loss, flip_rate=0.1), 0.6318966601),
        (hinge_loss, 0.9),
        (partial(ipo_loss, per_token=False), 16.0),
        (ipo_loss, 23.5225),
        (lambda pairs: dpo_loss(pairs.without_reference()), 0.5130152524),
        (simpo_loss, 0.1269280110),
        # D of the means is 2/5 - 1/4 = .15, times 5
        (length_normalised_dpo_loss, math.log(1 + math.exp(-0.75))),
        # the chosen response has -10/5 nats a token
        (partial(with_nll, coef=0.3), 0.6443966601 + 0.3 * 2),
    ],
)
def test_losses_match_the_worked_example(loss, expected) -> None:
    assert loss(example()).loss.item() == pytest.approx(expected, abs=1e-9)


def test_rewards_are_beta_times_the_log_ratios() -> None:
    found = dpo_loss(example(), beta=0.25)
    assert (found.reward_chosen.item(), found.reward_rejected.item(), found.margin.item()) == (0.5, 0.25, 0.25)
    assert found.accuracy.item() == 1
    means = ipo_loss(example(), beta=0.25)
    assert (means.reward_chosen.item(), means.reward_rejected.item()) == pytest.approx((0.1, 0.0625))


def three_pairs(**changes: Tensor) -> PairLogprobs:
    """Pairs whose D is 1, -2 and 0."""
    zeros, lengths = numbers(0, 0, 0), torch.tensor([3, 1, 2])
    return PairLogprobs(numbers(1, -1, -3), numbers(0, 1, -3), zeros, zeros, lengths, lengths)._replace(**changes)


def test_accuracy_is_the_chance_to_agree_with_a_labeller() -> None:
    # right, wrong, and equal rewards, which count half; then labels that a labeller follows as a probability
    assert dpo_loss(three_pairs()).accuracy.item() == pytest.approx((1 + 0 + 0.5) / 3)
    found = dpo_loss(three_pairs(label=numbers(0.75, 0.75, 0.0)))
    assert found.accuracy.item() == pytest.approx((0.75 + 0.25 + 0.5) / 3)


@pytest.mark.parametrize(
    "loss", [dpo_loss, robust_dpo_loss, ipo_loss, hinge_loss, length_normalised_dpo_loss, simpo_loss, with_nll]
)
def test_a_soft_label_is_the_mean_over_both_orders_and_weights_are_factors(loss) -> None:
    label, weight = numbers(0.2, 0.5, 1.0), numbers(3.0, 0.0, 0.5)
    pairs = three_pairs()
    swapped = PairLogprobs(pairs[1], pairs[0], pairs[3], pairs[2], pairs[5], pairs[4])
    one_by_one = [
        [float(loss(PairLogprobs(*(part[row : row + 1] for part in order[:6]))).loss) for row in range(3)]
        for order in (pairs, swapped)
    ]
    expected = [p * one + (1 - p) * other for p, one, other in zip(label.tolist(), *one_by_one, strict=True)]
    soft = loss(pairs._replace(label=label)).loss.item()
    assert soft == pytest.approx(sum(expected) / 3, abs=1e-9)
    weighted = loss(pairs._replace(label=label, weight=weight)).loss.item()
    assert weighted == pytest.approx((3 * expected[0] + 0.5 * expected[2]) / 3, abs=1e-9)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [(dpo_loss, 1.0), (partial(ipo_loss, per_token=False), None), (partial(dpo_loss, label_smoothing=0.2), 0.6)],
    ids=["dpo", "ipo", "cdpo"],
)
def test_losses_are_least_where_their_theory_says(loss, scale) -> None:
    p, beta = 0.7, 0.5
    # logit(p) for DPO, of the smoothed label for cDPO; p - 1/2 for IPO
    smoothed = None if scale is None else 0.5 + scale * (p - 0.5)
    best = (p - 0.5 if smoothed is None else math.log(smoothed / (1 - smoothed))) / beta
    chosen = numbers(best).requires_grad_()
    pairs = example(chosen=chosen, rejected=numbers(0), ref_chosen=numbers(0), ref_rejected=numbers(0))
    loss(pairs._replace(label=numbers(p)), beta=beta).loss.backward()
    assert chosen.grad is not None and abs(chosen.grad.item()) < 1e-9


def test_robust_loss_averaged_over_flips_is_that_of_the_true_labels() -> None:
    rate = 0.3
    flipped = {label: robust_dpo_loss(example(label=numbers(label)), flip_rate=rate).loss.item() for label in (0, 1)}
    assert (1 - rate) * flipped[1] + rate * flipped[0] == pytest.approx(dpo_loss(example()).loss.item(), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"label": numbers(1.5)}, {}, r"label \(\[1.5\]\) must lie between 0 and 1"),
        ({"label": numbers(math.nan)}, {}, "label"),
        ({"weight": numbers(-1.0)}, {}, "weight"),
        ({"chosen": numbers(1, 2)}, {}, r"shapes must be the same: chosen \(2,\)"),
        ({"rejected_lengths": torch.tensor([0])}, {}, "at least 1"),
        ({}, {"beta": 0.0}, r"beta \(0.0\) must be above 0"),
        ({}, {"label_smoothing": 0.5}, r"flipped labels \(0.5\)"),
    ],
)
def test_what_means_nothing_is_refused(changes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(example(**changes), **options)


def test_a_margin_of_simpo_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma \(nan\)"):
        simpo_loss(example(), gamma=math.nan)


def test_no_pair_is_refused() -> None:
    nothing = PairLogprobs(*[numbers()] * 4, *[torch.zeros(0, dtype=torch.long)] * 2)
    with pytest.raises(ValueError, match="at least one pair"):
        dpo_loss(nothing)


def test_kto_matches_the_worked_example() -> None:
    zeros, baseline = numbers(0), torch.tensor(0.5)
    for ratio, up in ((2.0, True), (-1.0, False)):
        found = kto_loss(numbers(ratio), zeros, torch.tensor([up]), baseline=baseline)
        assert found.loss.item() == pytest.approx(0.4625701547, abs=1e-9)
        assert found.accuracy.item() == 1
    both = kto_loss(
        numbers(2, -1, 2), numbers(0, 0, 0), torch.tensor([True, False, True]), baseline=baseline, up_weight=2.0,
        down_weight=3.0, weight=numbers(1, 1, 0.5),
    )  # fmt: skip
    assert both.loss.item() == pytest.approx(0.4625701547 * (2 + 3 + 1) / 3, abs=1e-9)
    assert (both.reward_up.item(), both.reward_down.item()) == pytest.approx((0.2, -0.1))


def test_kto_baseline_is_the_mean_of_all_ranks_above_zero_and_has_no_gradient() -> None:
    ratios = numbers(1.0, -0.5, 1.3).requires_grad_()
    assert kto_baseline(ratios).item() == pytest.approx(0.6)
    assert kto_baseline(ratios, reduce=lambda x: x + numbers(-9.0, 2)).item() == 0  # another rank has two, of sum -9
    assert kto_baseline(ratios, reduce=lambda x: x + numbers(3.2, 2)).item() == pytest.approx(1.0)
    assert not kto_baseline(ratios).requires_grad
    assert kto_baseline(numbers()).item() == 0


def test_kto_pushes_votes_up_and_down_apart() -> None:
    logprobs = numbers(0, 0).requires_grad_()
    kto_loss(logprobs, numbers(0, 0), torch.tensor([True, False]), baseline=torch.tensor(0.0)).loss.backward()
    # at the baseline sigma' is 1/4: beta / 4, over two votes
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-0.0125, 0.0125])
    with pytest.raises(TypeError, match="up is torch.int64"):
        kto_loss(logprobs, numbers(0, 0), torch.tensor([1, 0]), baseline=torch.tensor(0.0))
