"""Losses of labels: hand-made scores; a weight counts like a repetition, padding like nothing."""

import math

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.preference import (
    bins_loss,
    bradley_terry_loss,
    choice_loss,
    ranking_loss,
    scalar_loss,
    vote_loss,
)


def scores(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_bradley_terry_matches_the_worked_example() -> None:
    result = bradley_terry_loss(scores(1.5), scores(0.5))
    assert result.loss.item() == pytest.approx(0.3132616875, abs=1e-10)
    assert (result.accuracy.item(), result.mean_margin.item()) == (1, 1)


@pytest.mark.parametrize("margin", [0.5, scores(0.5)])
def test_margin_matches_the_worked_example(margin: Tensor | float) -> None:
    result = bradley_terry_loss(scores(1.5), scores(0.5), margin=margin)
    assert result.loss.item() == pytest.approx(0.4740769842, abs=1e-10)
    assert result.mean_margin.item() == 1


def test_centering_matches_the_worked_example() -> None:
    result = bradley_terry_loss(scores(1.5), scores(0.5), centering=0.01)
    assert result.loss.item() == pytest.approx(0.3532616875, abs=1e-10)


def test_loss_is_the_mean_over_pairs() -> None:
    result = bradley_terry_loss(scores(1.5, 0.5, 2.0), scores(0.5, 1.5, 2.0))
    # Gaps 1, -1, 0: ln(1 + e^-1), 1 + ln(1 + e^-1), ln 2.
    assert result.loss.item() == pytest.approx((0.3132616875 + 1.3132616875 + math.log(2)) / 3, abs=1e-10)
    # Right, wrong, and a tie that counts a half.
    assert result.accuracy.item() == pytest.approx(0.5)
    assert result.mean_margin.item() == 0


def test_soft_labels_weigh_both_orders() -> None:
    result = bradley_terry_loss(scores(1.5, 1.5), scores(0.5, 0.5), label=scores(0.75, 0.0))
    expected = (0.75 * 0.3132616875 + 0.25 * 1.3132616875 + 1.3132616875) / 2
    assert result.loss.item() == pytest.approx(expected, abs=1e-10)
    assert result.accuracy.item() == pytest.approx(0.375)


def test_a_tie_pulls_the_scores_together() -> None:
    chosen, rejected = scores(1.5).requires_grad_(), scores(0.5).requires_grad_()
    bradley_terry_loss(chosen, rejected, label=scores(0.5)).loss.backward()
    # sigma(1) - 1/2
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(0.2310585786, abs=1e-10)
    assert rejected.grad.item() == pytest.approx(-0.2310585786, abs=1e-10)


def test_large_gaps_stay_finite_with_gradient() -> None:
    chosen = torch.tensor([-2_000.0, 2_000.0], requires_grad=True)
    result = bradley_terry_loss(chosen, torch.zeros(2))
    result.loss.backward()
    assert result.loss.item() == 1_000
    assert chosen.grad is not None and chosen.grad.tolist() == [-0.5, 0]


def test_loss_of_half_precision_scores_is_float32() -> None:
    assert bradley_terry_loss(torch.ones(3).bfloat16(), torch.zeros(3).bfloat16()).loss.dtype == torch.float32


def test_bad_input_is_refused() -> None:
    pair = (torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"chosen \(2,\), rejected \(3,\)"):
        bradley_terry_loss(torch.ones(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin \(2, 1\)"):
        bradley_terry_loss(*pair, margin=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"label \(1,\)"):
        bradley_terry_loss(*pair, label=torch.ones(1))
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        bradley_terry_loss(torch.ones(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"\(0,\)"):
        bradley_terry_loss(torch.ones(0), torch.zeros(0))
    with pytest.raises(ValueError, match=r"label \(\[0.0, 1.5\]\)"):
        bradley_terry_loss(*pair, label=torch.tensor([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"centering \(-1\)"):
        bradley_terry_loss(*pair, centering=-1)


# rankings


def test_ranking_averages_all_its_pairs_and_pulls_scores_to_zero() -> None:
    result = ranking_loss(scores(0.0, 2.0, 1.0)[None], torch.tensor([[2, 0, 1]]), shrink=0.001)
    # Gaps 2, 1, 1: ln(1 + e^-2), twice ln(1 + e^-1); squares 4 + 0, 4 + 1, 1 + 0.
    expected = (0.1269280110 + 2 * 0.3132616875) / 3 + 0.001 * 0.5 * (4 + 5 + 1) / 3
    assert result.loss.item() == pytest.approx(expected, abs=1e-9)
    assert result.accuracy.item() == 1


def test_rankings_of_unequal_length_count_alike_and_ties_pull_together() -> None:
    numbers = torch.stack([scores(0.0, 2.0, 1.0), scores(0.5, 1.5, math.nan)]).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    result = ranking_loss(numbers, torch.tensor([[2, 0, 1], [4, 4, 0]]), mask=mask, shrink=0.0)
    first, second = (0.1269280110 + 2 * 0.3132616875) / 3, (0.3132616875 + 1.3132616875) / 2
    assert result.loss.item() == pytest.approx((first + second) / 2, abs=1e-9)
    assert result.accuracy.item() == pytest.approx((1 + 0.5) / 2)
    result.loss.backward()
    # Of a tie at gap 1, half of (sigma(1) - 1/2); the padding gets nothing.
    assert numbers.grad is not None
    assert numbers.grad[1].tolist() == pytest.approx([-0.2310585786 / 2, 0.2310585786 / 2, 0], abs=1e-9)


def test_choice_is_the_cross_entropy_of_the_best() -> None:
    logits = torch.stack([scores(1.0, 2.0, 3.0, math.nan), scores(1.0, 1.0, 1.0, 5.0)]).log()
    mask = torch.tensor([[True, True, True, False], [True, True, True, True]])
    one = choice_loss(logits[:1], torch.tensor([[3, 1, 2, 0]]), mask=mask[:1])
    assert one.loss.item() == pytest.approx(-math.log(2 / 6)) and one.accuracy.item() == 0
    both = choice_loss(logits, torch.tensor([[3, 1, 2, 0], [1, 0, 1, 0]]), mask=mask)
    shared = -(math.log(1 / 8) + math.log(5 / 8)) / 2  # two best of four
    assert both.loss.item() == pytest.approx((-math.log(2 / 6) + shared) / 2) and both.accuracy.item() == 0.5


# ratings and votes


def test_ratings_match_the_worked_examples() -> None:
    found = bins_loss(torch.stack([scores(0.2, 0.5, 0.3).log(), scores(0.1, 0.1, 0.8).log()]), torch.tensor([2, 2]))
    assert found.loss.item() == pytest.approx(-(math.log(0.3) + math.log(0.8)) / 2) and found.accuracy.item() == 0.5
    squared = scalar_loss(scores(1.0, -2.0), scores(0.0, 1.0))
    assert (squared.loss.item(), squared.error.item()) == ((1 + 9) / 2, (1 + 3) / 2)


def test_votes_match_the_worked_example() -> None:
    votes = vote_loss(scores(3.0, 3.0, 2.0), torch.tensor([True, False, True]), middle=2.0)
    assert votes.loss.item() == pytest.approx((0.3132616875 + 1.3132616875 + math.log(2)) / 3, abs=1e-9)
    assert votes.accuracy.item() == pytest.approx((1 + 0 + 0.5) / 3)


LOSSES = {
    "pairs": lambda x, rows, weight: bradley_terry_loss(
        x[rows, 0], x[rows, 1], label=torch.tensor([0.9, 0.5, 1.0])[rows], weight=weight, centering=0.1
    ),
    "rankings": lambda x, rows, weight: ranking_loss(x[rows], x.sort(dim=1).indices[rows], weight=weight),
    "choices": lambda x, rows, weight: choice_loss(x[rows], x.sort(dim=1).indices[rows], weight=weight),
    "bins": lambda x, rows, weight: bins_loss(x[rows], torch.tensor([3, 0, 1])[rows], weight=weight),
    "scalars": lambda x, rows, weight: scalar_loss(x[rows, 0], x[rows, 1], weight=weight),
    "votes": lambda x, rows, weight: vote_loss(x[rows, 0], x[rows, 1] > 0, weight=weight),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_weight_counts_like_a_repetition(kind: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = LOSSES[kind]
    repeated = loss(x, [0, 0, 0, 2, 2], None)
    weighted = loss(x, [0, 1, 2], torch.tensor([1.5, 0.0, 1.0]))
    torch.testing.assert_close(tuple(weighted), tuple(repeated))
    assert not torch.isclose(weighted.loss, loss(x, [0, 1, 2], None).loss)
    for weight in (torch.zeros(3), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, math.nan, 1.0])):
        with pytest.raises(ValueError, match="weight"):
            loss(x, [0, 1, 2], weight)


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_keep_their_digits_under_autocast(kind: str) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = LOSSES[kind](x, [0, 1, 2], torch.tensor([1.5, 0.5, 1.0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[kind](x, [0, 1, 2], torch.tensor([1.5, 0.5, 1.0]))
    assert torch.equal(torch.stack(found), torch.stack(expected)) and found.loss.dtype == torch.float32


def test_bad_labels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ranks \(2, 4\)"):
        ranking_loss(torch.ones(2, 3), torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[1\] responses"):
        choice_loss(torch.ones(1, 2), torch.tensor([[0, 1]]), mask=torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match=r"shrink \(-1\)"):
        ranking_loss(torch.ones(1, 2), torch.tensor([[0, 1]]), shrink=-1)
    with pytest.raises(ValueError, match=r"bins \(3,\)"):
        bins_loss(torch.ones(2, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"values \(3,\)"):
        scalar_loss(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(0,\)"):
        vote_loss(torch.ones(0), torch.ones(0, dtype=torch.bool))
