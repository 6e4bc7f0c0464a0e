"""What a trainer must keep to go on where it stopped, to the same bits; the update in hand included.

Trained weights, optimizer, counters, normaliser, coefficient, the call of `train`, and the responses that are being
learnt from. The trainer's own random states follow from the seed and counters; the global ones of Python, NumPy and
torch are kept for judges that draw from them. The frozen trunk is not written; a digest of it is, so that a checkpoint
is not taken up over another model.
"""

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from palm_rlhf_pytorch.palm.config import BEHAVIOUR
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.arguments import Call
from palm_rlhf_pytorch.policy.doctor import Doctor
from palm_rlhf_pytorch.policy.judging import Judge
from palm_rlhf_pytorch.policy.learning import Learner, Progress
from palm_rlhf_pytorch.policy.pretraining import Pretraining
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.policy.run import Flight, Run, round_names
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.sharding import spread_like, whole_tensor
from palm_rlhf_pytorch.policy.trainer_record import COUNTERS, FlightRecord, Record, read_record
from palm_rlhf_pytorch.policy.watch import Watch
from palm_rlhf_pytorch.reward.weighted import JudgeSum, ScoreNormalizer
from palm_rlhf_pytorch.training.checkpoint import Checkpoint
from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.optimizer_state import check_optimizer_state, given_state, kept_state
from palm_rlhf_pytorch.training.optimizers import kind_of
from palm_rlhf_pytorch.training.random_states import random_states, set_random_states
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.tensor_file import check_state

FREE = (  # settings that a run may go on without: the bits may differ, the run is the same
    "actor_lr", "critic_lr", "max_batch_size", "max_batch_tokens", "activation_checkpointing", "judge_timeout",
    "max_dropped", "max_skipped_steps", "keep_experience", "save_every", "save_every_steps", "save_rollouts",
    "keep_last", "keep_best", "keep_samples", "log_samples_every", "keep_rollouts",
)  # fmt: skip


class Trainer(Protocol):
    """What of a trainer is kept; `kind` says of which."""

    accelerator: Accelerator
    ranks: Ranks
    actor_critic: ActorCritic
    learner: Learner
    normalizer: ScoreNormalizer
    doctor: Doctor
    watch: Watch | None
    prompts: Prompts
    pretraining: Pretraining | None
    settings: PolicySettings
    run: Run
    call: Call | None
    flight: Flight | None
    reward_model: Judge
    held_out_judge: Judge | None
    seed: int
    rollouts: int
    answers: int
    episodes: int
    updates: int
    saves: int
    kl_coef: float
    trunk_digest: str | None

    @property
    def kind(self) -> str: ...  # noqa: D102


def state_of(trainer: Trainer) -> dict[str, Any]:
    """The arguments `values`, `tensors` and `files` of a checkpoint; to be asked for on every process."""
    parameters = _trained(trainer)
    model = {name: whole_tensor(parameter.detach()) for name, parameter in parameters.items()}
    optimizer = {
        f"{moment}.{name}": whole_tensor(value)
        for name, parameter in parameters.items()
        for moment, value in kept_state(trainer.learner.optimizer.state.get(parameter, {})).items()
    }
    flight = trainer.flight
    values = {
        "palm": trainer.actor_critic.palm.config,
        "settings": trainer.settings.plain(),
        "trunk": _trunk(trainer),
        "prompts": trainer.prompts.digest(),
        "pretraining": None if trainer.pretraining is None else trainer.pretraining.digest(),
        "precision": trainer.accelerator.mixed_precision,
        "seed": trainer.seed,
        "processes": trainer.ranks.count,
        "counters": {name: getattr(trainer, name) for name in COUNTERS},
        "prompts_taken": trainer.prompts.taken if flight is None else flight.taken,
        "steps": trainer.learner.steps,
        "skipped_in_a_row": trainer.learner.skipped_in_a_row,
        "kl_coef": trainer.kl_coef,
        "normalizer": trainer.normalizer.state(),
        "judges": [judge.state() if isinstance(judge, JudgeSum) else None for judge in _judges(trainer)],
        "doctor": trainer.doctor.state(),
        "watch": None if trainer.watch is None else trainer.watch.state(),
        "optimizer": kind_of(trainer.learner.optimizer),
        "learning_rates": [float(group["lr"]) for group in trainer.learner.optimizer.param_groups],
        "scaler": None if trainer.accelerator.scaler is None else trainer.accelerator.scaler.state_dict(),
        "call": None if trainer.call is None else asdict(trainer.call),
        "flight": None if flight is None else _flight_state(trainer, flight),
        "random": trainer.ranks.gather_values(random_states()),
    }
    kept = trainer.run.kept(trainer.updates, trainer.settings.stale_updates) if trainer.settings.stale_updates else []
    files = [path for file in kept for path in file.files()] + ([] if flight is None else flight.files)
    return {
        "values": values,
        "tensors": {"model": model, "optimizer": optimizer},
        "files": {path.name: path for path in files},
    }


def restore_state(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Check a checkpoint against a trainer, then take over its state.

    Raises:
        ValueError: if it does not fit; the trainer is then as it was.
    """
    path, values = checkpoint.path, checkpoint.values
    parameters = _trained(trainer)
    moments = checkpoint.tensors.get("optimizer", {})
    kind = kind_of(trainer.learner.optimizer)
    if values.get("optimizer", "AdamW") != kind:
        raise ValueError(f"{path} was trained with the optimizer {values.get('optimizer', 'AdamW')}, not {kind}")
    _check_tensors(path, parameters, checkpoint.tensors.get("model", {}), moments, trainer.learner.optimizer)
    _check_same_function(path, values.get("palm", {}), trainer.actor_critic.palm.config)
    _check_same(path, values.get("settings", {}), trainer.settings.plain())
    if values["trunk"] != _trunk(trainer):
        raise ValueError(f"{path} was trained over another palm: its frozen weights differ from this trainer's")
    if values.get("prompts") != trainer.prompts.digest():
        raise ValueError(f"{path} was trained on other prompts than this trainer's")
    if values.get("pretraining") != (None if trainer.pretraining is None else trainer.pretraining.digest()):
        raise ValueError(f"{path} was trained with other pretraining texts than this trainer's")
    if values.get("precision") != trainer.accelerator.mixed_precision:
        raise ValueError(
            f"{path} was trained with mixed_precision={values.get('precision')!r}, this trainer has"
            f" {trainer.accelerator.mixed_precision!r}"
        )
    _check_judges(path, values.get("judges"), _judges(trainer))
    record = read_record(path, values, num_groups=len(trainer.learner.optimizer.param_groups))
    alike = record.processes == trainer.ranks.count
    if not alike:
        warnings.warn(
            f"{path} was written by {record.processes} processes, this run has {trainer.ranks.count}: it goes on,"
            " but not to the same bits; the update that was in hand, if any, begins anew from where the weights are",
            stacklevel=4,
        )
        record.flight = None
    with trainer.ranks.together():
        record.flight = _usable_flight(trainer, record, checkpoint)
        fetched = trainer.run.fetch(checkpoint, num_tokens=trainer.actor_critic.palm.num_tokens)
    _apply(trainer, record, checkpoint, fetched)
    if alike:
        set_random_states(record.random[trainer.ranks.rank])


def _usable_flight(trainer: Trainer, record: Record, checkpoint: Checkpoint) -> FlightRecord | None:
    """The update in hand, if it can be gone on with; None where it is to begin anew."""
    flight = record.flight
    if flight is None:
        return None
    names = [trainer.run.path(kind, record.counters["updates"]).name for kind in round_names(flight.rounds)]
    needed = names if flight.progress is not None else names[: max(1, len(names) - 1)]  # the last may be yet to begin
    sampled = all(name in checkpoint.files for name in needed)
    if flight.progress is not None and not sampled:
        raise ValueError(f"{checkpoint.path} lacks the responses that are being learnt from; nothing was taken over")
    # by batches of another size other prompts would be answered
    alike = flight.max_batch_size == trainer.settings.max_batch_size
    return flight if sampled and (alike or flight.progress is not None) else None


def _apply(trainer: Trainer, record: Record, checkpoint: Checkpoint, fetched: dict[str, Path]) -> None:
    """Take over what was checked."""
    with torch.no_grad():
        for name, parameter in _trained(trainer).items():
            parameter.copy_(spread_like(parameter, checkpoint.tensors["model"][name]))
    _restore_optimizer(trainer, checkpoint.tensors.get("optimizer", {}))
    for group, lr in zip(trainer.learner.optimizer.param_groups, record.learning_rates, strict=True):
        group["lr"] = lr
    if trainer.accelerator.scaler is not None and record.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(record.scaler)
    trainer.seed = trainer.prompts.seed = record.seed
    trainer.prompts.taken = record.prompts_taken
    for name, count in record.counters.items():
        setattr(trainer, name, count)
    trainer.learner.steps, trainer.learner.skipped_in_a_row = record.steps, record.skipped_in_a_row
    trainer.kl_coef, trainer.call = record.kl_coef, record.call
    trainer.normalizer.restore(record.normalizer)
    for judge, kept in zip(_judges(trainer), record.judges, strict=True):
        if isinstance(judge, JudgeSum) and kept is not None:
            judge.restore(kept)
    trainer.doctor.restore(record.doctor)
    if trainer.watch is not None and record.watch is not None:
        trainer.watch.restore(record.watch)
        trainer.run.pin(trainer.watch.best_step)
    trainer.run.take_files(fetched, trainer.updates)
    trainer.flight = None if record.flight is None else _restored_flight(trainer, record.flight)


def _judges(trainer: Trainer) -> tuple[object, object]:
    return trainer.reward_model, trainer.held_out_judge


def _check_judges(path: Path, kept: Any, judges: tuple[object, object]) -> None:
    """Raise unless sums of judges are of those that the checkpoint has the scales of."""
    here = [sorted(judge.state()) if isinstance(judge, JudgeSum) else None for judge in judges]
    there = [None if state is None else sorted(state) for state in kept] if isinstance(kept, list) else kept
    if here != there:
        raise ValueError(f"{path} was trained with judges normalised as {there}, this trainer has {here}")


def _flight_state(trainer: Trainer, flight: Flight) -> dict[str, Any]:
    progress = None if flight.progress is None else flight.progress.state()
    return asdict(
        FlightRecord(
            flight.size,
            len(flight.rounds),
            trainer.settings.max_batch_size,
            flight.refreshed is not None,
            flight.held_out,
            flight.parts,
            progress,
        )
    )


def _restored_flight(trainer: Trainer, kept: FlightRecord) -> Flight:
    run, number, device = trainer.run, trainer.updates, trainer.accelerator.device
    return Flight(
        trainer.prompts.taken,
        kept.size,
        [run.round(place, number, fresh=False) for place in range(kept.rounds)],
        run.file("refreshed", number, fresh=False) if kept.refreshed else None,
        None if kept.progress is None else Progress.restored(kept.progress, device=device),
        kept.held_out,
        parts=kept.parts,
    )


def _check_tensors(
    path: Path,
    parameters: dict[str, nn.Parameter],
    model: dict[str, Tensor],
    moments: dict[str, Tensor],
    optimizer: Optimizer,
) -> None:
    """Names and shapes of weights and of the optimizer's state, which is empty before the first step."""
    check_state(parameters, model, path=path)
    if moments:
        check_optimizer_state(optimizer, parameters, moments, key=lambda name, moment: f"{moment}.{name}", path=path)
    for name, tensor in (model | moments).items():
        if not ((name in moments or tensor.is_floating_point()) and bool(tensor.isfinite().all())):
            raise ValueError(f"{path} holds numbers in {name} that are not finite: no trainer has written that")


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Give each parameter its moments; without any the optimizer is as new."""
    optimizer = trainer.learner.optimizer
    trained = _trained(trainer)
    names = {id(parameter): name for name, parameter in trained.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    kept = _by_parameter(tensors)
    state = {
        index: given_state({moment: spread_like(trained[name], value) for moment, value in kept[name].items()})
        for index, name in enumerate(order)
        if name in kept
    }
    # by load_state_dict, which knows on which device each kind of AdamW keeps its step count
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _by_parameter(moments: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors named "exp_avg.layers.0.weight" by the name of their parameter."""
    found: dict[str, dict[str, Tensor]] = {}
    for whole, value in moments.items():
        moment, _, name = whole.partition(".")
        found.setdefault(name, {})[moment] = value
    return found


def _trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    return trainer.learner.actor | trainer.learner.critic


# what must be the same


def _check_same_function(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """The palm must compute what the run's did: equal weights are not enough."""
    differing = [
        f"{name}: file {saved.get(name)}, palm {present[name]}"
        for name in BEHAVIOUR
        if saved.get(name) != present[name]
    ]
    if differing:
        raise ValueError(f"{path} was trained over a palm of another behaviour ({'; '.join(differing)})")


def _check_same(path: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Settings must be those of the run, FREE ones apart."""
    differing = [
        f"{name}: file {saved.get(name)}, trainer {value}"
        for name, value in present.items()
        if name not in FREE and saved.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was written with other settings ({'; '.join(differing)}); build the trainer with its own"
        )


def _trunk(trainer: Trainer) -> str:
    """The digest of the frozen trunk, by the names of its weights, taken once."""
    if trainer.trunk_digest is None:
        with trainer.learner.whole():
            trainer.trunk_digest = tensors_digest(trainer.actor_critic.palm.named_base_parameters())
    return trainer.trunk_digest
