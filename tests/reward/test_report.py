"""Figures of a judge on held-out labels, worked by hand."""

import json
import math

import numpy as np
import pytest

from palm_rlhf_pytorch.reward.agreement import Agreement
from palm_rlhf_pytorch.reward.figures import area_under_curve, pearson, shares_by, spearman, wilson
from palm_rlhf_pytorch.reward.report import RewardReport, report_pairs, report_ratings, report_votes

# differences 2, -1, 0, 1, 0.5 (people see a tie), 3 (people prefer the other one)
PAIRS = report_pairs(
    [3.0, 0.0, 1.0, 1.0, 0.5, 4.0],
    [1.0, 1.0, 1.0, 0.0, 0.0, 1.0],
    chosen_lengths=[5, 3, 4, 9, 2, 6],
    rejected_lengths=[3, 4, 4, 2, 2, 1],
    preferences=[1.0, 1.0, 1.0, 1.0, 0.5, 0.25],
    margins=[1, 1, 2, None, 1, 2],
    num_bins=2,
)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_accuracy_counts_equal_scores_half_and_leaves_ties_out():
    assert (PAIRS.accuracy.count, PAIRS.accuracy.share, PAIRS.ties) == (5, 2.5 / 5, 1)
    assert PAIRS.mean_difference == pytest.approx((2 - 1 + 0 + 1 - 3) / 5)
    costs = [-math.log(sigmoid(gap)) for gap in (2, -1, 0, 1)]
    costs += [-0.5 * math.log(sigmoid(gap)) for gap in (0.5, -0.5)]
    costs += [-0.25 * math.log(sigmoid(3)), -0.75 * math.log(sigmoid(-3))]
    assert PAIRS.loss == pytest.approx(sum(costs) / 6)


def test_accuracy_is_told_by_margin_and_by_length():
    assert [(row.name, row.count, row.share) for row in PAIRS.by_margin] == [("1", 2, 0.5), ("2", 2, 0.25)]
    assert [(row.name, row.share) for row in PAIRS.by_length] == [
        ("-5", 0.0), ("-1", 0.0), ("0", 0.5), ("2", 1.0), ("7", 1.0),
    ]  # fmt: skip
    assert (PAIRS.shorter_preferred.count, PAIRS.shorter_preferred.share) == (2, 0.0)
    assert (PAIRS.longer_preferred.count, PAIRS.longer_preferred.share) == (2, 1.0)
    assert PAIRS.length_only.share == (1 + 0 + 0.5 + 1 + 0) / 5
    gaps, longer = np.array([2, -1, 0, 1, 0.5, 3]), np.array([2, -1, 0, 7, 0, 5])
    assert PAIRS.length_correlation == pytest.approx(np.corrcoef(gaps, longer)[0, 1])


def test_calibration_compares_confidence_in_the_higher_score_with_how_often_it_is_preferred():
    unsure = (sigmoid(1) + 0.5 + sigmoid(1) + sigmoid(0.5)) / 4, (0 + 0.5 + 1 + 0.5) / 4
    sure = (sigmoid(2) + sigmoid(3)) / 2, (1 + 0.25) / 2
    assert [(part.low, part.high, part.count) for part in PAIRS.bins] == [(0.5, 0.75, 4), (0.75, 1.0, 2)]
    for part, (confidence, accuracy) in zip(PAIRS.bins, (unsure, sure), strict=True):
        assert (part.confidence, part.accuracy) == pytest.approx((confidence, accuracy))
    assert PAIRS.ece == pytest.approx((4 * abs(unsure[0] - unsure[1]) + 2 * abs(sure[0] - sure[1])) / 6)


def test_a_calibrated_judge_has_no_calibration_error_and_a_louder_one_has():
    generator = np.random.default_rng(0)
    gaps = generator.normal(scale=2, size=60_000)
    signs = np.where(generator.random(60_000) < 1 / (1 + np.exp(-gaps)), 1.0, -1.0)
    none = np.zeros(60_000)
    quiet, loud = (
        report_pairs(scale * gaps * signs, none, chosen_lengths=none, rejected_lengths=none) for scale in (1, 3)
    )
    assert quiet.ece < 0.01 < 0.1 < loud.ece and quiet.accuracy.share == loud.accuracy.share
    assert quiet.length_correlation is None and quiet.shorter_preferred.share is None


def test_many_different_values_are_cut_into_parts_of_equal_size():
    values = np.arange(11.0)[::-1]
    rows = shares_by(values, (values >= 5).astype(float))
    assert [(row.name, row.count, row.share) for row in rows] == [
        ("0 to 2", 3, 0.0), ("3 to 4", 2, 0.0), ("5 to 6", 2, 1.0), ("7 to 8", 2, 1.0), ("9 to 10", 2, 1.0),
    ]  # fmt: skip


def test_small_statistics_are_those_of_the_books():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=5e-5)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=5e-5)
    assert spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert pearson([1, 2, 3], [5, 5, 5]) is None
    ups = np.array([True, False, True, False])
    assert area_under_curve(np.array([3, 1, 2, 2]), ups) == 3.5 / 4
    assert area_under_curve(np.array([3, 1, 2, 2]), ups | True) is None
    with pytest.raises(ValueError, match=r"right \(4\)"):
        wilson(4, 3)


def test_ratings_are_rounded_for_accuracy_alone():
    found = report_ratings([0.5, 1.4, 3.0, 2.5], [1, 1, 4, 2], lengths=[4, 3, 2, 1])
    assert found.accuracy.share == 0.5 and found.baseline_accuracy == 0.5
    assert found.mean_absolute_error == pytest.approx((0.5 + 0.4 + 1.0 + 0.5) / 4)
    assert found.baseline_error == pytest.approx((0.5 + 0.5 + 2.5 + 0.5) / 4)  # median 1.5
    assert found.spearman == pytest.approx(np.corrcoef([1, 2, 4, 3], [1.5, 1.5, 4, 3])[0, 1])
    assert report_ratings([1.0, 2.0], [0.5, 2.0]).accuracy is None


def test_report_reads_well_and_its_json_is_strict():
    votes = report_votes([2.0, -1.0, 0.0], [True, True, False])
    assert votes.accuracy.share == 1.5 / 3 and votes.auc == 0.5
    agreement = {"pairs": Agreement(items=3, judgements=7, nominal=0.25, ordinal=0.5, interval=None)}
    ratings = report_ratings([1.0, 1.0], [0.0, 2.0])
    report = RewardReport(pairs=PAIRS, ratings=ratings, votes=votes, agreement=agreement, notes=["from a test"])
    found = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert found["pairs"]["accuracy"]["share"] == 0.5 and found["ratings"]["spearman"] is None
    table = report.table()
    for line in (
        "from a test",
        "  all                                             5   0.500   0.170 to 0.830",
        "ties, left out of the accuracy: 1",
        "agreement of annotators on pairs: Krippendorff's alpha nominal 0.250, ordinal 0.500, interval -",
    ):
        assert line in table.splitlines()
    assert max(map(len, table.splitlines())) <= 110
    assert RewardReport().table() == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_scores": [1.0, math.nan]}, r"chosen_scores \(nan in place 1"),
        ({"rejected_lengths": [1]}, r"rejected_lengths has shape \(1,\)"),
        ({"preferences": [1.0]}, "preferences has shape"),
        ({"margins": [1.0]}, r"margins \(1\)"),
        ({"num_bins": 0}, "num_bins"),
        (dict.fromkeys(("chosen_scores", "rejected_scores", "chosen_lengths", "rejected_lengths"), []), "at least one"),
    ],
)
def test_wrong_figures_are_refused(change, message):
    given = {"chosen_scores": [1.0, 2.0], "rejected_scores": [0.0, 0.0]}
    given |= {"chosen_lengths": [1, 2], "rejected_lengths": [2, 1]} | change
    with pytest.raises(ValueError, match=message):
        report_pairs(given.pop("chosen_scores"), given.pop("rejected_scores"), **given)
