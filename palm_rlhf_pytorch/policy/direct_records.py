"""What people have judged as pairs, or as votes, whichever a loss takes: files are read, other kinds are turned.

Knows no tokens and no loss.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

from palm_rlhf_pytorch.text.datasets import Labels, read_labels
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Vote

Source = str | Path | Sequence[Label] | Labels


def pairs_of(source: Source) -> list[Pair]:
    """Pairs as they are; of a ranking all its pairs, which share its weight, equal ranks being ties.

    Args:
        source: records, or a file that `read_labels` reads, whose records of other kinds are left out with a warning;
            read it yourself to leave bad records out.

    Raises:
        ValueError: if a record that is given is of another kind, or none is left.
    """
    pairs: list[Pair] = []
    for index, record in enumerate(_records(source, (Pair, Ranking))):
        if isinstance(record, Pair):
            pairs.append(record)
        elif isinstance(record, Ranking):
            pairs += _pairs_of_ranking(record)
        else:
            raise _other_kind(index, record, "pairs and rankings, which say what is better than what; votes are KTO's")
    _check_some(pairs)
    return pairs


def votes_of(source: Source) -> list[Vote]:
    """Votes as they are; of a pair one up for the preferred text, one down for the other.

    Votes of a pair that is not certain weigh |2 preference - 1| of it; ties say nothing and are left out. A ranking
    counts as its pairs.

    Args:
        source: see `pairs_of`.

    Raises:
        ValueError: if a record is of another kind, or none is left.
    """
    votes: list[Vote] = []
    for index, record in enumerate(_records(source, (Vote, Pair, Ranking))):
        if isinstance(record, Vote):
            votes.append(record)
        elif isinstance(record, Pair):
            votes += _votes_of_pair(record)
        elif isinstance(record, Ranking):
            votes += [vote for pair in _pairs_of_ranking(record) for vote in _votes_of_pair(pair)]
        else:
            raise _other_kind(index, record, "votes, pairs and rankings; say which ratings are good enough to be votes")
    _check_some(votes)
    return votes


def _records(source: Source, kinds: tuple[type[Label], ...]) -> Sequence[Label]:
    """Records as they are given; of a file those of the kinds, with a warning of how many others there are."""
    if not isinstance(source, str | Path):
        return source.records if isinstance(source, Labels) else source
    kept, others = sorted_out(read_labels(source).records, kinds)
    if others:
        warnings.warn(f"{source}: {others} of its records are of other kinds and left out", stacklevel=4)
    return kept


def sorted_out(records: Sequence[Label], kinds: tuple[type[Label], ...]) -> tuple[list[Label], int]:
    """Records of the kinds that a loss takes, and how many others there are."""
    kept = [record for record in records if isinstance(record, kinds)]
    return kept, len(records) - len(kept)


def _pairs_of_ranking(ranking: Ranking) -> list[Pair]:
    """All pairs of its texts, the better first."""
    order = sorted(range(len(ranking.texts)), key=ranking.ranks.__getitem__)
    two = list(combinations(order, 2))
    return [
        Pair(
            chosen=ranking.texts[first], rejected=ranking.texts[second],
            preference=0.5 if ranking.ranks[first] == ranking.ranks[second] else 1.0,
            weight=ranking.weight / len(two), annotator=ranking.annotator, group=ranking.group, line=ranking.line,
        )
        for first, second in two
    ]  # fmt: skip


def _votes_of_pair(pair: Pair) -> list[Vote]:
    certain = 2 * pair.preference - 1
    if certain == 0:
        return []
    better, worse = pair.texts if certain > 0 else pair.texts[::-1]
    vote = partial(Vote, weight=pair.weight * abs(certain), annotator=pair.annotator, group=pair.group, line=pair.line)
    return [vote(text=better, up=True), vote(text=worse, up=False)]


def _other_kind(index: int, record: object, wanted: str) -> ValueError:
    line = f" (line {record.line})" if isinstance(record, Label) and record.line else ""
    return ValueError(f"record {index}{line} is a {type(record).__name__}: what is learnt from here are {wanted}")


def _check_some(records: Sequence[Label]) -> None:
    if not records:
        raise ValueError("there is no record to learn from: give at least one, and for votes one that is no tie")
