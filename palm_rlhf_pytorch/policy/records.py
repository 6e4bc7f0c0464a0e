"""How responses lie in a file: a header, then a record for each; and their scores in a file beside.

    record = header | ids of prompt and response (int32) | NUMBERS of each response token (float32) | commit marker

Little-endian, no objects, nothing to unpickle. Every byte is under a CRC-32 or is compared with one, and no length is
used before its checksum and the size of the file agree with it. Opens no file for writing.
"""

import math
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, overload

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.tensors import check_same_shape
from palm_rlhf_pytorch.text.tokenizer import Decoder
from palm_rlhf_pytorch.training.atomic import check_target

FORMAT_VERSION = 1
FILE_MAGIC, SCORES_MAGIC, RECORD_MAGIC = b"PALMROLL", b"PALMSCOR", b"RESP"
FILE_HEADER = struct.Struct("<8sIdq")  # magic, format version, temperature, EOS (-1: none); then a CRC-32
SCORES_HEADER = struct.Struct("<8sIQ")  # magic, format version, rows; then that many float32, then a CRC-32
RECORD_HEADER = struct.Struct("<4s4I2q")  # magic, number of the record, then PER_ROW
CHECKSUMS = struct.Struct("<2I")  # CRC-32 of the payload, then of the header with that
MARKER = struct.Struct("<2I")  # both again, inverted: neither zeros nor the end of another record will do
CRC = struct.Struct("<I")
FILE_START = FILE_HEADER.size + CRC.size
RECORD_START = RECORD_HEADER.size + CHECKSUMS.size

PER_ROW = ("prompt_lengths", "lengths", "ended", "prompt_rows", "versions")
NUMBERS = ("logprobs", "ref_logprobs", "values", "sampler_logprobs", "kl_exact")
FINITE = NUMBERS[:4]  # a metric alone stops nothing
INDEX = np.dtype([(name, np.int64) for name in ("place", *PER_ROW)])  # place: where a payload begins
MAX_TOKENS = 2**31 - 1  # of a row


class Row(NamedTuple):
    """One response as it is stored: ids of prompt and response (n,), NUMBERS of the response (5, t), the rest of it."""

    ids: np.ndarray
    numbers: np.ndarray
    prompt_length: int
    length: int
    ended: bool
    prompt_row: int
    version: int


class Spans(Sequence[tuple[int, int]]):
    """Tokens of prompt and of response of each row, in 8 bytes a row; a list of pairs takes up to 120."""

    def __init__(self, pairs: Iterable[tuple[int, int]]) -> None:
        self._tokens = array("i", chain.from_iterable(pairs))

    def __len__(self) -> int:
        return len(self._tokens) // 2

    @overload
    def __getitem__(self, row: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, row: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, row: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        place = 2 * range(len(self))[row]  # which refuses what is out of range
        return self._tokens[place], self._tokens[place + 1]


def read_row(data: np.ndarray, entry: np.void) -> Row:
    """A row, as views of the bytes of a file.

    Args:
        data: all bytes, uint8.
        entry: the row's line of the index, see `scan`.
    """
    place, prompt_length, length, ended, prompt_row, version = entry.tolist()
    ids = np.frombuffer(data, "<i4", prompt_length + length, place)
    numbers = np.frombuffer(data, "<f4", len(NUMBERS) * length, place + ids.nbytes)
    return Row(ids, numbers.reshape(len(NUMBERS), length), prompt_length, length, bool(ended), prompt_row, version)


# writing


def checked_arrays(rollout: Rollout) -> dict[str, np.ndarray]:
    """The tensors of a rollout by name, if they can be stored as they are.

    Raises:
        TypeError: if ids are not int32, or a number is not float32.
        ValueError: if shapes differ, a length does not fit its row, or a log-probability or a value is NaN or infinite.
    """
    parts = {name: part.detach().cpu() for name, part in rollout._asdict().items() if isinstance(part, Tensor)}
    for name in ("sequences", *NUMBERS):
        expected = torch.int32 if name == "sequences" else torch.float32
        if parts[name].dtype != expected:
            raise TypeError(f"rollout.{name} is {parts[name].dtype}; experience keeps {expected}")
    check_same_shape(**{name: parts[name] for name in NUMBERS})
    check_same_shape(**{name: parts[name] for name in (*PER_ROW, "scores") if name in parts})
    counts = {name: len(parts[name]) for name in ("sequences", "logprobs", "lengths")}
    if len(set(counts.values())) > 1:
        raise ValueError(f"rollout has different numbers of rows: {counts}")
    arrays = {name: part.numpy() for name, part in parts.items()}
    (rows, width), steps = arrays["sequences"].shape, arrays["logprobs"].shape[1]
    for row, (prompt_length, length) in enumerate(rollout.spans()):
        if min(prompt_length, length) < 0 or length > steps or prompt_length + length > min(width, MAX_TOKENS):
            raise ValueError(
                f"row {row} has prompt_lengths {prompt_length} and lengths {length}, which do not fit into sequences"
                f" {(rows, width)} and logprobs {(rows, steps)}"
            )
        for name in FINITE:
            if not np.isfinite(arrays[name][row, :length]).all():
                raise ValueError(f"rollout.{name} of row {row} is NaN or infinite; leave that row out")
    return arrays


def file_header(temperature: float, eos_token: int | None) -> bytes:
    """What a file begins with."""
    return _sealed(FILE_HEADER.pack(FILE_MAGIC, FORMAT_VERSION, temperature, -1 if eos_token is None else eos_token))


def record(arrays: dict[str, np.ndarray], row: int, *, number: int) -> tuple[bytes, list[int]]:
    """One row as bytes, and its line of the index but for the place.

    Args:
        arrays: see `checked_arrays`.
        row: which of them.
        number: of the record in its file, from 0.
    """
    entry = [int(arrays[name][row]) for name in PER_ROW]
    prompt_length, length = entry[:2]
    ids = arrays["sequences"][row, : prompt_length + length].astype("<i4", copy=False)
    numbers = [arrays[name][row, :length].astype("<f4", copy=False) for name in NUMBERS]
    payload = b"".join(part.tobytes() for part in (ids, *numbers))
    header = _sealed(RECORD_HEADER.pack(RECORD_MAGIC, number, *entry) + CRC.pack(zlib.crc32(payload)))
    return header + payload + _marker(header), entry


def scores_content(scores: np.ndarray) -> bytes:
    """A whole file of scores (n,)."""
    return _sealed(SCORES_HEADER.pack(SCORES_MAGIC, FORMAT_VERSION, len(scores)) + scores.astype("<f4").tobytes())


def _sealed(content: bytes) -> bytes:
    """Content with its checksum after it."""
    return content + CRC.pack(zlib.crc32(content))


def _marker(header: bytes) -> bytes:
    """What stands behind the payload of a record with this header."""
    return MARKER.pack(*(0xFFFFFFFF - checksum for checksum in CHECKSUMS.unpack_from(header, RECORD_HEADER.size)))


# reading


def read_file_header(path: Path) -> tuple[float, int | None]:
    """Temperature and EOS of a file.

    Raises:
        ValueError: if it is no file of rollouts, is damaged, or has another version's format.
    """
    with path.open("rb") as file:
        head = file.read(FILE_START)
    if not head.startswith(FILE_MAGIC):
        raise ValueError(
            f"{path} starts with {head[:8]!r}, not with {FILE_MAGIC!r}: it holds no rollouts, or is damaged"
        )
    if len(head) < FILE_START or not _is_sealed(head):
        _damaged(path, "the header of the file")
    _, version, temperature, eos_token = FILE_HEADER.unpack_from(head)
    _check_version(path, version)
    return temperature, None if eos_token == -1 else eos_token


def scan(path: Path, *, verify: bool) -> tuple[np.ndarray, int]:
    """Index of the records in a file, (n,) of INDEX, and where the last whole one ends.

    What follows that is what a crash left of a record: its beginning, all of its length with bytes missing in it, or
    zeros.

    Args:
        path: a file whose header was read.
        verify: whether payloads are compared with their checksums.

    Raises:
        ValueError: if a record before the last is damaged, or the header of any that has bytes behind it.
    """
    data = np.memmap(path, mode="r", dtype=np.uint8)
    found, start, number = array("q"), FILE_START, 0
    while len(data) - start >= RECORD_START:
        place = start + RECORD_START
        header = data[start:place].tobytes()
        magic, stored_number, prompt_length, length, *rest = RECORD_HEADER.unpack_from(header)
        if not _is_sealed(header) or (magic, stored_number) != (RECORD_MAGIC, number):
            if not data[start:].any():  # the file grew, and the power went before its content came
                break
            _damaged(path, f"the header of record {number}")
        stop = place + 4 * (prompt_length + length) + 4 * len(NUMBERS) * length
        end = stop + MARKER.size
        if end > len(data):
            break
        checksum = zlib.crc32(data[place:stop].data) if verify else None
        if data[stop:end].tobytes() != _marker(header) or checksum not in (None, _payload_checksum(header)):
            if end == len(data):
                break
            _damaged(path, f"record {number}")
        found.extend((place, prompt_length, length, *rest))
        start, number = end, number + 1
    return np.frombuffer(found, INDEX) if found else np.zeros(0, INDEX), start


def read_scores(path: Path, rows: int) -> np.ndarray | None:
    """The scores (n,) of a file with so many rows; None if there are none, or of fewer rows: others came since.

    Raises:
        ValueError: if they are of more rows, are damaged, or have another version's format.
    """
    check_target(path)
    if not path.exists():
        return None
    if path.stat().st_size > SCORES_HEADER.size + 4 * rows + CRC.size:
        _damaged(path, f"it holds more than the scores of the {rows} rows there are")
    content = path.read_bytes()
    if len(content) < SCORES_HEADER.size + CRC.size or not _is_sealed(content):
        _damaged(path, "its checksum does not match")
    magic, version, count = SCORES_HEADER.unpack_from(content)
    _check_version(path, version)
    scores = np.frombuffer(content[SCORES_HEADER.size : -CRC.size], "<f4").astype(np.float32)
    if magic != SCORES_MAGIC or len(scores) != count:
        _damaged(path, "its header")
    return scores if count == rows else None


def _is_sealed(content: bytes) -> bool:
    return _sealed(content[: -CRC.size]) == content


def _payload_checksum(header: bytes) -> int:
    return CHECKSUMS.unpack_from(header, RECORD_HEADER.size)[0]


def _check_version(path: Path, version: int) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}; this palm_rlhf_pytorch reads version {FORMAT_VERSION}")


def _damaged(path: Path, reason: str) -> NoReturn:
    raise ValueError(f"{path} is damaged ({reason}); copy it again, or delete it together with its scores")


def described(row: Row, score: float, tokenizer: Decoder | None) -> dict[str, Any]:
    """What a line of JSON says of a row."""
    ids = row.ids.tolist()
    prompt, response = ids[: row.prompt_length], ids[row.prompt_length :]
    logprobs, ref_logprobs = row.numbers[:2].astype(np.float64)
    return {
        "prompt": prompt if tokenizer is None else tokenizer.decode(prompt),
        "response": response if tokenizer is None else tokenizer.decode(response),
        "score": score if math.isfinite(score) else None,
        "ended": row.ended,
        "version": row.version,
        "prompt_row": row.prompt_row,
        "prompt_length": row.prompt_length,
        "length": row.length,
        "kl": float((logprobs - ref_logprobs).sum()),
    }
