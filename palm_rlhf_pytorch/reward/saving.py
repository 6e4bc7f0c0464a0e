"""A reward model in files: saved to one, loaded from one, and as a folder or Hub repository (palm/hub.py).

Knows no class of reward model: what it is mixed into says which tensors and configuration it has.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.config import ARGUMENTS
from palm_rlhf_pytorch.palm.files import NOT_TOLD, beside_arguments, of_file, warn_of_differences
from palm_rlhf_pytorch.palm.hub import HubModel, on_disk, write_folder
from palm_rlhf_pytorch.palm.pretrained import OURS, checked_kind, layout_of
from palm_rlhf_pytorch.reward.files import OnTrunk, read_model, same_trunk, trunk_facts
from palm_rlhf_pytorch.reward.settings import Settings, differences
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.tensor_file import save_tensors
from palm_rlhf_pytorch.training.tensor_reader import TensorReader

KIND = "RewardModel"
SETTINGS = tuple(field.name for field in fields(Settings))


class Judge(OnTrunk, Protocol):
    """What a reward model has that is saved, or compared with a file's."""

    settings: Settings
    head: nn.Linear
    training: bool
    adapter: nn.Module | None
    prompt_embed: nn.Parameter
    response_embed: nn.Parameter
    score_mean: Tensor
    score_std: Tensor

    @property
    def config(self) -> dict[str, Any]:
        """What it was built with."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its weights by name."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the mode."""
        ...


class RewardModelFiles(HubModel):
    """What a reward model is saved with and loaded by."""

    def save(self, path: str | Path) -> None:
        """Write trunk, adapter, embeddings, head and configuration to one file, atomically; see `PaLM.save`."""
        model = cast("Judge", self)
        save_tensors(path, model.state_dict(), kind=KIND, config=model.config)

    def save_pretrained(self, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> None:
        """Write a folder for `from_pretrained` and the Hub, its trunk inside; see `PaLM.save_pretrained`."""
        model = cast("Judge", self)
        write_folder(folder, model.state_dict(), kind=KIND, config=model.config, extra={}, tokenizer=tokenizer)

    def load(self, path: str | Path) -> Self:
        """Become the reward model of a file: its weights, its trunk and its configuration.

        The trunk stays shared with the PaLM given at construction while the file's is the same to the bit. Else the
        file's replaces it, in the file's dtype and on this model's device, and that PaLM is left as it is. Where the
        configurations agree, parameters keep their identity, so that an optimizer goes on with them. All is checked
        before anything changes: after an error the model is as it was.

        Args:
            path: a file of `save`, a bare state dict of a model built as this one, or one of the layout in which the
                published PaLMs' reward models are, which average the features of all real tokens (pool_prompt).

        Returns:
            The model.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no checkpoint, or one of another model (keys and shapes are named).

        Warns:
            UserWarning: if the file's configuration differs from this model's; what differs is named.
        """
        model = cast("Judge", self)
        reader = TensorReader(path, kind=KIND)
        known = {name: model.palm.config[name] for name in NOT_TOLD}
        layout = checked_kind(layout_of(reader, known), KIND, path=path)
        config = layout.config if layout.kind is not None else model.config
        found = read_model(type(model), reader, config, layout.parts, device=model.head.weight.device)
        found.train(model.training)
        trunk = differences(trunk_facts(model.palm), trunk_facts(found.palm))
        differing = trunk + differences(asdict(model.settings), asdict(found.settings))
        if differing:
            unused = "; the PaLM given at construction is no longer used" if trunk else ""
            warnings.warn(
                f"{path} holds a reward model of another configuration: {', '.join(differing)}. This model takes it "
                f"over whole, trunk and configuration{unused}",
                stacklevel=2,
            )
        become(model, found)
        return self

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Build the reward model that a file, or a folder, describes, with its weights, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no configuration, or does not fit it.
        """
        found = on_disk(path)
        return cls._read(found.weights, config=found.arguments(), dtype=None, device="cpu", arguments={})

    @classmethod
    def _read(
        cls, path: Path, *, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str,
        arguments: Mapping[str, Any],
    ) -> Self:  # fmt: skip
        reader = TensorReader(path, kind=KIND)
        config = config if of_file(reader) else {}
        own = {name: value for name, value in arguments.items() if name in SETTINGS}
        trunk = {name: value for name, value in arguments.items() if name not in SETTINGS}
        strange = [name for name in trunk if name not in ARGUMENTS]
        if strange:
            raise TypeError(f"{', '.join(strange)}: no argument of RewardModel or PaLM")
        beside = beside_arguments(config, kind=KIND, known=("palm", *SETTINGS))
        layout = checked_kind(layout_of(reader, {**_trunk_beside(config), **trunk}), KIND, path=path)
        if layout.kind is None and "kind" not in config:
            raise ValueError(f"{path} holds no configuration; build the RewardModel yourself, then load(path)")
        found = beside if layout.kind is None else layout.config
        if layout.kind is not None and layout.name == OURS:
            warn_of_differences(layout.config, beside, path=path)
        settings = {**found, **own}
        if trunk:
            settings["palm"] = {**settings.get("palm", {}), **trunk}
        make: Any = cls
        model: Self = read_model(make, reader, settings, layout.parts, dtype=dtype, device=device)
        return model


def become(model: Judge, found: Judge) -> None:
    """Take over another model, sharing the present trunk on where the other's is the same."""
    shared = model.settings.use_lora == found.settings.use_lora and same_trunk(model.palm, found.palm)
    model.score_mean, model.score_std = found.score_mean, found.score_std
    if model.config == found.config:
        mine = dict(model.named_parameters())
        for name, parameter in found.named_parameters():
            if not (shared and name.startswith("palm.")):
                mine[name].data = parameter.data  # not copy_: that would write into the PaLM given at construction
        return
    model.palm = model.palm if shared else found.palm
    model.adapter, model.head = found.adapter, found.head
    model.prompt_embed, model.response_embed = found.prompt_embed, found.response_embed
    model.settings = found.settings


def _trunk_beside(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the trunk in the config.json of another program, whose tensors may leave them open."""
    return {} if "kind" in config else {name: value for name, value in config.items() if name in ARGUMENTS}
