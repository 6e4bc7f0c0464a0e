"""Items whose answer is known, shown among the others: how often each person gives it. Knows records, no database."""

from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from typing import NamedTuple

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.records import Judged

NEAR = 1  # stars by which a rating may miss the known one


class Accuracy(NamedTuple):
    """Right answers out of those given."""

    right: int
    asked: int

    @property
    def share(self) -> float | None:
        """Right / asked; None where nothing was asked."""
        return self.right / self.asked if self.asked else None


def is_right(one: Judged) -> bool:
    """Whether a judgement gives the known answer.

    A pair: the same side, whatever the strength, or a tie. Ratings: each within a star. A ranking: no two the other
    way round; two of equal rank may stand in either order.

    Raises:
        ValueError: if the item's answer is not known.
    """
    if one.gold is None:
        raise ValueError(f"item {one.item} has no known answer")
    if one.kind == Kind.PAIR:
        known = int(one.gold["choice"])
        return one.choice is not None and (one.choice > 0) - (one.choice < 0) == known
    if one.kind == Kind.RATING:
        return all(abs(said - known) <= NEAR for said, known in zip(one.ratings, one.gold["ratings"], strict=True))
    ranks = one.gold["ranks"]
    return all(ranks[better] <= ranks[worse] for better, worse in combinations(one.ranking, 2))


def accuracies(judged: Iterable[Judged]) -> dict[str, Accuracy]:
    """Accuracy of each person on the items whose answer is known; others are passed over."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for one in judged:
        if one.gold is not None:
            counts[one.annotator][0] += is_right(one)
            counts[one.annotator][1] += 1
    return {who: Accuracy(*numbers) for who, numbers in counts.items()}
