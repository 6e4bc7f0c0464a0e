"""Bradley-Terry: hand-made scores, margins, soft labels."""

import math

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.preference import bradley_terry_loss


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
