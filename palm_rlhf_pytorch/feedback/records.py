"""One judgement with all that it is about, and the rows that trainers read. Knows no database.

    preferences     prompt, chosen, rejected; of a ranking of K all K (K - 1) / 2 pairs, in one group
    conversational  the same, as lists of turns
    unpaired        prompt, completion, label: true or false
    ratings         prompt, completion, label: 0 to 4
    rankings        prompt, completions, ranks
    judgements      everything, one row a judgement

A row says what was asked: only who asks for another format than that of the question derives one from the other.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from typing import Any

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.formats import Prompt, turns_of

GOOD = 4  # stars from which a rating says that a response is good, and as many below the middle that it is bad
MIDDLE = 3
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judgement; completions are named by their place in the item.

    Args:
        item: id of the item.
        kind: of the question.
        prompt: text or turns.
        texts: of the completions.
        sources: names of what wrote them.
        scores: a reward model's, None where there is none.
        order: places as they were shown.
        choice: of a pair, below 0 where completion 0 is better, 0 a tie, up to 3 steps; None where both are bad.
        ratings: 1 to 5 of each completion; empty where not asked.
        ranking: places, best first.
        rules: of each completion, {rule: "yes", "no" or "unsure"}.
        note: of the annotator.
        annotator: their name.
        group: of the item, "" for none.
        gold: the known answer, by place.
        ms: from when the item was given.
        at: when it was submitted.
        round: of sampling.
    """

    item: int
    kind: int
    prompt: Prompt
    texts: tuple[str, ...]
    sources: tuple[str, ...]
    scores: tuple[float | None, ...]
    order: tuple[int, ...]
    choice: int | None
    ratings: tuple[int, ...]
    ranking: tuple[int, ...]
    rules: tuple[Mapping[str, str], ...]
    note: str
    annotator: str
    group: str
    gold: Mapping[str, Any] | None
    ms: int
    at: datetime
    round: int

    @property
    def both_bad(self) -> bool:
        """Whether both responses of a pair are bad."""
        return self.kind == Kind.PAIR and self.choice is None

    def pairs(self) -> Iterator[tuple[int, int, int | None]]:
        """Places of a better and a worse completion, and the steps between them; None in a ranking, 0 in a tie."""
        if self.kind == Kind.PAIR and self.choice is not None:
            yield (1, 0, self.choice) if self.choice > 0 else (0, 1, -self.choice)
        for better, worse in combinations(self.ranking, 2):
            yield better, worse, None


def bin_of(stars: int) -> int:
    """The bin of a rating from 1 to 5: 0 to 4, as a RewardModel of five bins counts.

    Raises:
        ValueError: if it is none of these.
    """
    if stars not in (1, 2, 3, 4, 5):
        raise ValueError(f"stars ({stars}) must be a whole number from 1 to 5")
    return stars - 1


def preferences(judged: Judged, *, ties: bool = False) -> Iterator[Row]:
    """Pairs with an explicit prompt; ties, where they are asked for, have a column `tie`."""
    for better, worse, strength in judged.pairs():
        if strength == 0 and not ties:
            continue
        said = {"tie": True} if strength == 0 else {} if strength is None else {"strength": strength}
        texts = {"prompt": judged.prompt, "chosen": judged.texts[better], "rejected": judged.texts[worse]}
        yield texts | said | _about(judged) | _rules(judged, (better, worse))


def conversational(judged: Judged, *, ties: bool = False) -> Iterator[Row]:
    """Pairs whose prompt and responses are lists of turns."""
    for row in preferences(judged, ties=ties):
        names = ("chosen", "rejected")
        sides = {name: [{"role": "assistant", "content": row[name].removeprefix(" ")}] for name in names}
        yield row | {"prompt": turns_of(row["prompt"])} | sides


def unpaired(judged: Judged) -> Iterator[Row]:
    """Single responses, good or bad: the two sides of a pair, both bad ones, ratings of 4 and 5 and of 1 and 2."""
    if judged.kind == Kind.RATING:
        labels = [(place, stars >= GOOD) for place, stars in enumerate(judged.ratings) if stars != MIDDLE]
    elif judged.both_bad:
        labels = [(place, False) for place in range(len(judged.texts))]
    elif judged.kind == Kind.PAIR:
        labels = [(place, good) for better, worse, steps in judged.pairs() if steps for place, good in
                  ((better, True), (worse, False))]  # fmt: skip
    else:
        return  # a place in an order says nothing of good and bad
    for place, good in labels:
        text = {"prompt": judged.prompt, "completion": judged.texts[place], "label": good}
        yield text | _about(judged) | _rules(judged, (place,))


def ratings(judged: Judged) -> Iterator[Row]:
    """Ratings as bins 0 to 4."""
    for place, stars in enumerate(judged.ratings):
        text = {"prompt": judged.prompt, "completion": judged.texts[place], "label": bin_of(stars)}
        yield text | _about(judged) | _rules(judged, (place,))


def rankings(judged: Judged) -> Iterator[Row]:
    """The ranked completions of a ranking, and their ranks from 0 for the best."""
    if judged.ranking:
        places = sorted(judged.ranking)
        ranks = [judged.ranking.index(place) for place in places]
        texts = {"prompt": judged.prompt, "completions": [judged.texts[place] for place in places], "ranks": ranks}
        yield texts | _about(judged) | _rules(judged, places)


def judgements(judged: Judged) -> Iterator[Row]:
    """Everything about a judgement; `order` holds the places as they were shown."""
    said: Row = {"choice": judged.choice} if judged.kind == Kind.PAIR else {}
    said |= {"both_bad": True} if judged.both_bad else {}
    said |= {"ratings": list(judged.ratings)} if judged.ratings else {}
    said |= {"ranking": list(judged.ranking)} if judged.ranking else {}
    yield {
        "kind": Kind(judged.kind).name.lower(), "prompt": judged.prompt, "completions": list(judged.texts), **said,
        "order": list(judged.order), "rules": [dict(rules) for rules in judged.rules], "note": judged.note,
        "sources": list(judged.sources), "scores": list(judged.scores), "gold": judged.gold, "ms": judged.ms,
        "at": judged.at.isoformat(), "round": judged.round, **_about(judged),
    }  # fmt: skip


FORMATS: dict[str, Callable[..., Iterator[Row]]] = {
    "preferences": preferences,
    "conversational": conversational,
    "unpaired": unpaired,
    "ratings": ratings,
    "rankings": rankings,
    "judgements": judgements,
}
WITH_TIES = ("preferences", "conversational")


def _about(judged: Judged) -> Row:
    """Who, and what stays together when records are split: the item's group, else its prompt."""
    prompt = json.dumps(judged.prompt, sort_keys=True).encode()
    group = judged.group or f"prompt-{hashlib.sha256(prompt).hexdigest()[:12]}"
    return {"annotator": judged.annotator, "group": group, "item": judged.item}


def _rules(judged: Judged, places: Sequence[int]) -> Row:
    """Answers about the rules, in the order of the row's texts; nothing where none was given."""
    said = [dict(judged.rules[place]) for place in places]
    return {"rules": said} if any(said) else {}
