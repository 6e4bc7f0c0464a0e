"""Tensors read out of a checkpoint piece by piece, into memory of their own and in the dtype asked for.

What is read of a memory-mapped file counts as this process's memory until the map is let go of; so the file is mapped
anew after every few pieces, and loading takes little more than the tensors that come of it. Knows no layout of keys.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.training.tensor_file import TensorFile, load_tensors

PIECE = 1 << 22  # bytes read at a time
HELD = 1 << 23  # bytes read of one map, or a 64th of the file if that is more
TOUCH = 1 << 20  # bytes that come with the first one of a piece: the system reads files ahead


class Part(NamedTuple):
    """Where a tensor is in a file: several of the file's side by side, one alone in another shape, or none (zeros).

    names: of the file's tensors.
    shape: of the tensor that comes of them.
    dim: along which several are put side by side.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dim: int = 0


class TensorReader:
    """A checkpoint whose tensors stay in the file until they are read; checked when opened as `load_tensors` does.

    `tensors` has the file's names, shapes and dtypes, without data (on torch's meta device); `kind`, `config` and
    `extra` are those of `TensorFile`.
    """

    def __init__(self, path: str | Path, *, kind: str | None = None) -> None:
        """Open and check a file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: as `load_tensors` does.
        """
        self.path = Path(path)
        found = load_tensors(path, kind=kind, mapped=True)
        self._identity = _identity(self.path)
        self.kind, self.config, self.extra = found.kind, found.config, found.extra
        self.tensors = {name: tensor.to("meta") for name, tensor in found.tensors.items()}
        self._mapped: Mapping[str, Tensor] = found.tensors
        self._limit = self._held = max(HELD, self.path.stat().st_size // 64)  # looking up all of them read some of each

    def whole(self) -> dict[str, Part]:
        """Every tensor of the file as it is there."""
        return {name: Part((name,), tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, part: Part, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor in memory of its own.

        Args:
            part: where it is.
            dtype: to convert to; None keeps the file's.
            device: where to put it.

        Raises:
            ValueError: if another file has taken the place of the one that was opened.
        """
        if not part.names:
            return torch.zeros(part.shape, dtype=dtype, device=device)
        result = torch.empty(part.shape, dtype=dtype or self.tensors[part.names[0]].dtype, device=device)
        if len(part.names) == 1:
            self._copy(part.names[0], result.view(self.tensors[part.names[0]].shape))
            return result
        sizes = [self.tensors[name].shape[part.dim] for name in part.names]
        for name, place in zip(part.names, result.split(sizes, dim=part.dim), strict=True):
            self._copy(name, place)
        return result

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors of the file are equal to the bit."""
        one, other = self._mapped[first], self._mapped[second]
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():  # stored once, for both
            return True
        pairs = zip(self._pieces(first), self._pieces(second), strict=True)
        return all(torch.equal(a, b) for (_, a), (_, b) in pairs)

    def _copy(self, name: str, result: Tensor) -> None:
        for rows, piece in self._pieces(name):
            (result if rows is None else result[rows]).copy_(piece)

    def _pieces(self, name: str) -> Iterator[tuple[slice | None, Tensor]]:
        """A tensor's rows by the piece, as views of the file; None where it has no rows."""
        tensor = self.tensors[name]
        if tensor.dim() == 0:
            yield None, self._map()[name]
            return
        step = max(1, PIECE * len(tensor) // max(1, tensor.nbytes))
        for start in range(0, len(tensor), step):
            rows = slice(start, start + step)
            piece = self._map()[name][rows]
            self._held += piece.nbytes + TOUCH
            yield rows, piece

    def _map(self) -> Mapping[str, Tensor]:
        """The file's tensors, mapped anew when enough was read of the last map."""
        if self._held >= self._limit:
            self._mapped = {}  # the old map is gone before there is a new one
            self._mapped, self._held = self._open_again().tensors, 0
        return self._mapped

    def _open_again(self) -> TensorFile:
        if _identity(self.path) != self._identity:
            raise ValueError(f"{self.path} was replaced while it was read; load it again")
        return load_tensors(self.path, mapped=True, checked=False)


def _identity(path: Path) -> tuple[Any, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
