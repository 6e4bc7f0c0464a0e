"""A reward model, or an ensemble, beside labels it has not learnt from: the figures of reward/report.py.

Scores are taken in the labels' unit, where the difference of two is the log-odds of a preference.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from palm_rlhf_pytorch.reward.agreement import Agreement
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.labels import EncodedLabels, read_texts
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.report import (
    PairReport,
    RewardReport,
    report_pairs,
    report_ratings,
    report_votes,
)
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Vote


class _Read(NamedTuple):
    """Of one text, its score and the tokens of its response."""

    score: float
    length: int


class _Compared(NamedTuple):
    first: _Read
    second: _Read
    preference: float
    margin: float | None


def assess(
    judge: RewardModel | RewardEnsemble,
    held_out: EncodedLabels,
    *,
    max_tokens_per_batch: int = 8192,
    agreement: Mapping[str, Agreement] | None = None,
    notes: Sequence[str] = (),
) -> RewardReport:
    """Figures of a judge on held-out labels; of rankings, on the pairs they hold.

    Args:
        judge: one reward model, or an ensemble, whose members' mean is judged.
        held_out: labels that it has not learnt from, as `train_reward_model` returns them.
        max_tokens_per_batch: texts times the longest of them, padding included.
        agreement: between the annotators, to be reported beside it (`measure_agreement`).
        notes: lines to be shown above the figures.
    """
    settings = (judge.models[0] if isinstance(judge, RewardEnsemble) else judge).settings
    middle = settings.label_offset + max(settings.num_binned_output - 1, 0) / 2
    scores = iter(_raw_scores(judge, held_out, max_tokens=max_tokens_per_batch))
    pairs: list[_Compared] = []
    ratings: list[tuple[_Read, float]] = []
    votes: list[tuple[_Read, bool]] = []
    for label, texts in zip(held_out.labels, held_out.texts, strict=True):
        read = [_Read(next(scores), len(text.ids) - text.prompt_length) for text in texts]
        if isinstance(label, Pair):
            pairs.append(_Compared(read[0], read[1], label.preference, label.margin))
        elif isinstance(label, Ranking):
            pairs += _ranked_pairs(label, read)
        elif isinstance(label, Rating):
            ratings.append((read[0], label.value))
        elif isinstance(label, Vote):
            votes.append((read[0], label.up))
    rated, lengths = [read.score for read, _ in ratings], [read.length for read, _ in ratings]
    return RewardReport(
        pairs=_pair_report(pairs) if pairs else None,
        ratings=report_ratings(rated, [value for _, value in ratings], lengths=lengths) if ratings else None,
        votes=report_votes([read.score - middle for read, _ in votes], [up for _, up in votes]) if votes else None,
        agreement=agreement or {},
        notes=notes,
    )


def _raw_scores(judge: RewardModel | RewardEnsemble, encoded: EncodedLabels, *, max_tokens: int) -> list[float]:
    if isinstance(judge, RewardEnsemble):
        return read_texts(judge, judge.read, encoded.flat, max_tokens=max_tokens).mean(dim=0).tolist()
    return read_texts(judge, lambda **batch: judge.read(**batch).scores, encoded.flat, max_tokens=max_tokens).tolist()


def _ranked_pairs(label: Ranking, read: Sequence[_Read]) -> list[_Compared]:
    """The pairs of a ranking, the better text first; ties as ties."""
    order = sorted(range(len(read)), key=lambda place: label.ranks[place])
    return [
        _Compared(read[first], read[second], 0.5 if label.ranks[first] == label.ranks[second] else 1.0, None)
        for at, first in enumerate(order)
        for second in order[at + 1 :]
    ]


def _pair_report(pairs: Sequence[_Compared]) -> PairReport:
    return report_pairs(
        [pair.first.score for pair in pairs],
        [pair.second.score for pair in pairs],
        chosen_lengths=[pair.first.length for pair in pairs],
        rejected_lengths=[pair.second.length for pair in pairs],
        preferences=[pair.preference for pair in pairs],
        margins=[pair.margin for pair in pairs],
    )
