"""What top-k and top-p leave of a distribution."""

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.truncation import LIKELIEST, Truncation, truncate

# mass 0.4, 0.3, 0.15, 0.1, 0.05
FIVE = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()


def kept(logits: Tensor, **cut: float) -> list[int]:
    return truncate(logits, **cut).isfinite().nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.05, [1]), (0.4, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.8, [1, 3, 4]), (0.9, [0, 1, 3, 4]), (1.0, range(5))],
)
def test_top_p_keeps_the_smallest_set_that_reaches_its_mass(top_p, expected):
    assert kept(FIVE, top_p=top_p) == list(expected)


def test_top_p_keeps_nine_tenths_of_a_long_tail():
    logits = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)) * 2
    mass = logits.softmax(dim=-1)
    cut = truncate(logits, top_p=0.9).isfinite()
    for row in range(3):
        total = float(mass[row][cut[row]].sum())
        assert 0.9 <= total < 0.9 + float(mass[row][cut[row]].min())
        assert mass[row][cut[row]].min() > mass[row][~cut[row]].max()


@pytest.mark.parametrize(("top_k", "expected"), [(1, [1]), (3, [1, 3, 4]), (5, range(5)), (9, range(5))])
def test_top_k_counts_tokens(top_k, expected):
    assert kept(FIVE, top_k=top_k) == list(expected)


def test_top_k_keeps_k_of_equal_logits():
    assert len(kept(torch.zeros(6), top_k=4)) == 4


def test_top_p_is_taken_of_what_top_k_left():
    # of 0.4, 0.3 and 0.15 the first two hold 0.82
    assert kept(FIVE, top_k=3, top_p=0.82) == [1, 3]
    assert kept(FIVE, top_k=3, top_p=0.83) == [1, 3, 4]


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_k": 9}, {"top_p": 1.0}, {"top_k": 7, "top_p": 1.0}])
def test_cut_that_leaves_all_is_none(cut):
    assert Truncation(**cut).kept(FIVE) is None and truncate(FIVE, **cut) is FIVE


@pytest.mark.parametrize("top_k", [None, 600])
def test_nucleus_of_a_large_vocabulary_is_that_of_one_token_after_the_other(top_k):
    generator = torch.Generator().manual_seed(0)
    size = LIKELIEST + 188
    spread = torch.tensor([0.1, 3.0, 0.0, 8.0, 1.0])[:, None]  # nuclei of more than LIKELIEST tokens, and of few
    logits = torch.randn(5, size, generator=generator) * spread
    found = Truncation(top_k, 0.93).kept(logits)
    counts = found.sum(dim=-1)
    assert counts.min() < 10 and counts.max() > LIKELIEST
    for row in range(5):
        order = logits[row].double().sort(descending=True, stable=True).values[:top_k]
        mass, count = 0.0, 0
        while mass < 0.93:
            mass += float(order[count].exp() / order.exp().sum())
            count += 1
        # where all are alike a sum of hundreds of float32 numbers may end a token earlier or later
        assert abs(int(counts[row]) - count) <= (row == 2)
        assert logits[row][found[row]].min() >= logits[row][~found[row]].max()


@pytest.mark.parametrize(
    ("cut", "error"),
    [
        ({"top_k": 0}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": 1.5}, ValueError),
        ({"top_k": 0.9}, TypeError),
    ],
)
def test_cut_that_leaves_no_distribution_is_refused(cut, error):
    ((name, value),) = cut.items()
    with pytest.raises(error, match=rf"{name} \({value}\)"):
        Truncation(**cut).check()
