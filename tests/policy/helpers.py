"""What several files of this room's tests share."""

import zlib

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.policy.targets import Lesson, Targets
from palm_rlhf_pytorch.training.ranks import Ranks

CPU = torch.device("cpu")


def one_process() -> Ranks:
    return Ranks(Accelerator(cpu=True))


def every_row(rollout: Rollout) -> Rows:
    return next(row_batches(rollout.spans(), range(len(rollout.lengths)), device=CPU))


class GivenLesson(Lesson):
    """A lesson whose targets are given."""

    def __init__(self, rollout: Rollout, targets: Targets) -> None:
        rows = len(rollout.lengths)
        counted = torch.ones(rows, dtype=torch.bool)
        super().__init__(rollout, torch.zeros(rows), counted, kl_coef=0.0, gamma=1.0, gae_lambda=1.0)
        self.targets = targets

    def read(self, rows: Rows) -> tuple[Rollout, Targets]:
        part = Targets(*(tensor[rows.numbers, : rows.steps] for tensor in self.targets))
        return self.source.select(rows), part


def seeded_by(seed: int):
    """Random states of an update: the same for the same purpose and counts."""

    def random(purpose: str, *counts: int) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(repr((seed, purpose, *counts)).encode()))

    return random


def without_time(history):
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in history]


def weights(trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.actor_critic.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
