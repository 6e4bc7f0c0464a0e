"""Stop strings: text passes until one of them is whole, and nothing of it passes.

Text comes in pieces, cut anywhere; what came out does not depend on where. Knows no token.
"""

from collections.abc import Sequence


class StopFilter:
    """Passes pieces of one text on, up to the stop string that is whole first; of two that end together, the longer.

    The end of what has come so far is held back while it may be the beginning of a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Begin a text that ends before any of the stop strings (`check_stops` gives them); none: it never ends."""
        self.stops, self.held, self.stopped = tuple(stops), "", False

    def add(self, piece: str) -> str:
        """What may be shown now that this piece has come; nothing once a stop string was met."""
        if self.stopped:
            return ""
        text = self.held + piece
        places = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)[1]]
        shown = len(text) - self._beginning(text)
        self.held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text has ended: what was held back was no stop string."""
        rest, self.held = self.held, ""
        return rest

    def _beginning(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((count for count in ends if any(stop.startswith(text[-count:]) for stop in self.stops)), 0)


def check_stops(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a user gives them: one, or several.

    Raises:
        TypeError: if one is no str.
        ValueError: if one is empty: every text holds it.
    """
    if not isinstance(stop, str | Sequence):
        raise TypeError(f"stop is of type {type(stop).__name__}; give text, or a list of texts")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    for index, given in enumerate(stops):
        if not isinstance(given, str):
            raise TypeError(f"stop[{index}] is of type {type(given).__name__}; give text, such as '\\n'")
        if not given:
            raise ValueError(f"stop[{index}] is empty, which every text holds; give at least one character")
    return stops
