"""A PaLM in files: saved to one, loaded from one, and as a folder or Hub repository (palm/hub.py).

Knows no class of model: what it is mixed into says which weights and configuration it has.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

import torch

from palm_rlhf_pytorch.palm.config import ARGUMENTS
from palm_rlhf_pytorch.palm.copying import Scoped, build_from, stored_state, take_checkpoint
from palm_rlhf_pytorch.palm.hub import WEIGHTS, HubModel, on_disk, write_folder
from palm_rlhf_pytorch.palm.pretrained import OURS, Layout, checked_kind, layout_of, merged_arguments, sizes_of
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.tensor_file import FORMAT_VERSION, save_tensors
from palm_rlhf_pytorch.training.tensor_reader import TensorReader

KIND = "PaLM"
NOT_TOLD = ("dim_head", "qk_scale")  # arguments that shape or scale a model, which tensors may leave open
BOOKKEEPING = ("kind", "format_version", "scopes")  # what config.json says beside the constructor's arguments


class PaLMFiles(HubModel):
    """What a language model is saved with and loaded by."""

    def save(self, path: str | Path, *, with_scopes: bool = False) -> None:
        """Write weights and configuration to one file, atomically; `.safetensors` by its suffix, else torch's format.

        Args:
            path: the file.
            with_scopes: write the low-rank scopes too; without, the base weights alone.
        """
        model = cast("Scoped", self)
        tensors, extra = stored_state(model, with_scopes=with_scopes)
        save_tensors(path, tensors, kind=KIND, config=model.config, extra=extra)

    def save_pretrained(
        self, folder: str | Path, *, with_scopes: bool = False, tokenizer: Tokenizer | None = None
    ) -> None:
        """Write a folder for `from_pretrained` and the Hub: model.safetensors, config.json and, where none is, a card.

        A new folder appears whole or not at all; in one that is there each of these files is replaced whole, and all
        others stay.

        Args:
            folder: where to.
            with_scopes: write the low-rank scopes too; without, the base weights alone.
            tokenizer: what makes the model's ids, saved with it.

        Raises:
            ValueError: if folder is a file.
            OSError: if the disk refuses.
        """
        model = cast("Scoped", self)
        tensors, extra = stored_state(model, with_scopes=with_scopes)
        write_folder(folder, tensors, kind=KIND, config=model.config, extra=extra, tokenizer=tokenizer)

    def load(self, path: str | Path) -> Self:
        """Take over the weights of a file, its scopes too in place of those of the same name; returns the model.

        The file is one of `save`, a bare state dict, or has the layout of the published PaLMs. All is checked before
        anything changes: after an error the model is as it was. Weights keep the model's dtype.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no checkpoint, or one of another model (keys and shapes are named).
        """
        reader = TensorReader(path, kind=KIND)
        model = cast("Scoped", self)
        known = {name: model.config[name] for name in NOT_TOLD}
        take_checkpoint(model, reader, checked_kind(layout_of(reader, known), KIND, path=path))
        return self

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Self:
        """Build the model that a file, or a folder, describes, in float32 on the CPU, with its weights and scopes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no configuration and its tensors do not tell it, or does not fit it.
        """
        found = on_disk(path)
        return cls._read(found.weights, config=found.arguments(), dtype=torch.float32, device="cpu", arguments={})

    @classmethod
    def _read(
        cls, path: Path, *, config: Mapping[str, Any], dtype: torch.dtype | None, device: torch.device | str,
        arguments: Mapping[str, Any],
    ) -> Self:  # fmt: skip
        reader = TensorReader(path, kind=KIND)
        layout = configured(reader, config, arguments)
        make: Any = cls
        return build_from(make, reader, layout, dtype=dtype, device=device)


def configured(reader: TensorReader, config: Mapping[str, Any], arguments: Mapping[str, Any]) -> Layout:
    """What a file holds, with the configuration to build it from.

    Args:
        reader: the file.
        config: the content of config.json beside it. The file's own record, where it has one, counts more.
        arguments: the user's; where the file tells one of them too, they must agree.

    Raises:
        ValueError: if the file is another kind of model's, or its sizes cannot be told, or contradict the arguments.
        TypeError: if an argument is unknown.

    Warns:
        UserWarning: if config.json says otherwise than the file's own record.
    """
    config = config if of_file(reader) else {}
    beside = beside_arguments(config, kind=KIND, known=ARGUMENTS)
    layout = checked_kind(layout_of(reader, {**beside, **arguments}), KIND, path=reader.path)
    if layout.name != OURS:
        return layout
    if layout.kind is None:
        try:
            told = sizes_of(layout.parts, {**beside, **arguments})
        except ValueError as error:
            raise ValueError(f"{reader.path} holds weights without a configuration: {error}") from error
        scopes = config.get("scopes", {}) if "kind" in config else {}
        return layout._replace(
            config=merged_arguments(told, {**beside, **arguments}, path=reader.path), scopes=dict(scopes)
        )
    warn_of_differences(layout.config, beside, path=reader.path)
    return layout._replace(config={**layout.config, **merged_arguments({}, arguments, path=reader.path)})


def of_file(reader: TensorReader) -> bool:
    """Whether config.json in a file's folder may be the file's: not where it has a record of its own and another name.

    A folder can hold several models' files, and the files of one that `save_pretrained` wrote.
    """
    return reader.kind is None or reader.path.name == WEIGHTS


def beside_arguments(config: Mapping[str, Any], *, kind: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The constructor's arguments in a config.json; of another program's what this one knows.

    Raises:
        ValueError: if it is of another kind of model, or of a newer version that knows more.
    """
    if "kind" not in config:
        return {name: value for name, value in config.items() if name in known}
    if config["kind"] != kind:
        raise ValueError(f"config.json is of a {config['kind']}, expected {kind}: load it with {config['kind']}")
    strange = [name for name in config if name not in (*known, *BOOKKEEPING)]
    if strange:
        raise ValueError(
            f"config.json has keys that this version of palm_rlhf_pytorch (format {FORMAT_VERSION}) does not know:"
            f" {', '.join(strange)}; upgrade it, or remove them"
        )
    return {name: value for name, value in config.items() if name not in BOOKKEEPING}


def warn_of_differences(own: Mapping[str, Any], beside: Mapping[str, Any], *, path: Path) -> None:
    """Warn where config.json says otherwise than the weights it stands beside: an edit, or two saves mixed."""
    differing = [f"{name} {value!r}, not {own[name]!r}" for name, value in beside.items() if own.get(name) != value]
    if differing:
        warnings.warn(
            f"config.json beside {path} says {', '.join(differing)}; what the weights were saved with is taken: pass"
            " arguments to from_pretrained to change it",
            stacklevel=6,
        )
