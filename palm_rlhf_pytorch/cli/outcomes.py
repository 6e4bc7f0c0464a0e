"""How the run of a command ends: what it leaves of an earlier one where it is refused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from palm_rlhf_pytorch.training.atomic import replacing


@contextmanager
def left_as_found(accelerator: Accelerator, metrics: Sequence[Path], others: Sequence[Path] = ()) -> Iterator[None]:
    """A block that begins a run and ends with it: where it is refused, the files are afterwards as they were.

    A run that has added to its metrics is not refused, whatever ends it: what it wrote stays.

    Args:
        accelerator: the main process looks after the files.
        metrics: files of metrics that the block may remove, and writes once it learns.
        others: files that the block may remove or write before that: the configuration, samples.
    """
    before = {path: _content(path) for path in (*metrics, *others)} if accelerator.is_main_process else {}
    try:
        yield
    except Exception:
        if not any(now and now != before[path] for path in metrics if path in before for now in (_content(path),)):
            for path, content in before.items():
                _give_back(path, content)
        raise


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _give_back(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    elif content != _content(path):
        with replacing(path) as file:
            file.write(content)
