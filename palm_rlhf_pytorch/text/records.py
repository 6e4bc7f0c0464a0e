"""What people say about responses, one record a judgement: pairs, rankings, ratings and votes.

Knows no file and no model. Every record says which texts it judges (`label.texts`), who judged and how much it counts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Text(NamedTuple):
    """What a judge reads: the prompt, which may be empty, and the response to it."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Label(ABC):
    """What all judgements share.

    Args:
        annotator: who judged; None where nobody says.
        group: records of one group (a dialogue, a source) stay together in a split; None to go by the prompt.
        weight: how much the record counts beside others, 0 or above.
        line: line of the file it was read from, counted from 1; 0 for none.

    Raises:
        ValueError: if a number is out of its range, naming it.
    """

    annotator: str | None = None
    group: str | None = None
    weight: float = 1.0
    line: int = 0

    @property
    @abstractmethod
    def texts(self) -> tuple[Text, ...]:
        """The texts judged."""

    def __post_init__(self) -> None:
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight ({self.weight}) must be a number of 0 or above")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair(Label):
    """Two responses, of which one is preferred.

    Args:
        chosen: the preferred text.
        rejected: the other one.
        preference: probability that `chosen` is preferred, in [0, 1]; 0.5 is a tie.
        margin: by how much the scores should differ, 0 or above; None where nobody says.
    """

    chosen: Text
    rejected: Text
    preference: float = 1.0
    margin: float | None = None

    @property
    def texts(self) -> tuple[Text, ...]:
        """The chosen text, then the rejected one."""
        return self.chosen, self.rejected

    def __post_init__(self) -> None:
        Label.__post_init__(self)  # not super(): a class with slots is made twice, and knows it by its first copy
        if not 0 <= self.preference <= 1:
            raise ValueError(f"preference ({self.preference}) must lie in [0, 1]; 0.5 is a tie")
        if self.margin is not None and not (self.margin >= 0 and math.isfinite(self.margin)):
            raise ValueError(f"margin ({self.margin}) must be a number of 0 or above; swap the two texts instead")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking(Label):
    """Two or more responses in order.

    Args:
        texts: the texts, in any order.
        ranks: of each text, 0 the best; equal ranks are ties.
    """

    texts: tuple[Text, ...] = field()
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        Label.__post_init__(self)
        if len(self.texts) < 2:
            raise ValueError(f"texts ({len(self.texts)}) must be two or more to be ranked")
        if len(self.ranks) != len(self.texts):
            raise ValueError(f"ranks ({len(self.ranks)}) must be as many as texts ({len(self.texts)})")
        if min(self.ranks) < 0:
            raise ValueError(f"ranks ({self.ranks}) must be 0 for the best and above 0 for others")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating(Label):
    """A number given to one response; a bin is a whole number counted from 0.

    Args:
        text: the text.
        value: the number, finite. Whether it is a bin or a scalar is for the model's head to say.
    """

    text: Text
    value: float

    @property
    def texts(self) -> tuple[Text, ...]:
        """The one text."""
        return (self.text,)

    def __post_init__(self) -> None:
        Label.__post_init__(self)
        if not math.isfinite(self.value):
            raise ValueError(f"value ({self.value}) must be a finite number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote(Label):
    """A thumb for one response.

    Args:
        text: the text.
        up: True for a thumb up, False for one down.
    """

    text: Text
    up: bool

    @property
    def texts(self) -> tuple[Text, ...]:
        """The one text."""
        return (self.text,)


def whole_bins(low: int, high: int) -> Callable[[float], int]:
    """A function from ratings low, low + 1, ..., high to bins 0, 1, ..., as `bins` of `read_labels`.

    It raises a ValueError for any other number: a 2.5, or a 0 among ratings from 1 to 5.

    Raises:
        ValueError: if high is not above low.
    """
    _check_range(low, high)

    def to_bin(value: float) -> int:
        if not low <= value <= high or value != int(value):
            raise ValueError(f"value ({value}) must be a whole number from {low} to {high}")
        return int(value) - low

    return to_bin


def even_bins(low: float, high: float, *, num_bins: int) -> Callable[[float], int]:
    """A function from numbers in [low, high] to num_bins bins of equal width, as `bins` of `read_labels`.

    A number between two bins goes to the upper one; it raises a ValueError outside of the range.

    Raises:
        ValueError: if high is not above low, or num_bins is below 2.
    """
    _check_range(low, high)
    if num_bins < 2:
        raise ValueError(f"num_bins ({num_bins}) must be 2 or more")

    def to_bin(value: float) -> int:
        if not low <= value <= high:
            raise ValueError(f"value ({value}) must lie between {low} and {high}")
        return min(int((value - low) * num_bins / (high - low)), num_bins - 1)

    return to_bin


def _check_range(low: float, high: float) -> None:
    if not high > low:
        raise ValueError(f"high ({high}) must be above low ({low})")
