"""Several judges as one: normalised apart, weighted, kept."""

import math

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.reward.weighted import JudgeSum

NONE = {"prompt_mask": torch.zeros(4, 3, dtype=torch.bool), "mask": torch.ones(4, 3, dtype=torch.bool)}
SEQUENCES = torch.zeros(4, 3, dtype=torch.long)
WIDE, NARROW = torch.tensor([100.0, 300.0, 100.0, 300.0]), torch.tensor([0.0, 0.0, 2.0, 2.0])


def says(values):
    return lambda sequences, *, prompt_mask, mask: values


def fitted(judges, **settings):
    judge = JudgeSum(judges, **settings)
    return judge.fit(judge.parts(SEQUENCES, **NONE))


def test_sum_weighs_judges_normalised_apart():
    judge = fitted({"wide": says(WIDE), "narrow": says(NARROW)}, weights={"narrow": 3.0})
    # mean 200, deviation 100; mean 1, deviation 1
    assert judge(SEQUENCES, **NONE).tolist() == [-1 - 3, 1 - 3, -1 + 3, 1 + 3]
    assert judge.parts(SEQUENCES, **NONE)["wide"] is WIDE


@pytest.mark.parametrize(
    ("normalize", "expected"), [(False, [100, 300, 106, 306]), (["wide"], [-1, 1, 5, 7]), ([], [100, 300, 106, 306])]
)
def test_sum_leaves_scores_raw_where_asked_to(normalize, expected):
    judges = {"wide": says(WIDE), "narrow": says(NARROW)}
    judge = fitted(judges, weights={"narrow": 3.0}, normalize=normalize)
    assert judge(SEQUENCES, **NONE).tolist() == expected


def test_scales_are_of_the_first_responses_and_are_restored():
    judge, other = (JudgeSum({"wide": says(WIDE)}) for _ in range(2))
    later = {"wide": torch.tensor([500.0, math.nan])}
    lengths = torch.tensor([3, 3])
    judge.fit({"wide": torch.tensor([100.0, math.nan, 300.0])}).fit(later)
    assert judge.total(later, lengths)[0] == 3 and judge.total(later, lengths)[1].isnan()
    other.restore(judge.state())
    assert other.fit({"wide": WIDE * 7}).total(later, lengths)[0] == 3
    with pytest.raises(ValueError, match=r"state is of the judges \['narrow'\]"):
        other.restore({"narrow": {"mean": 0.0, "std": 1.0}})


def test_scales_are_never_fixed_by_the_way():
    judge = JudgeSum({"wide": says(WIDE), "narrow": says(NARROW)}, weights={"narrow": 3.0})
    with pytest.raises(ValueError, match=r"scales of \['narrow', 'wide'\] are not fixed"):
        judge(SEQUENCES, **NONE)
    assert judge.raw()(SEQUENCES, **NONE).tolist() == [100, 300, 106, 306]
    assert not judge.is_fitted and fitted(judge.judges).is_fitted


def test_scores_of_all_ranks_fix_one_scale():
    halves = WIDE[:2], WIDE[2:] + 40
    alone = JudgeSum({"a": says(WIDE)}).fit({"a": torch.cat(halves)})
    sums = [torch.stack([part.sum(), torch.tensor(2.0)]) for part in halves]
    mean = torch.cat(halves).mean()
    squares = [(part - mean).square().sum() for part in halves]
    other_rank = iter([sums[1], squares[1]])
    ranked = JudgeSum({"a": says(WIDE)}).fit({"a": halves[0]}, reduce=lambda x: x + next(other_rank))
    assert ranked.state()["a"] == pytest.approx(alone.state()["a"])


def test_scores_and_rewards_of_tokens_add_up_at_the_last_token():
    tokens = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [3.0, 0.0, 5.0]])  # sums 3 1 0 8
    judges = {"tokens": says(tokens), "whole": says(NARROW)}
    lengths = torch.tensor([2, 1, 3, 3])
    raw = JudgeSum(judges, weights={"whole": 10.0}, normalize=False)
    expected = [[1, 2, 0], [1, 0, 0], [0, 0, 20], [3, 0, 25]]
    assert raw.total(raw.parts(SEQUENCES, **NONE), lengths).tolist() == expected
    scaled = JudgeSum(judges, normalize=["tokens"])
    parts = scaled.parts(SEQUENCES, **NONE)
    found = scaled.fit(parts).total(parts, lengths)
    std = math.sqrt((0 + 4 + 9 + 25) / 4)  # around the mean of 3
    assert torch.allclose(found.sum(dim=1), torch.tensor([0.0, -2 / std, -3 / std + 2, 5 / std + 2]), atol=1e-6)
    assert found[0, 0] == pytest.approx(1 / std) and found[0, 2] == 0 and found[1, 1] == 0
    with pytest.raises(ValueError, match="without a token"):
        scaled.total(parts, torch.tensor([2, 0, 3, 3]))


def test_a_judge_without_weight_is_watched_alone():
    judge = JudgeSum({"a": says(WIDE), "b": says(torch.full((4,), math.nan))}, weights={"b": 0.0}, normalize=False)
    assert judge(SEQUENCES, **NONE).tolist() == WIDE.tolist()
    assert judge.parts(SEQUENCES, **NONE)["b"].isnan().all()


def test_modules_among_the_judges_are_reached_and_errors_name_theirs():
    class Model(nn.Module):
        def forward(self, sequences, *, prompt_mask, mask):
            raise RuntimeError("broken")

    model = Model()
    judge = JudgeSum({"fine": says(WIDE), "model": model}, normalize=False)
    assert model in list(judge.modules())
    with pytest.raises(RuntimeError) as caught:
        judge(SEQUENCES, **NONE)
    assert caught.value.__notes__ == ["raised by the judge 'model'"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judges": {}}, "at least one of them not 0"),
        ({"judges": {"a": len}, "weights": {"b": 1.0}}, r"name \['b'\]"),
        ({"judges": {"a": len}, "normalize": ["c"]}, r"name \['c'\]"),
        ({"judges": {"a": len}, "normalize": "a"}, "is a str"),
        ({"judges": {"a": len}, "weights": {"a": math.inf}}, "finite"),
        ({"judges": {"score": len}}, "another metric"),
    ],
)
def test_a_sum_that_means_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        JudgeSum(**arguments)
