"""Agreement against published figures, and many judgements made into one."""

import math

import numpy as np
import pytest

from palm_rlhf_pytorch.reward.agreement import (
    annotator_weights,
    interval,
    krippendorff_alpha,
    measure_agreement,
    merge_annotators,
    nominal,
    ordinal,
    weighted_mean,
    weighted_median,
)
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote

# 4 observers and 12 units: Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011; nan: not seen
OBSERVERS = """
1 2 3 3 2 1 4 1 2 nan nan nan
1 2 3 3 2 2 4 1 2 5 nan 3
nan 3 3 3 2 3 4 2 2 5 1 nan
1 2 3 3 2 4 4 1 2 5 1 nan
"""
RATINGS = np.array([[float(value) for value in row.split()] for row in OBSERVERS.strip().splitlines()]).T


@pytest.mark.parametrize(("distance", "alpha"), [(nominal, 0.743), (ordinal, 0.815), (interval, 0.849)])
def test_alpha_is_the_published_one(distance, alpha):
    assert krippendorff_alpha(RATINGS, distance=distance) == pytest.approx(alpha, abs=5e-4)
    named = {place: {who: value for who, value in enumerate(unit)} for place, unit in enumerate(RATINGS)}
    lists = [[value for value in unit[::-1] if value == value] for unit in RATINGS]
    for ratings in (named, lists):
        assert krippendorff_alpha(ratings, distance=distance) == krippendorff_alpha(RATINGS, distance=distance)


def test_interval_alpha_keeps_under_a_change_of_scale_and_ordinal_under_any_that_keeps_the_order():
    assert krippendorff_alpha(3 - 2 * RATINGS) == pytest.approx(krippendorff_alpha(RATINGS))
    assert krippendorff_alpha(np.exp(RATINGS), distance=ordinal) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand_and_where_it_is_undefined():
    # two units (0, 0) and (0, 1): observed 2 / 4; expected 6 of the 12 ordered pairs of different values
    assert krippendorff_alpha([[0, 0], [0, 1]]) == pytest.approx(1 - (2 / 4) / (6 / 12))
    for nothing in ([], [[1.0], [2.0]], [[3, 3], [3, 3]]):
        assert krippendorff_alpha(nothing) is None
    with pytest.raises(ValueError, match="infinite"):
        krippendorff_alpha([[1.0, math.inf]])
    with pytest.raises(ValueError, match="different values"):
        krippendorff_alpha([[number, number + 0.5] for number in range(2001)])


def pair(chosen, rejected, **more):
    return Pair(chosen=Text("q", chosen), rejected=Text("q", rejected), **more)


def test_agreement_of_records_is_that_of_their_values():
    ratings = [
        Rating(text=Text("", str(unit)), value=value, annotator=str(who))
        for unit, row in enumerate(RATINGS)
        for who, value in enumerate(row)
        if value == value
    ]
    pairs = [pair("a", "b"), pair("b", "a"), pair("c", "d"), pair("d", "c", preference=0.0), pair("e", "f")]
    ranking = Ranking(texts=(Text("q", "a"), Text("q", "b")), ranks=(0, 1))
    found = measure_agreement([*ratings, *pairs, ranking, Vote(text=Text("q", "a"), up=True)])
    assert set(found) == {"ratings", "pairs"}  # one vote agrees with nobody
    assert (found["ratings"].items, found["ratings"].judgements) == (11, 40)
    assert found["ratings"].interval == pytest.approx(0.849, abs=5e-4)
    # for the first in the alphabet: (1, 0) and (1, 1); observed 2 / 4, expected 6 / 12
    assert (found["pairs"].items, found["pairs"].nominal) == (2, pytest.approx(0.0))


def test_weights_follow_agreement_with_the_others():
    votes = {"ann": (1, 1, 0, 0), "bob": (1, 1, 0, 0), "cat": (1, 0, 0, 1), "dan": ()}
    records = [
        Vote(text=Text("q", str(item)), up=bool(up), annotator=who)
        for who, ups in votes.items()
        for item, up in enumerate(ups)
    ]
    records.append(Vote(text=Text("q", "alone"), up=True, annotator="dan"))
    # 13 values of which 7 are 1: chance of two different ones is 2 * 7 * 6 / (13 * 12)
    chance = 84 / 156
    reliabilities = {"ann": 1 - 0.25 / chance, "bob": 1 - 0.25 / chance, "cat": 1 - 0.5 / chance}
    reliabilities["dan"] = sum(reliabilities.values()) / 3  # nothing is known of dan: the mean
    average = sum(reliabilities.values()) / 4
    expected = {who: value / average for who, value in reliabilities.items()}
    assert annotator_weights(records, prior=1e-9) == pytest.approx(expected)
    assert annotator_weights(records, prior=1e9) == pytest.approx(dict.fromkeys(votes, 1.0))
    drawn = annotator_weights(records)
    assert expected["cat"] < drawn["cat"] < 1 < drawn["ann"] < expected["ann"]
    assert annotator_weights([pair("a", "b", annotator="x"), pair("b", "a", annotator="y")]) == {"x": 1.0, "y": 1.0}


def test_pairs_of_several_people_become_one_soft_label():
    records = [
        pair("x", "y", annotator="ann", margin=2.0, group="g", line=1),
        pair("u", "v", annotator="ann", line=2),
        pair("x", "y", annotator="bob", weight=2.0, line=3),
        pair("y", "x", annotator="cat", margin=1.0, line=4),
    ]
    merged = merge_annotators(records, weights={"cat": 0.5})
    soft = pair("x", "y", preference=3 / 3.5, weight=3.5, margin=(2.0 * 1 - 1.0 * 0.5) / 1.5, group="g", line=1)
    assert merged == [soft, pair("u", "v", annotator="ann", line=2)]
    turned = merge_annotators(records, weights={"cat": 9.0})[0]
    assert turned.chosen == Text("q", "y") and turned.preference == pytest.approx(9 / 12)
    assert turned.margin == pytest.approx((9 * 1.0 - 2.0) / 10)
    assert merge_annotators([pair("x", "y", margin=1.0), pair("y", "x")])[0].margin is None  # a tie


def test_soft_label_costs_what_its_votes_cost():
    records = [pair("x", "y", preference=0.75, weight=1.5), pair("y", "x"), pair("x", "y", weight=0.25)]
    scores = {"x": 0.8, "y": -0.3}

    def loss(record):
        gap = scores[record.chosen.response] - scores[record.rejected.response]
        return record.weight * (
            record.preference * math.log1p(math.exp(-gap)) + (1 - record.preference) * math.log1p(math.exp(gap))
        )

    (merged,) = merge_annotators(records)
    assert loss(merged) == pytest.approx(sum(map(loss, records)))


def test_ratings_are_merged_as_asked():
    ratings = [Rating(text=Text("q", "x"), value=value, annotator=str(value)) for value in (4, 1, 1, 2)]
    vote = Vote(text=Text("q", "x"), up=True, annotator="1")
    assert merge_annotators([*ratings, vote], weights={"1": 0.5})[1:] == [
        Rating(text=Text("q", "x"), value=1, annotator="1", weight=0.5),
        Rating(text=Text("q", "x"), value=1, annotator="1", weight=0.5),
        Rating(text=Text("q", "x"), value=2, annotator="2"),
        Vote(text=Text("q", "x"), up=True, annotator="1", weight=0.5),
    ]
    assert merge_annotators(ratings, rating=weighted_mean) == [Rating(text=Text("q", "x"), value=2.0, weight=4.0)]
    assert merge_annotators(ratings, rating=weighted_median)[0].value == 1
    assert weighted_median([5, 1, 3], [1.0, 1.0, 3.0]) == 3 and weighted_median([5, 1, 3], [3.0, 1.0, 1.0]) == 5
    assert weighted_mean([5, 1], [0.0, 0.0]) == 3 and weighted_median([5, 1, 3], [0.0, 0.0, 0.0]) == 3
