"""Trackers: told once, closed always, and never the end of a run."""

import math
import warnings

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from palm_rlhf_pytorch.training import trackers as module
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.training.trackers import (
    FAILURES,
    Trackers,
    Tracking,
    check_trackers,
    flattened,
    markdown_table,
    tracked_accelerator,
)


@pytest.fixture(autouse=True)
def own_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Notebook(GeneralTracker):
    """Writes down each call; raises where it is told to."""

    name, requires_logging_directory = "notebook", False

    def __init__(self, fails=()):
        super().__init__()
        self.calls, self.fails = [], fails

    @property
    def tracker(self):
        return self

    def _call(self, *call):
        self.calls.append(call)
        if call[0] in self.fails:
            raise ConnectionError("the network\nis down")

    def store_init_configuration(self, values):
        self._call("config", values)

    def log(self, values, step=None, **kwargs):
        self._call("log", values, step)

    def log_table(self, table_name, columns=None, data=None, step=None):
        self._call("table", table_name, columns, data, step)

    def finish(self):
        self._call("finish")


def test_trackers_are_told_once_and_closed_after_an_error():
    notebook = Notebook()
    accelerator, trackers = tracked_accelerator({"cpu": True}, notebook)
    log = MetricsLog(None, accelerator=accelerator)
    log.log({"train/loss": 9.0}, 1)  # they do not run yet
    with pytest.raises(ZeroDivisionError), trackers.running({"seed": 3, "palm": {"dim": 8}}):
        log.log({"train/loss": 1.5}, 2)
        with Trackers(accelerator).running({"inner": 1}):  # as `fit` does inside a trainer
            MetricsLog(None, accelerator=accelerator, tracked=False).log({"train/loss": 7.0}, 3)
            trackers.log_table("samples", ("kind", "score"), [("best", 0.5)], step=2)
        raise ZeroDivisionError
    log.log({"train/loss": 9.0}, 4)
    assert notebook.calls == [
        ("config", {"seed": 3, "palm.dim": 8}),
        ("log", {"train/loss": 1.5}, 2),
        ("table", "samples", ["kind", "score"], [["best", 0.5]], 2),
        ("finish",),
    ]


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on(tmp_path):
    broken, whole = Notebook(fails=("log", "finish")), Notebook()
    accelerator, trackers = tracked_accelerator({"cpu": True}, [broken, whole])
    log = MetricsLog(tmp_path / "m.jsonl", accelerator=accelerator)
    with warnings.catch_warnings(record=True) as caught, trackers.running({}):
        warnings.simplefilter("always")
        for step in range(1, FAILURES + 3):
            log.log({"train/loss": 0.5}, step)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 1 and "notebook: ConnectionError: the network is down" in told[0]
    assert [call[0] for call in broken.calls] == ["config"] + ["log"] * FAILURES + ["finish"]
    assert [call[-1] for call in whole.calls[1:-1]] == [line["step"] for line in read_metrics(tmp_path / "m.jsonl")]


def test_a_tracker_that_does_not_start_ends_the_run_before_any_work():
    broken = Notebook(fails=("config",))
    accelerator, trackers = tracked_accelerator({"cpu": True}, broken)
    with pytest.raises(ValueError, match=r"notebook.*did not start \(ConnectionError: the network is down\)"):
        with trackers.running({}):
            raise AssertionError("nothing runs")
    assert broken.calls[-1] == ("finish",) and not accelerator.trackers


def test_tensorboard_files_hold_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = Tracking(log_with="tensorboard", project="mine")
    accelerator, trackers = tracked_accelerator({"cpu": True}, tracking, folder=tmp_path / "run")
    log = MetricsLog(None, accelerator=accelerator)
    with trackers.running({"lr": 0.5, "name": None}):
        for step, value in ((1, 0.25), (2, math.nan), (3, -2.0)):
            log.log({"reward/score": value}, step)
        trackers.log_table("samples", ("kind", "score"), [("best", 0.5)], step=3)
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "mine"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/score") if event.step != 2] == [
        (1, 0.25),
        (3, -2.0),
    ]
    (text,) = events.Tensors("samples/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "| kind | score |\n| --- | --- |\n| best | 0.500 |"


def test_what_names_no_tracker_is_refused_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'abacus', which is no tracker: choose from .*wandb"):
        check_trackers(["abacus"])
    with pytest.raises(ValueError, match="both name trackers"):
        tracked_accelerator({"log_with": "wandb"}, "tensorboard")
    monkeypatch.setattr(module, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ImportError, match=r'pip install "palm-rlhf-pytorch\[wandb\]"'):
        tracked_accelerator(None, Tracking(log_with="wandb"), folder=tmp_path)
    with pytest.raises(ValueError, match="'tensorboard', which writes files: give the trainer a run_dir"):
        tracked_accelerator({"cpu": True}, "tensorboard")
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_keeps_its_id(tmp_path):
    accelerator = Accelerator(cpu=True)
    first, again, other = (
        Trackers(accelerator, Tracking(log_with="wandb", init_kwargs={"wandb": {"mode": "offline"}}), tmp_path / name)
        for name in ("run", "run", "other")
    )
    started = first._arguments(["wandb"], 0)["wandb"]
    assert started == {"name": "run", "id": started["id"], "resume": "allow", "mode": "offline"}
    assert again._arguments(["wandb"], 5) == {
        **first._arguments(["wandb"], 5),
        "tensorboard": {"purge_step": 6},
    }
    assert other._arguments(["wandb"], 0)["wandb"]["id"] != started["id"]


def test_configurations_and_tables_are_written_as_trackers_take_them():
    config = {"a": {"b": {"c": 1}, "d": [1, "x"]}, "e": None, "f": True, "g": 0.5}
    assert flattened(config) == {"a.b.c": 1, "a.d": '[1, "x"]', "e": "None", "f": True, "g": 0.5}
    rows = [("a|b\n<i>", None), ("\\|", 0.12345)]
    assert markdown_table(("x", "y"), rows).splitlines()[2:] == ["| a\\|b<br>&lt;i> |  |", "| \\\\\\| | 0.123 |"]
