"""Copies of a language model: over the same weights in memory, into a file, and out of one.

Knows no class of model, only what all of this asks of one: base weights by name, scopes, and its configuration.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.config import compare_configs
from palm_rlhf_pytorch.palm.pretrained import Layout
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.training.tensor_file import check_state
from palm_rlhf_pytorch.training.tensor_reader import TensorReader

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

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by name."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], *, assign: bool) -> Any:
        """Take tensors over."""
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


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules built in this block have no memory and draw no random numbers: a file's tensors take their place."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves out what fills tensors at random: torch would import 800 modules to do so without memory (70 MB, 2 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})
        return func(*args, **kwargs)


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


def stored_state(model: Scoped, *, with_scopes: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What of a model goes into a file: base weights, and scopes with their settings where asked for."""
    tensors: dict[str, torch.Tensor] = dict(model.named_base_parameters())
    if with_scopes:
        tensors |= {f"{SCOPES}.{name}": weight for name, weight in model.finetune_modules.named_parameters()}
    return tensors, {"scopes": model.finetune_modules.settings if with_scopes else {}}


def take_checkpoint(model: Scoped, reader: TensorReader, layout: Layout) -> None:
    """Check a checkpoint whole, then put its tensors into the model, in its dtype, and put the scopes in place.

    Args:
        model: what takes the tensors over; its scopes of the same name are replaced.
        reader: the checkpoint.
        layout: what it holds.

    Raises:
        ValueError: if keys, shapes or sizes differ. Nothing has changed then.
    """
    generator = torch.Generator()  # the random adapters are overwritten: torch's global state is not theirs to move
    fresh = {scope: model.new_adapter(**kept, generator=generator) for scope, kept in layout.scopes.items()}
    expected = dict(model.named_base_parameters())
    for scope, adapter in fresh.items():
        expected |= {f"{SCOPES}.{scope}.{name}": weight for name, weight in adapter.named_parameters()}
    check_state(expected, layout.parts, path=reader.path)
    compare_configs(model.config, layout.config, path=reader.path)
    # new memory, all read before any is put in place: models that share the old keep it (`share_weights`)
    read = {
        name: reader.read(layout.parts[name], dtype=weight.dtype, device=weight.device)
        for name, weight in expected.items()
    }
    for name, weight in expected.items():
        weight.data = read[name]
    model.finetune_modules.update(fresh)


def build_from(
    make: Callable[..., Model],
    reader: TensorReader,
    layout: Layout,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Model:
    """The model that a checkpoint describes, with its tensors and scopes; torch's random state stays as it is.

    Args:
        make: called with the configuration.
        reader: the checkpoint.
        layout: what it holds, with a configuration.
        dtype: of the base weights; None keeps the file's. Scopes are float32.
        device: where to put it.

    Raises:
        ValueError: if no model can be made of the configuration, or tensors do not fit it.
    """
    try:
        with without_memory():
            model = make(**layout.config)
            for scope, kept in layout.scopes.items():
                model.finetune_modules.add(scope, model.new_adapter(**kept, generator=None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{reader.path} holds a configuration from which no model can be made: {error}") from error
    check_state(model.state_dict(), layout.parts, path=reader.path)
    state = {
        name: reader.read(part, dtype=torch.float32 if name.startswith(f"{SCOPES}.") else dtype, device=device)
        for name, part in layout.parts.items()
    }
    model.load_state_dict(state, assign=True)
    return model
