"""Checkpoints of the supervised loop: what is saved of it, and how it goes on.

A checkpoint is checked whole before any of it is taken over. Knows an optimizer and parameters by name, not what is
learnt.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints
from palm_rlhf_pytorch.training.folder import HIDDEN, discard, together
from palm_rlhf_pytorch.training.manifest import MANIFEST, CheckpointError, step_name, step_of
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizer_state import check_optimizer_state, given_state, is_adamw, kept_state
from palm_rlhf_pytorch.training.optimizers import kind_of
from palm_rlhf_pytorch.training.random_states import check_random_states, random_states, set_random_states
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.stopping import StopSignal
from palm_rlhf_pytorch.training.tensor_file import check_state

KIND = "fit"
GROUPS = ("model", "optimizer")
WRITTEN = {MANIFEST, *(f"{group}.safetensors" for group in GROUPS)}  # the files of a checkpoint
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ABSENT = "not recorded"


@dataclass
class Saves:
    """Checkpoints of a call of `fit`.

    Attributes:
        checkpoints: where they go, and which are kept.
        every: steps between two; the last step always makes one.
        resume: go on from the newest whole one, if there is one.
        stopped: after the call, the signal that ended it early, if one did.
        data: a digest or name of what is learnt from; a run resumes only with the same. Each process may have its own.
    """

    checkpoints: Checkpoints
    every: int = 100
    resume: bool = False
    stopped: str | None = None
    data: str | None = None


@dataclass
class Skips:
    """Steps left out because a number was not finite: all of them, and those since the last good one."""

    total: int = 0
    in_a_row: int = 0


class Keeper:
    """Saves a call of `fit`, brings it back, and listens for signals meanwhile; without `saves` it does nothing."""

    def __init__(
        self,
        saves: Saves | None,
        model: nn.Module,
        trained: list[nn.Parameter],
        optimizer: Optimizer,
        accelerator: Accelerator | None,
        plan: dict[str, Any],
    ) -> None:
        chosen = {id(parameter) for parameter in trained}
        self.parameters = {name: weight for name, weight in model.named_parameters() if id(weight) in chosen}
        self.saves, self.optimizer, self.skips = saves, optimizer, Skips()
        self.plan = plan if is_adamw(optimizer) else {**plan, "optimizer": kind_of(optimizer)}
        self.metrics: dict[str, float] = {}  # of the step that was resumed from
        self.accelerator, self.ranks = accelerator, Ranks(accelerator)
        self.stop = StopSignal(self.ranks, enabled=saves is not None)

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.__exit__()

    def resumed(self, source: Iterator[Any], metrics: MetricsLog | None) -> int:
        """Take over the newest checkpoint, if that is asked for; the steps that are done.

        Raises:
            ValueError: if it is of another model, other arguments or other data, holds what `fit` does not write, or
                the source gives fewer batches than were learnt from; weights, metrics and random states are then as
                they were.
        """
        if self.saves is None:
            return 0
        if not self.saves.resume:
            if self.saves.checkpoints.steps():
                raise ValueError("saves.checkpoints hold a run already: resume=True goes on with it")
            return 0
        found = self.saves.checkpoints.latest(kind=KIND)
        done = 0 if found is None else found.step
        if found is not None:
            together(self.accelerator, lambda: self._check(found, source))
        if metrics is not None:
            metrics.rewind(done)
        if found is not None:
            self._take(found)
        return done

    def _check(self, found: Checkpoint, source: Iterator[Any]) -> None:
        """Whether a checkpoint fits, to its last value; the batches that were learnt from are passed over."""
        _check_plan(found, self.plan)
        skips = _checked_skips(found)
        self._check_ranks(found)
        self._check_tensors(found, steps_taken=found.step - skips.total)
        needed = found.step * self.plan["accumulate"]
        for number in range(needed):
            try:
                next(source)
            except StopIteration:
                raise ValueError(
                    f"batches ran out after {number}, but {found.path} had learnt from {needed}; give what the run was "
                    "given, from its beginning"
                ) from None

    def _check_ranks(self, found: Checkpoint) -> None:
        """What is kept by process: random states, and what it learnt from."""
        assert self.saves is not None, "without saves there is nothing to resume"
        states, data = found.values.get("random"), found.values.get("data")
        if not isinstance(states, list) or not isinstance(data, list) or len(states) != len(data):
            raise CheckpointError(f"{found.path} does not hold random and data, two lists with a value of each process")
        if len(states) != self.ranks.count:
            raise ValueError(f"{found.path} was written by {len(states)} processes, this run has {self.ranks.count}")
        for rank, states_of_rank in enumerate(states):
            try:
                check_random_states(states_of_rank)
            except ValueError as error:
                raise CheckpointError(f"{found.path}, random[{rank}]: {error}") from error
        before, now = data[self.ranks.rank], self.saves.data
        if before != now:
            raise ValueError(f"{found.path} was written by a run over other data (saves.data: {before!r}, now {now!r})")

    def _check_tensors(self, found: Checkpoint, *, steps_taken: int) -> None:
        """Names, shapes and dtypes."""
        model, moments = (found.tensors.get(group, {}) for group in GROUPS)
        check_state(self.parameters, model, path=found.path / "model.safetensors")
        scaled = self.accelerator is not None and self.accelerator.scaler is not None  # may leave out any step
        if not moments and steps_taken and not scaled and is_adamw(self.optimizer):
            raise CheckpointError(f"{found.path / 'optimizer.safetensors'} is empty after {steps_taken} steps")
        order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = _by_parameter(moments)  # a parameter that got no gradient yet has nothing there
        begun = {str(number): parameter for number, parameter in enumerate(order) if str(number) in kept}
        file = found.path / "optimizer.safetensors"
        check_optimizer_state(self.optimizer, begun, moments, key=lambda name, moment: f"{name}.{moment}", path=file)
        for name, tensor in model.items():
            if tensor.dtype not in FLOATS:
                file = found.path / "model.safetensors"
                raise CheckpointError(f"{file} does not fit: {name} is {tensor.dtype}, expected a floating dtype")

    def _take(self, found: Checkpoint) -> None:
        """Take over a checkpoint that was checked."""
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(found.tensors["model"][name])
        kept = _by_parameter(found.tensors.get("optimizer", {}))
        moments = {int(number): given_state(state) for number, state in kept.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.skips, self.metrics = Skips(**found.values["skips"]), found.metrics
        set_random_states(found.values["random"][self.ranks.rank])

    def ended(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Save where it is time to; whether the run is to end here."""
        if self.saves is None:
            return False
        stopped = self.ranks.any(self.stop.name is not None)
        if stopped:
            self.saves.stopped = self.stop.name or "SIGTERM"
        if stopped or step % self.saves.every == 0 or step == self.plan["num_steps"]:
            self.saves.checkpoints.save(step, kind=KIND, metrics=metrics, **self._state())
        return stopped

    def _state(self) -> dict[str, Any]:
        assert self.saves is not None, "without saves nothing is kept"
        moments = self.optimizer.state_dict()["state"]
        optimizer = {
            f"{number}.{name}": value for number, state in moments.items() for name, value in kept_state(state).items()
        }
        return {
            "values": {
                "plan": self.plan,
                "skips": asdict(self.skips),
                "random": self.ranks.gather_values(random_states()),
                "data": self.ranks.gather_values(self.saves.data),
            },
            "tensors": {
                "model": {name: weight.detach() for name, weight in self.parameters.items()},
                "optimizer": optimizer,
            },
        }


def strangers(folder: Path) -> list[Path]:
    """What a folder of checkpoints holds, itself or in them, that `fit` did not write there."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = HIDDEN.fullmatch(path.name)  # a checkpoint that is being written, or deleted
        if _is_checkpoint(path):
            found += [inner for inner in sorted(path.iterdir()) if inner.name not in WRITTEN]
        elif match is None or step_of(match[1]) is None:
            found.append(path)
    return found


def clear(checkpoints: Checkpoints) -> None:
    """Remove the checkpoints of `fit`, whole or damaged, then their folder; strangers stay, and what they are in."""
    folder = checkpoints.folder
    kept = {stranger.parent for stranger in strangers(folder)}
    for path in [folder / step_name(step) for step in checkpoints.steps()]:
        if _is_checkpoint(path) and path not in kept:
            discard(path)
    with suppress(OSError):  # it is not empty
        folder.rmdir()


def _by_parameter(moments: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named "3.exp_avg" by the number of their parameter."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in moments.items():
        number, _, moment = name.partition(".")
        found.setdefault(number, {})[moment] = value
    return found


def _is_checkpoint(path: Path) -> bool:
    return step_of(path.name) is not None and path.is_dir() and not path.is_symlink()


def _check_plan(found: Checkpoint, plan: Mapping[str, Any]) -> None:
    kept = found.values.get("plan")
    if not isinstance(kept, dict):
        raise CheckpointError(f"{found.path} does not hold plan, the arguments of the run")
    before, now = ({name: of.get(name, ABSENT) for name in [*plan, *kept]} for of in (kept, plan))
    differing = [f"{name}: {before[name]}, now {now[name]}" for name in before if before[name] != now[name]]
    if differing:
        raise ValueError(f"{found.path} was written by a run with other arguments ({'; '.join(differing)})")
    if found.step > plan["num_steps"]:
        raise CheckpointError(f"{found.path} is of step {found.step}, beyond the run's num_steps ({plan['num_steps']})")


def _checked_skips(found: Checkpoint) -> Skips:
    kept = found.values.get("skips")
    if not isinstance(kept, dict) or kept.keys() != {"total", "in_a_row"}:
        raise CheckpointError(f"{found.path} does not hold skips, the counts total and in_a_row")
    counts = (kept["in_a_row"], kept["total"])
    if any(type(count) is not int for count in counts) or not 0 <= counts[0] <= counts[1] <= found.step:
        raise CheckpointError(f"{found.path} holds skips that cannot be: {kept} after {found.step} steps")
    return Skips(**kept)
