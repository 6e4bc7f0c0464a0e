"""Files of text and what is drawn from them: token stream, texts, prompts, what people judged.

It knows no model and no loss. All randomness comes from a seed; the order of prompts is the policy's to choose.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.text.columns import Read, read_columns
from palm_rlhf_pytorch.text.dialogues import FieldError, opening_of, read_turns, render_prompt
from palm_rlhf_pytorch.text.records import Label, Rating, Text
from palm_rlhf_pytorch.text.rows import Row, check_table, is_table, read_rows


class TokenStream:
    """Random windows of one long run of tokens, forever.

    Iterating yields `{"seq": (b, n)}`, long, b = batch_size, n = length; every start is equally likely. Each iterator
    begins anew from the seed, so two of them give the same batches.

    Args:
        tokens: ids (n,), a tensor or an array; a memory map is read window by window and never held whole.
        length: tokens of a window.
        batch_size: windows of a batch.
        seed: of the windows' places.

    Raises:
        TypeError: if tokens are not integers.
        ValueError: if tokens are not one row of at least `length`, or length or batch_size is not positive.
    """

    def __init__(self, tokens: Tensor | np.ndarray, *, length: int, batch_size: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"length ({length}) must be positive")
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be positive")
        array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"tokens must be integers, not {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"tokens must be one row (n,), not of shape {array.shape}")
        if len(array) < length:
            raise ValueError(f"tokens ({len(array)}) must fill a window of length ({length}); add text or shorten it")
        self.tokens = array
        self.length = length
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            starts = torch.randint(len(self.tokens) - self.length + 1, (self.batch_size,), generator=generator)
            windows = [self.tokens[start : start + self.length] for start in starts.tolist()]
            yield {"seq": torch.from_numpy(np.stack(windows).astype(np.int64))}


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    r"""Texts of UTF-8 files, a byte order mark removed and line ends made `\n`.

    Raises:
        TypeError: if paths is a single path.
        FileNotFoundError: naming the file that is missing.
        ValueError: if a path is a folder, or naming a file that is not UTF-8 and the first offending byte.
    """
    if isinstance(paths, str | Path):
        raise TypeError("paths must be a list of paths; for one file, pass [path]")
    return [_read_text(Path(path)) for path in paths]


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a UTF-8 file, one a line; blank lines are skipped. Of a table, its column `prompt`.

    Args:
        path: plain text, or a table by its name: .jsonl, .json, .csv, .tsv, also with .gz. There a prompt may be a list
            of turns; it is written as labels are (`text/dialogues.py`).

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not UTF-8, or holds no prompt, or a row of a table has none (its line is named).
    """
    if is_table(Path(path)):
        return [_prompt_of(row, path) for row in read_rows(Path(path))]
    # not splitlines, which also breaks at form feeds and at U+2028 inside a prompt
    prompts = [line for line in _read_text(Path(path)).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def _prompt_of(row: Row, path: str | Path) -> str:
    try:
        if isinstance(row.columns, FieldError):
            raise row.columns
        prompt = row.columns.get("prompt")
        if isinstance(prompt, str) and prompt.strip():
            return prompt
        if not isinstance(prompt, list):
            raise FieldError("prompt", "is missing: give a text, or a list of turns")
        return render_prompt(read_turns(prompt, field="prompt"), field="prompt")
    except FieldError as error:
        raise ValueError(f"{path}, line {row.line}: {error}") from error


class BadRecord(NamedTuple):
    """A record that could not be read: its file ("" for none), its line counted from 1, the field, and why."""

    file: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}, line {self.line}" if self.file else f"record {self.line}"
        return f"{place}: {self.field} {self.reason}" if self.field else f"{place}: {self.reason}"


def stop_at_bad_record(bad: BadRecord) -> NoReturn:
    """Raise a ValueError that names file, line and field; for `on_bad_record`."""
    raise ValueError(f"{bad}; mend it, or leave such records out and count them (on_bad_record=skip_bad_record)")


def skip_bad_record(bad: BadRecord) -> None:
    """Leave the record out; `Labels.bad` lists it all the same. For `on_bad_record`."""


@dataclass
class Labels:
    """What was read, and what happened to the rest.

    Args:
        records: the labels, in the order of their rows.
        bad: the records left out.
        rows: how many rows were read, bad ones included.
        counts: how many rows are worth knowing about, by what is special about them ("ties").
        unread: columns that nothing was read from, and in how many rows they stand.
    """

    records: list[Label] = field(default_factory=list)
    bad: list[BadRecord] = field(default_factory=list)
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """The counts in words, a line each; no text of a record is shown."""
        kinds = Counter(type(record).__name__.lower() for record in self.records)
        listed = ", ".join(f"{number:,} {kind}{'s' * (number != 1)}" for kind, number in sorted(kinds.items()))
        lines = [f"{self.rows:,} rows: {listed or 'no label'}, {len(self.bad):,} bad"]
        lines += [f"  {number:,} {name}" for name, number in sorted(self.counts.items()) if number]
        for name in ("annotator", "group"):
            values = {getattr(record, name) for record in self.records} - {None}
            lines += [f"  {len(values):,} {name}{'s' * (len(values) != 1)}"] if values else []
        ratings = [record.value for record in self.records if isinstance(record, Rating)]
        if ratings:
            whole = "whole numbers" if all(value == int(value) for value in ratings) else "numbers"
            lines.append(f"  ratings are {whole} from {min(ratings):g} to {max(ratings):g}")
        if self.unread:
            lines.append(f"  columns not read: {', '.join(sorted(self.unread))}")
        lines += [f"  bad: {bad}" for bad in self.bad[:5]]
        return "\n".join(lines + ([f"  and {len(self.bad) - 5:,} bad ones more"] if len(self.bad) > 5 else []))


def read_labels(
    source: str | Path | Iterable[str | Path | Mapping[str, object]],
    *,
    on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record,
    columns: Mapping[str, str | None] | None = None,
    bins: Callable[[float], float] | None = None,
) -> Labels:
    """What people judged, from files or rows; text/columns.py says which columns make which kind of label.

    Args:
        source: a path, several, or rows (mappings of columns, such as a Hugging Face dataset). Files are JSON lines,
            a JSON array, CSV or TSV with a header, in UTF-8, plain or .gz, as their names end.
        on_bad_record: is told of each record that cannot be read, and may raise. `stop_at_bad_record` does,
            `skip_bad_record` does not; `Labels.bad` lists them in either case.
        columns: new names of columns, {"sentence": "text"}; None leaves a column out.
        bins: changes the value of each rating (`whole_bins(1, 5)`: 1 to 5 become bins 0 to 4); None leaves them.

    Raises:
        TypeError: if source is a single row or a dictionary of splits, or holds something else than rows and paths.
        FileNotFoundError, ValueError: if a file is missing, of no known kind, or not one label can be read.
    """

    def read_row(row: Mapping[str, object], line: int) -> Read:
        return read_columns(_renamed(row, columns or {}), line=line, bins=bins)

    labels = Labels()
    for read in read_each(source_rows(source), read_row, on_bad_record):
        labels.rows += 1
        if isinstance(read, BadRecord):
            labels.bad.append(read)
            continue
        labels.records += read.labels
        labels.counts.update(read.notes)
        labels.unread.update(read.unread)
    if not labels.records:
        first = f"; the first of {len(labels.bad):,} bad records: {labels.bad[0]}" if labels.bad else ""
        raise ValueError(f"source holds no label{first}")
    return labels


class Grouped(Protocol):
    """A record that stays with its group: a label, or a demonstration."""

    @property
    def group(self) -> str | None:
        """Name of the group; None to go by the prompt."""
        ...

    @property
    def texts(self) -> tuple[Text, ...]:
        """The record's texts."""
        ...


Record = TypeVar("Record", bound=Grouped)
Found = TypeVar("Found")


def split_by_group(records: Sequence[Record], *, held_out: float, seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Records to train on, and records held out, with no group on both sides.

    A record without a group goes by its prompt (of two prompts, the first in the alphabet), of a dialogue by how that
    begins, since files hold the same one at several lengths; a record without either goes by its responses. Where a
    group goes depends on its name and the seed alone, so that added data moves no record.

    Args:
        records: of any kind.
        held_out: share of the groups to hold out, about; in (0, 1).
        seed: another one holds out other groups.

    Raises:
        ValueError: if held_out is not between 0 and 1, or one side stays empty.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out ({held_out}) must be above 0 and below 1")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        digest = hashlib.blake2b(f"{seed}\n{_group(record)}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        sides[int.from_bytes(digest) < held_out * 2**64].append(record)
    if not all(sides):
        groups = len({_group(record) for record in records})
        enough = min(0.5, 2 / groups)
        raise ValueError(
            f"held_out ({held_out}) leaves a side empty: there are {groups} groups (of one prompt, or one beginning of"
            f" a dialogue); hold out {max(enough, 0.1):.2g}, take another seed, or give more data"
        )
    return sides


def _group(record: Grouped) -> str:
    if record.group is not None:
        return f"group\n{record.group}"
    prompt = min(opening_of(text.prompt) for text in record.texts)
    return f"prompt\n{prompt}" if prompt else "\n".join(["text", *sorted(text.response for text in record.texts)])


def source_rows(source: str | Path | Iterable[str | Path | Mapping[str, object]]) -> Iterator[tuple[str, Row]]:
    """Rows and the names of their files, "" for none; all files are looked at before the first is read.

    Raises:
        TypeError: if source is a single row or a dictionary of splits, or holds something else than rows and paths.
        FileNotFoundError, ValueError: if a file is missing, or of no known kind.
    """
    if isinstance(source, Mapping):
        raise TypeError("source is a mapping: give a list of rows, or one split of a dataset")
    items = [source] if isinstance(source, str | Path) else source
    paths = [Path(item) for item in items if isinstance(item, str | Path)] if isinstance(items, Sequence) else []
    for path in paths:
        check_table(path)
    for number, item in enumerate(items, start=1):
        if isinstance(item, str | Path):
            check_table(Path(item))
            yield from ((str(item), row) for row in read_rows(Path(item)))
        elif isinstance(item, Mapping):
            yield "", Row(number, item)
        else:
            raise TypeError(f"source holds a {type(item).__name__}; give paths, or rows that map columns to values")


def read_each(
    rows: Iterable[tuple[str, Row]],
    read_row: Callable[[Mapping[str, object], int], Found],
    on_bad_record: Callable[[BadRecord], None],
) -> Iterator[Found | BadRecord]:
    """What is read of each row, or the bad record that it is, once `on_bad_record` was told of it.

    Args:
        rows: with the names of their files, as `source_rows` gives them.
        read_row: takes a row's columns and its line, 0 without a file; raises a FieldError where it cannot be read.
        on_bad_record: is told of each row that cannot be read, and may raise.
    """
    for file, row in rows:
        try:
            if isinstance(row.columns, FieldError):
                raise row.columns
            found = read_row(row.columns, row.line if file else 0)
        except FieldError as error:
            bad = BadRecord(file, row.line, error.field, error.reason)
            on_bad_record(bad)
            yield bad
        else:
            yield found


def _renamed(row: Mapping[str, object], columns: Mapping[str, str | None]) -> Mapping[str, object]:
    if not columns:
        return row
    renamed: dict[str, object] = {}
    for name, value in row.items():
        new = columns.get(name, name)
        if new in renamed:
            raise FieldError(new, "is the name of two columns after columns= has renamed them")
        if new is not None:
            renamed[new] = value
    return renamed


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such file: {path}") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        wrong = content[error.start]
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{wrong:02x} at offset {error.start}; convert it first"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
