"""Curves: what is read of runs that are whole, resumed, broken or still going, and what is drawn of it."""

import json
import math
import re

import pytest

from palm_rlhf_pytorch.training.charts import Line, svg_chart, thinned, ticks, value_range
from palm_rlhf_pytorch.training.curves import Panel, differing_settings, panels_of, read_runs, smoothed, summary
from palm_rlhf_pytorch.training.plots import curves_plot, lines_of
from palm_rlhf_pytorch.training.runs_page import runs_page

NAN = math.nan


def write(path, lines, end=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return path


def run_of(folder, scores, **more):
    lines = [{"step": step, "reward/score": score} | more for step, score in enumerate(scores, start=1)]
    return write(folder / "metrics.jsonl", lines).parent


def test_smoothing_weighs_the_past_and_leaves_gaps():
    assert smoothed([2.0, NAN, 4.0], 0.5)[::2] == [2.0, pytest.approx((0.5 * 2 + 4) / 1.5)]
    assert math.isnan(smoothed([2.0, NAN, 4.0], 0.5)[1])
    assert smoothed([3.0, 1.0, 2.0], 0.0) == [3.0, 1.0, 2.0]
    assert smoothed([7.0] * 4, 0.9) == pytest.approx([7.0] * 4)  # no pull of the start
    with pytest.raises(ValueError, match=r"weight \(1\.0\)"):
        smoothed([1.0], 1.0)


def test_runs_are_read_while_they_go_on_and_after_they_were_resumed(tmp_path):
    lines = [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": None}, {"step": 3, "train/loss": 9.0}]
    again = [{"step": 3, "train/loss": 1.0, "eval/loss": 2.0}]
    (run,) = read_runs([write(tmp_path / "palm.metrics.jsonl", lines + again, end='{"step": 4, "tr')])
    steps, values = run.curve("train/loss")
    assert (run.name, run.unit, steps) == ("palm", "step", [1, 2, 3])
    assert values[0] == 3.0 and math.isnan(values[1]) and values[2] == 1.0
    assert run.curve("eval/loss") == ([3], [2.0]) and run.last("train/loss") == 1.0 and run.last("value/loss") is None


def test_names_tell_runs_apart_and_settings_that_differ_are_told(tmp_path):
    first, second = run_of(tmp_path / "a" / "run", [1.0, 3.0, 2.0]), run_of(tmp_path / "b" / "run", [0.5])
    (first / "config.yaml").write_text("seed: 1\nlr: 0.1\nextra: 5\n")
    (second / "config.yaml").write_text("seed: 2\nlr: 0.1\n")
    runs = read_runs([first, second])
    assert [run.name for run in runs] == ["a/run", "b/run"]
    assert differing_settings(runs) == (["setting", "a/run", "b/run"], [["seed", "1", "2"]])
    columns, rows = summary(runs)
    assert columns == ["run", "steps", "best score", "last score"]
    assert rows[0] == ["a/run", "3 updates", "3 (update 2)", 2.0]


def test_panels_are_those_there_are_numbers_for(tmp_path):
    runs = read_runs(
        [run_of(tmp_path / "x", [1.0, 2.0], **{"policy/loss": 0.5, "policy/lr": 1e-3, "value/loss": None})]
    )
    assert panels_of(runs) == [
        Panel("Score", ("reward/score",)), Panel("Policy loss", ("policy/loss",)),
        Panel("Learning rate", ("policy/lr",)),
    ]  # fmt: skip
    assert [panel.names for panel in panels_of(runs, ["policy/*", "reward/score"])] == [
        ("policy/loss",), ("policy/lr",), ("reward/score",),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'policy/los'; did you mean policy/loss\?"):
        panels_of(runs, ["policy/los"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such run"),
        ("", "no whole line yet"),
        ('{"step": 1', "no whole line yet"),
        ('{"loss": 1}\n', "without a step"),
        ("hello\n", "line 1 of .* is not JSON"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, content, message):
    path = tmp_path / "m.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_runs([path])
    with pytest.raises(FileNotFoundError, match="metrics.jsonl" + ("; it holds m.jsonl" if path.exists() else "")):
        read_runs([tmp_path])


def test_runs_of_different_kinds_share_a_panel_only_where_they_mean_the_same(tmp_path):
    direct = write(tmp_path / "dpo.metrics.jsonl", [{"step": 1, "dpo/loss": 0.7, "eval/loss": 0.6}])
    reward = write(
        tmp_path / "rm.metrics.jsonl", [{"step": 1, "train/loss": 0.5, "eval/loss": 0.4, "eval/accuracy": 1.0}]
    )
    runs = read_runs([direct, reward])
    panels = panels_of(runs)
    assert [panel.names for panel in panels] == [
        ("dpo/loss", "eval/loss"), ("train/loss", "eval/loss"), ("eval/accuracy",),
    ]  # fmt: skip
    assert [line.raw for line in lines_of(runs, panels[0], 0.0)] == [[0.7], [0.6]]
    assert [line.raw for line in lines_of(runs, panels[1], 0.0)] == [[0.5], [0.4]]


def test_a_run_is_drawn_once(tmp_path):
    folder = run_of(tmp_path / "x", [1.0])
    with pytest.raises(ValueError, match="named twice"):
        read_runs([folder, folder / "metrics.jsonl"])


def test_ticks_are_round_and_lines_keep_spikes_and_gaps_when_thinned():
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.011, 0.021) == pytest.approx([-0.01, 0.0, 0.01, 0.02])
    values = [0.0] * 5000
    values[1234], values[4321] = 8.0, -8.0
    steps, kept = thinned(range(5000), values)
    assert len(kept) <= 502 and (steps[kept.index(8.0)], steps[kept.index(-8.0)]) == (1234, 4321)
    values[2000:2100] = [NAN] * 100
    assert any(map(math.isnan, thinned(range(5000), values)[1]))
    spiky = [1.0] * 99 + [1e6]
    assert value_range([Line("x", 0, False, range(100), spiky, [1.0] * 100)])[1] < 2


def test_a_chart_breaks_at_gaps_and_tells_its_numbers():
    values = [1.0, NAN, 3.0, 4.0, NAN, 2.0]
    svg = svg_chart([Line("a<b", 1, True, [1, 2, 3, 4, 5, 6], values, values)], title="t", unit="update")
    (path,) = re.findall(r'<path class="main dashed"[^>]* d="([^"]*)"', svg)
    assert path.count("M") == 3 and "nan" not in svg
    told = re.findall("<title>([^<]*)</title>", svg)
    assert sorted(told) == [f"a&lt;b, update {step}: {value:g}" for step, value in ((1, 1), (3, 3), (4, 4), (6, 2))]


def test_page_and_picture_of_runs_that_differ_in_what_they_hold(tmp_path):
    runs = read_runs(
        [run_of(tmp_path / "x", [1.0, None, 2.0]), run_of(tmp_path / "y", [0.5], **{"policy/entropy": 2.0})]
    )
    samples = {
        "x": [{"step": 1, "kind": "best", "prompt": "<script>", "response": "a\ud800b", "score": 1.0, "kl": None}]
    }
    page = runs_page(runs, panels_of(runs), samples=samples)
    assert page.count("<figure>") == 2 and "&lt;script&gt;" in page and "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)  # nothing is fetched
    pytest.importorskip("matplotlib")
    curves_plot(runs, panels_of(runs), tmp_path / "runs.png", weight=0.5)
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end with one of"):
        curves_plot(runs, panels_of(runs), tmp_path / "runs.gif")


def test_what_is_no_number_is_not_drawn(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "reward/score": "high", "note": "a", "x": [1]}, {"step": 2, "reward/score": 0.5, "y": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([tmp_path])
    assert run.curve("reward/score") == ([2], [0.5]) and run.last("reward/score") == 0.5
    assert [panel.names for panel in panels_of([run])] == [("reward/score",)]
