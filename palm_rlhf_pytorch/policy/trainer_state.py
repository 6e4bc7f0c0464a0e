"""What a trainer must keep to go on where it stopped: trained weights, optimizer, counters, normaliser, coefficient.

Random states need no keeping: each follows from the seed and a counter. The frozen trunk is not written; a digest of
it is, so that a checkpoint is not taken up over another model.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.training.checkpoint import check_state, load_tensors, save_tensors

if TYPE_CHECKING:
    from palm_rlhf_pytorch.policy.ppo import RLHFTrainer

KIND = "RLHFTrainer"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's state of one parameter


def save_trainer(trainer: "RLHFTrainer", path: str | Path) -> None:
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
        "episodes": trainer.episodes,
        "updates": trainer.updates,
        "steps": trainer.learner.steps,
        "kl_coef": trainer.kl_coef,
        "normalizer": trainer.normalizer.state(),
        "lr_factor": [float(group["lr"]) for group in trainer.learner.optimizer.param_groups],
    }
    config = {"palm": trainer.actor_critic.palm.config, "settings": trainer.settings.plain()}
    save_tensors(path, tensors, kind=KIND, config=config, extra=extra)


def load_trainer(trainer: "RLHFTrainer", path: str | Path) -> None:
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
    _check_same(path, checkpoint.config.get("settings", {}), trainer.settings.plain())
    if extra["trunk"] != _digest(trainer.actor_critic.palm):
        raise ValueError(f"{path} was trained over another palm: its frozen weights differ from this trainer's")

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(checkpoint.tensors[f"model.{name}"])
    trainer.learner.optimizer.state.clear()
    for name, parameter in parameters.items() if stepped else ():
        state = {moment: checkpoint.tensors[f"optimizer.{moment}.{name}"] for moment in MOMENTS}
        fused_on = parameter.device  # fused AdamW keeps its step count beside the weights
        trainer.learner.optimizer.state[parameter] = {
            moment: value.to(fused_on, copy=True) for moment, value in state.items()
        }
    for group, lr in zip(trainer.learner.optimizer.param_groups, extra["lr_factor"], strict=True):
        group["lr"] = lr
    trainer.seed, trainer.prompts.seed = extra["seed"], extra["seed"]
    trainer.prompts.taken, trainer.rollouts = extra["prompts_taken"], extra["rollouts"]
    trainer.episodes, trainer.updates, trainer.learner.steps = extra["episodes"], extra["updates"], extra["steps"]
    trainer.kl_coef = extra["kl_coef"]
    trainer.normalizer.restore(extra["normalizer"])


def _trained(trainer: "RLHFTrainer") -> dict[str, nn.Parameter]:
    return trainer.learner.actor | trainer.learner.critic


def _check_same(path: str | Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Settings must be those of the run, learning rates apart."""
    free = ("actor_lr", "critic_lr", "max_batch_size")
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
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
