"""Masked statistics and ragged batches: by hand."""

import math

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.tensors import (
    RunningMoments,
    lengths_to_mask,
    masked_mean,
    masked_moments,
    masked_whiten,
    pad_ragged,
    split_rows,
)

NAN = float("nan")


def test_masked_mean_counts_true_elements_only() -> None:
    x = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    torch.testing.assert_close(masked_mean(x, mask), torch.tensor(7 / 3))
    torch.testing.assert_close(masked_mean(x, mask, dim=1), torch.tensor([1.5, 4.0]))
    torch.testing.assert_close(masked_mean(x, mask, dim=0), torch.tensor([2.5, 2.0, 0.0]))


def test_masked_mean_pools_features_over_positions() -> None:
    x = torch.tensor([[[1.0, 10.0], [3.0, 30.0], [NAN, NAN]], [[NAN, NAN]] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    torch.testing.assert_close(masked_mean(x, mask, dim=1), torch.tensor([[2.0, 20.0], [0.0, 0.0]]))


def test_masked_mean_of_nothing_is_zero_with_zero_gradient() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    mean = masked_mean(x, torch.zeros(2, 3, dtype=torch.bool))
    mean.backward()
    assert mean.item() == 0 and x.grad is not None and x.grad.eq(0).all()


def test_masked_statistics_refuse_other_shapes_and_dtypes() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
        masked_mean(x, torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        masked_whiten(x, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="torch.bool"):
        masked_mean(x, torch.ones(2, 3))


def test_moments_are_of_the_population() -> None:
    moments = masked_moments(torch.tensor([1.0, 2.0, 6.0, NAN]), torch.tensor([True, True, True, False]))
    # Mean 3, squared deviations 4 + 1 + 9 = 14.
    torch.testing.assert_close(tuple(moments), (torch.tensor(3.0), torch.tensor(3.0), torch.tensor(14 / 3)))


def test_moments_of_a_large_mean_keep_the_variance() -> None:
    x = 10_000 + torch.tensor([-0.5, 0.5, -0.5, 0.5])
    torch.testing.assert_close(masked_moments(x, torch.ones(4, dtype=torch.bool)).var, torch.tensor(0.25))


def test_moments_of_nothing_are_zero() -> None:
    moments = masked_moments(torch.tensor([NAN, 1.0]), torch.tensor([False, False]))
    assert [moment.item() for moment in moments] == [0, 0, 0]


def test_moments_of_half_precision_are_taken_in_float32() -> None:
    moments = masked_moments(torch.full((3_000,), 1.5, dtype=torch.bfloat16), torch.ones(3_000, dtype=torch.bool))
    assert [moment.item() for moment in moments] == [3_000, 1.5, 0]


@pytest.mark.parametrize(("mean", "deviation"), [(0.25, 3.0), (1e9, 1.0), (-1e-9, 1e-12)])
def test_running_moments_are_those_of_all_parts_together(mean: float, deviation: float) -> None:
    numbers = mean + deviation * np.random.default_rng(0).standard_normal(1_000)
    masks = np.random.default_rng(1).random(1_000) < 0.7
    running = RunningMoments()
    for part, counted in zip(np.split(numbers, [1, 4, 700]), np.split(masks, [1, 4, 700]), strict=True):
        running.add(torch.from_numpy(np.where(counted, part, NAN))[:, None], torch.from_numpy(counted)[:, None])
        running.add(torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool))
    found, kept = running.compute(), numbers[masks]
    assert found.count.item() == len(kept) and {moment.dtype for moment in found} == {torch.float64}
    assert found.mean.item() == pytest.approx(kept.mean(), rel=1e-12)
    assert found.var.item() == pytest.approx(kept.var(), rel=1e-6)


def test_running_moments_by_hand_over_ranks_and_of_nothing() -> None:
    running = RunningMoments()
    assert [moment.item() for moment in running.compute()] == [0, 0, 0]
    running.add(torch.tensor([1.0, 2.0, NAN]), torch.tensor([True, True, False]))
    # The other rank holds 3 and 6: sum 9, count 2; about the common mean 3 their squared deviations sum to 9.
    others = iter([torch.tensor([9.0, 2.0]), torch.tensor(9.0)])
    found = running.compute(lambda total: total + next(others))
    assert [moment.item() for moment in found] == [4, 3, 3.5]
    with pytest.raises(ValueError, match="shapes"):
        running.add(torch.zeros(2), torch.ones(3, dtype=torch.bool))


def test_whitening_is_global_over_ranks() -> None:
    # The other rank holds 3 and 6: sum 9, count 2; about the common mean 3 their squared deviations sum to 9.
    others = iter([torch.tensor([9.0, 2.0]), torch.tensor(9.0)])
    whitened = masked_whiten(
        torch.tensor([1.0, 2.0]), torch.tensor([True, True]), reduce=lambda total: total + next(others)
    )
    torch.testing.assert_close(whitened, torch.tensor([-2.0, -1.0]) / math.sqrt(3.5))


def test_whitened_advantages_match_the_worked_example() -> None:
    advantages = torch.tensor([0.6683125, 0.60875, 0.425, NAN], dtype=torch.float64)
    whitened = masked_whiten(advantages, torch.tensor([True, True, True, False]))
    expected = torch.tensor([0.974924383, 0.399747162, -1.374671545, 0.0], dtype=torch.float64)
    torch.testing.assert_close(whitened, expected, rtol=0, atol=1e-9)
    # Not the Bessel-corrected (.796022549, .326392242, -1.122414791).
    assert abs(whitened[0].item() - 0.796022549) > 0.1


def test_whitening_can_keep_the_mean() -> None:
    whitened = masked_whiten(torch.tensor([1.0, 2.0, 6.0]), torch.ones(3, dtype=torch.bool), shift_mean=False)
    torch.testing.assert_close(whitened, 3 + torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(14 / 3))


@pytest.mark.parametrize("x", [[3.7, 1.0], [5.0, 5.0]])
def test_whitening_of_equal_values_is_zero(x: list[float]) -> None:
    mask = torch.tensor([True, x[0] == x[1]])
    assert masked_whiten(torch.tensor(x), mask).tolist() == [0, 0]


def test_whitening_once_keeps_a_minibatch_of_one_alive() -> None:
    x = torch.tensor([[1.0], [2.0], [6.0]])
    whitened = masked_whiten(x, torch.ones(3, 1, dtype=torch.bool))
    assert all(row.abs().item() > 0.4 for row in whitened)


@pytest.mark.parametrize("left", [False, True])
def test_ragged_sequences_are_padded_where_asked(left: bool) -> None:
    padded, mask = pad_ragged([torch.tensor([5, 0, 6]), torch.tensor([7]), torch.tensor([0, 0])], left=left)
    if left:
        assert padded.tolist() == [[5, 0, 6], [0, 0, 7], [0, 0, 0]]
        assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    else:
        assert padded.tolist() == [[5, 0, 6], [7, 0, 0], [0, 0, 0]]
        assert mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


def test_ragged_sequences_come_back_from_their_mask() -> None:
    sequences = [torch.arange(length, dtype=torch.float32) for length in (4, 1, 0, 3)]
    padded, mask = pad_ragged(sequences, pad_value=-1, left=True)
    assert padded.dtype == torch.float32 and padded[~mask].eq(-1).all()
    for row, sequence in enumerate(sequences):
        assert torch.equal(padded[row][mask[row]], sequence)


def test_ragged_sequences_refuse_bad_input() -> None:
    with pytest.raises(ValueError, match="empty"):
        pad_ragged([])
    with pytest.raises(ValueError, match=r"sequences\[1\].*\(1, 2\)"):
        pad_ragged([torch.tensor([1]), torch.tensor([[1, 2]])])
    with pytest.raises(TypeError, match=r"sequences\[1\].*float32"):
        pad_ragged([torch.tensor([1]), torch.tensor([1.0])])


def test_lengths_become_leading_places() -> None:
    mask = lengths_to_mask(torch.tensor([2, 0, 3]), 3)
    assert mask.tolist() == [[True, True, False], [False, False, False], [True, True, True]]


def test_lengths_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 4\].*3"):
        lengths_to_mask(torch.tensor([2, 4]), 3)
    with pytest.raises(ValueError, match="-1"):
        lengths_to_mask(torch.tensor([-1]), 3)
    with pytest.raises(ValueError, match=r"\(1, 1\)"):
        lengths_to_mask(torch.tensor([[1]]), 3)
    with pytest.raises(TypeError, match="float32"):
        lengths_to_mask(torch.tensor([1.0]), 3)


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = [3, 9, 4, 1, 8, 4]
    assert split_rows(lengths, max_rows=2) == [[1, 4], [2, 5], [0, 3]]
    assert split_rows(lengths, max_rows=6, max_tokens=13) == [[1], [4], [0, 2, 5], [3]]
    assert split_rows(lengths, max_rows=6, max_tokens=1) == [[1], [4], [2], [5], [0], [3]]  # alone, a row always fits
    assert split_rows(lengths, max_rows=6) == [[0, 1, 2, 3, 4, 5]]
    assert split_rows([], max_rows=3) == []
