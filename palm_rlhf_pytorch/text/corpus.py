"""A corpus of any size as token ids in a file: written once, piece by piece, then read through a memory map.

    folder/tokens.bin       ids, uint16 or uint32, little-endian: all documents, each from bos_token to eos_token
    folder/documents.bin    where each document begins, int64
    folder/manifest.json    tokenizer, sources, counts, SHA-256 of the tokens

The folder stands whole or not at all (training/folder.py). Knows no model.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from palm_rlhf_pytorch.text.datasets import BadRecord, stop_at_bad_record
from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.sources import BadTextError, Piece, Source, find_sources, read_pieces
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, Tokenizer
from palm_rlhf_pytorch.text.tokenizer_files import tokenizer_digest
from palm_rlhf_pytorch.training.folder import NewFolder

VERSION = 1  # of the files
AT_ONCE, MOST_AT_ONCE = 2**19, 4096  # characters and pieces that are tokenised together
TOKENS, DOCUMENTS, MANIFEST = "tokens.bin", "documents.bin", "manifest.json"
PROBE = "The quick brown fox, 1984.\n\n\tdéjà vu – 我们 🙂 <|endoftext|> <s> [INST] don't  x_y != 3.14;"


@dataclass(frozen=True)
class SourceFile:
    """A file as it was read: its size and time of change then, and what it gave."""

    path: str
    size: int
    changed: int
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Corpus:
    """Token ids of documents, in files.

    Attributes:
        path: the folder.
        tokens: ids of all documents, (n,), a memory map.
        starts: place of each document's first token, rising, (documents,), a memory map.
        files: what each source gave, in order.
        tokenizer: fingerprint of the tokenizer, see `fingerprint`.
        digest: SHA-256 of the ids.
        left_out: a message for each file of a folder that is no text, or holds none.
    """

    path: Path
    tokens: np.ndarray
    starts: np.ndarray
    files: list[SourceFile]
    tokenizer: str
    digest: str
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | Path) -> "Corpus":
        """Open a corpus that `write_tokens` wrote; nothing is read but its manifest.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the folder is no corpus, or its files are not of the size that its manifest says.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no corpus at {path}; write_tokens makes one")
        manifest = _read_manifest(path)
        try:
            tokens = _mapped(path / TOKENS, manifest["dtype"], manifest["num_tokens"])
            starts = _mapped(path / DOCUMENTS, "<i8", manifest["num_documents"])
            files = [SourceFile(**file) for file in manifest["files"]]
            return cls(path, tokens, starts, files, manifest["tokenizer"], manifest["digest"], manifest["left_out"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path / MANIFEST} is damaged ({error}); remove {path} to write it anew") from error

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        return sum(file.text_bytes for file in self.files)


def write_tokens(
    texts: Sequence[str | Path],
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    column: str = "text",
    on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record,
    progress: bool = True,
) -> Corpus:
    """Tokenise files into a folder; what it takes of memory does not grow with the corpus.

    Each document, a file or a row, begins with the tokenizer's bos_token and ends with its eos_token, if it has them:
    so a model learns how texts begin, which `generate_text` of an empty prompt asks for. A corpus that stands at path
    is replaced at the end; a call that is killed leaves it as it was, and the next one begins anew.

    Args:
        texts: files and folders, see `find_sources`. A file of a folder that is no text is left out, and named in
            `Corpus.left_out`; one given by name is an error.
        tokenizer: gives the ids.
        path: the folder to write.
        column: of .jsonl rows, holds the text.
        on_bad_record: is told of a row without text, and may raise; see `read_labels`.
        progress: show a bar on stderr.

    Raises:
        FileNotFoundError: if a text is missing.
        ValueError: if a named file is no text or empty, a file changes while it is read, there is no text at all, or
            path is a folder that is no corpus.
        OSError: if the disk refuses; nothing has changed then.
    """
    sources, path = find_sources(texts), Path(path)
    if path.exists():
        _read_manifest(path)  # refuses what is not ours to replace
    folder = NewFolder(path)
    try:
        folder.make(ours=lambda name: False)
        total = sum(source.path.stat().st_size for source in sources)
        with (
            folder.telling_of_the_disk(),
            (folder.partial / TOKENS).open("w+b") as tokens,
            (folder.partial / DOCUMENTS).open("w+b") as starts,
            tqdm(total=total, desc="tokenise", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            writer = _Writer(tokens, starts, tokenizer, column, on_bad_record)
            for source in sources:
                before = bar.n
                writer.add(source, bar.update)
                bar.update(before + writer.seen[-1][1] - bar.n)  # of what is compressed, or was passed over
            if not writer.num_tokens:
                raise ValueError(f"{', '.join(map(str, texts))}: no text in {len(sources):,} files; add some")
            manifest = json.dumps(writer.manifest(column), indent=1)
            (folder.partial / MANIFEST).write_text(manifest, encoding="utf-8")
        folder.place()
    finally:
        folder.close()
    return Corpus.open(path)


def open_or_write(
    texts: Sequence[str | Path], tokenizer: Tokenizer, path: str | Path, *, column: str = "text", **options: Any
) -> Corpus:
    """The corpus at path, if it was written of these files as they are now by this tokenizer; else write it.

    Files are compared by path, size and time of change. Arguments and errors are those of `write_tokens`.
    """
    path = Path(path)
    if path.exists():
        manifest = _read_manifest(path)
        kept = [[file["path"], file["size"], file["changed"]] for file in manifest.get("seen", [])]
        same = kept == [list(_state(source.path)) for source in find_sources(texts)]
        told = manifest.get("tokenizer"), manifest.get("column"), manifest.get("vocabulary")
        if same and told == (fingerprint(tokenizer), column, tokenizer.num_tokens):
            return Corpus.open(path)
    return write_tokens(texts, tokenizer, path, column=column, **options)


def fingerprint(tokenizer: Tokenizer) -> str:
    """What tells tokenizers apart: the vocabulary, where it can be written down, and what they make of a line."""
    vocabulary = tokenizer_digest(tokenizer) if isinstance(tokenizer, ByteTokenizer | HFTokenizer) else None
    special = (tokenizer.num_tokens, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    told = (type(tokenizer).__name__, vocabulary, special, tokenizer.encode(PROBE).tolist())
    return hashlib.sha256(repr(told).encode()).hexdigest()


def let_go(array: np.ndarray) -> None:
    """Give back the pages of a memory map that were read: they would count as this process's memory for ever.

    The system keeps them in its cache while it has room; any other array is left alone.
    """
    base: object = array.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


class _Writer:
    """Appends the ids of one file after the other; a file that turns out to be no text is taken back."""

    def __init__(
        self, tokens: IO[bytes], starts: IO[bytes], tokenizer: Tokenizer, column: str,
        on_bad_record: Callable[[BadRecord], None],
    ) -> None:  # fmt: skip
        self.tokens, self.starts, self.tokenizer = tokens, starts, tokenizer
        self.column, self.on_bad_record = column, on_bad_record
        self.dtype = np.dtype("<u2" if tokenizer.num_tokens <= 2**16 else "<u4")
        self.hash, self.num_tokens, self.num_documents = hashlib.sha256(), 0, 0
        self.files: list[SourceFile] = []
        self.seen: list[tuple[str, int, int]] = []
        self.left_out: list[str] = []

    def add(self, source: Source, advance: Callable[[int], object]) -> None:
        """Take in a file, telling of its bytes; one that a folder holds and that is no text is left out."""
        before = (self.hash.copy(), self.num_tokens, self.num_documents)
        self.seen.append(_state(source.path))
        try:
            text_bytes = self._add(source.path, advance if source.path.suffix != ".gz" else lambda _: None)
            if self.num_tokens == before[1]:
                raise BadTextError(f"{source.path} is empty: leave it out")
        except BadTextError as error:
            if source.named:
                raise
            self.left_out.append(str(error))
            self.hash, self.num_tokens, self.num_documents = before
            for file, size in ((self.tokens, self.num_tokens * self.dtype.itemsize), (self.starts, before[2] * 8)):
                file.seek(size)
                file.truncate()
            return
        if _state(source.path) != self.seen[-1]:
            raise ValueError(f"{source.path} changed while it was read; begin again once nothing writes to it")
        counts = self.num_tokens - before[1], self.num_documents - before[2], text_bytes
        self.files.append(SourceFile(*self.seen[-1], *counts))

    def _add(self, path: Path, advance: Callable[[int], object]) -> int:
        text_bytes, told, open_document = 0, 0, False
        pieces = read_pieces(path, column=self.column, on_bad_record=self.on_bad_record)
        for some in _batches(pieces):
            for piece, ids in zip(some, self.tokenizer([piece.text for piece in some]), strict=True):
                if piece.begins:
                    if open_document:
                        self._write_special(self.tokenizer.eos_token)
                    self.starts.write(np.array([self.num_tokens], dtype="<i8").tobytes())
                    self.num_documents += 1
                    self._write_special(self.tokenizer.bos_token)
                    open_document = True
                self._write(ids.numpy())
                text_bytes += len(piece.text.encode())
            advance(text_bytes - told)
            told = text_bytes
        if open_document:
            self._write_special(self.tokenizer.eos_token)
        return text_bytes

    def _write_special(self, token: int | None) -> None:
        if token is not None:
            self._write(np.array([token]))

    def _write(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.tokenizer.num_tokens:
            raise ValueError(
                f"tokenizer gave ids from {ids.min()} to {ids.max()}, outside its {self.tokenizer.num_tokens}"
            )
        content = ids.astype(self.dtype).tobytes()
        self.tokens.write(content)
        self.hash.update(content)
        self.num_tokens += len(ids)

    def manifest(self, column: str) -> dict[str, Any]:
        """What the manifest says."""
        return {
            "kind": "corpus", "version": VERSION, "dtype": self.dtype.str, "num_tokens": self.num_tokens,
            "num_documents": self.num_documents, "tokenizer": fingerprint(self.tokenizer),
            "vocabulary": self.tokenizer.num_tokens, "column": column, "digest": self.hash.hexdigest(),
            "files": [asdict(file) for file in self.files], "left_out": self.left_out,
            "seen": [dict(zip(("path", "size", "changed"), seen, strict=True)) for seen in self.seen],
        }  # fmt: skip


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces, several at a time: a tokenizer may take them on several cores."""
    some: list[Piece] = []
    length = 0
    for piece in pieces:
        some.append(piece)
        length += len(piece.text)
        if length >= AT_ONCE or len(some) == MOST_AT_ONCE:
            yield some
            some, length = [], 0
    if some:
        yield some


def _state(path: Path) -> tuple[str, int, int]:
    """What tells whether a file has changed."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no corpus ({error}); move it away, or name another folder") from error
    if not isinstance(found, dict) or found.get("kind") != "corpus":
        raise ValueError(f"{path} is no corpus; move it away, or name another folder")
    if found.get("version") != VERSION:
        raise ValueError(
            f"{path} is a corpus of version {found.get('version')}, not {VERSION}; remove it to write it anew"
        )
    return found


def _mapped(path: Path, dtype: str, count: int) -> np.ndarray:
    expected, size = count * np.dtype(dtype).itemsize, path.stat().st_size if path.exists() else 0
    if size != expected or not count:
        raise ValueError(f"{path} has {size:,} bytes, not {expected:,}; remove {path.parent} to write it anew")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))
