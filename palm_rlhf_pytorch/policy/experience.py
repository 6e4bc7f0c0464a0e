"""Experience on disk: several files of responses as one source of rows.

    RolloutFile -> select(rows) -> what Rollout.select would have given, bit for bit

Rows are read through a memory map: what nobody asks for stays on the disk. Knows no update and no checkpoint;
`records.py` knows the bytes.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.judging import Judge, judge_source
from palm_rlhf_pytorch.policy.records import (
    NUMBERS,
    Row,
    Spans,
    described,
)
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.text.tokenizer import Decoder
from palm_rlhf_pytorch.training.atomic import replacing

GATHERED = 1 << 20  # bytes that are handed to the disk together


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
            rewards=self._rewards(wanted, rows.steps),
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
        found = judge_source(
            judge, self, device=self.device, max_batch_size=max_batch_size, max_batch_tokens=max_batch_tokens,
            where=where,
        )  # fmt: skip
        scores, rewards = found.scores, found.rewards
        bad = int((~scores.isfinite()).sum())
        if bad > max_dropped * len(scores):
            raise ValueError(
                f"{bad} of {len(scores)} scores in {where} are NaN or infinite, more than max_dropped"
                f" ({max_dropped:.0%}): the old scores stay"
            )
        sizes = [*map(len, self.files)]
        every = [None] * len(sizes) if rewards is None else rewards.split(sizes)
        for file, share, of_tokens in zip(self.files, scores.split(sizes), every, strict=True):
            if len(file):
                file.set_scores(share, of_tokens)

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

    def _rewards(self, wanted: list[int], steps: int) -> Tensor | None:
        """What a judge gave each token of some rows, (b, t), where it did."""
        if not any(file.rewards is not None for file in self.files):
            return None
        found = torch.zeros(len(wanted), steps)
        for place, (file, row) in enumerate(self._places(wanted)):
            rewards = file.rewards_of(row)
            if rewards is None:
                raise ValueError(f"{file.path} has scores alone, other files of this experience rewards per token")
            found[place, : len(rewards)] = torch.from_numpy(rewards[:steps])
        return found.to(self.device)

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
        for file, row in self._places(numbers):
            yield file.read(row)

    def _places(self, numbers: Iterable[int]) -> Iterator[tuple[RolloutFile, int]]:
        """In which file each row is, and where in it."""
        ends = np.cumsum([len(file) for file in self.files]).tolist()
        for number in numbers:
            if not 0 <= number < ends[-1]:
                raise IndexError(f"row {number} is none of the {ends[-1]} rows of the experience")
            which = next(place for place, end in enumerate(ends) if number < end)
            file = self.files[which]
            yield file, number - ends[which] + len(file)

    def _column(self, name: str) -> Tensor:
        return torch.cat([file.column(name) for file in self.files])

    def _tensor(self, values: Iterable[Any]) -> Tensor:
        return torch.tensor(list(values), device=self.device)
