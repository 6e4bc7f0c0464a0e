"""Parts of a corpus as one run of tokens, and windows drawn from it: what a model reads in training and is judged on.

Nothing is read before it is asked for. Knows no model; all randomness comes from a seed.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.text.corpus import Corpus, let_go

LET_GO_EVERY = 32  # batches


class Excerpt:
    """Stretches of a corpus, one after the other, as one run of tokens.

    Args:
        tokens: ids of the corpus, (n,), an array or a memory map.
        starts: where its documents begin, rising.
        stretches: first place and end of each stretch, in order.
        digest: of the ids.

    Raises:
        ValueError: if a stretch lies outside the tokens.
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray, *, stretches: Sequence[tuple[int, int]], digest: str
    ) -> None:
        kept = np.array([stretch for stretch in stretches if stretch[1] > stretch[0]], dtype=np.int64).reshape(-1, 2)
        if len(kept) and not 0 <= kept[:, 0].min() <= kept[:, 1].max() <= len(tokens):
            raise ValueError(f"stretches must lie within the {len(tokens)} tokens")
        self.tokens, self.starts, self._digest = tokens, starts, digest
        self.begins = kept[:, 0]
        self.ends = np.cumsum(kept[:, 1] - kept[:, 0])  # of each stretch, in the run
        inner = np.searchsorted(starts, kept[:, 1]) - np.searchsorted(starts, kept[:, 0], side="right")
        self.num_documents = int(inner.sum()) + len(kept)

    @classmethod
    def of(cls, tokens: Tensor | np.ndarray, *, eos_token: int | None = None) -> "Excerpt":
        """An array of ids (n,), read once as a whole; its documents end with eos_token, None where there is but one.

        What is larger than memory is for `write_tokens`.

        Raises:
            TypeError: if they are not integers.
            ValueError: if they are not one row.
        """
        array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else tokens
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"tokens must be integers, not {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"tokens must be one row (n,), not of shape {array.shape}")
        inner = np.zeros(0, np.int64) if eos_token is None else np.flatnonzero(array[:-1] == eos_token) + 1
        digest = hashlib.sha256(np.ascontiguousarray(array).astype("<i8").data).hexdigest()
        starts = np.concatenate(([0], inner)).astype(np.int64)
        return cls(array, starts, stretches=[(0, len(array))], digest=digest)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def digest(self) -> str:
        """SHA-256 over the ids and what is taken of them."""
        told = [self._digest, self.begins.tolist(), self.ends.tolist()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def read(self, place: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids (length,), int64, from a place of the run on, and where one begins a document or a stretch, bool."""
        if not 0 <= place <= place + length <= len(self):
            raise ValueError(f"place ({place}) and length ({length}) must lie within the {len(self)} tokens")
        ids, begins = np.empty(length, np.int64), np.zeros(length, bool)
        taken, number = 0, int(np.searchsorted(self.ends, place, side="right"))
        while taken < length:
            before = int(self.ends[number - 1]) if number else 0
            first = int(self.begins[number]) + place + taken - before
            count = min(length - taken, int(self.ends[number]) - place - taken)
            ids[taken : taken + count] = self.tokens[first : first + count]
            if place + taken == before:  # the stretch begins here
                begins[taken] = True
            low, high = np.searchsorted(self.starts, (first, first + count))
            begins[taken + self.starts[low:high] - first] = True
            taken, number = taken + count, number + 1
        return ids, begins


def split_corpus(corpus: Corpus, held_out: float) -> tuple[Excerpt, Excerpt]:
    """All but the end of each file of a corpus, and these ends.

    A file of several documents is cut where a document begins, nearest to the share asked for.

    Raises:
        ValueError: if held_out is not between 0 and 1, or leaves fewer than two tokens on a side.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out ({held_out}) must lie between 0 and 1")
    train, tails, begin = [], [], 0
    for file in corpus.files:
        end = begin + file.tokens
        cut = begin + round(file.tokens * (1 - held_out))
        if file.documents > 1:
            low, high = np.searchsorted(corpus.starts, (begin + 1, end))
            inner = corpus.starts[low:high]
            cut = int(inner[np.abs(inner - cut).argmin()])
        train.append((begin, cut))
        tails.append((cut, end))
        begin = end
    parts = [Excerpt(corpus.tokens, corpus.starts, stretches=part, digest=corpus.digest) for part in (train, tails)]
    if min(map(len, parts)) < 2:
        raise ValueError(f"held_out ({held_out}) of {begin} tokens leaves nothing to judge by; add text")
    return parts[0], parts[1]


def whole_corpus(corpus: Corpus) -> Excerpt:
    """All of a corpus."""
    return Excerpt(corpus.tokens, corpus.starts, stretches=[(0, len(corpus.tokens))], digest=corpus.digest)


class Windows:
    """Random windows of an excerpt, forever; every start is equally likely.

    Iterating yields `{"seq": (b, n), "begins": (b, n), "weight": w}`: ids; where documents begin, left out where no
    window has a beginning within it, so that attention needs no mask; and the batch's number of targets over what it
    is on average: with it as the loss's factor a token counts the same whatever its batch. Each iterator begins anew.
    Of several processes each takes its own windows, together those of one process with a batch so much larger.

    Args:
        excerpt: what is read.
        length: n, tokens of a window.
        batch_size: b, windows of a batch, in each process.
        seed: of the windows' places.
        documents: tell where documents begin.
        rank: of this process.
        ranks: how many processes there are.

    Raises:
        ValueError: if length or batch_size is not positive, or the excerpt is shorter than a window.
    """

    def __init__(
        self, excerpt: Excerpt, *, length: int, batch_size: int, seed: int, documents: bool = True, rank: int = 0,
        ranks: int = 1,
    ) -> None:  # fmt: skip
        for name, count in (("length", length), ("batch_size", batch_size)):
            if count < 1:
                raise ValueError(f"{name} ({count}) must be positive")
        if len(excerpt) < length:
            raise ValueError(f"tokens ({len(excerpt)}) must fill a window of length ({length}); add text or shorten it")
        self.excerpt, self.length, self.batch_size, self.seed = excerpt, length, batch_size, seed
        self.documents, self.rank, self.ranks = documents, rank, ranks

    @property
    def digest(self) -> str:
        """SHA-256 over what decides the batches."""
        told = [self.excerpt.digest, self.length, self.batch_size, self.seed, self.documents, self.rank, self.ranks]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def __iter__(self) -> Iterator[dict[str, Tensor | float]]:
        generator = torch.Generator().manual_seed(self.seed)
        last = len(self.excerpt) - self.length + 1
        for number in itertools.count(1):
            places = torch.randint(last, (self.batch_size * self.ranks,), generator=generator)
            batch = read_windows(self.excerpt, places[self.rank :: self.ranks], self.length, documents=self.documents)
            yield {**batch, "weight": self._weight(batch)}
            if number % LET_GO_EVERY == 0:
                let_go(self.excerpt.tokens)

    def _weight(self, batch: Mapping[str, Tensor]) -> float:
        possible = self.batch_size * (self.length - 1)
        if not self.documents or not possible:
            return 1.0
        begun = int(batch["begins"][:, 1:].sum()) if "begins" in batch else 0
        usual = possible * (1 - self.excerpt.num_documents / len(self.excerpt))
        return (possible - begun) / max(usual, 1.0)


def read_windows(
    excerpt: Excerpt, places: Sequence[int] | Tensor, length: int, *, documents: bool = True
) -> dict[str, Tensor]:
    """Windows of an excerpt from the given places on, as `Windows` yields them."""
    found = [excerpt.read(int(place), length) for place in places]
    batch = {"seq": torch.from_numpy(np.stack([ids for ids, _ in found]))}
    begins = np.stack([begins for _, begins in found])
    if documents and begins[:, 1:].any():
        batch["begins"] = torch.from_numpy(begins)
    return batch
