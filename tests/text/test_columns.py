"""Rows of columns become labels; what could be read in two ways is refused."""

import numpy as np
import pytest

from palm_rlhf_pytorch.text.columns import read_columns
from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote, whole_bins

A, B, C = (Text("q", name) for name in "abc")
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
TWO = {"prompt": "q", "response_a": "a", "response_b": "b"}
LIST = {"prompt": "q", "responses": ["a", "b", "c"]}
ONE = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("row", "label"),
    [
        (PAIR, Pair(chosen=A, rejected=B)),
        (PAIR | {"margin": 2, "group": "g"}, Pair(chosen=A, rejected=B, margin=2.0, group="g")),
        (PAIR | {"annotator_id": 7}, Pair(chosen=A, rejected=B, annotator="7")),
        (PAIR | {"strength": "Slightly better", "worker": "w"}, Pair(chosen=A, rejected=B, margin=1.0, annotator="w")),
        (PAIR | {"tie": True, "margin": 0}, Pair(chosen=A, rejected=B, preference=0.5, margin=0.0)),
        (PAIR | {"label": "tie", "weight": "0.25"}, Pair(chosen=A, rejected=B, preference=0.5, weight=0.25)),
        (PAIR | {"preference": 0.25, "margin": 3}, Pair(chosen=B, rejected=A, preference=0.75, margin=3.0)),
        (PAIR | {"messages": "a", "score_chosen": 9}, Pair(chosen=A, rejected=B)),
        (TWO | {"choice": 1}, Pair(chosen=B, rejected=A)),
        (TWO | {"choice": "model_a"}, Pair(chosen=A, rejected=B)),
        (TWO | {"choice": "tie"}, Pair(chosen=A, rejected=B, preference=0.5)),
        (TWO | {"preference": 0.125}, Pair(chosen=B, rejected=A, preference=0.875)),
        (TWO | {"preference": 0.0}, Pair(chosen=B, rejected=A)),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "choice": 1}, Pair(chosen=B, rejected=A)),
        ({"prompt": "q", "response_1": "a", "response_2": "b", "choice": "1"}, Pair(chosen=A, rejected=B)),
        (LIST, Ranking(texts=(A, B, C), ranks=(0, 1, 2))),
        (LIST | {"ranks": [2, 1, 2]}, Ranking(texts=(A, B, C), ranks=(1, 0, 1))),
        (LIST | {"scores": [0.5, -1, 8]}, Ranking(texts=(A, B, C), ranks=(1, 2, 0))),
        (LIST | {"choice": 1}, Ranking(texts=(A, B, C), ranks=(1, 0, 1))),
        (ONE | {"label": True}, Vote(text=A, up=True)),
        (ONE | {"label": "false"}, Vote(text=A, up=False)),
        (ONE | {"vote": "down"}, Vote(text=A, up=False)),
        (ONE | {"thumbs": -1}, Vote(text=A, up=False)),
        (ONE | {"thumbs_up": "1"}, Vote(text=A, up=True)),
        (ONE | {"label": 1}, Rating(text=A, value=1.0)),
        (ONE | {"score": np.float32(0.5), "rating": None, "annotator": ""}, Rating(text=A, value=0.5)),
        ({"text": "alone", "rating": "4"}, Rating(text=Text("", "alone"), value=4.0)),
    ],
)  # fmt: skip
def test_row_becomes_the_label_its_columns_say(row, label):
    assert read_columns(row).labels == [label]


def test_ratings_of_several_people_become_a_record_each():
    row = ONE | {"ratings": [3, None, 5], "annotators": ["x", "y", "z"]}
    found = read_columns(row, line=4, bins=whole_bins(1, 5)).labels
    assert found == [Rating(text=A, value=v, annotator=who, line=4) for v, who in ((2, "x"), (4, "z"))]


def test_what_is_worth_knowing_is_counted_once_a_row():
    hh = "\n\nHuman: {}\n\nAssistant: yes"
    read = read_columns({"chosen": hh.format("a"), "rejected": hh.format("b"), "source": "s"})
    assert {name: count for name, count in read.notes.items() if count} == {
        "with an implicit prompt": 1,
        "whose prompts differ before the last turn": 1,
    }
    assert [text.prompt for text in read.labels[0].texts] == [hh.format(name)[:-4] for name in "ab"]
    assert read.unread == ["source"]
    assert read_columns(ONE | {"completion": "q and a", "label": 1}).notes["with a text that repeats its prompt"] == 1
    assert read_columns(PAIR | {"rejected": "a"}).notes["with equal texts"] == 1


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"prompt": "q"}, ""),
        ({"prompt": "q", "chosen": "a"}, "rejected"),
        (PAIR | {"chosen": ""}, "chosen"),
        (PAIR | {"rejected": ["a"]}, "rejected[0]"),
        (PAIR | {"completion": "c"}, "chosen, rejected, completion"),
        (PAIR | {"choice": 0}, "choice"),
        (PAIR | {"label": 1}, "label"),
        (PAIR | {"margin": float("nan")}, "margin"),
        (PAIR | {"margin": -1}, "margin"),
        (PAIR | {"strength": "rather"}, "strength"),
        (PAIR | {"margin": 1, "strength": 1}, "margin, strength"),
        (PAIR | {"tie": True, "margin": 1}, "margin, strength"),
        (PAIR | {"tie": True, "preference": 0.75}, "tie, preference"),
        (PAIR | {"preference": 1.5}, "preference"),
        (PAIR | {"weight": -1}, "weight"),
        (PAIR | {"annotator": "x", "worker": "y"}, "annotator, worker"),
        (PAIR | {"group": 1.5}, "group"),
        (TWO, "choice"),
        (TWO | {"choice": 2}, "choice"),
        (TWO | {"choice": True}, "choice"),
        (TWO | {"choice": 0, "preference": 0.25}, "choice, preference, tie"),
        (TWO | {"preference": 1}, "preference"),  # a probability, or the place of the second?
        ({"response_1": "a", "response_2": "b", "choice": 0}, "choice"),
        ({"response_0": "a", "response_1": "b", "response_2": "c", "choice": 0}, "response_0, response_1, response_2"),
        (LIST | {"ranks": [1, 2]}, "ranks"),
        (LIST | {"ranks": [1, "x", 2]}, "ranks[1]"),
        (LIST | {"ranking": [2, 0, 1]}, "ranking"),
        (LIST | {"choice": 3}, "choice"),
        (LIST | {"responses": ["a"]}, "responses"),
        (LIST | {"responses": ["a", ""]}, "responses[1]"),
        (ONE, "label"),
        (ONE | {"label": 1, "score": 2}, "label, score"),
        (ONE | {"label": "good"}, "label"),
        (ONE | {"label": 10**400}, "label"),
        (ONE | {"rating": True}, "rating"),
        (ONE | {"vote": 0}, "vote"),
        (ONE | {"text": "b", "label": 1}, "completion, text"),
        (ONE | {"ratings": [1, 2], "annotators": ["x"]}, "annotators"),
        (ONE | {"ratings": []}, "ratings"),
        (ONE | {"ratings": [None, None]}, "ratings"),
    ],
)
def test_wrong_or_doubtful_row_is_refused_by_the_fields_name(row, field):
    with pytest.raises(FieldError) as error:
        read_columns(row)
    assert error.value.field == field, str(error.value)


def test_value_that_fits_no_bin_is_refused():
    with pytest.raises(FieldError, match=r"rating: value \(0.0\)"):
        read_columns(ONE | {"rating": 0}, bins=whole_bins(1, 5))
