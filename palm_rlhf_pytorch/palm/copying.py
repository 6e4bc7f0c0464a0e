"""Copies of a language model: over the same weights in memory, into a file, and out of one.

Knows no class of model, only what all of this asks of one: base weights by name, scopes, and its configuration.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.config import compare_configs
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.training.tensor_file import TensorFile, check_state, save_tensors

SCOPES = "finetune_modules"  # where a model keeps its scopes


class Scoped(Protocol):
    """A model with scopes beside its base weights."""

    finetune_modules: Scopes

    @property
    def config(self) -> dict[str, Any]:
        """What it was built with."""
        ...

    def new_adapter(
        self, *, r: int | None, alpha: float | None, last_layers: int | None, generator: torch.Generator | None
    ) -> Adapter:
        """An untrained adapter that fits it."""
        ...

    def named_base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its weights without scopes, by name."""
        ...


Model = TypeVar("Model", bound=Scoped)


def share_weights(model: Model, trainable: Callable[[str], bool] | None) -> Model:
    """A model of the same structure without scopes, whose frozen weights are this one's memory, the others copies.

    Args:
        model: what to copy; it keeps its own flags.
        trainable: says of a weight's name whether it is to be trained; None trains none.
    """
    memo: dict[int, Any] = {id(model.finetune_modules): Scopes()}  # what deepcopy takes for copied already
    for name, weight in model.named_base_parameters():
        if trainable is not None and trainable(name):
            memo[id(weight)] = nn.Parameter(weight.detach().clone())
        else:
            memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    return deepcopy(model, memo)


def move_together(*modules: nn.Module, device: torch.device | str) -> None:
    """Move modules in place, so that tensors which share memory before share it after, whichever module they are in.

    `module.to(device)`, module by module, would copy a trunk that two of them share twice.
    """
    moved: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        if memory == 0:  # nothing there that could be shared
            return tensor.to(device)
        key = (tensor.device, memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in moved:
            moved[key] = tensor, tensor.to(device)  # the old one too: its memory must not be another's meanwhile
        return moved[key][1]

    for module in modules:
        module._apply(move)


def save_model(model: Scoped, path: str | Path, *, kind: str, with_scopes: bool) -> None:
    """Write base weights and configuration, and scopes with their settings where asked for, to one file."""
    tensors: dict[str, torch.Tensor] = dict(model.named_base_parameters())
    if with_scopes:
        tensors |= {f"{SCOPES}.{name}": weight for name, weight in model.finetune_modules.named_parameters()}
    extra = {"scopes": model.finetune_modules.settings if with_scopes else {}}
    save_tensors(path, tensors, kind=kind, config=model.config, extra=extra)


def take_checkpoint(model: Scoped, checkpoint: TensorFile, *, path: str | Path) -> None:
    """Check a checkpoint whole, then put its tensors into the model, in its dtype, and put the scopes in place.

    Args:
        model: what takes the tensors over; its scopes of the same name are replaced.
        checkpoint: what `load_tensors` read.
        path: where the checkpoint came from, for messages.

    Raises:
        ValueError: if keys, shapes or sizes differ. Nothing has changed then.
    """
    settings: dict[str, dict[str, Any]] = checkpoint.extra.get("scopes", {})
    generator = torch.Generator()  # the random adapters are overwritten: torch's global state is not theirs to move
    fresh = {scope: model.new_adapter(**kept, generator=generator) for scope, kept in settings.items()}
    expected = dict(model.named_base_parameters())
    for scope, adapter in fresh.items():
        expected |= {f"{SCOPES}.{scope}.{name}": weight for name, weight in adapter.named_parameters()}
    check_state(expected, checkpoint.tensors, path=path)
    compare_configs(model.config, checkpoint.config, path=path)
    with torch.no_grad():
        for name, weight in expected.items():  # new memory: models that share the old keep it (`share_weights`)
            weight.data = checkpoint.tensors[name].to(weight, copy=True)
    model.finetune_modules.update(fresh)


def build_from(make: Callable[..., Model], checkpoint: TensorFile, *, path: str | Path) -> Model:
    """The model that a checkpoint's configuration describes, with its tensors; torch's random state stays as it is.

    Raises:
        ValueError: if there is no configuration, or none from which a model can be made, or tensors do not fit it.
    """
    if not checkpoint.config:
        raise ValueError(f"{path} holds weights without a configuration; build the model yourself, then load(path)")
    try:
        with torch.random.fork_rng(devices=[]):
            model = make(**checkpoint.config)
    except TypeError as error:
        raise ValueError(f"{path} holds a configuration from which no model can be made: {error}") from error
    take_checkpoint(model, checkpoint, path=path)
    return model
