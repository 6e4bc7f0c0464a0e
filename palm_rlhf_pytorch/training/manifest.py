"""The manifest of a checkpoint's folder: what must be in it, to the byte, checked before anything else is read.

manifest.json is canonical JSON (ASCII, sorted keys, no blanks) with the SHA-256 of itself in it, so that each of its
bytes counts. A float JSON has no word for is {"$float": its bits}; a key that starts with "$" gets another "$".

Reads and checks only, knows no tensors and no processes.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 10_000_000  # bytes
MAX_DEPTH = 100  # of lists and dicts in one another; Python itself stops at a thousand
MAX_STEP = 10**18 - 1
FIELDS = {"files", "format_version", "groups", "kind", "metrics", "step", "values"}
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
GROUP_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
STEP_NAME = re.compile(r"step-([0-9]{8,18})")


class CheckpointError(ValueError):
    """A path holds no checkpoint, a damaged one, or one of another kind or version; nothing of it was used."""


class Stored(NamedTuple):
    """Size and hexadecimal SHA-256 of a file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a checkpoint says of itself; `groups` are the names of `files` ending in .safetensors, without that."""

    kind: str
    step: int
    values: dict[str, Any]
    metrics: dict[str, float]
    files: dict[str, Stored]
    groups: list[str]


def manifest_bytes(manifest: Manifest) -> bytes:
    """The content of manifest.json.

    Raises:
        TypeError: if values or metrics hold what JSON does not, naming the place.
        ValueError: if kind, step or a name cannot be, or the values are nested too deep or too large.
    """
    for name, value in manifest.metrics.items():
        if not isinstance(value, int | float):
            raise TypeError(f"metrics[{name!r}] is a {type(value).__name__}, expected a number")
    record = {
        "files": {name: stored._asdict() for name, stored in manifest.files.items()},
        "format_version": FORMAT_VERSION,
        "groups": sorted(manifest.groups),
        "kind": manifest.kind,
        "metrics": _encoded({name: float(value) for name, value in manifest.metrics.items()}, "metrics"),
        "step": manifest.step,
        "values": _encoded(dict(manifest.values), "values"),
    }
    problem = _problem(record)
    if problem is not None:
        raise ValueError(problem)
    content = _signed(record)
    if len(content) > MAX_MANIFEST:
        raise ValueError(f"values take {len(content):,} bytes of JSON, at most {MAX_MANIFEST:,}; save them as tensors")
    return content


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a folder; the files it names are not looked at.

    Raises:
        CheckpointError: if it is missing, no ordinary file, too large, damaged, or of a newer version.
    """
    path = folder / MANIFEST
    with open_regular(path) as file:
        content = file.read(MAX_MANIFEST + 1)
    if len(content) > MAX_MANIFEST:
        raise CheckpointError(f"{path} is larger than a manifest can be ({MAX_MANIFEST:,} bytes)")
    try:
        record = json.loads(content.decode("ascii"))
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        version = record.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format_version {version}, this palm_rlhf_pytorch reads up to {FORMAT_VERSION}; upgrade it"
            )
        record.pop("sha256", None)
        if _signed(record) != content:
            raise ValueError("it does not match its own SHA-256")
        problem = _problem(record)
        if problem is not None:
            raise ValueError(problem)
        return _manifest(record)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RecursionError, struct.error) as error:
        raise CheckpointError(f"{path} is damaged or no manifest ({error})") from error


def verify(folder: Path, *, kind: str) -> Manifest:
    """Check each file of a checkpoint against the manifest: names, sizes, then SHA-256; nothing is parsed.

    Raises:
        CheckpointError: naming the first file that is wrong and what is wrong with it.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link; give the folder it points to")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is {'not a folder' if folder.exists() else 'missing: no checkpoint there'}")
    sizes = _sizes(folder)
    manifest = read_manifest(folder)
    if manifest.kind != kind:
        raise CheckpointError(
            f"{folder / MANIFEST} is of kind {manifest.kind!r}, expected {kind!r}; load it with what saved it"
        )
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{folder} was renamed: its manifest says step {manifest.step}")
    for name in sorted(sizes.keys() - manifest.files.keys() - {MANIFEST}):
        raise CheckpointError(f"{str(folder / name)!r} is not in the manifest; a checkpoint holds nothing else")
    for name, stored in manifest.files.items():
        if name not in sizes:
            raise CheckpointError(f"{folder / name} is missing")
        if sizes[name] != stored.bytes:
            raise CheckpointError(f"{folder / name} has {sizes[name]:,} bytes, the manifest says {stored.bytes:,}")
    for name, stored in manifest.files.items():
        if digest_of(folder / name) != stored:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    return manifest


def digest_of(path: Path) -> Stored:
    """Size and SHA-256 of an ordinary file.

    Raises:
        CheckpointError: if it is none, or cannot be read.
    """
    with open_regular(path) as file:
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        return Stored(file.tell(), digest)


def open_regular(path: Path) -> io.BufferedReader:
    """Open an ordinary file to read: no link to one, no pipe to wait at.

    Raises:
        CheckpointError: if it is none, or cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        reason = "a symbolic link" if error.errno == errno.ELOOP else f"not to be read: {error.strerror}"
        raise CheckpointError(f"{path} is {reason}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is not an ordinary file")
    return open(descriptor, "rb")


def step_name(step: int) -> str:
    """Name of the folder of a step; names of eight digits also sort as their steps do.

    Raises:
        ValueError: if step is no integer from 0 to 10^18 - 1.
    """
    if not _is_count(step, MAX_STEP):
        raise ValueError(f"step ({step!r}) must be an integer from 0 to {MAX_STEP}")
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step a folder's name says, None if it is not such a name."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def _sizes(folder: Path) -> dict[str, int]:
    """Size of each file in the folder, which holds nothing else."""
    sizes = {}
    try:
        for path in sorted(folder.iterdir()):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                raise CheckpointError(f"{str(path)!r} is a symbolic link; a checkpoint holds ordinary files only")
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{str(path)!r} is not an ordinary file; a checkpoint holds nothing else")
            sizes[path.name] = status.st_size
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    return sizes


def _signed(record: dict[str, Any]) -> bytes:
    """The record as canonical JSON, its own SHA-256 in it: doubled keys, blanks, NaN and 1e999 never come out equal."""

    def canonical(value: dict[str, Any]) -> bytes:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")

    return canonical(record | {"sha256": hashlib.sha256(canonical(record)).hexdigest()})


def _problem(record: dict[str, Any]) -> str | None:
    """What of the record cannot be, None if all can; the values are not looked into."""
    if record.keys() != FIELDS:
        return f"its fields are {', '.join(sorted(record))}, expected {', '.join(sorted(FIELDS))}"
    if type(record["format_version"]) is not int or record["format_version"] != FORMAT_VERSION:
        return f"format_version is {record['format_version']!r}, expected {FORMAT_VERSION}"
    if not isinstance(record["kind"], str) or not record["kind"]:
        return f"kind ({record['kind']!r}) must be a string, not empty"
    if not _is_count(record["step"], MAX_STEP):
        return f"step ({record['step']!r}) must be an integer from 0 to {MAX_STEP}"
    if not isinstance(record["values"], dict) or not isinstance(record["metrics"], dict):
        return "values and metrics must be JSON objects"
    files, groups = record["files"], record["groups"]
    if not isinstance(files, dict) or not isinstance(groups, list):
        return "files must be a JSON object, groups a list"
    for name, stored in files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            return f"file name {name!r} must be of letters, digits, '.', '_' and '-', and not {MANIFEST}"
        if not isinstance(stored, dict) or stored.keys() != {"bytes", "sha256"}:
            return f"the entry of {name} must hold bytes and sha256"
        if not _is_count(stored["bytes"], 2**63 - 1) or not DIGEST.fullmatch(str(stored["sha256"])):
            return f"bytes or sha256 of {name} cannot be ({stored['bytes']!r}, {stored['sha256']!r})"
    for group in groups:
        if not isinstance(group, str) or not GROUP_NAME.fullmatch(group):
            return f"group name {group!r} must be of letters, digits and '_', and not start with a digit"
        if f"{group}.safetensors" not in files:
            return f"group {group} has no file"
    return None if len(set(groups)) == len(groups) else "a group is named twice"


def _is_count(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _manifest(record: dict[str, Any]) -> Manifest:
    """The manifest of a checked record.

    Raises:
        ValueError, TypeError, struct.error: if values or metrics are not as this package writes them.
    """
    values, metrics = _decoded(record["values"]), _decoded(record["metrics"])
    if not isinstance(values, dict) or _encoded(values, "values") != record["values"]:
        raise ValueError("its values are not encoded as this package does")
    if not isinstance(metrics, dict) or not all(type(value) is float for value in metrics.values()):
        raise ValueError("its metrics are not numbers by name")
    files = {name: Stored(**stored) for name, stored in record["files"].items()}
    return Manifest(record["kind"], record["step"], values, metrics, files, record["groups"])


def _encoded(value: Any, where: str, depth: int = 0) -> Any:
    """The value in JSON's own types."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where[:200]}... is nested deeper than {MAX_DEPTH}")
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": struct.pack(">d", value).hex()}
    for exact in (bool, int, float, str):
        if isinstance(value, exact):
            return exact(value)
    if isinstance(value, list):
        return [_encoded(item, f"{where}[{place}]", depth + 1) for place, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
        return {
            f"${key}" if key.startswith("$") else str(key): _encoded(item, f"{where}[{key!r}]", depth + 1)
            for key, item in value.items()
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint's values are None, bool, int, float, str, and lists and "
        "dicts of them (tensors go into `tensors`; a tuple must be made a list)"
    )


def _decoded(value: Any) -> Any:
    """The reverse of `_encoded`."""
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$float"}:
        return struct.unpack(">d", bytes.fromhex(value["$float"]))[0]
    return {key.removeprefix("$"): _decoded(item) for key, item in value.items()}
