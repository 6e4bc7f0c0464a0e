"""Stop strings: what is shown, and when."""

import random

import pytest

from palm_rlhf_pytorch.text.stops import StopFilter, check_stops


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        ((), ["a", "b"], ["a", "b", ""]),
        (("\n\nHuman:",), ["Hi.", "\n", "\nHu", "man:", " more"], ["Hi.", "", "", "", "", ""]),
        (("\n\nHuman:",), ["Hi.\n", "\nHu", "go", "\n"], ["Hi.", "", "\n\nHugo", "", "\n"]),
        (("stop",), ["begins stop and goes on"], ["begins ", ""]),
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", "", ""]),  # the first a is told only by the third
        (("bc", "abcd"), ["abcd"], ["a", ""]),  # bc is whole first
        (("bc", "abc"), ["xa", "bc"], ["x", "", ""]),  # both end here: nothing of the longer is shown
    ],
)
def test_pieces_pass_until_a_stop_string_is_whole(stops, pieces, shown):
    stop_filter = StopFilter(stops)
    assert [stop_filter.add(piece) for piece in pieces] + [stop_filter.finish()] == shown


def test_what_is_shown_does_not_depend_on_how_the_text_was_cut():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("abc", k=draw.randrange(12)))
        stops = ["".join(draw.choices("abc", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
        ended = [stop for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
        first = next((end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)), None)
        longest = max((len(stop) for stop in stops if first and text[:first].endswith(stop)), default=0)
        expected = text if first is None else text[: first - longest]
        stop_filter, shown, rest = StopFilter(stops), "", text
        while rest:
            size = draw.randrange(1, 5)
            shown += stop_filter.add(rest[:size])
            assert expected.startswith(shown)
            rest = rest[size:]
        assert shown + stop_filter.finish() == expected and stop_filter.stopped == bool(ended)


def test_stop_strings_are_checked():
    assert check_stops("ab") == ("ab",) and check_stops(["a", "b"]) == ("a", "b")
    with pytest.raises(ValueError, match=r"stop\[1\] is empty"):
        check_stops(["a", ""])
    with pytest.raises(TypeError, match=r"stop\[0\] is of type int"):
        check_stops([3])
    with pytest.raises(TypeError, match="stop is of type int"):
        check_stops(3)
