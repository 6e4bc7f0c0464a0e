"""A judge that is asked once about the same response: in memory, and in a file that outlives the run if wanted.

For judges that repeat themselves, and are slow or cost money; one that is still being trained is not of them. The file
is an SQLite database: written in transactions, so that a kill loses the last call at most and several processes may
share it; it holds digests and numbers, nothing that could be run.
"""

import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.reward.functions import Judge, as_rewards

Kept = float | np.ndarray  # a score, or the rewards of one response
MARK = 0x50414C4D  # "PALM": whose database it is
ASKED_AT_ONCE = 500  # of one statement; SQLite takes 999 at least


class CachedJudge(nn.Module):
    """A judge, asked only about responses it has not judged before; equal rows of one batch are judged once.

    Rows are the same if ids of prompt and response are, and the place where one ends and the other begins. What cannot
    be judged (NaN or infinite) is not kept, and so asked again. Of several judges each may have a cache: put it around
    those, not around their sum, whose scales change once. `num_hits` counts the rows answered without the judge,
    `num_asked` those that it judged.
    """

    def __init__(
        self, judge: Judge, *, max_entries: int = 1_000_000, path: str | Path | None = None, version: str | None = None
    ) -> None:
        """Put a cache before a judge; the file is made, or checked, at once.

        Args:
            judge: gives the same for the same ids; scores (b,) or rewards (b, t).
            max_entries: responses in memory, and as many in the file; those not asked about the longest leave the
                memory, those judged first leave the file.
            path: the file; None keeps all in memory.
            version: with path: which judge it is, and which of its weights, in a word of yours. What another one said
                is not taken.

        Raises:
            ValueError: if max_entries is below 1, path comes without version or the other way round, or path is of
                another version or no cache.
            OSError: if the file cannot be written.
        """
        super().__init__()
        if max_entries < 1:
            raise ValueError(f"max_entries ({max_entries}) must be at least 1")
        if (path is None) != (not version):
            raise ValueError(
                f"path ({path}) and version ({version!r}) go together: name the judge whose scores these are"
            )
        self.judge, self.max_entries = judge, max_entries
        self.num_hits = self.num_asked = 0
        self._memory: OrderedDict[bytes, Kept] = OrderedDict()
        self._file = None if path is None else _File(Path(path), str(version), max_entries)

    def forward(self, sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        """Scores (b,) or rewards (b, t), as the judge gives them; arguments as in `Judge`."""
        keys = _digests(sequences, prompt_mask, mask)
        known = self._known(set(keys))
        fresh = list({key: row for row, key in enumerate(keys) if key not in known}.values())
        if fresh:
            known |= self._judged(sequences, prompt_mask, mask, keys, fresh)
        self.num_asked += len(fresh)
        self.num_hits += len(keys) - len(fresh)
        found = [known[key] for key in keys]
        if len({isinstance(kept, float) for kept in found}) > 1:
            raise ValueError("the judge gave scores once and rewards for each token another time: give it a new cache")
        lengths = (mask & ~prompt_mask).sum(dim=-1).tolist()
        return as_rewards(found, lengths, device=sequences.device)

    def clear(self) -> None:
        """Forget what is in memory; the file stays."""
        self._memory.clear()

    def _known(self, keys: set[bytes]) -> dict[bytes, Kept]:
        found = {key: self._memory[key] for key in keys if key in self._memory}
        if self._file is not None and len(found) < len(keys):
            found |= self._file.read(sorted(keys - set(found)))
        self._keep(found)
        return found

    def _judged(
        self, sequences: Tensor, prompt_mask: Tensor, mask: Tensor, keys: Sequence[bytes], rows: list[int]
    ) -> dict[bytes, Kept]:
        """What the judge says of some rows, by their keys; kept as far as it can be."""
        index = torch.tensor(rows, device=sequences.device)
        used = mask[index].any(dim=0).nonzero()[:, 0]
        kept = slice(0, int(used.max()) + 1 if len(used) else 0)
        masks = {"prompt_mask": prompt_mask[index, kept], "mask": mask[index, kept]}
        found = self.judge(sequences[index, kept], **masks)
        if not isinstance(found, Tensor):
            raise TypeError(f"the judge gave a {type(found).__name__}, no tensor; `text_judge` makes one of a list")
        found = found.detach().float().cpu()
        lengths = (masks["mask"] & ~masks["prompt_mask"]).sum(dim=-1).tolist()
        if found.shape not in ((len(rows),), (len(rows), max(lengths))):
            raise ValueError(f"the judge gave shape {tuple(found.shape)} for {len(rows)} responses of {lengths} tokens")
        whole = found.tolist() if found.ndim == 1 else [row[:n].numpy() for row, n in zip(found, lengths, strict=True)]
        new: dict[bytes, Kept] = {keys[row]: value for row, value in zip(rows, whole, strict=True)}
        certain = {key: value for key, value in new.items() if np.isfinite(value).all()}
        self._keep(certain)
        if self._file is not None:
            self._file.write(certain)
        return new

    def _keep(self, entries: dict[bytes, Kept]) -> None:
        for key, value in entries.items():
            self._memory[key] = value
            self._memory.move_to_end(key)
        while len(self._memory) > self.max_entries:
            self._memory.popitem(last=False)


class _File:
    """Scores by digest in an SQLite file; opened for each call, since a trainer may call from different threads."""

    def __init__(self, path: Path, version: str, max_entries: int) -> None:
        self.path, self.max_entries = path, max_entries
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            mark = database.execute("PRAGMA application_id").fetchone()[0]
            tables = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if mark != MARK and tables:
                raise ValueError(f"path ({path}) is another program's database: give the path of a cache, or a new one")
            if mark != MARK:
                database.execute(f"PRAGMA application_id = {MARK}")
            database.execute("CREATE TABLE IF NOT EXISTS about (version TEXT)")
            database.execute("CREATE TABLE IF NOT EXISTS said (key BLOB UNIQUE, score REAL, rewards BLOB)")
            database.execute("INSERT INTO about SELECT ? WHERE NOT EXISTS (SELECT 1 FROM about)", (version,))
            theirs = database.execute("SELECT version FROM about").fetchone()[0]
        if theirs != version:
            raise ValueError(f"path ({path}) holds what {theirs!r} said, not version ({version!r}): give another path")

    def read(self, keys: list[bytes]) -> dict[bytes, Kept]:
        """What is known of keys."""
        found: dict[bytes, Kept] = {}
        with self._open() as database:
            for at in range(0, len(keys), ASKED_AT_ONCE):
                some = keys[at : at + ASKED_AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = database.execute(f"SELECT key, score, rewards FROM said WHERE key IN ({marks})", some)
                for key, score, rewards in rows:
                    found[key] = np.frombuffer(rewards, dtype="<f4") if score is None else float(score)
        return found

    def write(self, entries: dict[bytes, Kept]) -> None:
        """Add entries; the oldest make room for them."""
        rows = [
            (key, value, None) if isinstance(value, float) else (key, None, value.astype("<f4").tobytes())
            for key, value in entries.items()
        ]
        with self._open() as database:
            database.executemany("INSERT OR IGNORE INTO said VALUES (?, ?, ?)", rows)
            last = "(SELECT max(rowid) FROM said)"
            database.execute(f"DELETE FROM said WHERE rowid <= {last} - ?", (self.max_entries,))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
                yield database
        except sqlite3.OperationalError as error:
            raise OSError(f"path ({self.path}): {error}") from error  # full, locked for a minute, read-only
        except sqlite3.DatabaseError as error:
            raise ValueError(f"path ({self.path}) cannot be used as a cache of scores: {error}") from error


def _digests(sequences: Tensor, prompt_mask: Tensor, mask: Tensor) -> list[bytes]:
    """What tells rows apart: ids and where the response begins, whatever padding is around them."""
    ids, prompts, real = (tensor.cpu().numpy() for tensor in (sequences.long(), prompt_mask, mask))
    return [
        hashlib.blake2b(row[kept].astype("<i8").tobytes() + prompt[kept].tobytes(), digest_size=20).digest()
        for row, prompt, kept in zip(ids, prompts, real, strict=True)
    ]
