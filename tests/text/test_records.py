"""Records of judgements, and ratings put into bins."""

import pickle
from dataclasses import replace

import pytest

from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Rating, Text, Vote, even_bins, whole_bins

GOOD, BAD, ODD = Text("q", "good"), Text("q", "bad"), Text("q", "odd")


def test_every_record_names_its_texts_and_survives_copying():
    records = {
        Pair(chosen=GOOD, rejected=BAD, annotator="ann", line=3): (GOOD, BAD),
        Ranking(texts=(BAD, GOOD, ODD), ranks=(1, 0, 1), group="g"): (BAD, GOOD, ODD),
        Rating(text=ODD, value=2.5, weight=0.5): (ODD,),
        Vote(text=GOOD, up=True): (GOOD,),
    }
    for record, texts in records.items():
        assert isinstance(record, Label) and record.texts == texts
        assert pickle.loads(pickle.dumps(record)) == record == replace(record)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vote(text=GOOD, up=True, weight=-1.0), r"weight \(-1.0\)"),
        (lambda: Rating(text=GOOD, value=1.0, weight=float("nan")), r"weight \(nan\)"),
        (lambda: Rating(text=GOOD, value=float("inf")), r"value \(inf\)"),
        (lambda: Pair(chosen=GOOD, rejected=BAD, preference=1.1), r"preference \(1.1\)"),
        (lambda: Pair(chosen=GOOD, rejected=BAD, margin=-0.5), r"margin \(-0.5\)"),
        (lambda: Ranking(texts=(GOOD,), ranks=(0,)), r"texts \(1\)"),
        (lambda: Ranking(texts=(GOOD, BAD), ranks=(0, 1, 2)), r"ranks \(3\)"),
        (lambda: Ranking(texts=(GOOD, BAD), ranks=(-1, 0)), r"ranks \(\(-1, 0\)\)"),
    ],
)
def test_record_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_whole_bins_start_at_zero_and_take_nothing_between_or_outside():
    assert [whole_bins(1, 5)(value) for value in (1, 2.0, 5)] == [0, 1, 4]
    for value in (0, 6, 2.5):
        with pytest.raises(ValueError, match="whole number from 1 to 5"):
            whole_bins(1, 5)(value)


def test_even_bins_have_equal_widths():
    to_bin = even_bins(-4, 4, num_bins=5)  # of width 1.6: edges -2.4, -0.8, 0.8, 2.4
    assert [to_bin(value) for value in range(-4, 5)] == [0, 0, 1, 1, 2, 3, 3, 4, 4]
    with pytest.raises(ValueError, match="between -4 and 4"):
        to_bin(4.1)
    for wrong in (lambda: even_bins(1, 1, num_bins=2), lambda: even_bins(0, 1, num_bins=1), lambda: whole_bins(5, 1)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
