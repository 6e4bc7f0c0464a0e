"""Labels as token batches: what is cut and counted, which labels share a batch, which rows belong to which label."""

import itertools
import math

import pytest
import torch

from palm_rlhf_pytorch.reward.labels import (
    Course,
    check_ratings,
    encode_labels,
    label_batch,
    plan_batches,
    read_texts,
)
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.ranks import Ranks

EOS = 257


def encoded(labels, *, max_length=1000, eos_token=EOS):
    return encode_labels(labels, ByteTokenizer(), max_length=max_length, eos_token=eos_token)


def words(text):
    """A token text as prompt, response and whether an EOS ends it."""
    ids, end = text.ids.tolist(), text.prompt_length
    ended = ids[-1:] == [EOS]
    return bytes(ids[:end]).decode(), bytes(ids[end : len(ids) - ended]).decode(), ended


def mixed():
    return [
        Rating(text=Text("p", "abc"), value=3),
        Ranking(texts=(Text("q", "de"), Text("q", "f"), Text("q", "ghijk")), ranks=(1, 1, 0), weight=0.5),
        Pair(chosen=Text("r", "lm"), rejected=Text("rr", "n"), preference=0.75, margin=2.0),
        Vote(text=Text("", "o"), up=False, weight=2.0),
        Ranking(texts=(Text("s", "pq"), Text("s", "r")), ranks=(0, 1)),
        Pair(chosen=Text("t", "s"), rejected=Text("t", "tu")),
        Vote(text=Text("u", "v"), up=True),
    ]


def test_long_texts_lose_the_beginning_of_the_prompt_first():
    labels = [
        Pair(chosen=Text("0123456789", "abcd"), rejected=Text("789", "efghi")),
        Rating(text=Text("0123", "abcdefghijkl"), value=0.0),
        Rating(text=Text("abc", "left out"), value=0.0, weight=0.0),
    ]
    found = encoded(labels, max_length=9)
    assert [words(text) for text in found.flat] == [
        ("6789", "abcd", True),
        ("789", "efghi", True),
        ("", "abcdefghi", False),  # it never ended
    ]
    assert (found.cut_prompts, found.cut_responses, found.weightless, len(found.labels)) == (1, 1, 1, 2)
    assert [words(text) for text in encoded(labels[:1], max_length=9, eos_token=None).flat][0] == (
        "56789", "abcd", False,
    )  # fmt: skip
    assert max(len(text.ids) for text in found.flat) == 9


def test_what_cannot_be_learnt_from_is_refused():
    with pytest.raises(ValueError, match="1 labels, none of a weight above 0"):
        encoded([Vote(text=Text("", "a"), up=True, weight=0.0)])
    with pytest.raises(ValueError, match="line 7 is empty"):
        encoded([Vote(text=Text("a", ""), up=True, line=7)], eos_token=None)
    assert words(encoded([Vote(text=Text("a", ""), up=True)]).flat[0]) == ("a", "", True)
    with pytest.raises(ValueError, match=r"max_length \(0\)"):
        encoded(mixed(), max_length=0)
    rating = [Rating(text=Text("", "a"), value=2.5, line=4)]
    check_ratings(rating, num_bins=0, lowest=0)
    for value, lowest in ((2.5, 0), (5, 0), (0, 1)):
        with pytest.raises(ValueError, match=f"line 4 is {value}: 5 bins take whole numbers from {lowest} to"):
            check_ratings([Rating(text=Text("", "a"), value=value, line=4)], num_bins=5, lowest=lowest)


def many(count=53):
    lengths = torch.randint(1, 60, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return encoded(
        [
            Vote(text=Text("", "x" * length), up=True)
            if number % 3
            else Pair(chosen=Text("", "y" * length), rejected=Text("", "z"))
            for number, length in enumerate(lengths)
        ],
        eos_token=None,
    )


def padded(found, batch):
    texts = [len(text.ids) for number in batch for text in found.texts[number]]
    return len(texts) * max(texts)


def test_batches_hold_every_label_once_within_the_budget():
    found = many()
    generator = torch.Generator().manual_seed(1)
    first, second = (plan_batches(found, max_tokens=200, max_labels=9, generator=generator) for _ in range(2))
    for plan in (first, second, plan_batches(found, max_tokens=200, max_labels=9)):
        assert sorted(number for batch in plan for number in batch) == list(range(53))
        assert all(len(batch) <= 9 and padded(found, batch) <= 200 for batch in plan)
    again = plan_batches(found, max_tokens=200, max_labels=9, generator=torch.Generator().manual_seed(1))
    assert again == first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_labels_of_a_batch_have_similar_lengths():
    found = many()
    plan = plan_batches(found, max_tokens=240, max_labels=1000, generator=torch.Generator().manual_seed(1))
    longest = [max(len(text.ids) for text in texts) for texts in found.texts]
    spans = [(min(longest[number] for number in batch), max(longest[number] for number in batch)) for batch in plan]
    alike = 2 ** (1 / 8)
    for (low, high), (lower, higher) in itertools.combinations(spans, 2):
        assert low * alike >= higher or lower * alike >= high


def test_a_label_beyond_the_budget_is_a_batch_of_its_own():
    found = encoded([Vote(text=Text("", "x" * length), up=True) for length in (3, 50, 4)], eos_token=None)
    assert sorted(map(sorted, plan_batches(found, max_tokens=10, max_labels=9))) == [[0, 2], [1]]


def test_rows_of_a_mixed_batch_are_those_of_its_labels():
    labels = mixed()
    found = encoded(labels)
    numbers = [5, 1, 3, 0, 2, 6, 4]
    batch = label_batch(found, numbers)
    told, said = batch["labels"], [
        bytes(ids[length:][real[length:]].tolist()[:-1]).decode()
        for ids, real, length in zip(batch["seq"], batch["mask"], batch["prompt_lengths"].tolist(), strict=True)
    ]  # fmt: skip
    assert len(said) == 12 and batch["seq"].dtype == torch.int64
    assert [said[row] for row in told.pairs.chosen] == ["s", "lm"] and told.pairs.preference.tolist() == [1, 0.75]
    assert [said[row] for row in told.pairs.rejected] == ["tu", "n"] and told.pairs.margin.tolist() == [0, 2]
    assert told.rankings.mask.tolist() == [[True, True, True], [True, True, False]]
    assert [said[row] for row in told.rankings.rows[told.rankings.mask]] == ["de", "f", "ghijk", "pq", "r"]
    assert told.rankings.ranks[told.rankings.mask].tolist() == [1, 1, 0, 0, 1]
    assert told.rankings.weight.tolist() == [0.5, 1]
    assert [said[row] for row in told.ratings.rows] == ["abc"] and told.ratings.values.tolist() == [3]
    assert [said[row] for row in told.votes.rows] == ["o", "v"] and told.votes.values.tolist() == [0, 1]
    assert told.votes.weight.tolist() == [2, 1]
    alone = label_batch(found, [3])["labels"]
    assert alone.pairs is None and alone.rankings is None and alone.ratings is None


class Rank(Ranks):
    def __init__(self, rank, count):
        self.rank, self.count = rank, count


@pytest.mark.parametrize("count", [1, 3])
def test_processes_share_the_batches_evenly(count):
    found, options = many(17), {"epochs": 2, "seed": 3, "max_tokens": 150, "max_labels": 4}
    whole = Course(found, accumulate=1, ranks=Rank(0, 1), **options)
    parts = [Course(found, accumulate=2, ranks=Rank(rank, count), **options) for rank in range(count)]
    steps = math.ceil(len(whole.own) / (2 * count))
    assert {part.num_steps for part in parts} == {steps} and {len(part.own) for part in parts} == {2 * steps}
    together = [batch for own in zip(*(part.own for part in parts), strict=True) for batch in own]
    assert together == (whole.own * 2)[: 2 * steps * count]
    assert whole.mean_weight == pytest.approx(sum(len(batch) for batch in whole.own) / len(whole.own))


def test_numbers_of_texts_come_back_in_their_order():
    texts, judge, calls = many().flat, torch.nn.Linear(1, 1), []

    def read(seq, mask, *, prompt_lengths):
        assert not judge.training
        calls.append(mask.numel())
        return torch.stack([mask.sum(dim=1), seq[:, 0]])

    found = read_texts(judge, read, texts, max_tokens=100)
    assert found.tolist() == [[len(text.ids) for text in texts], [int(text.ids[0]) for text in texts]]
    assert len(calls) > 3 and max(calls) <= 100 and judge.training
