"""A model in one file: tensors and plain values, replaced whole or not at all, read without running anything in it.

A path that ends in `.safetensors` gets that format (https://github.com/huggingface/safetensors), any other the zip of
`torch.save`. Both record a format version, the kind of model, its configuration and what the caller adds.

Knows no model and no process group: in a run of several processes the caller lets only one of them save.
"""

import errno
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from palm_rlhf_pytorch.training.atomic import nature, replacing
from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.foreign_file import describe, describe_zip

FORMAT_VERSION = 1
FIELDS = ("format_version", "kind", "config", "extra")
ZIP_MAGIC = b"PK\x03\x04"
MAX_HEADER = 100_000_000  # bytes; the limit of safetensors itself


class TensorFile(NamedTuple):
    """What `load_tensors` found in a file: CPU tensors by name, and the plain values saved with them.

    `kind` is None, `config` and `extra` are empty, when the file is a bare state dict of another program.
    """

    tensors: Mapping[str, Tensor]
    kind: str | None
    config: dict[str, Any]
    extra: dict[str, Any]


def save_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint so that at every moment `path` holds the old file or the new one, whole.

    Missing parent folders are made; `training/atomic.py` says how the file is replaced.

    Args:
        path: where to; `*.safetensors` chooses that format, anything else `torch.save`.
        tensors: any device and dtype; stored on the CPU, contiguous, each without the rest of its storage. That
            tensors which share a storage still do after loading is not promised: tie them again.
        kind: what the tensors belong to, say "palm"; `load_tensors(kind=)` compares it.
        config: constructor arguments: None, bool, int, float, str, and lists and dicts of them. Tuples become lists.
        extra: more of the same; outside safetensors also tensors and integer keys (the state of an optimizer).

    Raises:
        TypeError: if config or extra hold anything else, or a tensor is sparse or quantised.
        ValueError: if path is a folder, a symbolic link or a device.
        OSError: if the disk refuses (full, read-only), naming path and size; the old file is then untouched.
    """
    path = Path(path)
    portable = path.suffix == ".safetensors"
    stored = {name: _stored(tensor, f"tensors[{name!r}]") for name, tensor in tensors.items()}
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "config": _plain(dict(config), "config", tensors=False),
        "extra": _plain(dict(extra or {}), "extra", tensors=not portable),
    }
    with replacing(path) as file:
        if portable:
            _write_safetensors(record, stored, file)
        else:
            torch.save(record | {"tensors": stored}, file)


def load_tensors(
    path: str | Path, *, kind: str | None = None, mapped: bool = False, checked: bool = True
) -> TensorFile:
    """Read a checkpoint onto the CPU, whatever device wrote it; a bare state dict of tensors is read too.

    The format is told from the content, not from the name. All bytes are checked against the file's own checksums first
    (CRC-32 in a zip, SHA-256 in safetensors written here). Nothing is unpickled but tensors and plain values, so a file
    from a stranger runs no code.

    Args:
        path: the file.
        kind: the kind it must be; None takes any. A bare state dict has none and passes.
        mapped: leave tensors in the file, which they are a view of; `training/tensor_reader.py` copies them in pieces.
        checked: compare the checksums; False for a file that was compared before.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a checkpoint (and what it is instead), is truncated or damaged, holds pickled objects,
            is of another kind, or was written by a newer version of this package. Always names the path.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no checkpoint at this path", str(path))
    if not path.is_file():
        raise ValueError(f"{path} is {nature(path)}, not a checkpoint file; give the path of the file itself")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(ZIP_MAGIC):
        checkpoint = _read_zip(path, mapped=mapped, checked=checked)
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        checkpoint = _read_safetensors(path, mapped=mapped, checked=checked)
    else:
        raise ValueError(f"{path} is not a checkpoint: {describe(head)}")
    if kind is not None and checkpoint.kind not in (None, kind):
        raise ValueError(
            f"{path} holds a checkpoint of kind {checkpoint.kind!r}, expected {kind!r}; load it with the class "
            "that saved it"
        )
    return checkpoint


class Shaped(Protocol):
    """What has a shape: a tensor, or a description of one."""

    @property
    def shape(self) -> torch.Size:
        """Its sizes."""
        ...


def check_state(expected: Mapping[str, Shaped], found: Mapping[str, Shaped], *, path: str | Path) -> None:
    """Compare names and shapes, so that a wrong file is refused before any weight is changed.

    Args:
        expected: the model's own state dict.
        found: the tensors of the file.
        path: where they came from, for the message.

    Raises:
        ValueError: listing missing and unexpected keys and differing shapes, the first five of each and their number.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    differing = [
        f"{name}: file {tuple(found[name].shape)}, model {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing keys": missing, "unexpected keys": unexpected, "differing shapes": differing}
    problems = [f"{len(names)} {what} ({_first(names)})" for what, names in kinds.items() if names]
    if problems:
        raise ValueError(f"{path} does not fit this model: {'; '.join(problems)}; build the model as the file's was")


def _first(names: list[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# values


def _stored(tensor: Tensor, where: str) -> Tensor:
    """A dense CPU tensor that owns no more storage than it shows (torch.save would write the whole storage)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{where} is a sparse, quantised or meta tensor; make it dense first")
    tensor = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _plain(value: Any, where: str, *, tensors: bool) -> Any:
    """The value in exact built-in types, which both formats give back as they were."""
    if value is None:
        return None
    for exact in (bool, int, float, str):
        if isinstance(value, exact):
            return exact(value)
    if isinstance(value, dict):
        keys = (str, int) if tensors else str
        for key in value:
            if not isinstance(key, keys) or isinstance(key, bool):
                raise TypeError(f"{where} has the key {key!r}; keys must be strings, or integers outside safetensors")
        return {key: _plain(item, f"{where}[{key!r}]", tensors=tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{place}]", tensors=tensors) for place, item in enumerate(value)]
    if tensors and isinstance(value, Tensor):
        return _stored(value, where)
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds None, bool, int, float, str, and lists and dicts of "
        "them (tensors only in `tensors`, or in `extra` outside safetensors)"
    )


# writing


def _write_safetensors(record: dict[str, Any], tensors: dict[str, Tensor], file: BinaryIO) -> None:
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():  # the format refuses tensors that share a storage
        owned[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in storages else tensor
        storages.add(tensor.untyped_storage().data_ptr())
    metadata = {field: json.dumps(record[field]) for field in FIELDS}
    metadata["sha256"] = _digest(metadata, ((name, owned[name]) for name in sorted(owned)))
    metadata["format"] = "pt"  # accelerate and transformers refuse a file that does not say so
    file.write(safetensors.torch.save(owned, metadata))


def _digest(metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the fields, and over name, dtype, shape and bytes of each tensor: safetensors has no checksum.

    The tensors come sorted by name.
    """
    named = ((json.dumps([name, str(tensor.dtype), list(tensor.shape)]), tensor) for name, tensor in tensors)
    return tensors_digest(named, told=json.dumps([metadata[field] for field in FIELDS]))


# reading


def _read_zip(path: Path, *, mapped: bool, checked: bool) -> TensorFile:
    if checked:
        _check_zip(path)
    mapped = mapped and path.suffix != ".safetensors"  # by its path, which a map needs, torch goes by the suffix
    try:
        with path.open("rb") as file:
            record = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # torch's own message advises weights_only=False: not passed on
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = found.group(1) if found else "objects"
        raise ValueError(
            f"{path} was not loaded: it pickles {what}, and unpickling can run any code; a checkpoint holds only "
            "tensors and plain values, so save a state dict instead"
        ) from None
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, AssertionError) as error:
        _damaged(path, str(error).split("\n")[0], error)
    if isinstance(record, dict) and record and all(isinstance(value, Tensor) for value in record.values()):
        return _checked(path, dict(record), {})
    if not isinstance(record, dict) or "format_version" not in record:
        held = f"a dict of {_first([repr(key) for key in record])}" if isinstance(record, dict) else "no dict"
        raise ValueError(f"{path} is another program's file (it holds {held}); save its dict of tensors alone")
    tensors = record.pop("tensors", None)
    return _checked(path, tensors, record)


def _check_zip(path: Path) -> None:
    """Verify what torch.load does not: that it is a torch zip, uncompressed, whose records pass their CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            pickled = any(name.endswith("/data.pkl") for name in names)
            if not pickled or any(name.endswith("/constants.pkl") for name in names):
                raise ValueError(f"{path} is not a checkpoint: {describe_zip(names)}")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                _damaged(path, "a record of the zip is compressed")
            broken = archive.testzip()
            if broken is not None:
                _damaged(path, f"record {broken} fails its checksum")
    except (zipfile.BadZipFile, struct.error, EOFError, NotImplementedError, UnicodeDecodeError, RuntimeError) as error:
        _damaged(path, str(error), error)


def _read_safetensors(path: Path, *, mapped: bool, checked: bool) -> TensorFile:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = LazyTensors(path) if mapped else {name: file.get_tensor(name) for name in names}
    except (safetensors.SafetensorError, UnicodeDecodeError, RuntimeError, ValueError, TypeError, LookupError) as error:
        _damaged(path, str(error), error)
    if not metadata.keys() & {*FIELDS, "sha256"}:
        return _checked(path, tensors, {})
    try:
        record = {field: json.loads(metadata[field]) for field in FIELDS}
        expected = metadata["sha256"]
    except (KeyError, json.JSONDecodeError) as error:
        _damaged(path, f"metadata {error}", error)
    checkpoint = _checked(path, tensors, record)
    strange = metadata.keys() - {*FIELDS, "sha256", "format"}
    if strange or metadata.get("format", "pt") != "pt":  # what the checksum does not cover
        _damaged(path, f"metadata {strange or metadata['format']}")
    if checked and _digest(metadata, _each_alone(path, sorted(names))) != expected:
        _damaged(path, "its SHA-256 does not match")
    return checkpoint


class LazyTensors(Mapping[str, Tensor]):
    """A safetensors file's tensors, views of the file, each looked up when asked for: that alone reads some of it."""

    def __init__(self, path: Path) -> None:
        self._file = safetensors.safe_open(path, framework="pt", device="cpu").__enter__()
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _each_alone(path: Path, names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    """Each tensor from a map of its own: what was read of one map stays in memory as long as that map does."""
    for name in names:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            yield name, file.get_tensor(name)


def _checked(path: Path, tensors: Any, record: dict[str, Any]) -> TensorFile:
    """Assemble the checkpoint of what a file held; an empty record is a bare state dict."""
    version = record.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version < 1:
        _damaged(path, f"format_version is {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this palm_rlhf_pytorch reads up to {FORMAT_VERSION}; upgrade it"
        )
    if record and not (
        all(field in record for field in FIELDS)
        and isinstance(record["kind"], str)
        and isinstance(record["config"], dict)
        and isinstance(record["extra"], dict)
    ):
        _damaged(path, f"it lacks one of the fields {', '.join(FIELDS)}")
    if isinstance(tensors, LazyTensors):
        return TensorFile(tensors, record.get("kind"), record.get("config", {}), record.get("extra", {}))
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        _damaged(path, "its tensors are not a dict of names and tensors")
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    return TensorFile(plain, record.get("kind"), record.get("config", {}), record.get("extra", {}))


def _damaged(path: Path, reason: str, error: Exception | None = None) -> NoReturn:
    raise ValueError(f"{path} is truncated or damaged ({reason}); copy it again, or use an earlier one") from error
