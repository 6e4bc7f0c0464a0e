"""SVG charts: places and heights by hand, words that cannot become markup, nothing drawn outside."""

from xml.etree import ElementTree

import pytest

from palm_rlhf_pytorch.feedback.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Column, Point, bars, shares

SVG = "{http://www.w3.org/2000/svg}"
PLOT = HEIGHT - TOP - BOTTOM


def boxes(svg):
    return [(box.get("class"), float(box.get("y")), float(box.get("height"))) for box in svg.iter(f"{SVG}rect")]


def test_columns_are_as_high_as_their_values_and_layers_stand_on_each_other():
    columns = [Column("mon", (2, 1)), Column("tue", (0, 4)), Column("wed", (0, 0))]
    svg = ElementTree.fromstring(bars(columns, label="by day"))
    # the axis ends at 4; a value of 0 draws nothing
    expected = [("c1", TOP + PLOT / 2, PLOT / 2), ("c2", TOP + PLOT / 4, PLOT / 4), ("c2", TOP, PLOT)]
    for (name, y, height), (want_name, want_y, want_height) in zip(boxes(svg), expected, strict=True):
        assert name == want_name and (y, height) == pytest.approx((want_y, want_height), abs=0.06)


@pytest.mark.parametrize(
    ("highest", "marks"),
    [(0, ["0", "1"]), (1, ["0", "1"]), (7, ["0", "2", "4", "6", "8"]), (1234, ["0", "500", "1,000", "1,500"])],
)
def test_axes_end_at_a_round_number_above_the_highest(highest, marks):
    svg = ElementTree.fromstring(bars([Column("x", (highest,))], label="one"))
    assert [text.text for text in svg.iter(f"{SVG}text")][: len(marks)] == marks


def test_shares_stand_at_their_height_with_their_interval_and_none_is_left_out():
    points = [Point("short", 0.75, 0.5, 1.0), Point("long", None, None, None)]
    svg = ElementTree.fromstring(shares(points, label="how often"))
    (dot,) = svg.iter(f"{SVG}circle")
    assert float(dot.get("cy")) == pytest.approx(TOP + PLOT / 4, abs=0.06)
    (interval,) = (line for line in svg.iter(f"{SVG}line") if line.get("class") == "interval")
    ends = float(interval.get("y1")), float(interval.get("y2"))
    assert ends == pytest.approx((TOP + PLOT / 2, TOP), abs=0.06)
    assert {"75%", "short", "long"} <= {text.text for text in svg.iter(f"{SVG}text")}


def test_names_stay_text_and_nothing_is_drawn_outside():
    evil = '</text><script>alert("x")</script>'
    columns = [Column(evil, (1.0,), evil)] + [Column(f"{number} Nov", (number,)) for number in range(30)]
    drawn = bars(columns, label=evil, shown=True)
    assert "<script" not in drawn
    svg = ElementTree.fromstring(drawn)
    assert svg.get("aria-label") == evil
    for box in svg.iter(f"{SVG}rect"):
        x, width = float(box.get("x")), float(box.get("width"))
        assert LEFT <= x and x + width <= WIDTH - RIGHT
    named = [float(text.get("x")) for text in svg.iter(f"{SVG}text") if (text.text or "").endswith("Nov")]
    assert all(after - before > 40 for before, after in zip(named, named[1:], strict=False))
