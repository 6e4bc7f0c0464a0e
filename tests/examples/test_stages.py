"""The numbered examples run one after the other, at their quick size, each from the files of those before it."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples"
STAGES = sorted(FOLDER.glob("[0-9]_*.py"))
TASK = runpy.run_path(str(FOLDER / "alphabet.py"))


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_example_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.parametrize(
    ("question", "answer", "score"),
    [
        ("Which 4 letters follow c?", " defg", 1.0),
        ("Which 3 letters follow y?", "zab", 1.0),
        ("Which 4 letters follow c?", " dexg", 3 / 4),
        ("Which 4 letters follow c?", " defgh", (4 - 1) / 4),
        ("Which 4 letters follow c?", "", -1.0),
    ],
)
def test_rule_scores_what_was_said(question, answer, score):
    assert TASK["rule"](TASK["asked"](question), answer) == pytest.approx(score)


def test_no_question_is_both_judged_and_kept():
    judged, kept = (TASK["questions"](held_out=held) for held in (False, True))
    assert not set(judged) & set(kept)
    assert len(judged) + len(kept) == 26 * 5


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
    rule = TASK["rule"]
    assert rows and all(rule(row["prompt"], row["chosen"]) > rule(row["prompt"], row["rejected"]) for row in rows)
    for name in ("ppo", "grpo", "dpo"):
        assert (tmp_path / "run" / name / "metrics.jsonl").stat().st_size > 0
        assert f"\n{name}: right answers" in printed["7"]
