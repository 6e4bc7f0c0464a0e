"""Agreement of people, each with the rest, and with known answers: against figures worked by hand."""

import pytest

from palm_rlhf_pytorch.feedback.agreement import agreement, with_rest
from palm_rlhf_pytorch.feedback.gold import accuracies, is_right
from tests.feedback.test_formats import PAIR, RANKING, RATING, judged


def said(rows):
    """Choices by (item, person)."""
    return [judged(choice=choice, item=item, annotator=person) for item, person, choice in rows]


def test_alpha_of_names_by_hand():
    # items 1 and 2 agree (A, A) and (B, B), item 3 does not (A, B); strength makes no difference to names
    rows = [
        (1, "anna", -3),
        (1, "ben", -1),
        (2, "anna", 1),
        (2, "ben", 2),
        (3, "anna", -2),
        (3, "ben", 3),
        (4, "ben", 1),
    ]
    found = agreement(said(rows))
    # 6 values, 3 A and 3 B: observed 2/6, expected 2 * 3 * 3 / (6 * 5) = 0.6
    assert found.nominal == pytest.approx(1 - (2 / 6) / 0.6)
    assert (found.items, found.judgements) == (3, 6)


def test_both_bad_is_a_name_of_its_own_and_no_step():
    found = agreement(said([(1, "anna", None), (1, "ben", None), (2, "anna", 1), (2, "ben", 1)]))
    assert found.nominal == 1.0
    assert found.interval is None  # of steps, all alike
    assert agreement(said([(1, "anna", 1), (2, "ben", 1)])) is None


def test_one_thing_is_judged_by_stars_and_by_order_of_two():
    ratings = [judged(RATING, ratings=stars, annotator=who) for who, stars in (("anna", (1, 5)), ("ben", (1, 4)))]
    # interval: values 1 1 5 4; observed (0 + 0 + 1 + 1) / 4, expected over all ordered pairs of values
    pairs = [(a - b) ** 2 for i, a in enumerate((1, 1, 5, 4)) for j, b in enumerate((1, 1, 5, 4)) if i != j]
    assert agreement(ratings).interval == pytest.approx(1 - 0.5 / (sum(pairs) / 12))
    orders = [judged(RANKING, number=3, ranking=r, annotator=w) for w, r in (("anna", (0, 1, 2)), ("ben", (1, 0, 2)))]
    assert agreement(orders).items == 3  # of three texts, three twos
    assert with_rest(orders)["anna"].share == pytest.approx(2 / 3)


def test_each_person_is_compared_with_all_others_on_the_same_items():
    rest = with_rest(
        said([(1, "anna", 1), (1, "ben", 2), (1, "cleo", -1), (2, "anna", 0), (2, "ben", 0), (3, "cleo", 1)])
    )
    assert {who: (one.same, one.compared) for who, one in rest.items()} == {
        "anna": (2, 3), "ben": (2, 3), "cleo": (0, 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "right"),
    [
        (judged(PAIR, choice=3, gold={"choice": 1}), True),
        (judged(PAIR, choice=-1, gold={"choice": 1}), False),
        (judged(PAIR, choice=0, gold={"choice": 0}), True),
        (judged(PAIR, choice=None, gold={"choice": 0}), False),
        (judged(RATING, ratings=(4, 2), gold={"ratings": [5, 1]}), True),
        (judged(RATING, ratings=(3, 2), gold={"ratings": [5, 1]}), False),
        (judged(RANKING, number=3, ranking=(2, 0, 1), gold={"ranks": [1, 1, 0]}), True),
        (judged(RANKING, number=3, ranking=(0, 2, 1), gold={"ranks": [1, 1, 0]}), False),
    ],
)
def test_a_known_answer_is_met_or_not(one, right):
    assert is_right(one) is right


def test_accuracy_counts_known_answers_alone():
    found = accuracies([judged(choice=1, gold={"choice": 1}), judged(choice=1, gold={"choice": -1}), judged(choice=1)])
    assert (found["anna"].right, found["anna"].asked, found["anna"].share) == (1, 2, 0.5)
