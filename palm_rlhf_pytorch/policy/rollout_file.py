"""The responses of an update in a file that only grows, and what judges say of them in files beside it.

    rollout -> RolloutFile.append -> records

Rows are read through a memory map: what nobody asks for stays on the disk. Knows no update and no checkpoint;
`records.py` knows the bytes, `experience.py` reads several files as one source of rows.
"""

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.records import (
    FILE_START,
    INDEX,
    RECORD_START,
    Row,
    Spans,
    checked_arrays,
    file_header,
    read_file_header,
    read_row,
    read_scores,
    record,
    scan,
    scores_content,
)
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.training.atomic import check_target, replacing

GATHERED = 1 << 20  # bytes that are handed to the disk together


class RolloutFile:
    """The responses of one process in a file that only grows; scores, and rewards per token if there are such, beside.

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
        self.rewards_path = self.path.with_name(f"{self.path.name}.rewards")
        check_target(self.path)
        self.temperature: float | None = None
        self.eos_token: int | None = None
        self._index, self._size, self._end = np.zeros(0, INDEX), 0, 0  # bytes of the file, and of its whole records
        self._starts: np.ndarray | None = None  # where each row's rewards begin
        self._map: np.memmap[Any, np.dtype[np.uint8]] | None = None
        if self.path.exists():
            self._size = self.path.stat().st_size
            self.temperature, self.eos_token = read_file_header(self.path)
            self._index, self._end = scan(self.path, verify=verify)
        self._scores = read_scores(self.scores_path, len(self))
        self._rewards = None if self._scores is None else read_scores(self.rewards_path, self._num_tokens)

    def __len__(self) -> int:
        return len(self._index)

    def append(self, rollout: Rollout) -> None:
        """Add a record for each response, and wait until the disk has them all.

        What lies beyond a row's lengths is not kept. Scores and rewards are, unless earlier rows have none.

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
        known = self._rewards if len(self) else np.zeros(0, np.float32)
        self._index, self._scores = np.concatenate((self._index, self._write(arrays))), None
        self._rewards = None
        if before is not None and rollout.scores is not None and len(self):
            more = None if rollout.rewards is None else self._flat(rollout.rewards, arrays["lengths"])
            flat = None if more is None or known is None else np.concatenate((known, more))
            self._put_scores(np.concatenate((before, arrays["scores"])), flat)

    def read(self, row: int) -> Row:
        """One row, as views of the file."""
        if self._map is None:
            self._map = np.memmap(self.path, mode="r", dtype=np.uint8)
        return read_row(self._map, self._index[row])

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

    @property
    def rewards(self) -> np.ndarray | None:
        """What a judge gave each response token, row after row, float32; None if it gave scores alone."""
        return self._rewards

    def set_scores(self, scores: Tensor, rewards: Tensor | None = None) -> None:
        """Write the scores of all rows (n,) in place of any there are, whole or not at all.

        Args:
            scores: finite or not.
            rewards: for each token of each response, (n, t), t the longest, where the judge gives such; the score is
                their sum.

        Raises:
            ValueError: if they are not one for each row (and token), or there are no rows.
        """
        if not len(self) or scores.shape != (len(self),):
            raise ValueError(
                f"scores {tuple(scores.shape)} must be one for each of the {len(self)} rows of {self.path}"
            )
        values = scores.detach().cpu().float().numpy()
        self._put_scores(values, None if rewards is None else self._flat(rewards, self._index["lengths"]))

    def _put_scores(self, values: np.ndarray, flat: np.ndarray | None) -> None:
        self.scores_path.unlink(missing_ok=True)  # never scores beside the rewards of others
        self._scores = self._rewards = None
        if flat is None:
            self.rewards_path.unlink(missing_ok=True)
        else:
            with replacing(self.rewards_path) as file:
                file.write(scores_content(flat))
        with replacing(self.scores_path) as file:
            file.write(scores_content(values))
        self._scores, self._rewards = values.copy(), flat

    def files(self) -> list[Path]:
        """The files there are."""
        return [path for path in (self.path, self.scores_path, self.rewards_path) if path.exists()]

    def discard(self) -> None:
        """Delete the files; rows can be appended anew."""
        self.scores_path.unlink(missing_ok=True)  # first: never scores without what they are of
        self.rewards_path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.temperature = self.eos_token = self._scores = self._rewards = self._map = None
        self._index, self._size, self._end = np.zeros(0, INDEX), 0, 0

    @property
    def _num_tokens(self) -> int:
        return int(self._index["lengths"].sum())

    def _flat(self, rewards: Tensor, lengths: np.ndarray) -> np.ndarray:
        """Rewards (n, t) without what lies beyond the responses, row after row."""
        if rewards.shape[:1] != lengths.shape or rewards.ndim != 2 or rewards.shape[1] < lengths.max(initial=0):
            raise ValueError(
                f"rewards {tuple(rewards.shape)} must be one for each token of {len(lengths)} responses, the longest of"
                f" {lengths.max(initial=0)}"
            )
        within = np.arange(rewards.shape[1]) < lengths[:, None]
        return rewards.detach().cpu().float().numpy()[within]

    def rewards_of(self, row: int) -> np.ndarray | None:
        """Those of one row, (t,)."""
        if self._rewards is None:
            return None
        if self._starts is None or len(self._starts) != len(self):
            self._starts = np.cumsum(self._index["lengths"]) - self._index["lengths"]
        start = int(self._starts[row])
        return self._rewards[start : start + int(self._index["lengths"][row])]

    def _begin(self, temperature: float, eos_token: int | None) -> None:
        """Make the file, with a header and no row; what it held without a whole record goes."""
        self.scores_path.unlink(missing_ok=True)
        self.rewards_path.unlink(missing_ok=True)
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
