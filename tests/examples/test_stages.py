"""The numbered examples run one after the other, at their quick size, each from the files of those before it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
STAGES = sorted(FOLDER.glob("[0-9]_*.py"))
COUNTING = runpy.run_path(str(FOLDER / "counting.py"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        ("From 3 to 6?", " 3 4 5 6", 1.0),
        ("From 11 to 8?", "11 10 9 8", 1.0),
        # three of four numbers: 2 * 3 / 7; "3 4 6" of "3 4 5 6", all five characters: 2 * 5 / 12
        ("From 3 to 6?", " 3 4 6", (6 / 7 + 10 / 12) / 2),
        ("From 3 to 6?", "", 0.0),
    ],
)
def test_rule_scores_what_was_said(question, answer, score):
    assert COUNTING["rule"](COUNTING["asked"](question), answer) == pytest.approx(score)


def test_no_question_is_both_judged_and_kept():
    judged, kept = (COUNTING["questions"](held_out=held) for held in (False, True))
    assert not set(judged) & set(kept)
    assert len(judged) + len(kept) == 220  # 31 numbers, of which 29, 28, 27 and 26 pairs are 2 to 5 apart, both ways


@pytest.mark.filterwarnings("ignore:.*steps teach little:UserWarning")
def test_examples_run_in_order_each_from_what_the_others_wrote(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    printed = {}
    for path in STAGES:
        monkeypatch.setattr(sys, "argv", [path.name, "--quick", "--out", str(tmp_path / "run")])
        runpy.run_path(str(path), run_name="__main__")
        printed[path.stem[0]] = capsys.readouterr().out
    assert list(printed) == list("1234567")
    bits = float(re.search(r"([\d.]+) bits a byte", printed["1"])[1])
    assert 4 < bits < 8.1  # ten steps have taught it a little
    rows = [json.loads(line) for line in (tmp_path / "run" / "labels.jsonl").read_text(encoding="utf-8").splitlines()]
    rule = COUNTING["rule"]
    assert rows and all(rule(row["prompt"], row["chosen"]) > rule(row["prompt"], row["rejected"]) for row in rows)
    for name in ("ppo", "grpo", "dpo"):
        assert (tmp_path / "run" / name / "metrics.jsonl").stat().st_size > 0
        assert f"\n{name}: right answers" in printed["7"]
