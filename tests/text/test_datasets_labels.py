"""Labels from files and rows: kinds in one list, bad records named and counted, groups on one side of a split."""

import json

import pytest

from palm_rlhf_pytorch.text.datasets import read_labels, skip_bad_record, split_by_group
from palm_rlhf_pytorch.text.records import Pair, Rating, Text, Vote, even_bins

GOOD = {"prompt": "q", "chosen": "a", "rejected": "b", "annotator": "ann", "source": "s"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_mix_of_labels_is_read_from_several_files(tmp_path):
    first = write(tmp_path / "first.jsonl", GOOD, {"prompt": "q", "completion": "a", "label": True})
    second = tmp_path / "second.csv"
    second.write_text("sentence,label,id\nfine,1,x\nbad,-1,y\n")
    labels = read_labels(
        [first, str(second)], columns={"sentence": "text", "id": None}, bins=even_bins(-1, 1, num_bins=2)
    )
    assert labels.records == [
        Pair(chosen=Text("q", "a"), rejected=Text("q", "b"), annotator="ann", line=1),
        Vote(text=Text("q", "a"), up=True, line=2),
        Rating(text=Text("", "fine"), value=1, line=2),
        Rating(text=Text("", "bad"), value=0, line=3),
    ]
    assert (labels.rows, labels.bad, dict(labels.unread)) == (4, [], {"source": 1})
    for line in (
        "4 rows: 1 pair, 2 ratings, 1 vote, 0 bad",
        "2 without a prompt",
        "1 annotator",
        "columns not read: source",
    ):
        assert line in labels.summary()


def test_rows_of_any_iterable_are_read_as_those_of_files(tmp_path):
    class Dataset:  # as a Hugging Face dataset is: no sequence, yields dictionaries
        def __iter__(self):
            yield from (GOOD, GOOD | {"tie": True})

    rows = read_labels(Dataset()).records
    files = read_labels(write(tmp_path / "rows.jsonl", *Dataset())).records
    assert [record.preference for record in rows] == [1.0, 0.5] == [record.preference for record in files]
    assert [record.line for record in rows] == [0, 0] and [record.line for record in files] == [1, 2]


def test_bad_record_stops_the_reading_or_is_left_out_and_listed(tmp_path):
    rows = [GOOD, GOOD | {"margin": "much"}, GOOD, {"prompt": "q", "chosen": "a"}]
    path = write(tmp_path / "pairs.jsonl", *rows)
    with pytest.raises(ValueError, match=r"pairs.jsonl, line 2: margin \('much'\) must be a number"):
        read_labels(path)
    labels = read_labels(path, on_bad_record=skip_bad_record)
    assert [record.line for record in labels.records] == [1, 3]
    assert [bad[:3] for bad in labels.bad] == [(str(path), 2, "margin"), (str(path), 4, "rejected")]
    assert "2 bad" in labels.summary() and "line 4: rejected is missing" in labels.summary()
    told = []
    read_labels(rows, on_bad_record=told.append)
    assert [str(bad) for bad in told][1] == "record 4: rejected is missing"


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (GOOD, TypeError, "source is a mapping"),
        ([1], TypeError, "source holds a int"),
        ([], ValueError, "source holds no label"),
        ([{}], ValueError, "first of 1 bad records: record 1"),
        (["none.jsonl"], FileNotFoundError, "none.jsonl"),
        ([GOOD | {"text": "a"}], ValueError, "first of 1 bad records"),
    ],
)
def test_source_without_labels_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        read_labels(source, on_bad_record=skip_bad_record, columns={"text": "prompt"})


def test_missing_file_is_found_before_the_first_is_read(tmp_path):
    told = []
    with pytest.raises(FileNotFoundError):
        read_labels([write(tmp_path / "bad.jsonl", {}), tmp_path / "none.jsonl"], on_bad_record=told.append)
    assert not told


def pair(number, group=None, prompt=None):
    prompt = f"prompt {number % 40}" if prompt is None else prompt
    return Pair(chosen=Text(prompt, f"a{number}"), rejected=Text(prompt, f"b{number}"), group=group)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda number: pair(number, group=f"g{number % 60}"), lambda record: record.group),
        (pair, lambda record: record.chosen.prompt),
        (lambda number: pair(number % 150, prompt=""), lambda record: record.chosen.response),
    ],
)
def test_split_keeps_groups_together_and_moves_nothing_when_data_are_added(make, key):
    records = [make(number) for number in range(300)]
    train, held_out = split_by_group(records, held_out=0.3, seed=1)
    assert len(train) + len(held_out) == 300 and 30 < len(held_out) < 150
    assert not {key(record) for record in train} & {key(record) for record in held_out}
    fewer = split_by_group(records[::-3], held_out=0.3, seed=1)
    assert all(record in held_out for record in fewer[1]) and all(record in train for record in fewer[0])
    assert split_by_group(records, held_out=0.3, seed=2)[1] != held_out


def test_the_same_two_texts_stay_together_in_either_order():
    swapped = [
        Pair(chosen=record.rejected, rejected=record.chosen) for record in (pair(n, prompt="") for n in range(50))
    ]
    train, held_out = split_by_group([*swapped, *(pair(n, prompt="") for n in range(50))], held_out=0.5)
    assert not {frozenset(record.texts) for record in train} & {frozenset(record.texts) for record in held_out}


def test_a_dialogue_stays_together_at_every_length():
    begun = [f"\n\nHuman: question {number}\n\nAssistant:" for number in range(60)]
    prompts = [*begun, *(f"{prompt} answer {len(prompt)}\n\nHuman: and?\n\nAssistant:" for prompt in begun)]
    records = [Pair(chosen=Text(prompt, " a"), rejected=Text(prompt, " b")) for prompt in prompts]
    sides = split_by_group(records, held_out=0.4)
    learnt, held_out = ({begun.index(record.chosen.prompt.split(" answer")[0]) for record in side} for side in sides)
    assert not learnt & held_out and len(learnt) + len(held_out) == 60


def test_split_with_an_empty_side_is_refused():
    with pytest.raises(ValueError, match=r"held_out \(0.5\) leaves a side empty: there are 1 groups"):
        split_by_group([pair(1, group="g"), pair(2, group="g")], held_out=0.5)
    with pytest.raises(ValueError, match=r"held_out \(1.0\)"):
        split_by_group([pair(1)], held_out=1.0)
