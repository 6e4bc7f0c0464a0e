"""The supervised loop, ended and gone on with: the same bits, and nothing taken up that does not fit."""

import itertools
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints, load_checkpoint, save_checkpoint
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.training.random_states import check_random_states, random_states
from palm_rlhf_pytorch.training.saves import Saves, clear, strangers
from palm_rlhf_pytorch.training.supervised import fit

STEPS = 9


class Noisy(nn.Module):
    """A regression with dropout, which draws from torch's global random state; it can end its own process."""

    def __init__(self, *, signal_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(3, 7), nn.Dropout(0.3), nn.Linear(7, 1))
        self.layers[0].bias.requires_grad_(False)
        self.calls, self.signal_at = itertools.count(1), signal_at

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls) == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return (self.layers(x) - x.sum(dim=-1, keepdim=True)).square().mean()


def batches() -> Iterator[dict[str, Tensor]]:
    for seed in itertools.count():
        yield {"x": torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))}


def run(folder: Path, model: Noisy, **options: Any) -> tuple[Noisy, Saves]:
    data, source = options.pop("data", None), options.pop("source", batches())
    saves = Saves(Checkpoints(folder / "run"), every=4, resume=options.pop("resume", False), data=data)
    arguments = {"num_steps": STEPS, "lr": 0.05, "accumulate": 2, "warmup_steps": 3, "weight_decay": 0.1} | options
    fit(model, source, progress=False, metrics=MetricsLog(folder / "metrics.jsonl"), saves=saves, **arguments)
    return model, saves


@pytest.mark.parametrize("signal_at", [1, 8, 11])  # a forward pass; two make a step, checkpoints stand at 4 and 8
def test_a_run_told_to_stop_goes_on_to_the_same_bits(tmp_path: Path, signal_at: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected, _ = run(tmp_path / "alone", Noisy())
        torch.manual_seed(1)
        stopped, saves = run(tmp_path / "told", Noisy(signal_at=signal_at))
        assert saves.stopped == "SIGTERM" and saves.checkpoints.steps()[-1] == -(-signal_at // 2)
        torch.manual_seed(2)
        found, saves = run(tmp_path / "told", Noisy(), resume=True)
    assert saves.stopped is None
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("told", "alone"))
    assert [line["train/loss"] for line in ours] == [line["train/loss"] for line in theirs] and len(ours) == STEPS


@pytest.mark.parametrize("signal_at", [3, 7, 11])  # in steps 2, 4 and 6, of which the last is the one to stop at
def test_a_run_that_stops_by_itself_stops_at_the_same_step_when_gone_on_with(tmp_path: Path, signal_at: int) -> None:
    asked: list[int] = []

    def stop(step: int, metrics: Mapping[str, float]) -> bool:
        assert metrics["eval/loss"] == 0.5
        asked.append(step)
        return step >= 6

    options = {"evaluate": lambda: {"eval/loss": 0.5}, "eval_every": 2, "stop": stop}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected, _ = run(tmp_path / "alone", Noisy(), **options)
        assert asked == [2, 4, 6]
        torch.manual_seed(1)
        run(tmp_path / "told", Noisy(signal_at=signal_at), **options)
        asked.clear()
        found, _ = run(tmp_path / "told", Noisy(), resume=True, **options)
    assert asked == list(range(-(-signal_at // 2), 7, 2))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert len(read_metrics(tmp_path / "told" / "metrics.jsonl")) == 6


def test_what_was_done_since_the_last_checkpoint_is_done_again_and_logged_once(tmp_path: Path) -> None:
    class FaultError(Exception):
        pass

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from itertools.islice(batches(), 13)
        raise FaultError

    log = MetricsLog(tmp_path / "metrics.jsonl")
    saves = Saves(Checkpoints(tmp_path / "run"), every=4)
    with torch.random.fork_rng(), pytest.raises(FaultError):
        fit(Noisy(), broken(), num_steps=STEPS, lr=0.05, accumulate=2, progress=False, metrics=log, saves=saves)
    assert len(read_metrics(log.path or "")) == 6 and saves.checkpoints.steps() == [4]
    run(tmp_path, Noisy(), resume=True, warmup_steps=0, weight_decay=0.0)
    assert [line["step"] for line in read_metrics(log.path or "")] == list(range(1, STEPS + 1))


def test_a_run_that_does_not_fit_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    run(tmp_path, Noisy(), num_steps=4)
    with pytest.raises(ValueError, match="holds? a run already: resume=True"):
        run(tmp_path, Noisy(), num_steps=4)
    with pytest.raises(ValueError, match="num_steps: 4, now 5"):
        run(tmp_path, Noisy(), num_steps=5, resume=True)
    other = Noisy()
    other.layers[2] = nn.Linear(7, 2)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    with pytest.raises(ValueError, match=r"layers.2.weight: file \(1, 7\), model \(2, 7\)"):
        run(tmp_path, other, num_steps=4, resume=True)
    assert all(torch.equal(now, then) for now, then in zip(other.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the data "cats", interrupted at step 5, and one line of metrics that is younger than its checkpoint."""
    folder = tmp_path_factory.mktemp("half_way")
    with torch.random.fork_rng():
        run(folder, Noisy(signal_at=10), data="cats")
    MetricsLog(folder / "metrics.jsonl").log({"train/loss": 1.0}, 6)
    return folder


def refused(folder: Path, message: str, **options: Any) -> None:
    """The run does not go on, and its model, metrics and random states are as before."""
    model = Noisy()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    metrics = (folder / "metrics.jsonl").read_bytes()
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with pytest.raises(ValueError, match=message):
        run(folder, model, resume=True, **{"data": "cats"} | options)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), weights, strict=True))
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def put(group: str, name: str, tensor: Tensor) -> Callable[[Checkpoint], object]:
    return lambda old: old.tensors[group].update({name: tensor})


# trained are, in the optimizer's order, weights (7, 3) and (1, 7), then the bias (1,)
FORGERIES = [
    (put("optimizer", "0.exp_avg", torch.zeros(1)), r"0.exp_avg: file \(1,\), model \(7, 3"),
    (put("optimizer", "2.step", torch.ones(1)), r"optimizer.safetensors .*2.step: file \(1,"),
    (put("optimizer", "1.exp_avg_sq", torch.zeros(1, 7).int()), "1.exp_avg_sq is torch.int32"),
    (put("optimizer", "3.exp_avg", torch.zeros(1)), r"unexpected keys \(3.exp_avg"),
    (put("optimizer", "moments", torch.zeros(1)), r"unexpected keys \(moments"),
    (lambda old: old.tensors["optimizer"].pop("1.step"), r"missing keys \(1.step"),
    (lambda old: old.tensors["optimizer"].clear(), "optimizer.safetensors is empty after 5 steps"),
    (put("model", "layers.2.bias", torch.ones(1).bool()), "layers.2.bias is torch.bool"),
    (lambda old: old.tensors.pop("model"), "3 missing keys"),
    (lambda old: old.values["plan"].pop("max_norm"), "max_norm: not recorded, now 1.0"),
    (lambda old: old.values.update(plan=[1]), "does not hold plan"),
    (lambda old: old.values["skips"].update(total=6), "skips that cannot be"),
    (lambda old: old.values["skips"].pop("in_a_row"), "does not hold skips"),
    (lambda old: old.values.pop("data"), "does not hold random and data"),
    (lambda old: old.values.update(random=old.values["random"] * 2, data=["cats"] * 2), "written by 2 processes"),
    (lambda old: old.values["random"][0]["numpy"].__setitem__(2, 625), r"random\[0\]: the random state of numpy"),
]  # fmt: skip


@pytest.mark.parametrize(("forge", "message"), FORGERIES)
def test_a_forged_checkpoint_is_refused_and_nothing_changes(
    half_way: Path, tmp_path: Path, forge: Callable[[Checkpoint], object], message: str
) -> None:
    folder = shutil.copytree(half_way, tmp_path / "forged")
    path = folder / "run" / "step-00000005"
    old = load_checkpoint(path, kind="fit")
    forge(old)
    save_checkpoint(path, kind="fit", step=5, values=old.values, tensors=old.tensors)
    shutil.rmtree(folder / "run" / "step-00000004")
    refused(folder, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.2}, "weight_decay: 0.1, now 0.2"),
        ({"max_norm": None}, "max_norm: 1.0, now None"),
        ({"data": "dogs"}, "over other data .*'cats', now 'dogs'"),
        ({"data": None}, "over other data .*'cats', now None"),
        ({"source": itertools.islice(batches(), 9)}, "ran out after 9, but .*step-00000005 had learnt from 10"),
    ],
)
def test_other_arguments_or_data_are_refused_and_nothing_changes(
    half_way: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    refused(shutil.copytree(half_way, tmp_path / "copy"), message, **options)


def test_parameters_and_steps_that_learnt_nothing_have_no_moments_and_go_on(tmp_path: Path) -> None:
    class Spare(Noisy):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.spare = nn.Parameter(torch.ones(2, 4))

    def first_is_broken() -> Iterator[dict[str, Tensor]]:
        yield {"x": torch.full((5, 3), torch.nan)}
        yield from itertools.islice(batches(), 1, None)

    with torch.random.fork_rng():
        for steps, signal_at in ((1, 2), (5, 8)):  # a step that was left out, then four that were taken
            _, saves = run(tmp_path, Spare(signal_at=signal_at), source=first_is_broken(), resume=steps > 1)
            assert saves.checkpoints.steps()[-1] == steps and saves.stopped == "SIGTERM"
            found = load_checkpoint(tmp_path / "run" / f"step-0000000{steps}", kind="fit")
            assert len(found.tensors["optimizer"]) == (0 if steps == 1 else 9)
        _, saves = run(tmp_path, Spare(), source=first_is_broken(), resume=True, max_skipped_steps=7)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["train/skipped_steps"] for line in lines] == [1.0] * STEPS and saves.stopped is None


def test_a_run_that_is_done_gives_its_last_metrics_again(tmp_path: Path) -> None:
    def results(*, resume: bool) -> dict[str, float]:
        saves = Saves(Checkpoints(tmp_path), resume=resume)
        options = {"num_steps": 2, "lr": 0.05, "progress": False, "evaluate": lambda: {"eval/loss": 0.25}}
        return fit(Noisy(), batches(), saves=saves, **options)

    with torch.random.fork_rng():
        first = results(resume=False)
        assert first["eval/loss"] == 0.25 and results(resume=True) == first


def test_clear_removes_checkpoints_and_leaves_what_is_not_of_the_run(half_way: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(half_way / "run", tmp_path / "run")
    assert strangers(folder) == [] and strangers(tmp_path / "none") == []
    ours, theirs = folder / "notes.txt", folder / "step-00000004" / "notes.txt"
    for path in (ours, theirs):
        path.write_text("kept")
    (folder / ".step-00000005.removed").mkdir()
    (folder / "step-00000005" / "manifest.json").write_text("damaged")
    assert strangers(folder) == [ours, theirs]
    clear(Checkpoints(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step-00000004"]
    assert ours.read_text() == theirs.read_text() == "kept"
    ours.unlink()
    theirs.unlink()
    clear(Checkpoints(folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("python", 0), 2),
        (("python", 1), [1] * 624),
        (("python", 1, 624), -1),
        (("python", 1, 7), 2**32),
        (("python", 2), "0.5"),
        (("numpy", 0), "PCG64"),
        (("numpy", 1, 3), 0.5),
        (("numpy", 2), True),
        (("numpy", 3), 2),
        (("torch",), "00" * 5056),
        (("torch",), "00" * 7),
        (("torch",), "no"),
        (("torch",), None),
        (("cuda",), "00"),
        (("cuda",), [3]),
        (("more",), 1),
    ],
)
def test_random_states_that_cannot_be_set_are_named(where: tuple[Any, ...], value: object) -> None:
    states = random_states()
    check_random_states(states)
    *outer, last = where
    place: Any = states
    for key in outer:
        place = place[key]
    place[last] = value
    with pytest.raises(ValueError, match="must hold" if last == "more" else f"random states? of {where[0]}"):
        check_random_states(states)
