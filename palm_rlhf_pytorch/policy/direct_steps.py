"""Optimizer steps over examples: which of them each takes, in which passes, on which process.

Knows no model and no loss; of examples only how long they are, and how much each counts.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from palm_rlhf_pytorch.policy.direct_data import Examples
from palm_rlhf_pytorch.tensors import split_rows
from palm_rlhf_pytorch.training.ranks import Ranks


class Steps:
    """Which examples each optimizer step takes, and how this rank reads its share: the same number of passes each step.

    An epoch is a permutation drawn from (seed, epoch) alone, cut into steps; its last one may be short. A pass that
    there is no example for reads one that counts 0, so that ranks keep step.
    """

    def __init__(
        self, examples: Examples, *, num_steps: int, minibatch_size: int, max_batch_tokens: int, seed: int, ranks: Ranks
    ) -> None:
        """Plan the steps.

        Args:
            examples: what is gone through.
            num_steps: optimizer steps; they go on from epoch to epoch.
            minibatch_size: examples of a step, over all ranks.
            max_batch_tokens: tokens, padding included, of a pass.
            seed: of the order.
            ranks: all processes.
        """
        self.num_steps, self.size, self.seed, self.ranks = num_steps, minibatch_size, seed, ranks
        self.sizes, self.counts = examples.sizes(), examples.counts()
        self.max_tokens = max(1, max_batch_tokens // len(examples.read([0])))
        shares = (rows[rank :: ranks.count] for rows in self.rows() for rank in range(ranks.count))
        self.accumulate = max(len(self._split(share)) for share in shares)

    def rows(self) -> Iterator[list[int]]:
        """The examples of each step, over all ranks."""
        total, step, epoch = len(self.sizes), 0, 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(total).tolist()
            for start in range(0, total, self.size):
                if step == self.num_steps:
                    return
                yield order[start : start + self.size]
                step += 1
            epoch += 1

    def __iter__(self) -> Iterator[tuple[list[int], list[tuple[list[int], float]]]]:
        """For each step its examples, and the passes of this rank: rows, and their share of the step's mean."""
        for rows in self.rows():
            total = sum(self.counts[row] for row in rows)
            passes = self._split(rows[self.ranks.rank :: self.ranks.count])
            while len(passes) < self.accumulate and any(len(part) > 1 for part in passes):
                largest = max((part for part in passes if len(part) > 1), key=self._cost)
                half = len(largest) // 2
                passes = [*(part for part in passes if part is not largest), largest[:half], largest[half:]]
            factor = self.accumulate * self.ranks.count / total
            shared = [(part, factor * sum(self.counts[row] for row in part)) for part in passes]
            spare = min(rows, key=self.sizes.__getitem__)
            yield rows, shared + [([spare], 0.0)] * (self.accumulate - len(shared))

    def _split(self, rows: Sequence[int]) -> list[list[int]]:
        lengths = [self.sizes[row] for row in rows]
        parts = split_rows(lengths, max_rows=max(1, len(rows)), max_tokens=self.max_tokens)
        return [[rows[place] for place in part] for part in parts]

    def _cost(self, rows: Sequence[int]) -> int:
        return len(rows) * max(self.sizes[row] for row in rows)
