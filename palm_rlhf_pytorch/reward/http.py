"""A scorer behind an address: texts go out as JSON, scores come back.

    judge = text_judge(HTTPScorer("http://localhost:8000/score"), tokenizer)

Sent is POST {"prompts": [...], "responses": [...]}; expected is {"scores": [...]} or the list alone, one number for
each, null where there is none. Other forms through `body` and `read`. Knows no judge: `text_judge` makes one of it.
"""

import http.client
import json
import math
import random
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from threading import Event
from typing import Any
from urllib.parse import urlsplit


class HTTPScorer:
    """Asks a server for scores: in batches, several at once, again where it makes sense, with a limit on everything.

    Asked again, after a wait that doubles and is partly random, is on status 429 and 5xx, on a connection that fails or
    breaks, and on silence. A `Retry-After` is obeyed. Any other status is an error at once, and so is a reply that is
    not understood. Redirections are not followed, for they could lead texts and headers to someone else.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        batch_size: int = 32,
        max_at_once: int = 4,
        timeout: float = 30.0,
        max_attempts: int = 5,
        first_wait: float = 0.5,
        longest_wait: float = 60.0,
        max_reply_bytes: int = 1 << 24,
        body: Callable[[list[str], list[str]], Any] | None = None,
        read: Callable[[Any], Any] | None = None,
    ) -> None:
        """Set up; nothing is sent yet.

        Args:
            url: http:// or https://, followed as it is; proxies of the environment are used.
            headers: more of them, such as {"Authorization": "Bearer ..."}; never shown in an error.
            batch_size: responses of one request.
            max_at_once: requests under way at the same time.
            timeout: seconds to connect, without a byte, and of a whole reply's body.
            max_attempts: requests for one batch, the first one included.
            first_wait: seconds before the second attempt, of which a random half is left out; doubled each time.
            longest_wait: seconds that it grows to. A server that asks for more is given up.
            max_reply_bytes: a longer reply is an error.
            body: what is sent, of prompts and responses; anything that JSON can say.
            read: the list of scores in a reply's JSON.

        Raises:
            ValueError: if url is no address of http or https, or a number is out of its range.
        """
        parts = urlsplit(url)
        self.shown = f"{parts.scheme}://{parts.hostname}:{parts.port or ''}".rstrip(":") + parts.path  # without secrets
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url ({self.shown!r}) must begin with http:// or https:// and name a host")
        if any(character <= " " for character in url):
            raise ValueError(f"url (of {self.shown}) holds a blank or a control character: percent-encode it")
        if parts.username is not None or parts.password is not None:
            raise ValueError(f"url (of {self.shown}) holds a user or password: give headers={{'Authorization': ...}}")
        for name, number in {
            "batch_size": batch_size,
            "max_at_once": max_at_once,
            "max_attempts": max_attempts,
        }.items():
            if number < 1:
                raise ValueError(f"{name} ({number}) must be at least 1")
        for name, limit in {
            "timeout": timeout,
            "longest_wait": longest_wait,
            "max_reply_bytes": max_reply_bytes,
        }.items():
            if not 0 < limit < math.inf:
                raise ValueError(f"{name} ({limit}) must be above 0 and finite")
        if not 0 <= first_wait <= longest_wait:
            raise ValueError(f"first_wait ({first_wait}) must lie between 0 and longest_wait ({longest_wait})")
        self.url, self.headers = (
            url,
            {"Content-Type": "application/json", "Accept": "application/json", **(headers or {})},
        )
        self.batch_size, self.max_at_once, self.max_attempts = batch_size, max_at_once, max_attempts
        self.timeout, self.first_wait, self.longest_wait = timeout, first_wait, longest_wait
        self.max_reply_bytes, self.body, self.read = max_reply_bytes, body or _body, read or _scores
        self._random = random.Random()  # of waits alone; its own, so that no one's random state moves
        self._opener = urllib.request.build_opener(_Unredirected)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[Any]:
        """What the server says of each response, a list of b.

        Raises:
            ConnectionError: if it cannot be reached, fails in every attempt, asks for too long a wait, or refuses.
            TimeoutError: if it was silent in the last attempt.
            ValueError: if a reply is too long, no JSON, or has not one entry for each response.
        """
        given_up, failures = Event(), list[Exception]()

        def batch(at: int) -> list[Any]:
            rows = slice(at, at + self.batch_size)
            try:
                return self._batch(prompts[rows], responses[rows], given_up)
            except Exception as error:
                failures.append(error)  # the first of them is the cause of the others
                given_up.set()  # here, before this thread takes up another batch
                raise

        pool = ThreadPoolExecutor(self.max_at_once)
        try:
            batches = [pool.submit(batch, at) for at in range(0, len(responses), self.batch_size)]
            wait(batches, return_when=FIRST_EXCEPTION)
            if failures:
                raise failures[0]
            return [score for each in batches for score in each.result()]
        finally:
            given_up.set()  # after Ctrl-C too
            pool.shutdown(wait=False, cancel_futures=True)

    def _batch(self, prompts: list[str], responses: list[str], given_up: Event) -> list[Any]:
        content = json.dumps(self.body(prompts, responses)).encode()
        for attempt in range(1, self.max_attempts + 1):
            if given_up.is_set():
                break
            try:
                return self._understood(self._asked(content), len(responses))
            except (OSError, http.client.HTTPException) as error:
                told, seconds = self._failure(error, attempt)
                if seconds is None or attempt == self.max_attempts:
                    kind = TimeoutError if _is_silence(error) else ConnectionError
                    raise kind(f"{self.shown}: {told} (attempt {attempt} of {self.max_attempts})") from error
                given_up.wait(seconds)
        raise ConnectionError(f"{self.shown}: given up with another batch")

    def _asked(self, content: bytes) -> bytes:
        """The body of one reply."""
        request = urllib.request.Request(self.url, data=content, headers=self.headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as reply:
            expected = reply.headers.get("Content-Length")
            found = self._received(reply)
        if expected is not None and expected.isdigit() and len(found) < int(expected):
            raise http.client.IncompleteRead(found[:0], int(expected) - len(found))
        return found

    def _received(self, reply: http.client.HTTPResponse) -> bytes:
        """All of the body, by parts: a limit on each of them does not limit their sum."""
        deadline, found = time.monotonic() + self.timeout, bytearray()
        while part := reply.read1(1 << 16):
            found += part
            if len(found) > self.max_reply_bytes:
                raise ValueError(f"{self.shown} sent more than max_reply_bytes ({self.max_reply_bytes})")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the reply took longer than timeout ({self.timeout} seconds)")
        return bytes(found)

    def _understood(self, content: bytes, count: int) -> list[Any]:
        try:
            scores = self.read(json.loads(content))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.shown} sent a reply without scores, {content[:200]!r}: {error!r}") from error
        if not isinstance(scores, list) or len(scores) != count:
            given = f"{len(scores)} scores" if isinstance(scores, list) else f"a {type(scores).__name__}"
            raise ValueError(f"{self.shown} sent {given} for {count} responses: it must send a list with one for each")
        return scores

    def _failure(self, error: Exception, attempt: int) -> tuple[str, float | None]:
        """What happened, and seconds to wait before asking again; None if that is useless."""
        seconds = min(self.longest_wait, self.first_wait * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1)
        if not isinstance(error, urllib.error.HTTPError):
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            useless = isinstance(reason, ssl.SSLCertVerificationError)
            return f"{type(reason).__name__}: {reason}", None if useless else seconds
        with error:
            if 300 <= error.code < 400:
                return f"status {error.code}, redirected to {error.headers.get('Location')!r}: give that as url", None
            told = f"status {error.code} {error.reason}, {_beginning(error)!r}"
            asked = _seconds(error.headers.get("Retry-After"))
        if error.code != 429 and error.code < 500:
            return told, None
        if asked > self.longest_wait:
            return f"{told}; it asks to wait {asked:.0f} s, above longest_wait ({self.longest_wait:g} s)", None
        return told, max(seconds, asked)


class _Unredirected(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None makes an error of every redirection."""


def _body(prompts: list[str], responses: list[str]) -> Any:
    return {"prompts": prompts, "responses": responses}


def _scores(reply: Any) -> Any:
    return reply if isinstance(reply, list) else reply["scores"]


def _is_silence(error: Exception) -> bool:
    return isinstance(getattr(error, "reason", error), TimeoutError)


def _beginning(error: urllib.error.HTTPError) -> str:
    """The first words of the body of a refusal, if it sends them."""
    try:
        return error.read1(200).decode("utf-8", errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _seconds(retry_after: str | None) -> float:
    """What a Retry-After header asks for, in seconds or as a date; 0 where there is none that can be read."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
