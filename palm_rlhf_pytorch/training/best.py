"""The weights of a run's best evaluation, by `eval/loss`, and whether there was no better one for too long.

Knows no model; what `fit` asks by `stop`.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint
from palm_rlhf_pytorch.training.manifest import read_manifest, step_name
from palm_rlhf_pytorch.training.saves import KIND


class Best:
    """Remembers the weights of the best evaluation; asked after each whether there was no better one for too long.

    A run that resumes finds what came before among its checkpoints, of which the best is kept.

    Args:
        model: what is trained.
        trained: its parameters that change.
        patience: steps after the best evaluation, from which on the answer is yes.
        checkpoints: of the run, one for each evaluation and the best of them kept; None where there are none.
    """

    def __init__(
        self, model: nn.Module, trained: Sequence[Tensor], *, patience: int, checkpoints: Checkpoints | None
    ) -> None:
        chosen = {id(weight) for weight in trained}
        self.parameters = {name: weight for name, weight in model.named_parameters() if id(weight) in chosen}
        self.patience, self.checkpoints = patience, checkpoints
        self.step, self.loss, self.metrics = 0, math.inf, dict[str, float]()
        self.weights: dict[str, Tensor] | None = None

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the run is to end here, after an evaluation; see `fit`, `stop`."""
        if self.step == 0:
            self._recall(before=step)
        if self._take(step, metrics):
            self.weights = {name: weight.detach().cpu().clone() for name, weight in self.parameters.items()}
        return step - self.step >= self.patience

    def _recall(self, *, before: int) -> None:
        for step in self.checkpoints.steps() if self.checkpoints is not None else []:
            if step < before:
                self._take(step, read_manifest(self._path(step)).metrics)

    def _take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether it is the best so far; of equals the later, as among checkpoints."""
        loss = metrics.get("eval/loss", math.nan)
        loss = math.inf if math.isnan(loss) else loss
        if loss > self.loss:
            return False
        self.step, self.loss = step, loss
        self.metrics = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        return True

    def restore(self) -> None:
        """Put the best weights into the model; after an evaluation."""
        weights = self.weights
        if weights is None:
            weights = load_checkpoint(self._path(self.step), kind=KIND).tensors["model"]
        with torch.no_grad():
            for name, weight in self.parameters.items():
                weight.copy_(weights[name])

    def _path(self, step: int) -> Path:
        assert self.checkpoints is not None, "without checkpoints all steps are this call's own"
        return self.checkpoints.folder / step_name(step)
