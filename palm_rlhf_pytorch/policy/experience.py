"""Experience on disk: the responses of an update appended to a file, and several such files as one source of rows.

    rollout -> RolloutFile.append -> records -> select(rows) -> what Rollout.select would have given, bit for bit

Rows are read through a memory map: what nobody asks for stays on the disk. Knows no update and no checkpoint;
`records.py` knows the bytes.
"""

import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.records import (
    FILE_START,
    INDEX,
    NUMBERS,
    RECORD_START,
    Decoder,
    Row,
    Spans,
    checked_arrays,
    described,
    file_header,
    read_file_header,
    read_row,
    read_scores,
    record,
    scan,
    scores_content,
)
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.policy.scores import Judge, judge_source
from palm_rlhf_pytorch.training.atomic import check_target, replacing

GATHERED = 1 << 20  # bytes that are handed to the disk together


class RolloutFile:
    """The responses of one process in a file that only grows, and their scores, once there are some, in one beside.

    What `append` returned from is on the disk. A last record that a crash cut short is left out, and overwritten by
    the next; any other damage is refused. One process writes; others open the file for themselves.

    Args:
        path: opened and checked if it exists, otherwise made by the first `append`.
        device: where `select` puts rows.
        verify: whether opening compares each record with its checksum, for which it reads the whole file. Headers and
            markers always are; False will do for what this process wrote itself.

    Raises:
        ValueError: if path is a folder, a link or a device, holds no rollouts, or is damaged before its end.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu", verify: bool = True) -> None:
        self.path, self.device = Path(path), torch.device(device)
        self.scores_path = self.path.with_name(f"{self.path.name}.scores")
        check_target(self.path)
        self.temperature: float | None = None
        self.eos_token: int | None = None
        self._index, self._size, self._end = np.zeros(0, INDEX), 0, 0  # bytes of the file, and of its whole records
        self._map: np.memmap[Any, np.dtype[np.uint8]] | None = None
        if self.path.exists():
            self._size = self.path.stat().st_size
            self.temperature, self.eos_token = read_file_header(self.path)
            self._index, self._end = scan(self.path, verify=verify)
        self._scores = read_scores(self.scores_path, len(self))

    def __len__(self) -> int:
        return len(self._index)

    def append(self, rollout: Rollout) -> None:
        """Add a record for each response, and wait until the disk has them all.

        What lies beyond a row's lengths is not kept. Scores are, unless earlier rows have none.

        Raises:
            TypeError: if ids are not int32, or a number is not float32.
            ValueError: if a length does not fit its row, a log-probability or a value is NaN or infinite (the row is
                named), temperature or eos_token differ from the file's, or another process has changed the file.
            OSError: if the disk refuses, naming path and bytes; the rows before are untouched.
        """
        arrays = checked_arrays(rollout)
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:
            raise ValueError(f"{self.path} has {size} bytes, not {self._size}: another process has changed it")
        if not len(self):
            self._begin(float(rollout.temperature), rollout.eos_token)
        elif (rollout.temperature, rollout.eos_token) != (self.temperature, self.eos_token):
            raise ValueError(
                f"rollout has temperature {rollout.temperature} and eos_token {rollout.eos_token}, {self.path} has"
                f" {self.temperature} and {self.eos_token}; append it to another file"
            )
        before = self._scores if len(self) else np.zeros(0, np.float32)
        self._index, self._scores = np.concatenate((self._index, self._write(arrays))), None
        if before is not None and rollout.scores is not None and len(self):
            self.set_scores(torch.from_numpy(np.concatenate((before, arrays["scores"]))))

    def read(self, row: int) -> Row:
        """One row, as views of the file."""
        if self._map is None:
            self._map = np.memmap(self.path, mode="r", dtype=np.uint8)
        return read_row(self._map, self._index[row])

    def select(self, rows: Rows | Tensor) -> Rollout:
        """See `Experience.select`."""
        return Experience([self]).select(rows)

    def spans(self) -> Spans:
        """Tokens of prompt and of response of each row."""
        return Spans(zip(self._index["prompt_lengths"], self._index["lengths"], strict=True))

    def column(self, name: str) -> Tensor:
        """What each row has of prompt_lengths, lengths, ended (0 or 1), prompt_rows or versions, int64, (n,)."""
        return torch.tensor(self._index[name], device=self.device)

    @property
    def scores(self) -> Tensor | None:
        """The judge's raw scores, float32, (n,), finite or not; None unless all rows have one."""
        return None if self._scores is None else torch.tensor(self._scores, device=self.device)

    def set_scores(self, scores: Tensor) -> None:
        """Write the scores of all rows (n,) in place of any there are, whole or not at all.

        Raises:
            ValueError: if they are not one for each row, or there are no rows.
        """
        if not len(self) or scores.shape != (len(self),):
            raise ValueError(
                f"scores {tuple(scores.shape)} must be one for each of the {len(self)} rows of {self.path}"
            )
        values = scores.detach().cpu().float().numpy()
        with replacing(self.scores_path) as file:
            file.write(scores_content(values))
        self._scores = values.copy()

    def files(self) -> list[Path]:
        """The files there are."""
        return [path for path in (self.path, self.scores_path) if path.exists()]

    def discard(self) -> None:
        """Delete the files; rows can be appended anew."""
        self.scores_path.unlink(missing_ok=True)  # first: never scores without what they are of
        self.path.unlink(missing_ok=True)
        self.temperature = self.eos_token = self._scores = self._map = None
        self._index, self._size, self._end = np.zeros(0, INDEX), 0, 0

    def _begin(self, temperature: float, eos_token: int | None) -> None:
        """Make the file, with a header and no row; what it held without a whole record goes."""
        self.scores_path.unlink(missing_ok=True)
        with replacing(self.path) as file:
            file.write(file_header(temperature, eos_token))
        self.temperature, self.eos_token = temperature, eos_token
        self._size = self._end = FILE_START

    def _write(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Put records behind the last whole one; their index."""
        found, end = array("q"), self._end
        try:
            with self.path.open("r+b", buffering=GATHERED) as file:
                file.truncate(end)
                file.seek(end)
                for row in range(len(arrays["lengths"])):
                    content, entry = record(arrays, row, number=len(self) + row)
                    file.write(content)
                    found.extend((end + RECORD_START, *entry))
                    end += len(content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            os.truncate(self.path, self._end)
            self._size, self._map = self._end, None
            if not isinstance(error, OSError):
                raise
            reason = f"{error.strerror or error} while adding {end - self._end:,} bytes; the rows before are untouched"
            raise OSError(error.errno, reason, str(self.path)) from error
        self._size, self._end, self._map = end, end, None
        return np.frombuffer(found, INDEX) if found else np.zeros(0, INDEX)


class Experience:
    """Several files of responses as one source of rows, the oldest file's first; reads as a `Rollout` in memory does.

    Rows appended to a file later are seen too.

    Raises:
        ValueError: if there is no file, or files differ in device, temperature or eos_token.
    """

    def __init__(self, files: Sequence[RolloutFile]) -> None:
        if not files:
            raise ValueError("files is empty; give at least one RolloutFile")
        self.files = list(files)
        self.device = self._first.device

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @property
    def eos_token(self) -> int | None:
        """The id that ends a response, None if none does."""
        return self._first.eos_token

    def spans(self) -> Spans:
        """Tokens of prompt and of response of each row."""
        return Spans(span for file in self.files for span in file.spans())

    @property
    def ended(self) -> Tensor:
        """True where the response ended with EOS, (n,)."""
        return self._column("ended").bool()

    @property
    def prompt_rows(self) -> Tensor:
        """Which of the trainer's prompts each row answers, -1 where that is not known, (n,)."""
        return self._column("prompt_rows")

    @property
    def versions(self) -> Tensor:
        """How many updates the policy had had that sampled each row, (n,)."""
        return self._column("versions")

    @property
    def scores(self) -> Tensor | None:
        """The judge's raw scores, float32, (n,), finite or not; None unless all rows have one."""
        found = [file.scores for file in self.files if len(file)]
        known = [scores for scores in found if scores is not None]
        return torch.cat(known) if known and len(known) == len(found) else None

    def select(self, rows: Rows | Tensor) -> Rollout:
        """Some of the rows, by number or by a mask, padded to the longest sequence and response among them.

        Raises:
            ValueError: if rows selects none.
            IndexError: if there is no such row.
        """
        if isinstance(rows, Tensor):
            rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
            if len(rows) == 0:
                raise ValueError("rows selects no row of the experience; give at least one")
            rows = next(row_batches(self.spans(), rows.tolist(), device=rows.device))
        wanted = rows.numbers.tolist()
        found, first, scores = list(self._read(wanted)), self._first, self.scores
        sequences = np.zeros((len(found), rows.total), np.int32)
        numbers = np.zeros((len(NUMBERS), len(found), rows.steps), np.float32)
        for place, row in enumerate(found):
            sequences[place, : len(row.ids)] = row.ids[: rows.total]
            numbers[:, place, : row.length] = row.numbers[:, : rows.steps]
        assert first.temperature is not None, "there are rows, so there is a header"
        return Rollout(
            sequences=torch.from_numpy(sequences).to(self.device),
            prompt_lengths=self._tensor(row.prompt_length for row in found),
            lengths=self._tensor(row.length for row in found),
            **dict(zip(NUMBERS, torch.from_numpy(numbers).to(self.device), strict=True)),
            ended=self._tensor(row.ended for row in found),
            prompt_rows=self._tensor(row.prompt_row for row in found),
            versions=self._tensor(row.version for row in found),
            temperature=first.temperature,
            eos_token=first.eos_token,
            scores=None if scores is None else scores[wanted],
        )

    def rescore(
        self,
        judge: Judge,
        *,
        max_batch_size: int = 64,
        max_batch_tokens: int = 4096,
        max_dropped: float = 0.1,
        where: str = "rescore",
    ) -> None:
        """Have all responses judged again, a batch in memory at a time; arguments as `judge_source`.

        Nothing is written before all are judged; then each file's scores are replaced whole. A response whose score is
        not finite counts nowhere; if more than max_dropped of them are, the old scores stay.

        Raises:
            ValueError: in that case.
        """
        if not len(self):
            return
        scores = judge_source(
            judge, self, device=self.device, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens,
            where=where,
        )  # fmt: skip
        bad = int((~scores.isfinite()).sum())
        if bad > max_dropped * len(scores):
            raise ValueError(
                f"{bad} of {len(scores)} scores in {where} are NaN or infinite, more than max_dropped"
                f" ({max_dropped:.0%}): the old scores stay"
            )
        for file, share in zip(self.files, scores.split([*map(len, self.files)]), strict=True):
            if len(file):
                file.set_scores(share)

    def to_jsonl(self, path: str | Path, tokenizer: Decoder | None) -> None:
        """Write a line for each response, for people to read; the file is replaced whole.

        A line holds `prompt`, `response`, `score` (null without a finite one), `ended`, `version`, `prompt_row`,
        `prompt_length` and `length` in tokens, and `kl`: the sum over the response of logprob - reference logprob.

        Args:
            path: the file.
            tokenizer: anything with `decode(ids)`; None writes ids.
        """
        scores = [math.nan] * len(self) if self.scores is None else self.scores.tolist()
        with replacing(path) as file:
            for row, score in zip(self._read(range(len(self))), scores, strict=True):
                line = json.dumps(described(row, score, tokenizer), allow_nan=False)
                file.write(line.encode() + b"\n")

    @property
    def _first(self) -> RolloutFile:
        """A file with rows, which stands for all of them."""
        filled = [file for file in self.files if len(file)] or self.files[:1]
        kinds = {(str(file.device), file.temperature, file.eos_token) for file in filled}
        if len(kinds) > 1:
            raise ValueError(f"files differ in device, temperature or eos_token: {sorted(kinds, key=str)}")
        return filled[0]

    def _read(self, numbers: Iterable[int]) -> Iterator[Row]:
        """Rows by their number over all files."""
        ends = np.cumsum([len(file) for file in self.files]).tolist()
        for number in numbers:
            if not 0 <= number < ends[-1]:
                raise IndexError(f"row {number} is none of the {ends[-1]} rows of the experience")
            which = next(place for place, end in enumerate(ends) if number < end)
            file = self.files[which]
            yield file.read(number - ends[which] + len(file))

    def _column(self, name: str) -> Tensor:
        return torch.cat([file.column(name) for file in self.files])

    def _tensor(self, values: Iterable[Any]) -> Tensor:
        return torch.tensor(list(values), device=self.device)
