"""A folder replaced whole or not at all, by one process or several: what training/atomic.py is for a file.

Knows nothing of what is written.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

from palm_rlhf_pytorch.training.manifest import Stored

# .partial is being written; .replaced stood at the name until the new one does; .removed is being deleted
HIDDEN = re.compile(r"\.(.+)\.(partial|replaced|removed)")
T = TypeVar("T")


class NewFolder:
    """A folder that takes the place of `path` when it is complete; until then it has a hidden name beside it.

    One process calls `make`, `place` and `close`; others may write into `partial` between `make` and `place`.
    """

    def __init__(self, path: Path) -> None:
        if not path.name:
            raise ValueError(f"path ({str(path)!r}) names no folder; give the path of a folder to write")
        self.path, self.partial = path, hidden(path, "partial")
        self._lock: int | None = None

    def make(self, *, ours: Callable[[str], bool]) -> None:
        """Clear away what killed processes left of this folder and of those whose names are `ours`, then begin."""
        with self.telling_of_the_disk():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            clear_away(self.path.parent, ours=lambda name: name == self.path.name or ours(name))
            try:
                self.partial.mkdir()
            except FileExistsError:
                reason = "another process is saving to this path; what it left is in the hidden folder"
                raise FileExistsError(errno.EEXIST, reason, str(self.partial)) from None
            self._lock = os.open(self.partial, os.O_RDONLY)
            _lock(self._lock, fcntl.LOCK_SH)  # shared is enough, and network file systems grant it to readers

    def place(self, *, over_old: bool = True) -> None:
        """Give the folder its name; an old one there is moved aside first, and deleted last.

        Args:
            over_old: without it an old one stays, and is an OSError unless it is empty.
        """
        aside, replacing = hidden(self.path, "replaced"), over_old and self.path.exists()
        with self.telling_of_the_disk():
            _flush(self.partial)
            if replacing:
                self.path.rename(aside)
            try:
                self.partial.rename(self.path)
            except BaseException:
                if replacing:
                    aside.rename(self.path)
                raise
        _flush(self.path.parent)
        if replacing:
            remove(aside)

    def close(self) -> None:
        """Remove what was not placed; nothing, if `make` did not succeed: it may be another process's."""
        if self._lock is not None:
            remove(self.partial)
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def telling_of_the_disk(self) -> Iterator[None]:
        """Errors of the disk get the path of the folder, and how much was written."""
        try:
            yield
        except OSError as error:
            written = sum(path.lstat().st_size for path in self.partial.iterdir()) if self.partial.is_dir() else 0
            where = f" ({error.filename})" if error.filename else ""
            reason = f"{error.strerror or error}{where} after {written:,} bytes; nothing was saved"
            raise OSError(error.errno, f"{reason}, what stood there is untouched", str(self.path)) from error


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Stored:
    """Write a new file to the disk."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
        return Stored(file.tell(), digest.hexdigest())


def attach_file(source: Path, target: Path) -> Stored:
    """Copy a file, and see it to the disk; a second name would be cheaper, but share every damage.

    Raises:
        OSError: if the disk refuses, or the file grows meanwhile.
    """
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        os.fsync(file.fileno())
        if size != source.stat().st_size:
            raise OSError(errno.EBUSY, "the file is still being written", str(source))
    return Stored(size, digest)


def hidden(path: Path, state: str) -> Path:
    """The name of a folder in one of the states of HIDDEN."""
    return path.with_name(f".{path.name}.{state}")


def clear_away(parent: Path, *, ours: Callable[[str], bool]) -> None:
    """Undo what killed processes left half done for folders whose names are `ours`; living ones are let be."""
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = HIDDEN.fullmatch(path.name)
        if match is None or not ours(match[1]) or _is_being_written(hidden(parent / match[1], "partial")):
            continue
        if match[2] == "replaced" and not os.path.lexists(parent / match[1]):  # killed between the two renames
            path.rename(parent / match[1])
        else:
            remove(path)


def discard(path: Path) -> None:
    """Delete a folder so that no moment shows half of it."""
    removed = hidden(path, "removed")
    remove(removed)
    path.rename(removed)
    remove(removed)


def remove(path: Path) -> None:
    """Delete a hidden folder or file, if it is there; what a network file system still holds open stays for later."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def together(accelerator: Accelerator | None, work: Callable[[], T]) -> list[T]:
    """What `work` returns on each process, by rank; if it raises on one, all raise, so that none waits for ever.

    Raises:
        Exception: the process's own error; where it has none, a RuntimeError that tells of the others'.
    """
    results: list[T] = []
    failure = None
    try:
        results.append(work())
    except Exception as error:  # raised below, once the others know
        failure = error
    told = [(results, None if failure is None else f"{type(failure).__name__}: {failure}")]
    if accelerator is not None:
        told = gather_object(told)
    if failure is not None:
        raise failure
    others = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if others:
        raise RuntimeError("another process stopped: " + "; ".join(others))
    return [result for results_of_rank, _ in told for result in results_of_rank]


def is_main(accelerator: Accelerator | None) -> bool:
    """Whether this is the process that saves; it is, where there is one."""
    return accelerator is None or accelerator.is_main_process


def _is_being_written(partial: Path) -> bool:
    """Whether a living process holds the lock of a partial folder."""
    try:
        descriptor = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Lock until the descriptor is closed or the process dies; False if another holds it. Without locks, True."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has none
        pass
    return True


def _flush(folder: Path) -> None:
    """See the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
