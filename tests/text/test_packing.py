"""Packing: rows that hold all examples, and batches in which a token counts the same."""

import random

import pytest
import torch

from palm_rlhf_pytorch.text.packing import PackedBatches, count_targets, first_fit_decreasing, pack


def example(length, targets):
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(targets)] = True
    return torch.arange(length) + 10 * length, mask


def test_first_fit_decreasing_by_hand():
    # 7 | 6 4 | 5 3 2 of 10: 7, then 6, 5 (own), 4 (with 6), 3 (with 7), 2 (with 5)
    assert first_fit_decreasing([4, 7, 2, 5, 6, 3], capacity=10) == [[1, 5], [4, 0], [3, 2]]


def test_first_fit_decreasing_agrees_with_a_plain_search():
    chance = random.Random(0)
    for count in (1, 2, 57):
        sizes = [chance.randint(1, 23) for _ in range(count)]
        bins, room = [], []
        for item in sorted(range(count), key=lambda item: (-sizes[item], item)):
            place = next((at for at, left in enumerate(room) if left >= sizes[item]), len(bins))
            if place == len(bins):
                bins.append([])
                room.append(23)
            bins[place].append(item)
            room[place] -= sizes[item]
        assert first_fit_decreasing(sizes, capacity=23) == bins


def test_what_is_too_long_is_cut_and_what_has_no_target_is_dropped_and_counted():
    examples = [example(9, [2, 7, 8]), example(4, [0]), example(8, [6, 7]), example(3, [2]), example(0, [])]
    packed = pack(examples, length=6)
    assert (packed.cut, packed.cut_tokens, packed.dropped) == (2, 5, 3)  # 9 - 6 and 8 - 6 tokens
    assert [len(ids) for ids, _ in packed.examples] == [6, 3] and packed.num_targets == 2
    with pytest.raises(ValueError, match="none of 1 examples"):
        pack(examples[2:3], length=6)


def test_batches_hold_each_example_once_with_its_marks():
    packed = pack([example(3, [1, 2]), example(5, [4]), example(2, [1]), example(6, [3, 5])], length=8)
    assert packed.rows == [[3, 2], [1, 0]]
    (batch,) = PackedBatches(packed, batch_size=2)
    rows = {tuple(row.tolist()): at for at, row in enumerate(batch["begins"].nonzero().reshape(2, 2, 2)[..., 1])}
    first = rows[0, 6]  # the row of examples 3 and 2
    assert batch["seq"][first].tolist() == [*range(60, 66), 20, 21]
    assert batch["targets"][first].nonzero().flatten().tolist() == [3, 5, 7]
    assert batch["mask"].all() and int(count_targets(batch)) == 6 and batch["weight"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_epochs_see_every_row_in_another_order_and_weights_average_to_one(ranks):
    packed = pack([example(4 + at % 3, range(1, 2 + at % 3)) for at in range(22)], length=6, several=False)
    runs = [
        list(PackedBatches(packed, batch_size=2, epochs=2, seed=5, rank=rank, ranks=ranks)) for rank in range(ranks)
    ]
    steps = len(runs[0]) // 2
    assert steps == (11 if ranks == 1 else 6)  # 11 batches; the first once more where they do not come out even
    epochs = [[runs[step % ranks][epoch * steps + step // ranks] for step in range(11)] for epoch in range(2)]
    for batches in epochs:
        assert sum(batch["weight"] for batch in batches) / 11 == pytest.approx(1)
        assert sum(int(count_targets(batch)) for batch in batches) == packed.num_targets
        assert "begins" not in batches[0]
    assert [batch["seq"].tolist() for batch in epochs[0]] != [batch["seq"].tolist() for batch in epochs[1]]
