"""Metrics: every name defined, every line whole, means by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from palm_rlhf_pytorch.training.metrics import GLOSSARY, MetricsLog, RunningMean, joined_names, read_metrics


def test_log_appends_one_json_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    log = MetricsLog(path)
    log.log({"train/loss": 1.5, "train/lr": torch.tensor(0.25)}, 1)
    assert path.read_text() == '{"step": 1, "train/loss": 1.5, "train/lr": 0.25}\n'
    MetricsLog(path).log({"episodes": 7}, 2)
    assert read_metrics(path) == [{"step": 1, "train/loss": 1.5, "train/lr": 0.25}, {"step": 2, "episodes": 7.0}]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    log.log({"train/loss": math.nan, "train/lr": math.inf, "train/grad_norm": torch.tensor(-math.inf)}, 3)
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {
        "step": 3,
        "train/loss": None,
        "train/lr": None,
        "train/grad_norm": None,
    }
    assert math.isnan(read_metrics(tmp_path / "m.jsonl")[0]["train/loss"])


@pytest.mark.parametrize("name", ["policy/approxkl", "", "step"])
def test_undefined_name_is_refused_before_writing(tmp_path: Path, name: str) -> None:
    log = MetricsLog(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="GLOSSARY"):
        log.log({"train/loss": 1.0, name: 2.0}, 1)
    assert not (tmp_path / "m.jsonl").exists()
    with pytest.raises(ValueError, match="GLOSSARY"):
        MetricsLog(None).log({name: 2.0}, 1)


def test_glossary_defines_every_name_in_words() -> None:
    for name, definition in GLOSSARY.items():
        assert name in ("step", "episodes") or name.count("/") == 1
        assert len(definition) > 10


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"step": 1}\n{"step": 2, "train/l', '{"step": 1}\n'),
        ('{"step": 1}\n{"s', '{"step": 1}\n'),
        ("someone's notes", "someone's notes\n"),
        ("", ""),
    ],
)
def test_log_goes_on_after_an_unfinished_line(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(before)
    MetricsLog(path).log({"eval/loss": 2.0}, 3)
    assert path.read_text() == after + '{"step": 3, "eval/loss": 2.0}\n'


def test_rewind_takes_out_the_lines_of_later_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.rewind(3)  # where there is nothing yet
    notes = ["someone's notes\n", '["step", 9]\n', '{"run": 9}\n', '{"step": "9"}\n']
    steps = [f'{{"step": {step}, "train/loss": 0.1}}\n' for step in (2, 3, 4, 11)]
    path.write_text("".join([*notes, *steps]))
    log.rewind(11)
    assert path.read_text() == "".join([*notes, *steps])
    monkeypatch.setattr(MetricsLog, "_is_main", property(lambda self: False))
    log.rewind(0)
    assert path.read_text() == "".join([*notes, *steps])
    monkeypatch.undo()
    log.rewind(3)
    log.log({"train/loss": 0.5}, 4)
    assert path.read_text() == "".join([*notes, *steps[:2], '{"step": 4, "train/loss": 0.5}\n'])
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]


def test_read_metrics_skips_an_unfinished_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"step": 2, "tr\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*m\.jsonl"):
        read_metrics(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"line 1 of .*m\.jsonl is not a JSON object"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="gone"):
        read_metrics(tmp_path / "gone")
    with pytest.raises(ValueError, match="not a file"):
        MetricsLog(tmp_path)


class Recorder(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "recorder"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[dict[str, Any], int | None]] = []

    @property
    def tracker(self) -> "Recorder":
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.calls.append((values, step))


def test_log_reaches_the_trackers(tmp_path: Path) -> None:
    recorder = Recorder()
    accelerator = Accelerator(cpu=True, log_with=recorder)
    accelerator.init_trackers("test")
    MetricsLog(tmp_path / "m.jsonl", accelerator=accelerator).log({"train/loss": torch.tensor(0.5)}, 4)
    assert recorder.calls == [({"train/loss": 0.5}, 4)]
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 4, "train/loss": 0.5}]
    MetricsLog(None, accelerator=Accelerator(cpu=True)).log({"train/loss": 1.0}, 5)


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(Accelerator, "is_main_process", property(lambda self: False))
    MetricsLog(tmp_path / "new" / "m.jsonl", accelerator=accelerator).log({"train/loss": 1.0}, 1)
    assert list(tmp_path.iterdir()) == []


def test_running_mean_is_weighted() -> None:
    mean = RunningMean()
    mean.add({"train/loss": 1.0, "train/lr": torch.tensor(2.0, requires_grad=True)}, weight=3)
    mean.add({"train/loss": torch.tensor(5.0)}, weight=torch.tensor(1))
    assert mean.compute() == {"train/loss": 2.0, "train/lr": 2.0}  # (3 * 1 + 1 * 5) / 4
    mean.clear()
    assert mean.compute() == {}


def test_running_mean_ignores_what_weighs_nothing() -> None:
    mean = RunningMean()
    mean.add({"train/loss": math.nan}, weight=0)
    mean.add({"train/loss": torch.tensor(math.nan)}, weight=torch.tensor(0.0))
    assert mean.compute() == {}
    mean.add({"train/loss": 4.0}, weight=2)
    assert mean.compute() == {"train/loss": 4.0}


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "palm.pt"
    path.write_bytes(b"PK\x03\x04\x80\n")
    with pytest.raises(ValueError, match=r"palm.pt is not UTF-8 \(at byte 4\)"):
        read_metrics(path)


def test_nested_names_are_joined_by_dots():
    nested = {"a": {"b": {"c": 1}, "d": [{"x": 2}]}, 3: {"e": None}, "f": {}}
    assert joined_names(nested) == {"a.b.c": 1, "a.d": [{"x": 2}], "3.e": None}
