"""Examples packed into rows of a given length, so that little of a batch is padding.

First-fit decreasing: the longest example first, each into the first row with room for it. Johnson, "Near-Optimal Bin
Packing Algorithms", 1973, shows that it never takes more than 11/9 of the fewest rows, and one. Knows ids and masks
alone; a model keeps the examples of a row apart by `begins`.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import pad_ragged

Example = tuple[Tensor, Tensor]  # ids (n,), and True on targets (n,)


@dataclass(frozen=True)
class Packed:
    """Examples and the rows they are packed into.

    Attributes:
        examples: ids and targets of each, cut to the length.
        rows: numbers of the examples in each row.
        cut: examples that were too long, and lost their end.
        cut_tokens: tokens lost so.
        dropped: examples without a target, left out; those whose targets were all cut off among them.
    """

    examples: list[Example]
    rows: list[list[int]]
    cut: int
    cut_tokens: int
    dropped: int

    @property
    def num_targets(self) -> int:
        """Tokens to be predicted; an example's first token is none."""
        return sum(int(targets[1:].sum()) for _, targets in self.examples)

    @property
    def num_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(ids) for ids, _ in self.examples)

    @property
    def digest(self) -> str:
        """SHA-256 over examples and rows."""
        found = hashlib.sha256(repr((self.rows, [len(ids) for ids, _ in self.examples])).encode())
        for ids, targets in self.examples:
            found.update(ids.numpy().astype("<i8").tobytes() + targets.numpy().tobytes())
        return found.hexdigest()


def pack(examples: Sequence[Example], *, length: int, several: bool = True) -> Packed:
    """Cut examples to a length, leave out those without a target, and pack the others into rows.

    Args:
        examples: ids (n,) and a mask of their targets (n,), each.
        length: tokens of a row at most.
        several: put several examples into a row; False gives each its own.

    Raises:
        ValueError: if length is below 2, or no example has a target within it.
    """
    if length < 2:
        raise ValueError(f"length ({length}) must be at least 2: a token is predicted from another")
    shortened = [(ids[:length], targets[:length]) for ids, targets in examples]
    kept = [example for example in shortened if bool(example[1][1:].any())]
    if not kept:
        raise ValueError(
            f"none of {len(examples):,} examples has a token to learn from within length ({length}); make it longer"
        )
    lost = [len(ids) - length for ids, _ in examples if len(ids) > length]
    sizes = [len(ids) for ids, _ in kept]
    rows = first_fit_decreasing(sizes, capacity=length) if several else [[number] for number in range(len(kept))]
    return Packed(kept, rows, len(lost), sum(lost), len(examples) - len(kept))


def first_fit_decreasing(sizes: Sequence[int], *, capacity: int) -> list[list[int]]:
    """Numbers of the items in each bin; the first bin with room is found in a tree of the most room left."""
    bins: list[list[int]] = []
    width = 1
    while width < len(sizes):
        width *= 2
    room = [capacity] * (2 * width)  # of bin b at width + b; above it the most of any below
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        node = 1
        while node < width:
            node = 2 * node if room[2 * node] >= sizes[item] else 2 * node + 1
        if node - width == len(bins):
            bins.append([])
        bins[node - width].append(item)
        room[node] -= sizes[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


class PackedBatches:
    """Batches of packed rows, epoch after epoch, each in an order of its own.

    Iterating yields `{"seq", "mask", "targets", "begins": (b, n), "weight": w}`: ids, True on real tokens, on targets,
    on the first token of each example ("begins" only where a row holds several), and the batch's number of targets
    over the mean of all batches. With it as the loss's factor a token counts the same whatever batch it is in. Of
    several processes each takes its share; where batches do not come out even, the first ones are taken once more.

    Args:
        packed: what is learnt from.
        batch_size: b, rows of a batch.
        epochs: passes over the rows.
        accumulate: batches of an optimizer step; an epoch has a whole number of steps.
        seed: of the orders.
        rank: of this process.
        ranks: how many processes there are.

    Raises:
        ValueError: if a count is not positive.
    """

    def __init__(
        self, packed: Packed, *, batch_size: int, epochs: int = 1, accumulate: int = 1, seed: int = 0, rank: int = 0,
        ranks: int = 1,
    ) -> None:  # fmt: skip
        counts = {"batch_size": batch_size, "epochs": epochs, "accumulate": accumulate}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        self.packed, self.batch_size, self.epochs, self.seed = packed, batch_size, epochs, seed
        self.rank, self.ranks, self.accumulate = rank, ranks, accumulate
        self.batches_an_epoch = -(-len(packed.rows) // batch_size)
        self.steps_an_epoch = -(-self.batches_an_epoch // (ranks * accumulate))
        self.mean_targets = packed.num_targets / self.batches_an_epoch

    @property
    def digest(self) -> str:
        """SHA-256 over what decides the batches."""
        told = (self.packed.digest, self.batch_size, self.epochs, self.accumulate, self.seed, self.rank, self.ranks)
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def __iter__(self) -> Iterator[dict[str, Tensor | float]]:
        for epoch in range(self.epochs):
            order = list(range(len(self.packed.rows)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            batches = [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
            wanted = self.steps_an_epoch * self.accumulate * self.ranks
            for number in range(self.rank, wanted, self.ranks):
                batch = self.batch(batches[number % len(batches)])
                yield batch | {"weight": int(count_targets(batch)) / self.mean_targets}

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows of these numbers as one batch, without its weight."""
        return packed_batch(self.packed, rows)


def packed_batch(packed: Packed, rows: Sequence[int]) -> dict[str, Tensor]:
    """Some of the rows as a batch, (b, n) with n the longest of them; what it holds `PackedBatches` says."""
    members = [[packed.examples[number] for number in packed.rows[row]] for row in rows]
    seq, mask = pad_ragged([torch.cat([ids for ids, _ in row]) for row in members])
    targets, _ = pad_ragged([torch.cat([chosen for _, chosen in row]) for row in members])
    batch = {"seq": seq, "mask": mask, "targets": targets}
    if any(len(row) > 1 for row in members):
        firsts = [torch.cat([torch.arange(len(ids)) == 0 for ids, _ in row]) for row in members]
        batch["begins"] = pad_ragged(firsts)[0]
    return batch


def count_targets(batch: Mapping[str, Tensor]) -> Tensor:
    """How many tokens a batch's loss is over."""
    chosen = batch["targets"].clone()
    chosen[:, 0] = False
    return (chosen & ~batch["begins"]).sum() if "begins" in batch else chosen.sum()
