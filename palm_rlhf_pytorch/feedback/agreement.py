"""How far the people of a project agree, all together and each with the rest. Knows records, and no database.

Krippendorff's alpha (reward/agreement.py) of what was asked: the names A, B, tie and both bad, the seven steps, stars,
and of a ranking which of two stands higher.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.records import Judged
from palm_rlhf_pytorch.reward.agreement import Agreement, interval, krippendorff_alpha, nominal, ordinal

BOTH_BAD = 9.0  # a name among the values of a choice
Values = dict[Hashable, dict[Hashable, float]]  # thing -> who -> value


@dataclass(frozen=True)
class WithRest:
    """How often one person says what the others say of the same thing.

    Args:
        same: judgements of others that are the same.
        compared: judgements of others, on things this person judged.
    """

    same: int
    compared: int

    @property
    def share(self) -> float | None:
        """Same / compared; None where there is nothing to compare."""
        return self.same / self.compared if self.compared else None


def agreement(judged: Iterable[Judged]) -> Agreement | None:
    """Alpha over what two people or more judged; None where there is nothing of the kind.

    Both bad is a name of its own in `nominal`; in `ordinal` and `interval`, which go by steps, it is left out.

    Raises:
        ValueError: if the judgements are of several kinds of question.
    """
    judged = list(judged)
    if len({one.kind for one in judged}) > 1:
        raise ValueError("judged holds several kinds of question; take one project at a time")
    shared = [list(said.values()) for said in values(judged, names).values() if len(said) > 1]
    if not shared:
        return None
    by_step = [list(said.values()) for said in values(judged, steps).values()]
    return Agreement(
        items=len(shared),
        judgements=sum(map(len, shared)),
        nominal=krippendorff_alpha(shared, distance=nominal),
        ordinal=krippendorff_alpha(by_step, distance=ordinal),
        interval=krippendorff_alpha(by_step, distance=interval),
    )


def with_rest(judged: Iterable[Judged]) -> dict[str, WithRest]:
    """Of each person, how often the others say the same: the same side, the same stars, the same order of two."""
    same: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for said in values(judged, names).values():
        for who, value in said.items():
            others = [other for person, other in said.items() if person != who]
            same[str(who)][0] += sum(other == value for other in others)
            same[str(who)][1] += len(others)
    return {who: WithRest(*counts) for who, counts in same.items()}


def values(judged: Iterable[Judged], said: Callable[[Judged], Mapping[Hashable, float]]) -> Values:
    """What people said of each thing: of a pair, of each response that is rated, of each two that are ranked.

    Args:
        judged: of any kind.
        said: `names` or `steps`.
    """
    found: Values = defaultdict(dict)
    for one in judged:
        for thing, value in said(one).items():
            found[one.item, thing][one.annotator] = value
    return found


def steps(one: Judged) -> dict[Hashable, float]:
    """The steps of a choice, none where both are bad; stars; the order of each two."""
    if one.kind == Kind.PAIR:
        return {} if one.choice is None else {"pair": float(one.choice)}
    if one.kind == Kind.RATING:
        return {place: float(stars) for place, stars in enumerate(one.ratings)}
    ordered = ((better, worse) for better, worse, _ in one.pairs())
    return {(min(pair), max(pair)): 1.0 if pair[0] < pair[1] else -1.0 for pair in ordered}


def names(one: Judged) -> dict[Hashable, float]:
    """The same as names: of a choice the side alone, tie, or both bad."""
    if one.kind != Kind.PAIR:
        return steps(one)
    return {"pair": BOTH_BAD if one.choice is None else float((one.choice > 0) - (one.choice < 0))}
