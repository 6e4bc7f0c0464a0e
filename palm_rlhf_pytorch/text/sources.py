r"""Text files to train on, found by name or in folders, and read piece by piece however large they are.

Plain text is one document a file; .jsonl and .ndjson hold one a row, in a column. Both may be gzipped (.gz). UTF-8; a
byte order mark is removed, and line ends become `\n`. Knows no tokenizer.
"""

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from palm_rlhf_pytorch.text.datasets import BadRecord, read_each, stop_at_bad_record
from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.rows import read_rows

ROWS = (".jsonl", ".ndjson")
# what is taken from a folder: other files there are left alone; a file given by its name may end in anything
PLAIN = tuple(
    ".txt .text .md .markdown .rst .org .tex .adoc .html .htm .xml .css .yaml .yml .toml .py .pyi .js .jsx"
    " .ts .tsx .c .h .cc .cpp .hpp .cu .cs .java .kt .go .rs .rb .php .swift .scala .hs .lua .r .jl .sql .sh".split()
)
PIECE = 2**15  # characters
CHUNK = 2**20  # bytes read at a time


class Source(NamedTuple):
    """A file to read, and whether the user named it, rather than a folder that it is in."""

    path: Path
    named: bool


class Piece(NamedTuple):
    """A part of a document, and whether it is the first one."""

    text: str
    begins: bool


class BadTextError(ValueError):
    """A file that is no text: the message says which, where in it, and why."""


def find_sources(paths: Sequence[str | Path]) -> list[Source]:
    """Files to read, in the order given; those of a folder sorted by their paths, in folders within it too.

    Of a folder, files are taken whose names end as PLAIN and ROWS say, perhaps with .gz; hidden ones and links are
    passed over, and so are those that are in the list already.

    Raises:
        TypeError: if paths is a single path.
        FileNotFoundError: naming the path that is missing.
        ValueError: if a path is neither a file nor a folder, a folder holds no text, or there are no paths.
    """
    if isinstance(paths, str | Path):
        raise TypeError("paths must be a list of paths; for one file or folder, pass [path]")
    if not paths:
        raise ValueError("paths is empty; give at least one file or folder")
    found: list[Source] = []
    seen = {Path(path).resolve() for path in paths}
    for path in map(Path, paths):
        if path.is_dir():
            inside = [file for file in _walk(path) if file.resolve() not in seen]
            seen |= {file.resolve() for file in inside}
            found += [Source(file, named=False) for file in inside]
            if not inside and not any(_is_text(file) for file in _walk(path)):
                raise ValueError(f"{path} is a folder without text; it takes files ending in {' '.join(PLAIN + ROWS)}")
        elif path.is_file():
            found.append(Source(path, named=True))
        elif path.exists():
            raise ValueError(f"{path} is neither a file nor a folder; give text files or folders of them")
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return found


def read_pieces(
    path: Path, *, column: str = "text", on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record
) -> Iterator[Piece]:
    r"""The documents of a file, each in pieces of some 30,000 characters; empty ones are passed over.

    Pieces are cut before the first letter of a line where one of the lines allows it, so that a tokenizer that looks
    no further than a word gives the same ids as for the whole; where none does, between two characters.

    Args:
        path: of the file.
        column: of the rows, holds the text.
        on_bad_record: is told of a row that has no text there, and may raise; see `read_labels`.

    Raises:
        BadTextError: if the file is damaged, not UTF-8, or holds zero bytes, as binary files do.
        OSError: if it cannot be read.
    """
    if _suffix(path) in ROWS:
        for text in _row_texts(path, column, on_bad_record):
            yield from _cut_up(iter([text]))
    else:
        yield from _cut_up(_characters(path))


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.is_file() and _is_text(path):
            yield path


def _is_text(path: Path) -> bool:
    return _suffix(path) in PLAIN + ROWS


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _characters(path: Path) -> Iterator[str]:
    utf8, ends = codecs.getincrementaldecoder("utf-8")(), io.IncrementalNewlineDecoder(None, translate=True)
    place, first = 0, True
    file: IO[bytes]
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:  # type: ignore[assignment]
        while True:
            chunk = _read(file, path, place)
            waiting = len(utf8.getstate()[0])  # of a character that the last chunk cut
            try:
                text = ends.decode(utf8.decode(chunk, not chunk), not chunk)
            except UnicodeDecodeError as error:
                wrong, offset = error.object[error.start], place - waiting + error.start
                raise BadTextError(
                    f"{path} is not UTF-8: byte 0x{wrong:02x} at offset {offset}; convert it first"
                ) from error
            zero = chunk.find(0)
            if zero >= 0:
                raise BadTextError(
                    f"{path} holds a zero byte at offset {place + zero}: it is binary, or UTF-16; convert it to UTF-8"
                )
            if not chunk and not text:
                return
            yield text.removeprefix("\ufeff") if first else text
            place, first = place + len(chunk), first and not text


def _read(file: IO[bytes], path: Path, place: int) -> bytes:
    try:
        return file.read(CHUNK)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadTextError(f"{path} ends early or is damaged after {place:,} bytes of text ({error})") from error


def _row_texts(path: Path, column: str, on_bad_record: Callable[[BadRecord], None]) -> Iterator[str]:
    rows = ((str(path), row) for row in read_rows(path))
    for text in read_each(rows, lambda columns, _: _text_of(columns, column), on_bad_record):
        if not isinstance(text, BadRecord):
            yield text.replace("\r\n", "\n").replace("\r", "\n")


def _text_of(columns: Mapping[str, object], column: str) -> str:
    text = columns.get(column)
    if not isinstance(text, str):
        kind = "is missing" if text is None else f"is of type {type(text).__name__}"
        raise FieldError(column, f"{kind}: give text; the columns are {', '.join(map(str, columns)) or 'none'}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(column, "holds half of a surrogate pair, which is no character") from error
    return text


def _cut_up(texts: Iterator[str]) -> Iterator[Piece]:
    """One document, which comes in parts of any length, in pieces of about PIECE characters."""
    begins, waiting = True, ""
    for text in texts:
        waiting += text
        start = 0
        while len(waiting) - start >= 2 * PIECE:
            end = _place_to_cut(waiting, start + PIECE // 2, start + PIECE)
            yield Piece(waiting[start:end], begins)
            start, begins = end, False
        waiting = waiting[start:]
    if waiting:
        yield Piece(waiting, begins)


def _place_to_cut(text: str, first: int, last: int) -> int:
    """Where to cut between two places: behind a line end between two letters, if there is one, else any line end."""
    end = text.rfind("\n", first, last)
    while end > first and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind("\n", first, end)
    if end <= first:
        end = text.rfind("\n", first, last)
    if end <= first:  # a space goes with the word behind it
        end = text.rfind(" ", first, last) - 1
    return end + 1 if end > first else last
