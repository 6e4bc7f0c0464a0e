"""A file replaced whole or not at all: after a failure, a kill or a power cut there is the old one or the new one.

Knows nothing of what is written.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends well, and vanishes when it does not.

    It is written beside `path` without a name (Linux; elsewhere under a hidden one, which only a kill can leave),
    flushed to the disk, then renamed. It keeps the old file's permissions; a first one gets those of the umask.
    Missing parent folders are made.

    Raises:
        ValueError: if path is a folder, a symbolic link, a device or names no file.
        OSError: if the disk refuses (full, read-only), naming path and bytes written; the old file is untouched.
    """
    path = Path(path)
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:50]}.{secrets.token_hex(6)}.tmp")
    folder = os.open(path.parent, os.O_RDONLY)
    written = 0
    try:
        descriptor = _open_unnamed(path.parent)
        unnamed = descriptor is not None
        if descriptor is None:
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as file:
            try:
                yield file
                file.flush()
            finally:
                written = os.fstat(descriptor).st_size
            if path.exists():
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            os.fsync(descriptor)
            if unnamed:  # a folder descriptor makes this linkat(2), which follows the link in /proc
                os.link(f"/proc/self/fd/{descriptor}", beside, src_dir_fd=folder)
        os.replace(beside, path)
        os.fsync(folder)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        cause = _disk_error(error)
        if cause is None:
            raise
        reason = f"{cause.strerror or cause} after {written:,} bytes; nothing was saved, an earlier file is untouched"
        raise OSError(cause.errno, reason, str(path)) from error
    finally:
        os.close(folder)


def check_target(path: Path) -> None:
    """Raise a ValueError unless a file can be put at `path`; ask before the work whose result goes there."""
    if not path.name:
        raise ValueError(f"path ({str(path)!r}) names no file; give the path of a file to write")
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link; save to the file it points to ({path.resolve()}) instead")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {nature(path)}; give the path of a file to write")


def nature(path: Path) -> str:
    """What is at a path that is no ordinary file, for messages."""
    return "a folder" if path.is_dir() else "a device, pipe or socket"


def _open_unnamed(folder: Path) -> int | None:
    """Open a file in the folder that has no name yet, so that not even a kill leaves it behind; None if impossible."""
    flag = getattr(os, "O_TMPFILE", None)
    if flag is None or not Path("/proc/self/fd").is_dir():
        return None
    try:
        return os.open(folder, flag | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):  # old kernel or file system
            return None
        raise


def _disk_error(error: BaseException) -> OSError | None:
    """The disk's own error behind `error`: torch.save covers it with a RuntimeError about positions."""
    cause: BaseException | None = error
    while isinstance(cause, RuntimeError):
        cause = cause.__context__
    return cause if isinstance(cause, OSError) else None
