"""Responses of two models to the same prompts, compared: win rate, mean difference, a pairwise judge's answers.

Pure functions of what each response earned, (n,), and of the prompt it answers, (n,). Prompts are a sample of what will
be asked, and the responses to one prompt are alike: intervals are over prompts, not over responses (Miller, "Adding
Error Bars to Evals", https://arxiv.org/abs/2411.00640). Knows no model; the first of two is a, the second b.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HEAD = f"{'':<44}{'A':>10}{'B':>10}{'B - A':>10}   95 % interval"
Z = 1.959964  # of 95 % of a normal distribution, two-sided

# (prompts, first responses, second responses) -> probability that the first is better, (n,); 0.5 is a tie
PairJudge = Callable[[list[str], list[str], list[str]], Sequence[float] | Tensor]


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def interval(self, *, signed: bool = False) -> str:
        """The interval for people."""
        sign = "+" if signed else ""
        return f"{self.low:{sign}.3f} to {self.high:{sign}.3f}"


class Figure(NamedTuple):
    """A figure of a and of b, and the difference b - a where it has an interval."""

    a: float
    b: float
    difference: Estimate | None = None

    def line(self, name: str) -> str:
        """A line of a table whose head is HEAD."""
        start = f"{name:<44}{self.a:>10.3f}{self.b:>10.3f}"
        if self.difference is None:
            return start
        return f"{start}{self.difference.value:>+10.3f}   {self.difference.interval(signed=True)}"

    def summary(self) -> dict[str, Any]:
        """The same, JSON-able but for numbers that are not finite."""
        return {"a": self.a, "b": self.b, "difference": self.difference and self.difference._asdict()}


@dataclass(frozen=True)
class Contest:
    """What a judge says of a and b.

    Attributes:
        outcomes: 1 where b's response is better, 0 where a's is, 0.5 for a tie, NaN without two finite scores, (n,).
        win_rate: of b over a, ties half.
        margins: by how much b's is better in the judge's unit, NaN likewise, (n,).
        scores: mean of a's and of b's; None of a pairwise judge.
        difference: of the scores, b minus a; None of a pairwise judge.
        unscored: pairs left out.
        inconsistent: pairs of which a pairwise judge said otherwise with the sides swapped.
        first_rate: see `Preferences`.
    """

    outcomes: Tensor
    win_rate: Estimate
    margins: Tensor
    scores: tuple[Estimate, Estimate] | None = None
    difference: Estimate | None = None
    unscored: int = 0
    inconsistent: int | None = None
    first_rate: float | None = None

    def lines(self, name: str) -> list[str]:
        """Lines of a table, as `Figure.line`."""
        lines = [f"{f'{name}: B wins':<54}{self.win_rate.value:>10.3f}{'':>13}{self.win_rate.interval()}"]
        if self.scores is not None:
            lines.append(Figure(self.scores[0].value, self.scores[1].value, self.difference).line(f"{name}: score"))
        if self.inconsistent is not None:
            lines.append(f"{f'{name}: answers turned by swapping sides':<54}{self.inconsistent:>10}")
        if self.unscored:
            lines.append(f"{f'{name}: pairs without two finite scores':<54}{self.unscored:>10}")
        return lines

    def summary(self) -> dict[str, Any]:
        """The same, JSON-able but for numbers that are not finite."""
        first, second = self.scores or (None, None)
        estimates = {"win_rate": self.win_rate, "score_a": first, "score_b": second, "difference": self.difference}
        counts = {"unscored": self.unscored, "inconsistent": self.inconsistent, "first_rate": self.first_rate}
        return {name: estimate and estimate._asdict() for name, estimate in estimates.items()} | counts


class Preferences(NamedTuple):
    """What a pairwise judge says of n pairs, asked twice with the sides swapped.

    outcomes: 1 where it prefers b both times, 0 where a both times, else 0.5, (n,).
    inconsistent: True where the two answers differ, (n,).
    first_rate: share of its decided answers that prefer what was shown first; 0.5 is without a position bias. NaN
        where it decided nothing.
    """

    outcomes: Tensor
    inconsistent: Tensor
    first_rate: float


def contest_of(scores_a: Tensor, scores_b: Tensor, prompts: Tensor) -> Contest:
    """By the scores of a judge that sees one response at a time, (n,); pairs without two finite scores are left out.

    Raises:
        ValueError: if shapes differ, or no pair has two finite scores.
    """
    outcomes = outcomes_of(scores_a, scores_b)
    known = outcomes.isfinite()
    means = [mean_estimate(scores.double().masked_fill(~known, torch.nan), prompts) for scores in (scores_a, scores_b)]
    margins = (scores_b.double() - scores_a.double()).masked_fill(~known, torch.nan)
    return Contest(
        outcomes, win_rate(outcomes, prompts), margins, scores=(means[0], means[1]),
        difference=mean_estimate(margins, prompts), unscored=int((~known).sum()),
    )  # fmt: skip


def pair_contest(preferences: "Preferences", prompts: Tensor) -> Contest:
    """By the answers of a judge that sees two responses at a time."""
    outcomes = preferences.outcomes
    return Contest(
        outcomes, win_rate(outcomes, prompts), 2 * outcomes - 1, inconsistent=int(preferences.inconsistent.sum()),
        first_rate=preferences.first_rate,
    )  # fmt: skip


def cluster_numbers(texts: Sequence[str]) -> Tensor:
    """A number for each text, the same for texts that are the same, (n,)."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([numbers[text] for text in texts])


def outcomes_of(scores_a: Tensor, scores_b: Tensor) -> Tensor:
    """1 where b scores higher, 0 where a does, 0.5 for a tie, NaN where a score is not finite, (n,)."""
    found = (scores_b > scores_a).double() + 0.5 * (scores_b == scores_a).double()
    return found.masked_fill(~(scores_a.isfinite() & scores_b.isfinite()), torch.nan)


def win_rate(outcomes: Tensor, prompts: Tensor) -> Estimate:
    """Mean outcome, each prompt counting the same, with Wilson's interval for the number of responses that it is worth.

    That number is p (1 - p) over the variance that the mean has by the spread of its prompts: the number of prompts
    where each has one response and there is no tie (there it is Wilson's interval itself), less than the number of
    responses where those to one prompt are alike. Few prompts with several responses take Student's quantile (Korn and
    Graubard, "Confidence intervals for proportions with small expected number of positive counts estimated from survey
    data", 1998). Where all prompts agree their number is taken. A bootstrap over prompts gives such an interval no
    width at all, and too little elsewhere.

    Args:
        outcomes: from 0 to 1, (n,); rows that are not finite are left out.
        prompts: which prompt each row answers, (n,); rows of one prompt are one cluster.

    Raises:
        ValueError: if shapes differ, or no row is left.
    """
    means, num_rows = _prompt_means(outcomes, prompts)
    count, rate = len(means), float(means.mean())
    spread = float(((means - rate) ** 2).mean())
    worth = count * rate * (1 - rate) / spread if spread > 1e-12 else float(count)
    if num_rows > count > 1:
        worth *= (count - 1) / count * (Z / student_quantile(count - 1)) ** 2
    middle = (rate + Z**2 / (2 * worth)) / (1 + Z**2 / worth)
    half = Z / (1 + Z**2 / worth) * math.sqrt(rate * (1 - rate) / worth + (Z / (2 * worth)) ** 2)
    return Estimate(rate, max(0.0, middle - half), min(1.0, middle + half))


def mean_estimate(values: Tensor, prompts: Tensor) -> Estimate:
    """Mean of values, each prompt counting the same, with Student's interval over prompts; endless for one prompt.

    Of b minus a it is the paired difference: what two responses to one prompt have in common drops out.

    Args:
        values: (n,); rows that are not finite are left out.
        prompts: which prompt each row answers, (n,).

    Raises:
        ValueError: if shapes differ, or no row is left.
    """
    means, _ = _prompt_means(values, prompts)
    count, mean = len(means), float(means.mean())
    if count == 1:
        return Estimate(mean, -math.inf, math.inf)
    half = student_quantile(count - 1) * float(means.std()) / math.sqrt(count)
    return Estimate(mean, mean - half, mean + half)


@cache
def student_quantile(freedom: int) -> float:
    """What Student's t exceeds, either way, in 5 % of cases.

    With t = sqrt(freedom) tan(x) the density is cos(x)^(freedom - 1), up to a factor, on half a turn: it is summed.
    """
    x = np.linspace(0, math.pi / 2, 100_001)
    log_density = (freedom - 1) * np.log(np.maximum(np.cos(x), 1e-300))
    density = np.exp(log_density)
    below = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return math.sqrt(freedom) * math.tan(float(np.interp(0.95 * below[-1], below, x)))


def swapped_preferences(judge: PairJudge, prompts: list[str], a: list[str], b: list[str]) -> Preferences:
    """Ask a pairwise judge twice, the sides swapped, since judges favour a place (https://arxiv.org/abs/2306.05685).

    A win is one in both orders; all else is a tie. A judge that scores each response alone, a reward model, cannot
    favour a place: its scores are compared by `outcomes_of`.

    Args:
        judge: called as judge(prompts, first, second), gives the probability that the first is better, (n,).
        prompts: (n,).
        a: the responses of one model.
        b: those of the other.

    Raises:
        ValueError: if an answer is no number from 0 to 1 for each pair.
    """
    answers = torch.stack([_answers(judge, prompts, *sides) for sides in ((a, b), (b, a))])
    first = (answers - 0.5).sign()  # 1 where what was shown first is preferred, -1 where not, 0 undecided
    for_a, for_b = first[0] - first[1], first[1] - first[0]
    outcomes = 0.5 + 0.5 * (for_b == 2).double() - 0.5 * (for_a == 2).double()
    decided = int((first != 0).sum())
    first_rate = int((first > 0).sum()) / decided if decided else math.nan
    return Preferences(outcomes, first[0] != -first[1], first_rate)


def distinct_shares(a: Sequence[str], b: Sequence[str], *, words: int) -> tuple[float, float]:
    """Share of the runs of so many words that are different runs, over all texts of each side; 0 where there is none.

    Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055. The share falls with the
    number of runs, so both sides are measured on as many, the first ones, as the side with fewer has.
    """
    runs = [_runs(texts, words) for texts in (a, b)]
    count = min(map(len, runs))
    shares = [len(set(found[:count])) / count if count else 0.0 for found in runs]
    return shares[0], shares[1]


def _runs(texts: Sequence[str], words: int) -> list[tuple[str, ...]]:
    split = [text.split() for text in texts]
    return [tuple(text[at : at + words]) for text in split for at in range(len(text) - words + 1)]


def _answers(judge: PairJudge, prompts: list[str], first: list[str], second: list[str]) -> Tensor:
    found = torch.as_tensor(judge(prompts, first, second), dtype=torch.float64).cpu()
    if found.shape != (len(prompts),):
        raise ValueError(f"the pairwise judge gave {tuple(found.shape)} answers: it must give ({len(prompts)},)")
    wrong = ~((found >= 0) & (found <= 1))  # NaN too
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        raise ValueError(
            f"the pairwise judge gave {float(found[row])} for pair {row}: it must be the probability, from 0 to 1,"
            " that the first response is better"
        )
    return found


def _prompt_means(values: Tensor, prompts: Tensor) -> tuple[Tensor, int]:
    """Mean of each prompt's finite values, in float64, and how many values those are."""
    if values.shape != prompts.shape or values.ndim != 1:
        raise ValueError(f"values {tuple(values.shape)} and prompts {tuple(prompts.shape)} must both be (n,)")
    finite = values.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"none of the {len(values)} values is finite: there is nothing to compare")
    _, cluster = prompts[finite].unique(return_inverse=True)
    counts = torch.bincount(cluster).double()
    sums = torch.zeros_like(counts).index_add_(0, cluster, values[finite].double())
    return sums / counts, int(finite.sum())
