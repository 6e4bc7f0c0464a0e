"""Demonstrations: which rows hold them, and what of them is learnt from."""

import json

import pytest

from palm_rlhf_pytorch.text.datasets import split_by_group
from palm_rlhf_pytorch.text.demonstrations import example_of, prompt_of, read_demonstrations
from palm_rlhf_pytorch.text.dialogues import Turn
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

ASKED, TOLD = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TURNS = (Turn("user", "2+2?"), Turn("assistant", "4"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, TOLD]},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"prompt": "2+2?", "messages": [ASKED, TOLD]},
        {"prompt": [ASKED], "completion": [TOLD]},
        {"prompt": [ASKED], "response": " 4"},
        {"prompt": "2+2?", "response": [TOLD]},
        {"prompt": [ASKED], "completion": [ASKED, TOLD]},
        {"text": "\n\nHuman: 2+2?\n\nAssistant: 4"},
        {"chosen": "Human: 2+2?\n\nAssistant: 4", "rejected": "Human: 2+2?\n\nAssistant: 5"},
        {"messages": [ASKED, TOLD, {"role": "user", "content": "thanks"}]},
    ],
)
def test_every_shape_of_a_dialogue_gives_its_turns(row):
    (record,) = read_demonstrations([row]).records
    assert record.turns == TURNS and record.plain is None
    ids, targets = example_of(record, ByteTokenizer())
    assert bytes(ids[~targets].tolist()) == b"\n\nHuman: 2+2?\n\nAssistant:"
    assert ids[targets].tolist() == [*b" 4", 257]
    assert prompt_of(record, ByteTokenizer()).tolist() == ids[~targets].tolist()


def test_plain_prompt_and_response_stay_as_they_are(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,completion,source\nOnce upon, a time,x\n", encoding="utf-8")
    found = read_demonstrations(path)
    ids, targets = example_of(found.records[0], ByteTokenizer())
    assert ids.tolist() == [*b"Once upon a time", 257] and int(targets.sum()) == len(" a time") + 1
    assert found.unread == {"source": 1} and found.records[0].line == 2


def test_all_turns_of_the_assistant_are_learnt_from():
    row = {"messages": [{"role": "system", "content": "Be brief."}, ASKED, TOLD, ASKED, {**TOLD, "content": "four"}]}
    ids, targets = example_of(read_demonstrations([row]).records[0], ByteTokenizer())
    assert ids[targets].tolist() == [*b" 4", 257, *b" four", 257]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED]}, "messages holds nothing that the assistant says"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "nothing that the assistant says"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role"),
        ({"text": "plain prose"}, "text is plain text, not a dialogue"),
        ({"prompt": "a"}, "has none of messages"),
        ({"messages": [ASKED, TOLD], "conversation": [ASKED, TOLD]}, "messages, conversation could each be meant"),
        ({"prompt": "a", "response": "  "}, "response is an empty response"),
    ],
)
def test_rows_that_teach_nothing_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_demonstrations([row])


def test_bad_rows_may_be_left_out(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"messages": [ASKED, TOLD]}, {"a": 1})))
    found = read_demonstrations(path, on_bad_record=lambda bad: None)
    assert (len(found.records), found.rows, found.bad[0].line) == (1, 2, 2)


def test_dialogues_of_one_opening_or_group_stay_on_one_side():
    rows = [{"messages": [{**ASKED, "content": f"{n % 7}?"}, {**TOLD, "content": str(n)}]} for n in range(40)]
    train, held_out = split_by_group(read_demonstrations(rows).records, held_out=0.4, seed=1)
    asked = [{record.turns[0].content for record in side} for side in (train, held_out)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
