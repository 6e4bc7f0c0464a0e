"""The plain values of a trainer's checkpoint, checked whole before any of them is taken over.

A checkpoint is verified against its own SHA-256, which says that it is as it was written, not that a trainer wrote it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch.policy.arguments import Call
from palm_rlhf_pytorch.policy.doctor import Doctor
from palm_rlhf_pytorch.policy.progress import Progress
from palm_rlhf_pytorch.policy.run import MAX_ROUNDS
from palm_rlhf_pytorch.policy.watch import Watch
from palm_rlhf_pytorch.training.random_states import check_random_states

COUNTERS = ("rollouts", "answers", "episodes", "updates", "saves")
WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)  # what odd values raise


@dataclass
class FlightRecord:
    """What is kept of an update in hand; see `Flight`."""

    size: int
    rounds: int
    max_batch_size: int
    refreshed: bool
    held_out: dict[str, float] | None
    parts: dict[str, list[float]]
    progress: dict[str, Any] | None


@dataclass
class Record:
    """The values, each of the type and range it must have."""

    seed: int
    processes: int
    prompts_taken: int
    steps: int
    skipped_in_a_row: int
    counters: dict[str, int]
    kl_coef: float
    normalizer: dict[str, float | None]
    doctor: dict[str, Any]
    watch: dict[str, Any] | None
    judges: list[dict[str, Any] | None]
    learning_rates: list[float]
    scaler: dict[str, Any] | None
    call: Call | None
    flight: FlightRecord | None
    random: list[Any]


def read_record(path: Path, values: Mapping[str, Any], *, num_groups: int) -> Record:
    """What `state_of` wrote, checked.

    Args:
        path: of the checkpoint, for messages.
        values: its plain values.
        num_groups: parameter groups of the optimizer.

    Raises:
        ValueError: if a value is missing, or is not what it must be.
    """
    try:
        return _record(values, num_groups)
    except WRONG as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not what a trainer writes ({reason}); nothing was taken over") from error


def _record(values: Mapping[str, Any], num_groups: int) -> Record:
    whole = {name: _count(values[name], name) for name in ("seed", "prompts_taken", "steps", "skipped_in_a_row")}
    processes = _count(values["processes"], "processes", least=1)
    doctor = dict(values["doctor"])
    trial = Doctor(eos_token=True)
    trial.restore(doctor)
    trial.examine({})  # it must be able to go on with that
    watch = None if values["watch"] is None else dict(values["watch"])
    if watch is not None:
        again = Watch()
        again.restore(watch)
        again.examine({"reward/score": 0.0}, 1)
    rates = [_number(rate, "learning_rates") for rate in values["learning_rates"]]
    if len(rates) != num_groups:
        raise ValueError(f"learning_rates are {len(rates)}, the optimizer has {num_groups} groups")
    random = list(values["random"])
    if len(random) != processes:
        raise ValueError(f"random states are of {len(random)} processes, not {processes}")
    for states in random:
        check_random_states(states)
    scaler, call, flight = values["scaler"], values["call"], values["flight"]
    return Record(
        **whole,
        processes=processes,
        counters={name: _count(values["counters"][name], name) for name in COUNTERS},
        kl_coef=_number(values["kl_coef"], "kl_coef"),
        normalizer=_normalizer(values["normalizer"]),
        doctor=doctor,
        judges=[None if kept is None else _judge_sum(kept) for kept in values["judges"]],
        watch=watch,
        learning_rates=rates,
        scaler=None if scaler is None else dict(scaler),
        call=None if call is None else _call(call),
        flight=None if flight is None else _flight(flight),
        random=random,
    )


def _normalizer(kept: Mapping[str, Any]) -> dict[str, float | None]:
    found = {name: kept[name] for name in ("mean", "std")}
    for name, value in found.items():
        if value is not None and not math.isfinite(float(value) + 0.0 * value):
            raise ValueError(f"normalizer's {name} is {value!r}")
    return found


def _judge_sum(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _normalizer(state) for name, state in kept.items()}


def _call(kept: Mapping[str, Any]) -> Call:
    call = Call(**kept)
    for name in ("num_episodes", "max_seq_len", "update_timesteps"):
        _count(getattr(call, name), name, least=1)
    _count(call.done, "done")
    _count(call.updates, "updates")
    return call


def _flight(kept: Mapping[str, Any]) -> FlightRecord:
    flight = FlightRecord(**kept)
    _count(flight.size, "size", least=1)
    if _count(flight.rounds, "rounds", least=1) > MAX_ROUNDS:
        raise ValueError(f"rounds is {flight.rounds}, above {MAX_ROUNDS}")
    _count(flight.max_batch_size, "max_batch_size", least=1)
    if not isinstance(flight.refreshed, bool):
        raise ValueError(f"refreshed is {flight.refreshed!r}")
    if flight.held_out is not None:
        flight.held_out = {str(name): float(value) for name, value in flight.held_out.items()}
    flight.parts = {str(name): [float(total), float(count)] for name, (total, count) in flight.parts.items()}
    if flight.progress is not None:
        progress = Progress.restored(flight.progress, device=torch.device("cpu"))
        for name in ("epoch", "minibatch", "steps", "skipped"):
            _count(getattr(progress, name), name)
    return flight


def _count(value: Any, name: str, *, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} on")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} holds {value!r}, not a finite number of 0 or above")
    return float(value)
