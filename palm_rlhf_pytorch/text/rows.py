"""Rows of a table in a file: JSON lines, a JSON array, or comma- or tab-separated values with a header; plain or gzip.

A row that cannot be read comes out as an error with its line, and the reading goes on behind it. Knows no label.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from palm_rlhf_pytorch.text.dialogues import FieldError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_BOM = b"\xef\xbb\xbf"
_DAMAGE = (EOFError, OSError, zlib.error)


class Row(NamedTuple):
    """A line of a file, counted from 1, and its columns, or what is wrong with it.

    In a JSON array `line` counts the rows, and in CSV it is the last line of the row.
    """

    line: int
    columns: Mapping[str, object] | FieldError


def is_table(path: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return _suffix(path) in SUFFIXES


def check_table(path: Path) -> None:
    """Refuse what `read_rows` cannot open, before anything is read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, or its name ends with none of SUFFIXES (and perhaps ".gz").
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if _suffix(path) not in SUFFIXES:
        raise ValueError(f"{path} ends with none of {', '.join(SUFFIXES)} (or these with .gz); rename or convert it")


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, one after the other; blank lines and a byte order mark are passed over.

    Raises:
        ValueError: if a header names a column twice or not at all, or a JSON array is broken.
    """
    suffix = _suffix(path)
    file: IO[bytes]
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:  # type: ignore[assignment]
        if suffix in (".csv", ".tsv"):
            yield from _csv_rows(file, path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and _begins_array(file):
            yield from _array_rows(file, path)
        else:
            yield from _json_rows(file)


def _json_rows(file: IO[bytes]) -> Iterator[Row]:
    for number, line in _lines(file):
        if isinstance(line, FieldError):
            yield Row(number, line)
        elif line.strip():
            yield Row(number, _parse(line))


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | FieldError]]:
    """Numbered lines; damage to a compressed file ends them with an error."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline()
        except _DAMAGE as error:
            yield number, FieldError("", f"the file ends early or is damaged here ({error}); what follows is lost")
            return
        if not line:
            return
        yield number, line.removeprefix(_BOM) if number == 1 else line


def _parse(line: bytes) -> Mapping[str, object] | FieldError:
    try:
        found = json.loads(line.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return FieldError("", f"is not UTF-8: byte 0x{line[error.start]:02x} at offset {error.start} of the line")
    except FieldError as error:
        return error
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; the file has no end of line here and may be cut short"
        return FieldError("", f"is not JSON ({error}){cut}")
    return found if isinstance(found, Mapping) else FieldError("", "is JSON, but no object of columns")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise FieldError(", ".join(twice), "stands twice in one object")
    return columns


def _begins_array(file: IO[bytes]) -> bool:
    try:
        beginning = file.read(4096).removeprefix(_BOM).lstrip()
    except _DAMAGE:
        beginning = b""  # it is met again, and told, where the lines are read
    file.seek(0)
    return beginning.startswith(b"[")


def _array_rows(file: IO[bytes], path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(file.read().removeprefix(_BOM).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError, *_DAMAGE) as error:
        raise ValueError(f"{path} is not a whole JSON array ({error}); no row of it can be read") from error
    for number, row in enumerate(rows, start=1):
        yield Row(number, row if isinstance(row, Mapping) else FieldError("", "is JSON, but no object of columns"))


def _csv_rows(file: IO[bytes], path: Path, delimiter: str) -> Iterator[Row]:
    damage: list[Row] = []

    def decoded() -> Iterator[str]:
        for number, line in _lines(file):
            if isinstance(line, FieldError):
                damage.append(Row(number, line))
            else:
                yield line.decode("utf-8", errors="surrogateescape")  # the row is refused, not the whole file

    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    try:
        header = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: the header is not CSV ({error})") from error
    if not header or len(set(header)) < len(header) or not all(name.strip() for name in header):
        raise ValueError(f"{path} must begin with a line that names each column once, not {header}")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield Row(reader.line_num, FieldError("", f"is not CSV ({error})"))
            continue
        if cells:
            yield Row(reader.line_num, _cells(header, cells))
    yield from damage


def _cells(header: list[str], cells: list[str]) -> Mapping[str, object] | FieldError:
    if len(cells) != len(header):
        return FieldError("", f"has {len(cells)} cells; the header has {len(header)}")
    for name, cell in zip(header, cells, strict=True):
        try:
            cell.encode()
        except UnicodeEncodeError:
            return FieldError(name, "is not UTF-8")
    return dict(zip(header, cells, strict=True))


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
