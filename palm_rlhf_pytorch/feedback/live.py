"""Responses that are written while somebody waits for them: one worker thread, which has the models to itself.

An item without responses (an imported prompt) is given to a person, `Writer.ask` queues it, and `add_completions` puts
what was written into the database, where the page that asks again and again finds it. Knows no request.
"""

import logging
import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from django.apps import apps
from django.db import connections

from palm_rlhf_pytorch.feedback.formats import NewCompletion, Prompt
from palm_rlhf_pytorch.feedback.imports import add_completions
from palm_rlhf_pytorch.feedback.models import Item
from palm_rlhf_pytorch.feedback.sampling import MAX_SAMPLES, Author, Reader, sample_items
from palm_rlhf_pytorch.text.dialogues import read_turns, render_prompt

TRIES = 3  # a model that wrote nothing, or the same again, is asked so often
Respond = Callable[[Prompt, int], Sequence[NewCompletion]]
_log = logging.getLogger(__name__)


def responder(authors: Sequence[Author], *, samples: int, reader: Reader | None = None) -> Respond:
    """What a `Writer` asks: the responses to a prompt that are worth most to judge together.

    Args:
        authors: as in `sample_items`.
        samples: likewise; two at least, as some projects compare them.
        reader: likewise.

    Returns:
        Called with a prompt and the kind of question; raises a ValueError where no responses can be judged.

    Raises:
        ValueError: if samples is out of range.
    """
    if not 2 <= samples <= MAX_SAMPLES:
        raise ValueError(f"samples ({samples}) must be from 2 to {MAX_SAMPLES}")

    def respond(prompt: Prompt, kind: int) -> Sequence[NewCompletion]:
        text = prompt if isinstance(prompt, str) else render_prompt(read_turns(prompt, field="prompt"), field="prompt")
        for _ in range(TRIES):
            seed = secrets.randbits(62)
            found = sample_items(authors, [text], kind=kind, samples=samples, seed=seed, reader=reader)
            if found.items:
                return found.items[0].completions
        raise ValueError(f"after {TRIES} tries the responses are empty or all the same")

    return respond


class Writer:
    """A thread that writes responses, one item after the other; `close` ends it."""

    def __init__(self, respond: Respond) -> None:
        """Start the thread, which ends with the process.

        Args:
            respond: gives responses to a prompt for a kind of question; a ValueError says that there are none.
        """
        self._respond = respond
        self._waiting: queue.Queue[int | None] = queue.Queue()
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._failed: dict[int, str] = {}
        self._thread = threading.Thread(target=self._work, name="palm-feedback-writer", daemon=True)
        self._thread.start()

    def ask(self, item_id: int) -> str | None:
        """Queue an item, once; gives why it could not be written, where that is known already."""
        with self._lock:
            if item_id in self._failed:
                return self._failed[item_id]
            if item_id not in self._asked:
                self._asked.add(item_id)
                self._waiting.put(item_id)
        return None

    def close(self) -> None:
        """End the thread once it has written the item that it is at."""
        with self._lock:
            with suppress(queue.Empty):  # the thread takes from it too: none is there because it was a moment ago
                while True:
                    self._waiting.get_nowait()
            self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item_id := self._waiting.get()) is not None:
            reason = None
            try:
                item = Item.objects.select_related("project").get(pk=item_id)
                if not item.ready:
                    add_completions(item, self._respond(item.prompt, item.project.kind))
            except ValueError as error:
                reason = str(error)
            except Exception:  # whatever it is, the thread that all wait for goes on
                _log.exception("item %d could not be written", item_id)
                reason = "the server failed; its log says how"
            finally:
                connections.close_all()
            with self._lock:
                self._asked.discard(item_id)
                if reason is not None:
                    self._failed[item_id] = reason


def current_writer() -> Writer | None:
    """The writer of this server, None where responses are not written live."""
    config: Any = apps.get_app_config("palm_feedback")
    return config.writer


def set_writer(writer: Writer | None) -> None:
    """Have the pages ask this writer."""
    config: Any = apps.get_app_config("palm_feedback")
    config.writer = writer
