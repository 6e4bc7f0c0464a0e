"""How far people agree: Krippendorff's alpha, what each annotator's word is worth, one soft label out of many.

Krippendorff, "Computing Krippendorff's Alpha-Reliability", https://repository.upenn.edu/asc_papers/43
Knows records, and no model.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from palm_rlhf_pytorch.text.records import Label, Pair, Rating, Vote

Values = Mapping[Hashable, float] | Sequence[float]
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
MAX_VALUES = 4000  # different values: a matrix of their distances is 128 MB


def krippendorff_alpha(
    ratings: Mapping[Hashable, Values] | Sequence[Values] | np.ndarray, *, distance: Distance | None = None
) -> float | None:
    """Agreement beyond chance, alpha = 1 - observed / expected disagreement; 1 is perfect, 0 is chance.

    Observed is the mean squared distance of two values of one item, each item counting as often as it has values;
    expected is that of any two values. An item with fewer than two values says nothing and is left out.

    Args:
        ratings: the values of each item, by annotator or in a list; or an array (items, annotators), NaN where
            there is none.
        distance: `nominal`, `ordinal`, `interval` (the default) or one like them.

    Returns:
        alpha, or None where it is undefined: no item has two values, or all values are the same.

    Raises:
        ValueError: if a value is infinite, or there are more than MAX_VALUES different ones.
    """
    rows = ratings.values() if isinstance(ratings, Mapping) else ratings
    units = [_known(row) for row in rows]
    units = [unit for unit in units if len(unit) > 1]
    if not units:
        return None
    values, places = np.unique(np.concatenate(units), return_inverse=True)
    if len(values) > MAX_VALUES:
        raise ValueError(f"ratings hold {len(values)} different values; round them to at most {MAX_VALUES}")
    coincidences = np.zeros((len(values), len(values)))
    for unit in np.split(places, np.cumsum([len(unit) for unit in units])[:-1]):
        share = 1 / (len(unit) - 1)
        np.add.at(coincidences, (unit[:, None], unit[None, :]), share)
        np.add.at(coincidences, (unit, unit), -share)  # a value is not compared with itself
    counts = coincidences.sum(axis=1)
    distances = (distance or interval)(values, counts)
    expected = (np.outer(counts, counts) - np.diag(counts)) * distances
    if not expected.sum() > 0:
        return None
    return float(1 - (counts.sum() - 1) * (coincidences * distances).sum() / expected.sum())


def nominal(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Squared distances (v, v) of values that are names: 1 wherever they differ."""
    return 1.0 - np.eye(len(values))


def ordinal(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Squared distances (v, v) of values that have an order alone: how many values lie between, ends counted half."""
    middles = np.cumsum(counts) - counts / 2
    return (middles[:, None] - middles[None, :]) ** 2


def interval(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Squared distances (v, v) of values whose differences mean something: (c - k)^2."""
    return (values[:, None] - values[None, :]) ** 2


@dataclass(frozen=True)
class Agreement:
    """Alpha over judgements of one kind; None where it is undefined.

    Args:
        items: things that two or more people judged.
        judgements: of these things.
        nominal: alpha of the values as names.
        ordinal: alpha of their order.
        interval: alpha of their differences.
    """

    items: int
    judgements: int
    nominal: float | None
    ordinal: float | None
    interval: float | None


def measure_agreement(records: Iterable[Label]) -> dict[str, Agreement]:
    """Agreement on "pairs" (the probability of one of the two), on "ratings" and on "votes", where anything is shared.

    Of several judgements of one thing by one annotator the last counts. Records without annotator are of different
    people. Rankings are left out: look at the pairs they hold.
    """
    found = {}
    for kind, items in _items(records).items():
        shared = [list(values.values()) for values in items.values() if len(values) > 1]
        if shared:
            alphas = {measure.__name__: krippendorff_alpha(shared, distance=measure) for measure in _DISTANCES}
            found[kind] = Agreement(len(shared), sum(map(len, shared)), **alphas)
    return found


def annotator_weights(records: Sequence[Label], *, prior: float = 10.0) -> dict[str, float]:
    """What each annotator's word is worth, by agreement with the others on the same items; 1 on average.

    An annotator's reliability is 1 - d / e: d the mean squared distance to the other values of the same items, e the
    one that chance would give, over each kind of judgement; it is drawn towards the mean of all by `prior` items'
    worth, so that little evidence makes no difference, and is at least 0. Weights are reliabilities over their mean.

    Args:
        records: pairs, ratings and votes; others are passed over.
        prior: items at which an annotator's own evidence weighs as much as the common mean.

    Returns:
        A weight for each annotator named; 1 for all where nobody agrees more than by chance.

    Raises:
        ValueError: if prior is below 0.
    """
    if not prior >= 0:
        raise ValueError(f"prior ({prior}) must be 0 or above")
    evidence: dict[str, list[float]] = {name: [] for record in records if (name := record.annotator) is not None}
    for items in _items(records).values():
        everything = np.array([value for values in items.values() for value in values.values()])
        chance = float(2 * everything.var() * len(everything) / max(len(everything) - 1, 1))
        if chance > 0:
            for values in items.values():
                _compare(values, chance, evidence)
    known = [agreement for own in evidence.values() for agreement in own]
    mean = sum(known) / len(known) if known else 0.0
    reliabilities = {
        name: max((sum(own) + prior * mean) / (len(own) + prior), 0.0) if own or prior else max(mean, 0.0)
        for name, own in evidence.items()
    }
    average = sum(reliabilities.values()) / max(len(reliabilities), 1)
    return {name: value / average if average > 0 else 1.0 for name, value in reliabilities.items()}


def merge_annotators(
    records: Iterable[Label],
    *,
    weights: Mapping[str, float] | None = None,
    rating: Callable[[Sequence[float], Sequence[float]], float] | None = None,
) -> list[Label]:
    """One record in place of several people's judgements of the same thing.

    Pairs of the same two texts, in either order, become one whose preference is the weighted mean: a soft label. Its
    weight is the sum of theirs, so that the Bradley-Terry loss is the same as theirs together, for one pass through
    the model. Its margin is the weighted mean of those given, as seen from the chosen text, and at least 0.

    Args:
        records: any; votes and rankings are kept, their weights multiplied.
        weights: of annotators (`annotator_weights`), times the weights of the records; 1 for those not named.
        rating: one value out of the values and weights of all ratings of a text (`weighted_mean`, and for bins
            `weighted_median`); None keeps each.

    Returns:
        Records in the order in which their things first appear, `annotator` None where several judged.
    """
    together: dict[Hashable, list[Label]] = defaultdict(list)
    for number, record in enumerate(records):
        record = replace(record, weight=record.weight * (weights or {}).get(record.annotator or "", 1.0))
        if isinstance(record, Pair):
            together["pair", *sorted(record.texts)].append(record)
        elif isinstance(record, Rating) and rating is not None:
            together["rating", record.text].append(record)
        else:
            together["alone", number].append(record)
    merged: list[Label] = []
    for same in together.values():
        pairs = [record for record in same if isinstance(record, Pair)]
        ratings = [record for record in same if isinstance(record, Rating)]
        if pairs and len(pairs) > 1:
            merged.append(_merge_pairs(pairs))
        elif len(ratings) > 1 and rating is not None:
            value = rating([record.value for record in ratings], [record.weight for record in ratings])
            weight, annotator = _of_all(ratings)
            merged.append(replace(ratings[0], value=value, weight=weight, annotator=annotator))
        else:
            merged += same
    return merged


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Mean of values; the plain one where all weights are 0."""
    return float(np.average(values, weights=weights if sum(weights) > 0 else None))


def weighted_median(values: Sequence[float], weights: Sequence[float]) -> float:
    """The lowest of the values that half of the weight does not exceed: of whole numbers, a whole number."""
    order = np.argsort(values)
    shares = np.asarray(weights, dtype=float)[order]
    cumulated = np.cumsum(shares if shares.sum() > 0 else np.ones(len(shares)))
    return float(np.asarray(values, dtype=float)[order][int(np.searchsorted(cumulated, cumulated[-1] / 2))])


_DISTANCES = (nominal, ordinal, interval)


def _known(row: Values) -> np.ndarray:
    values = np.array(list(row.values()) if isinstance(row, Mapping) else row, dtype=np.float64)
    if np.isinf(values).any():
        raise ValueError("ratings hold an infinite value; leave it out, or give NaN for a missing one")
    return values[~np.isnan(values)]


def _items(records: Iterable[Label]) -> dict[str, dict[Hashable, dict[Hashable, float]]]:
    """Kind -> what was judged -> who -> value."""
    items: dict[str, dict[Hashable, dict[Hashable, float]]] = {}
    for number, record in enumerate(records):
        thing = record.texts
        if isinstance(record, Pair):
            thing = tuple(sorted(thing))
            kind, value = "pairs", record.preference if record.chosen == thing[0] else 1 - record.preference
        elif isinstance(record, Rating):
            kind, value = "ratings", record.value
        elif isinstance(record, Vote):
            kind, value = "votes", float(record.up)
        else:
            continue
        who = number if record.annotator is None else record.annotator
        items.setdefault(kind, {}).setdefault(thing, {})[who] = value
    return items


def _compare(values: Mapping[Hashable, float], chance: float, evidence: dict[str, list[float]]) -> None:
    """Add each annotator's agreement with the others on one item."""
    if len(values) < 2:
        return
    for name, value in values.items():
        if isinstance(name, str):
            others = [other for who, other in values.items() if who != name]
            evidence[name].append(1 - sum((value - other) ** 2 for other in others) / len(others) / chance)


def _merge_pairs(pairs: Sequence[Pair]) -> Pair:
    """Pairs of the same two texts, seen from the chosen one of the first."""
    weights = [pair.weight for pair in pairs]
    first = pairs[0]
    same = [pair.chosen == first.chosen for pair in pairs]
    toward = [pair.preference if along else 1 - pair.preference for pair, along in zip(pairs, same, strict=True)]
    preference = weighted_mean(toward, weights)
    given = [
        (pair.margin if along else -pair.margin, pair.weight)
        for pair, along in zip(pairs, same, strict=True)
        if pair.margin is not None
    ]
    margin = weighted_mean([value for value, _ in given], [weight for _, weight in given]) if given else None
    chosen, rejected = first.chosen, first.rejected
    if preference < 0.5:
        chosen, rejected, preference = rejected, chosen, 1 - preference
        margin = None if margin is None else -margin
    if margin is not None:
        margin = None if preference == 0.5 else max(margin, 0.0)
    weight, annotator = _of_all(pairs)
    merged = replace(first, chosen=chosen, rejected=rejected, preference=preference, margin=margin)
    return replace(merged, weight=weight, annotator=annotator)


def _of_all(records: Sequence[Label]) -> tuple[float, str | None]:
    """Weight and annotator of several records in one."""
    names = {record.annotator for record in records}
    return sum(record.weight for record in records), names.pop() if len(names) == 1 else None
