"""The supervised loop, ended and gone on with: the same bits, and nothing taken up that does not fit."""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.training.saves import Saves
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
    saves = Saves(Checkpoints(folder / "run"), every=4, resume=options.pop("resume", False))
    arguments = {"num_steps": STEPS, "lr": 0.05, "accumulate": 2, "warmup_steps": 3, "weight_decay": 0.1} | options
    fit(model, batches(), progress=False, metrics=MetricsLog(folder / "metrics.jsonl"), saves=saves, **arguments)
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
