"""What a trainer must keep to go on where it stopped: trained weights, optimizer, counters, normaliser, coefficient.

Random states need no keeping: each follows from the seed and a counter. The frozen trunk is not written; a digest of
it is, so that a checkpoint is not taken up over another model.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.config import BEHAVIOUR
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.policy.scores import ScoreNormalizer
from palm_rlhf_pytorch.policy.settings import PPOSettings
from palm_rlhf_pytorch.training.tensor_file import check_state, load_tensors, save_tensors

KIND = "RLHFTrainer"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


class Trainer(Protocol):
    """What of a trainer is kept."""

    accelerator: Accelerator
    actor_critic: ActorCritic
    learner: Learner
    normalizer: ScoreNormalizer
    prompts: Prompts
    settings: PPOSettings
    seed: int
    rollouts: int
    answers: int
    episodes: int
    updates: int
    kl_coef: float


def save_trainer(trainer: Trainer, path: str | Path) -> None:
    """Write a trainer's state to one file, atomically."""
    parameters = _trained(trainer)
    tensors = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for moment, value in trainer.learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = value
    extra = {
        "trunk": _digest(trainer.actor_critic.palm),
        "seed": trainer.seed,
        "prompts_taken": trainer.prompts.taken,
        "rollouts": trainer.rollouts,
        "answers": trainer.answers,
        "episodes": trainer.episodes,
        "updates": trainer.updates,
        "steps": trainer.learner.steps,
        "kl_coef": trainer.kl_coef,
        "normalizer": trainer.normalizer.state(),
        "learning_rates": [float(group["lr"]) for group in trainer.learner.optimizer.param_groups],
        "scaler": None if trainer.accelerator.scaler is None else trainer.accelerator.scaler.state_dict(),
    }
    config = {"palm": trainer.actor_critic.palm.config, "settings": trainer.settings.plain()}
    save_tensors(path, tensors, kind=KIND, config=config, extra=extra)


def load_trainer(trainer: Trainer, path: str | Path) -> None:
    """Check a file against a trainer, then take over its state.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not fit; the trainer is then as it was.
    """
    checkpoint = load_tensors(path, kind=KIND)
    if checkpoint.kind != KIND:
        raise ValueError(f"{path} is not a trainer's checkpoint; trainer.save(path) writes one")
    parameters = _trained(trainer)
    expected: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in parameters.items()}
    stepped = any(name.startswith("optimizer.") for name in checkpoint.tensors)
    if stepped:
        for name, parameter in parameters.items():
            shapes = (parameter, parameter, torch.zeros(()))
            expected |= {f"optimizer.{moment}.{name}": shape for moment, shape in zip(MOMENTS, shapes, strict=True)}
    check_state(expected, checkpoint.tensors, path=path)
    extra = checkpoint.extra
    _check_same_function(path, checkpoint.config.get("palm", {}), trainer.actor_critic.palm.config)
    _check_same(path, checkpoint.config.get("settings", {}), trainer.settings.plain())
    if extra["trunk"] != _digest(trainer.actor_critic.palm):
        raise ValueError(f"{path} was trained over another palm: its frozen weights differ from this trainer's")

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.tensors[f"model.{name}"])
    _restore_optimizer(trainer, checkpoint.tensors if stepped else {})
    for group, lr in zip(trainer.learner.optimizer.param_groups, extra["learning_rates"], strict=True):
        group["lr"] = lr
    if trainer.accelerator.scaler is not None and extra["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(extra["scaler"])
    trainer.seed, trainer.prompts.seed = extra["seed"], extra["seed"]
    trainer.prompts.taken, trainer.rollouts = extra["prompts_taken"], extra["rollouts"]
    trainer.answers = extra["answers"]
    trainer.episodes, trainer.updates, trainer.learner.steps = extra["episodes"], extra["updates"], extra["steps"]
    trainer.kl_coef = extra["kl_coef"]
    trainer.normalizer.restore(extra["normalizer"])


def _restore_optimizer(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """Give each parameter its moments; without any the optimizer is as new."""
    optimizer = trainer.learner.optimizer
    names = {id(parameter): name for name, parameter in _trained(trainer).items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {moment: tensors[f"optimizer.{moment}.{name}"] for moment in MOMENTS}
        for index, name in enumerate(order if tensors else ())
    }
    # by load_state_dict, which knows on which device each kind of AdamW keeps its step count
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _trained(trainer: Trainer) -> dict[str, nn.Parameter]:
    return trainer.learner.actor | trainer.learner.critic


def _check_same_function(path: str | Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """The palm must compute what the run's did: equal weights are not enough."""
    differing = [
        f"{name}: file {saved.get(name)}, palm {present[name]}"
        for name in BEHAVIOUR
        if saved.get(name) != present[name]
    ]
    if differing:
        raise ValueError(f"{path} was trained over a palm of another behaviour ({'; '.join(differing)})")


def _check_same(path: str | Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Settings must be those of the run, learning rates apart."""
    free = ("actor_lr", "critic_lr", "max_batch_size", "max_batch_tokens", "activation_checkpointing")
    differing = [
        f"{name}: file {saved.get(name)}, trainer {value}"
        for name, value in present.items()
        if name not in free and saved.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was written with other settings ({'; '.join(differing)}); build the trainer with its own"
        )


def _digest(palm: PaLM) -> str:
    """SHA-256 of the frozen weights, by name."""
    digest = hashlib.sha256()
    for name, parameter in palm.named_base_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
