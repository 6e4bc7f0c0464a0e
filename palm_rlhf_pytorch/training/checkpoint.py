"""A run's checkpoints: folders that stand whole or not at all, and are read only after every byte was checked.

A folder holds manifest.json (training/manifest.py), a safetensors file for each group of tensors, and attached files.
It is written beside under a hidden name, flushed to the disk, then renamed (training/folder.py). Nothing is unpickled.

Knows no trainer: what must be kept is the caller's to say.
"""

import errno
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.training.atomic import nature
from palm_rlhf_pytorch.training.folder import (
    HIDDEN,
    NewFolder,
    attach_file,
    clear_away,
    discard,
    hidden,
    is_main,
    together,
    write_file,
)
from palm_rlhf_pytorch.training.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    Stored,
    manifest_bytes,
    read_manifest,
    step_name,
    step_of,
    verify,
)
from palm_rlhf_pytorch.training.tensor_stream import check_tensor, chunks_of, read_copies
from palm_rlhf_pytorch.typecheck import typecheck


class Checkpoint(NamedTuple):
    """What `load_checkpoint` found: all of it verified, tensors on the CPU by group and name, attached files by name.

    The files are the checkpoint's own: read them, link or copy them, never write to them.
    """

    path: Path
    kind: str
    step: int
    values: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    files: dict[str, Path]
    metrics: dict[str, float]


def save_checkpoint(
    path: str | Path,
    *,
    kind: str,
    step: int,
    values: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, str | Path] | None = None,
    metrics: Mapping[str, float] | None = None,
    accelerator: Accelerator | None = None,
) -> None:
    """Write a checkpoint so that at every moment the old one or the new one stands at `path`, whole.

    In several processes all must call it, on one file system: values, tensors and metrics are taken from the main
    process, files from each. No process returns before the checkpoint stands; if one fails, all raise.

    Args:
        path: the folder; an earlier checkpoint there is replaced. Only one run may save to a parent folder.
        kind: what it belongs to, say "RLHFTrainer"; `load_checkpoint(kind=)` compares it.
        step: how far the run is.
        values: None, bool, int, float (to the bit, nan and infinities too), str, and lists and dicts of them.
        tensors: by group and name, any device and dtype; the groups' names are plain identifiers.
        files: more files by the name they get, which no other process may use. They are linked where the file
            system can, else copied: replace or remove the originals afterwards, never write to them. A file linked
            from several checkpoints is one file: damage to it is damage to all of them.
        metrics: numbers by which `Checkpoints` may tell the best.
        accelerator: of a run of several processes.

    Raises:
        TypeError: if values hold anything else, or a tensor cannot be stored, naming the place.
        ValueError: if a name or step cannot be, or `path` is something else than a checkpoint.
        OSError: if the disk refuses (full, read-only), naming path and bytes; what stood there still does.
        RuntimeError: if another process failed, saying how.
    """
    main = is_main(accelerator)
    manifest = Manifest(kind, step, dict(values), dict(metrics or {}), {}, list(tensors))
    own = _Files(tensors if main else {}, files or {})
    folder = NewFolder(Path(path))

    def begin() -> list[str]:
        own.check(manifest if main else manifest._replace(values={}, metrics={}, groups=[]))
        if main:
            _check_target(folder.path)
            folder.make(ours=_is_step)
        return own.names

    def write() -> dict[str, Stored]:
        with folder.telling_of_the_disk():
            return own.write(folder.partial)

    def finish(files: dict[str, Stored]) -> None:
        if main:
            with folder.telling_of_the_disk():
                write_file(folder.partial / MANIFEST, [manifest_bytes(manifest._replace(files=files))])
            folder.place()

    try:
        _refuse_doubled(together(accelerator, begin))
        stored = {name: one for files_of_rank in together(accelerator, write) for name, one in files_of_rank.items()}
        together(accelerator, lambda: finish(stored))
    finally:
        folder.close()


def load_checkpoint(path: str | Path, *, kind: str) -> Checkpoint:
    """Verify a checkpoint, then read it onto the CPU.

    Names, sizes and SHA-256 of all files are checked before one is parsed; the tensors are copies, so later changes of
    the files do not reach them. A folder from a stranger runs no code.

    Raises:
        FileNotFoundError: if there is nothing at path.
        CheckpointError: naming the file and what is wrong, and an earlier checkpoint beside it that is whole.
    """
    path = Path(path)
    if not os.path.lexists(path) and not hidden(path, "replaced").is_dir():
        raise FileNotFoundError(errno.ENOENT, "no checkpoint at this path", str(path))
    try:
        return _load(path, kind)
    except CheckpointError as error:
        whole = next((earlier for earlier in _earlier(path) if _is_whole(earlier, kind)), None)
        if whole is None:
            raise
        raise CheckpointError(f"{error}; {whole.name} beside it is whole: load that, or resume='auto'") from error


class Checkpoints:
    """The checkpoints of one run, a folder `step-00000012` for each step kept; what is older is removed.

    In several processes all construct it and call `save` and `latest`. What a kill left half done is cleared away at
    construction; a checkpoint that another process is writing just then is let be.

    Args:
        folder: where they are; made by the first save.
        keep_last: how many of the newest are kept.
        keep_best: name of a metric; the checkpoint where it is best is kept too. Missing or nan counts as worst.
        maximize: whether the best is the largest.
        accelerator: of a run of several processes.
    """

    @typecheck
    def __init__(
        self,
        folder: str | Path,
        *,
        keep_last: int = 2,
        keep_best: str | None = None,
        maximize: bool = True,
        accelerator: Accelerator | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last ({keep_last}) must be at least 1: a run goes on from the newest")
        self.folder = Path(folder)
        self.keep_last, self.keep_best, self.maximize = keep_last, keep_best, maximize
        self.accelerator = accelerator
        self.pinned: set[int] = set()  # steps that are kept whatever comes after them
        self._damaged: set[int] = set()
        together(accelerator, lambda: clear_away(self.folder, ours=_is_step) if is_main(accelerator) else None)

    def save(
        self,
        step: int,
        *,
        kind: str,
        values: Mapping[str, Any],
        tensors: Mapping[str, Mapping[str, Tensor]],
        files: Mapping[str, str | Path] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Path:
        """Save as `save_checkpoint` does, then remove what is no longer to be kept; returns the folder.

        Checkpoints of later steps, left by a run that went further, and damaged ones are neither counted nor removed.
        """
        path = self.folder / step_name(step)
        save_checkpoint(
            path, kind=kind, step=step, values=values, tensors=tensors, files=files, metrics=metrics,
            accelerator=self.accelerator,
        )  # fmt: skip
        self._damaged.discard(step)
        together(self.accelerator, lambda: self._prune(step) if is_main(self.accelerator) else None)
        return path

    def latest(self, *, kind: str) -> Checkpoint | None:
        """The newest checkpoint that is whole, read; None if there is none at all. A newer damaged one is warned of.

        Raises:
            CheckpointError: if there are checkpoints and none is whole, or processes do not find the same one.
        """
        found, damaged = None, []
        for step in reversed(self.steps()):
            path = self.folder / step_name(step)
            try:
                found = _load(path, kind)
                break
            except CheckpointError as error:
                if os.path.lexists(path):  # not pruned by the run since
                    damaged.append(str(error))
                    self._damaged.add(step)
        taken = together(self.accelerator, lambda: found and found.step)
        if len(set(taken)) > 1:
            raise CheckpointError(f"the processes find different checkpoints in {self.folder}: steps {taken} by rank")
        if damaged and found is None:
            raise CheckpointError(f"no checkpoint in {self.folder} is whole: {'; '.join(damaged)}; start in another")
        if damaged and is_main(self.accelerator) and found is not None:
            warnings.warn(f"{'; '.join(damaged)}; {found.path.name} is taken instead", stacklevel=2)
        return found

    def steps(self) -> list[int]:
        """Steps of the checkpoints that stand, ascending; by their names alone."""
        if not self.folder.is_dir():
            return []
        listed = os.listdir(self.folder)
        aside = [match[1] for match in map(HIDDEN.fullmatch, listed) if match and match[2] == "replaced"]
        return sorted({step for step in map(step_of, listed + aside) if step is not None})

    def _prune(self, newest: int) -> None:
        merits: dict[int, float] = {}
        for step in self.steps():
            with suppress(CheckpointError):
                metrics = read_manifest(self.folder / step_name(step)).metrics
                if step <= newest and step not in self._damaged:
                    merits[step] = self._merit(metrics)
        kept = sorted(merits)[-self.keep_last :]
        if self.keep_best is not None:
            kept.append(max(merits, key=lambda step: (merits[step], step)))
        for step in merits.keys() - set(kept) - self.pinned:
            discard(self.folder / step_name(step))
        later = [step_name(step) for step in self.steps() if step > newest and step not in self._damaged]
        if later:
            warnings.warn(
                f"{', '.join(later)} in {self.folder}: of a run that went further than this one; resume='auto' would "
                "take the newest: move them away",
                stacklevel=5,
            )

    def _merit(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self.keep_best or "", math.nan)
        return -math.inf if math.isnan(value) else value if self.maximize else -value


# one process's files


class _Files:
    """What one process puts into the folder: tensors by group, and files to attach."""

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]], files: Mapping[str, str | Path]) -> None:
        self.tensors = tensors
        self.files = dict(files)
        self.names = [f"{group}.safetensors" for group in tensors] + list(files)

    def check(self, manifest: Manifest) -> None:
        """Refuse what cannot be saved before the disk is touched."""
        manifest_bytes(manifest._replace(files=dict.fromkeys(self.names, Stored(0, "0" * 64))))
        for group, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                if not isinstance(name, str) or name == "__metadata__":
                    raise ValueError(f"tensors[{group!r}] has the name {name!r}; it must be a string, not __metadata__")
                check_tensor(tensor, f"tensors[{group!r}][{name!r}]")
        for name, source in self.files.items():
            if not Path(source).is_file():
                raise ValueError(f"files[{name!r}] ({source}) is missing or no ordinary file")

    def write(self, folder: Path) -> dict[str, Stored]:
        """Write them to the disk."""
        stored = {}
        for group, tensors in self.tensors.items():
            name = f"{group}.safetensors"
            stored[name] = write_file(folder / name, chunks_of(tensors))
        for name, source in self.files.items():
            stored[name] = attach_file(Path(source), folder / name)
        return stored


def _refuse_doubled(names: list[list[str]]) -> None:
    every = sorted(name for names_of_rank in names for name in names_of_rank)
    doubled = sorted({name for name, following in zip(every, every[1:], strict=False) if name == following})
    if doubled:
        raise ValueError(f"files have names that other files have too: {doubled}; put the rank into the name")


def _check_target(path: Path) -> None:
    """Raise a ValueError unless nothing but a checkpoint would be replaced."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; save to the folder it points to ({path.resolve()}) instead")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is {'a file' if path.is_file() else nature(path)}; give the path of a folder")
    if path.is_dir() and not _is_step(path.name) and any(path.iterdir()):
        try:
            read_manifest(path)
        except CheckpointError as error:
            raise ValueError(f"{path} holds something else than a checkpoint ({error}); give another path") from error


# loading


def _load(path: Path, kind: str) -> Checkpoint:
    if not os.path.lexists(path) and hidden(path, "replaced").is_dir():  # a kill between the two renames
        path = hidden(path, "replaced")
    manifest = verify(path, kind=kind)
    tensors = {group: read_copies(path / f"{group}.safetensors") for group in manifest.groups}
    attached = manifest.files.keys() - {f"{group}.safetensors" for group in manifest.groups}
    files = {name: path / name for name in sorted(attached)}
    return Checkpoint(path, manifest.kind, manifest.step, manifest.values, tensors, files, manifest.metrics)


def _earlier(path: Path) -> Iterator[Path]:
    """Checkpoints of smaller steps beside it, the newest first; of all steps, if its own name says none."""
    own = step_of(path.name)
    steps = [] if not path.parent.is_dir() else [step_of(name) for name in os.listdir(path.parent)]
    for step in sorted((step for step in steps if step is not None), reverse=True):
        if own is None or step < own:
            yield path.parent / step_name(step)


def _is_whole(path: Path, kind: str) -> bool:
    with suppress(CheckpointError):
        verify(path, kind=kind)
        return True
    return False


def _is_step(name: str) -> bool:
    return step_of(name) is not None
