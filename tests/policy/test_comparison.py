"""Win rates and differences with their intervals, and judges that see two responses."""

import math

import pytest
import torch

from palm_rlhf_pytorch.policy.comparison import (
    contest_of,
    distinct_shares,
    mean_estimate,
    pair_contest,
    student_quantile,
    swapped_preferences,
    win_rate,
)

NAN, INF = float("nan"), float("inf")


def own_prompts(count):
    return torch.arange(count)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        # (7 + z^2 / 2) / (10 + z^2) -+ z sqrt(7 * 3 / 10 + z^2 / 4) / (10 + z^2), z^2 = 3.8415
        ([1.0] * 7 + [0.0] * 3, (0.7, 0.39677, 0.89221)),
        ([0.0] * 4, (0.0, 0.0, 0.48989)),  # z^2 / (4 + z^2)
        ([1.0] * 4, (1.0, 0.51011, 1.0)),
        # a tie of two: the variance is half of p (1 - p), so that 4 prompts are worth 8:
        # (4 + z^2 / 2) / (8 + z^2) -+ z sqrt(4 * 4 / 8 + z^2 / 4) / (8 + z^2)
        ([0.5, 1.0, 0.5, 0.0], (0.5, 0.21521, 0.78479)),
    ],
)
def test_win_rate_of_one_response_a_prompt_has_wilsons_interval(outcomes, expected):
    found = win_rate(torch.tensor(outcomes), own_prompts(len(outcomes)))
    assert found == pytest.approx(expected, abs=2e-5)


def test_win_rate_counts_copies_of_a_response_once():
    outcomes = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0])
    once = win_rate(outcomes, own_prompts(7))
    copies = win_rate(outcomes.repeat_interleave(5), own_prompts(7).repeat_interleave(5))
    taken_apart = win_rate(outcomes.repeat_interleave(5), own_prompts(35))
    assert copies.value == once.value == pytest.approx(4.5 / 7)
    assert copies.low < once.low < taken_apart.low and copies.high > once.high > taken_apart.high


def test_win_rate_interval_holds_what_it_promises_where_responses_to_a_prompt_are_alike():
    generator = torch.Generator().manual_seed(3)
    prompts = torch.arange(15).repeat_interleave(4)
    hits = 0
    for _ in range(250):
        likely = torch.where(torch.rand(15, generator=generator) < 0.5, 0.95, 0.25)  # of prompts: 0.6 in the mean
        outcomes = (torch.rand(60, generator=generator) < likely.repeat_interleave(4)).double()
        found = win_rate(outcomes, prompts)
        hits += found.low <= 0.6 <= found.high
    assert 0.92 <= hits / 250 <= 0.99  # of 60 responses taken apart it would be about 0.77


def test_student_quantiles_are_those_of_the_tables():
    found = [student_quantile(freedom) for freedom in (1, 2, 5, 30, 1000)]
    assert found == pytest.approx([12.7062, 4.30265, 2.57058, 2.04227, 1.96234], rel=2e-5)


def test_mean_estimate_is_students_over_prompts():
    prompts, values = torch.tensor([4, 0, 4, 9, 9]), torch.tensor([0.0, 2.0, 2.0, 5.0, 7.0])  # means 1, 2, 6
    half = 4.30265 * math.sqrt(7 / 3)
    assert mean_estimate(values, prompts) == pytest.approx((3.0, 3 - half, 3 + half), rel=1e-5)
    with_nan = mean_estimate(torch.cat((values, torch.tensor([NAN, INF]))), torch.cat((prompts, torch.tensor([0, 5]))))
    assert with_nan == mean_estimate(values, prompts)
    assert mean_estimate(torch.tensor([1.0, 3.0]), torch.tensor([2, 2])) == (2.0, -INF, INF)


def test_contest_leaves_out_pairs_without_two_finite_scores():
    a = torch.tensor([1.0, 2.0, NAN, 5.0, -INF])
    b = torch.tensor([1.0, 4.0, 9.0, 3.0, 7.0])
    found = contest_of(a, b, own_prompts(5))
    assert found.outcomes[[0, 1, 3]].tolist() == [0.5, 1.0, 0.0] and found.outcomes.isnan().tolist()[2::2] == [True] * 2
    assert found.unscored == 2 and found.win_rate.value == 0.5
    assert found.scores[0].value == pytest.approx(8 / 3) and found.scores[1].value == pytest.approx(8 / 3)
    assert found.difference.value == 0 and found.margins[[0, 1, 3]].tolist() == [0.0, 2.0, -2.0]
    with pytest.raises(ValueError, match="none of the 2 values is finite"):
        contest_of(a[2:5:2], b[2:5:2], own_prompts(2))


def test_a_judge_that_likes_a_place_gives_ties_and_is_found_out():
    texts = ["x"] * 3
    found = swapped_preferences(lambda prompts, first, second: [1.0] * 3, texts, ["a"] * 3, ["b"] * 3)
    assert found.outcomes.tolist() == [0.5] * 3 and found.inconsistent.all() and found.first_rate == 1.0
    contest = pair_contest(found, own_prompts(3))
    assert contest.inconsistent == 3 and contest.scores is None and contest.win_rate.value == 0.5
    assert any("turned by swapping sides" in line for line in contest.lines("judge"))


def test_pairwise_wins_are_those_in_both_orders():
    a, b = ["1", "5", "3", "0", "2"], ["4", "2", "3", "9", "8"]

    def judge(prompts, first, second):
        """The larger number; but next to a 9 it cannot tell, and next to an 8 it likes the first."""
        answers = []
        for one, other in zip(first, second, strict=True):
            larger = 0.5 + 0.5 * ((one > other) - (one < other))
            answers.append(0.5 if "9" in one else 1.0 if "8" in one + other else larger)
        return torch.tensor(answers)

    found = swapped_preferences(judge, ["p"] * 5, a, b)
    # the fourth pair: b ahead where it is second, undecided where it is first
    assert found.outcomes.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert found.inconsistent.tolist() == [False, False, False, True, True]
    assert found.first_rate == pytest.approx(4 / 7)  # decided: two of each of the first two, one, two


@pytest.mark.parametrize(("answer", "message"), [([0.5], r"gave \(1,\)"), ([0.5, NAN], "pair 1"), ([1.5, 0.5], "1.5")])
def test_a_pairwise_judge_must_give_probabilities(answer, message):
    with pytest.raises(ValueError, match=message):
        swapped_preferences(lambda prompts, first, second: answer, ["p", "p"], ["a", "a"], ["b", "b"])


def test_distinct_shares_are_measured_on_as_many_words():
    a = ["the cat the cat", "sat"]  # the, cat, the, cat, sat
    b = ["one two three", "one two four five"]  # of five: one, two, three, one, two
    assert distinct_shares(a, b, words=1) == (3 / 5, 3 / 5)
    assert distinct_shares(a, b, words=2) == (2 / 3, 2 / 3)  # one two, two three, one two; none runs across responses
    assert distinct_shares(a, [""], words=1) == (0.0, 0.0)
