"""Reward models from files: what is checked, and which weights stay shared with the PaLM they were made from.

Knows no class of reward model, only what all of this asks of one: a trunk `palm`, and a configuration.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.copying import without_memory
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.tensors import at_least_float32
from palm_rlhf_pytorch.training.tensor_file import TensorFile, check_state
from palm_rlhf_pytorch.training.tensor_reader import Part, TensorReader


class OnTrunk(Protocol):
    """A model with a language model for its trunk."""

    palm: PaLM

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by name, the trunk's beginning with `palm.`."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any], *, assign: bool) -> Any:
        """Take tensors over."""
        ...


Model = TypeVar("Model", bound=OnTrunk)


def build_model(make: Callable[..., Model], checkpoint: TensorFile, *, path: str | Path) -> Model:
    """The model of a checkpoint, on the CPU; its weights are the checkpoint's tensors, not copies.

    Args:
        make: called as make(palm, **settings).
        checkpoint: what `load_tensors` read, with a configuration.
        path: where it came from, for messages.

    Raises:
        ValueError: if no model can be made of the configuration, or tensors do not fit it.
    """
    model = _empty(make, checkpoint.config, path)
    _fill(model, with_normalization(checkpoint.tensors), path)
    return model


def read_model(
    make: Callable[..., Model],
    reader: TensorReader,
    config: Mapping[str, Any],
    parts: Mapping[str, Part],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Model:
    """The model of a file, its tensors read in pieces.

    Args:
        make: called as make(palm, **settings).
        reader: the file.
        config: what to build it from.
        parts: where its tensors are.
        dtype: of the trunk; None keeps the file's. All else is float32.
        device: where to put it.

    Raises:
        ValueError: as `build_model` does.
    """
    model = _empty(make, config, reader.path)
    check_state(model.state_dict(), with_normalization(parts), path=reader.path)
    tensors = {
        name: reader.read(part, dtype=dtype if name.startswith("palm.") else None, device=device)
        for name, part in parts.items()
    }
    _fill(model, with_normalization(tensors, device=device), reader.path)
    return model


def _empty(make: Callable[..., Model], config: Mapping[str, Any], path: str | Path) -> Model:
    """A model without memory, as a configuration describes it."""
    settings = dict(config)
    trunk = settings.pop("palm", None)
    if not isinstance(trunk, dict):
        raise ValueError(f"{path} is damaged: its configuration lacks that of the trunk, 'palm'")
    try:
        with without_memory():
            return make(PaLM(**trunk), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds a configuration that builds no reward model: {error}") from error


def _fill(model: OnTrunk, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Check tensors, and make them the model's own."""
    check_state(model.state_dict(), tensors, path=path)
    odd = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if odd:
        raise ValueError(f"{path} is damaged: {odd[0]} holds {tensors[odd[0]].dtype}, not weights")
    if not 0 < float(tensors["score_std"]) < float("inf"):
        raise ValueError(f"{path} is damaged: score_std, by which scores are divided, is {tensors['score_std']}")
    model.load_state_dict({name: _in_its_dtype(name, tensor) for name, tensor in tensors.items()}, assign=True)


def with_normalization(
    tensors: Mapping[str, Any], prefix: str = "", *, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Tensors with the shift and scale of scores, which files from before there were any lack."""
    neutral = {"score_mean": torch.zeros((), device=device), "score_std": torch.ones((), device=device)}
    return {f"{prefix}{name}": tensor for name, tensor in neutral.items()} | dict(tensors)


def unshare(palm: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Give a trunk memory of its own where tensors that are to be copied into its shared weights differ from them.

    `load_state_dict` copies in place: else it would write into the PaLM that shares the trunk's storage.
    """
    for name, parameter in palm.named_parameters():
        given = state_dict.get(f"{prefix}palm.{name}")
        shared = not (parameter.requires_grad or parameter.is_meta)
        if shared and isinstance(given, Tensor) and not identical(parameter, given):
            parameter.data = parameter.data.clone()


def trunk_facts(palm: PaLM) -> dict[str, Any]:
    """What must agree for two trunks to be of one kind."""
    return palm.config | {"dtype": palm.token_emb.weight.dtype}


def same_trunk(first: PaLM, second: PaLM) -> bool:
    """Whether two trunks have the same configuration and the same weights, to the bit."""
    weights = zip(first.parameters(), second.parameters(), strict=False)
    return first.config == second.config and all(identical(mine, theirs) for mine, theirs in weights)


def identical(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same in dtype and to the bit; those of one memory are not compared."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    same_memory = first.device == second.device and first.data_ptr() == second.data_ptr() != 0
    return (same_memory and first.stride() == second.stride()) or torch.equal(first, second.to(first.device))


def _in_its_dtype(name: str, tensor: Tensor) -> Tensor:
    """The trunk keeps the file's dtype; all else is float32."""
    return tensor if name.startswith("palm.") else at_least_float32(tensor)
