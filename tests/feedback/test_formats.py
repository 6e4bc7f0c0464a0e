"""Rows in, rows out: what is refused, what is kept, and that every export is read back by the readers of labels."""

from datetime import UTC, datetime

import pytest

from palm_rlhf_pytorch.feedback.formats import read_item
from palm_rlhf_pytorch.feedback.records import FORMATS, Judged, bin_of
from palm_rlhf_pytorch.text.columns import read_columns
from palm_rlhf_pytorch.text.datasets import read_labels
from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote

PAIR, RATING, RANKING = 1, 2, 3
TURNS = [{"role": "user", "content": "Name a bird."}]
HH = "\n\nHuman: Name a bird.\n\nAssistant:"


def judged(kind=PAIR, **said):
    texts = ("Heron.", "A table", "Wren", "Owl")[: said.pop("number", 2)]
    blank = {"order": tuple(range(len(texts))), "choice": None, "ratings": (), "ranking": (), "gold": None}
    blank |= {"sources": ("",) * len(texts), "scores": (None,) * len(texts), "rules": ({},) * len(texts)}
    blank |= {"note": "", "annotator": "anna", "group": "", "ms": 1500, "at": datetime(2026, 1, 2, tzinfo=UTC)}
    return Judged(**{"item": 7, "kind": kind, "prompt": "Name a bird.", "texts": texts, "round": 0} | blank | said)


@pytest.mark.parametrize(
    ("row", "prompt", "texts"),
    [
        ({"prompt": "p", "response_a": " x", "response_b": "y"}, "p", [" x", "y"]),
        ({"prompt": TURNS, "chosen": "x", "rejected": "y"}, TURNS, ["x", "y"]),
        ({"prompt": "p", "completions": ["x", [{"role": "assistant", "content": "y"}]]}, "p", ["x", "y"]),
        ({"chosen": HH + " x", "rejected": HH + " y"}, HH, [" x", " y"]),
        (
            {side: [*TURNS, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
            TURNS,
            ["chosen", "rejected"],
        ),
        ({"prompt": "p"}, "p", []),
    ],
)
def test_prompt_and_responses_are_found_in_every_shape(row, prompt, texts):
    item = read_item(row, PAIR)
    assert item.prompt == prompt
    assert [completion.text for completion in item.completions] == texts


def test_sources_scores_gold_and_priority_are_kept():
    row = {
        "prompt": "p",
        "response_a": "x",
        "response_b": "y",
        "source_a": "old",
        "source_b": "new",
        "scores": [0.5, -1],
    }
    item = read_item(row | {"gold": "b", "group": 3, "expected": {"gain": 0.25}}, PAIR)
    assert [(each.source, each.score) for each in item.completions] == [("old", 0.5), ("new", -1.0)]
    assert (item.gold, item.group, item.priority) == ({"choice": 1}, "3", 0.25)
    assert read_item({"prompt": "p", "completion": "x", "gold": 4}, RATING).gold == {"ratings": [4]}
    for texts in ({"completion": "x"}, {"response": "x"}, {"responses": ["x"]}):
        assert read_item({"prompt": "p", "source": "old", **texts}, RATING).completions[0].source == "old"
    assert read_item({"prompt": "p", "responses": ["x", "y"], "gold": [1, 0]}, RANKING).gold == {"ranks": [1, 0]}


def test_the_key_is_the_same_whichever_side_a_response_stands_on():
    first = read_item({"prompt": "p", "response_a": "x", "response_b": "y"}, PAIR)
    assert first.key == read_item({"prompt": "p", "response_a": "y", "response_b": "x"}, PAIR).key
    assert first.key != read_item({"prompt": "q", "response_a": "y", "response_b": "x"}, PAIR).key


@pytest.mark.parametrize(
    ("row", "kind", "field"),
    [
        ({}, PAIR, "prompt"),
        ({"prompt": "p", "response_a": "x"}, PAIR, "response_a"),
        ({"prompt": "p", "response_a": "x", "response_b": " "}, PAIR, "response_b"),
        ({"prompt": "p", "completions": ["x", "y", "z"]}, PAIR, "completions"),
        ({"prompt": "p", "completions": "x"}, RATING, "completions"),
        ({"prompt": "p", "completion": "x"}, RANKING, "completion"),
        ({"prompt": "p", "completion": "x", "responses": ["y"]}, RATING, "responses, completion"),
        ({"prompt": "p", "completion": "x\0"}, RATING, "completion"),
        ({"prompt": "p\0", "completion": "x"}, RATING, "prompt"),
        ({"prompt": [{"role": "user", "content": "p\0"}], "completion": "x"}, RATING, "prompt"),
        ({"prompt": "p", "completion": "x", "source": "m\ud800"}, RATING, "source"),
        ({"prompt": "p", "completion": "x", "group": "g\0"}, RATING, "group"),
        ({"prompt": "p", "completion": "x", "gold": 6}, RATING, "gold"),
        ({"prompt": "p", "completion": "x", "gold": [1, 2]}, RATING, "gold"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "gold": "c"}, PAIR, "gold"),
        ({"prompt": "p", "gold": "a"}, PAIR, "gold"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "scores": [1]}, PAIR, "scores"),
        ({"prompt": "p", "response_a": "x", "response_b": "y", "priority": "high"}, PAIR, "priority"),
        ({"chosen": HH + " x", "rejected": "\n\nHuman: other\n\nAssistant: y"}, PAIR, "chosen, rejected"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, PAIR, "prompt[0].role"),
    ],
)
def test_a_wrong_row_names_its_field(row, kind, field):
    with pytest.raises(FieldError) as error:
        read_item(row, kind)
    assert error.value.field == field


@pytest.mark.parametrize(("choice", "better", "strength"), [(-3, 0, 3), (-1, 0, 1), (2, 1, 2)])
def test_a_choice_becomes_a_pair_with_its_strength_as_margin(choice, better, strength):
    one = judged(choice=choice, rules=({"is rude": "no"}, {}))
    (row,) = FORMATS["preferences"](one)
    assert list(row)[:4] == ["prompt", "chosen", "rejected", "strength"]
    (pair,) = read_labels([row]).records
    texts = [Text("Name a bird.", text) for text in one.texts]
    assert pair == Pair(
        chosen=texts[better], rejected=texts[1 - better], margin=strength, annotator="anna", group=row["group"]
    )


def test_ties_and_both_bad_make_no_pair_unless_ties_are_asked_for():
    tie, bad = judged(choice=0), judged(choice=None)
    assert [*FORMATS["preferences"](tie), *FORMATS["preferences"](bad), *FORMATS["preferences"](bad, ties=True)] == []
    (row,) = FORMATS["preferences"](tie, ties=True)
    assert read_labels([row]).records[0].preference == 0.5
    assert [row["label"] for row in FORMATS["unpaired"](bad)] == [False, False]
    assert list(FORMATS["unpaired"](tie)) == []


def test_a_ranking_becomes_all_its_pairs_in_one_group_and_leaves_the_unranked_out():
    one = judged(RANKING, number=4, ranking=(2, 0, 3))
    rows = list(FORMATS["preferences"](one))
    assert [(row["chosen"], row["rejected"]) for row in rows] == [
        ("Wren", "Heron."), ("Wren", "Owl"), ("Heron.", "Owl"),
    ]  # fmt: skip
    assert len({row["group"] for row in rows}) == 1 and "strength" not in rows[0]
    assert all(isinstance(record, Pair) for record in read_labels(rows).records)
    (ranking,) = read_labels(list(FORMATS["rankings"](one))).records
    assert isinstance(ranking, Ranking)
    assert dict(zip([text.response for text in ranking.texts], ranking.ranks, strict=True)) == {
        "Wren": 0, "Heron.": 1, "Owl": 2,
    }  # fmt: skip


def test_ratings_from_1_to_5_are_bins_from_0_to_4():
    assert [bin_of(stars) for stars in (1, 2, 3, 4, 5)] == [0, 1, 2, 3, 4]
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"stars \\({wrong}\\)"):
            bin_of(wrong)
    read = read_labels(list(FORMATS["ratings"](judged(RATING, number=3, ratings=(5, 1, 3))))).records
    assert [(type(record), record.value) for record in read] == [(Rating, 4), (Rating, 0), (Rating, 2)]
    votes = read_labels(list(FORMATS["unpaired"](judged(RATING, number=3, ratings=(5, 1, 3))))).records
    assert [(type(vote), vote.text.response, vote.up) for vote in votes] == [
        (Vote, "Heron.", True), (Vote, "A table", False),
    ]  # fmt: skip


@pytest.mark.parametrize("prompt", ["Name a bird.", TURNS, HH])
def test_a_conversation_is_lists_of_turns_and_reads_as_the_same_dialogue(prompt):
    (row,) = FORMATS["conversational"](judged(choice=1, prompt=prompt))
    assert row["prompt"] == TURNS
    assert row["chosen"] == [{"role": "assistant", "content": "A table"}]
    assert read_columns(row).labels[0].texts[0] == Text(HH, " A table")


def test_rows_of_one_prompt_share_a_group_and_an_items_own_group_stands_above():
    groups = {next(FORMATS["preferences"](judged(choice=1, item=item)))["group"] for item in (1, 2)}
    assert len(groups) == 1
    assert next(FORMATS["preferences"](judged(choice=1, group="chat 5")))["group"] == "chat 5"


def test_everything_about_a_judgement_is_in_its_own_row():
    one = judged(order=(1, 0), note="hm", sources=("old", "new"), scores=(0.5, None), gold={"choice": 0})
    (row,) = FORMATS["judgements"](one)
    assert row["both_bad"] is True and row["choice"] is None
    assert (row["order"], row["note"], row["sources"], row["ms"]) == ([1, 0], "hm", ["old", "new"], 1500)
    assert row["gold"] == {"choice": 0} and row["at"] == "2026-01-02T00:00:00+00:00"


def test_a_source_that_is_not_known_is_not_called_none():
    item = read_item({"prompt": "p", "response_a": "x", "response_b": "y", "sources": [None, "new"]}, PAIR)
    assert [completion.source for completion in item.completions] == ["", "new"]
