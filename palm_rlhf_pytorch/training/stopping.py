"""A run that is asked to stop: SIGTERM and Ctrl-C wait for the end of a step, and for what is to be saved.

Knows nothing of what runs.
"""

import signal
import threading
from types import FrameType
from typing import Any, Self

from palm_rlhf_pytorch.training.ranks import Ranks

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (no error)
    """Leaves a run at a place where its state can be saved."""


class StopSignal:
    """Within the block, notes the first SIGTERM or SIGINT instead of obeying it; the second does what it always did.

    Handlers belong to the main thread: in another one, and where `enabled` is False, signals act as ever.
    """

    def __init__(self, ranks: Ranks, *, enabled: bool = True) -> None:
        self.ranks = ranks
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.name: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self.enabled:
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._before = {number: handler for number, handler in handlers.items() if handler is not None}
            for number in self._before:  # a handler that is None is not Python's to put back
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def check(self, *_: object) -> None:
        """End of a step, on all processes: stop if one of them was asked to.

        Raises:
            Stopped: on every process.
        """
        if self.enabled and self.ranks.any(self.name is not None):
            self.name = self.name or "SIGTERM"  # this process was not told itself
            raise Stopped

    def check_alone(self, *_: object) -> None:
        """The same where processes are not at the same place: a run of one stops here, others at their next step.

        Raises:
            Stopped: if this is the only process, and was asked to stop.
        """
        if self.ranks.count == 1 and self.name is not None:
            raise Stopped

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            return
        self.__exit__()
        signal.raise_signal(number)
