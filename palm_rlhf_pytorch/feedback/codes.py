"""Codes that the tables hold: kinds of question, states of an assignment."""

from enum import IntEnum


class Kind(IntEnum):
    """What is asked about an item: which of two is better, each from 1 to 5, an order with the best first."""

    PAIR = 1
    RATING = 2
    RANKING = 3


class State(IntEnum):
    """Of an assignment; one that is leased and past `expires` no longer keeps others from the item."""

    LEASED = 1
    DONE = 2
    SKIPPED = 3


def choices(codes: type[IntEnum]) -> list[tuple[int, str]]:
    """Codes and their names, as a field takes them."""
    return [(code.value, code.name.lower()) for code in codes]
