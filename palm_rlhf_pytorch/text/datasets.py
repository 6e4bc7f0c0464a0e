"""Files of text and what is drawn from them: token stream, texts, prompts.

It knows no model and no loss. All randomness comes from a seed; the order of prompts is the policy's to choose.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


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
    """Prompts of a UTF-8 file, one a line; blank lines are skipped.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is not UTF-8, or holds no prompt.
    """
    # not splitlines, which also breaks at form feeds and at U+2028 inside a prompt
    prompts = [line for line in _read_text(Path(path)).split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


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
