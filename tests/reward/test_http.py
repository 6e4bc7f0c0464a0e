"""A scorer behind an address, against a server of the test's own: what is sent, retried, refused, bounded."""

import json
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

import pytest
import torch

from palm_rlhf_pytorch.reward.functions import text_judge
from palm_rlhf_pytorch.reward.http import HTTPScorer
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

QUICK = {"first_wait": 0.01, "timeout": 5.0}
FOUR = (["p"] * 4, ["a", "bb", "ccc", ""])


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@contextmanager
def server(*answers):
    """A server that gives each request the next answer, a (status, body, headers) or a function; then the last one."""
    seen, stopped = [], Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self.sent = json.loads(content)
            seen.append((time.monotonic(), dict(self.headers), self.sent))
            answer = answers[min(len(seen), len(answers)) - 1]
            if callable(answer):
                return answer(self, stopped)
            status, body, headers = (*answer, {})[:3]
            body = lengths(self.sent) if body is None else body
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        thread = Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}/score", seen
        stopped.set()
        httpd.shutdown()
        thread.join()


def lengths(sent):
    return json.dumps({"scores": [len(text) for text in sent["responses"]]}).encode()


def hangs(handler, stopped):
    stopped.wait(10)
    handler.close_connection = True


def breaks(handler, stopped):
    handler.send_response(200)
    handler.send_header("Content-Length", "99")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [1,')
    handler.close_connection = True


def drips(handler, stopped):
    handler.send_response(200)
    handler.end_headers()
    while not stopped.wait(0.05):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return


def test_scores_come_back_in_order_whatever_the_batches():
    with server((200, None)) as (url, seen):
        scorer = HTTPScorer(url, headers={"Authorization": "Bearer word"}, batch_size=2, max_at_once=3, **QUICK)
        assert scorer(["p"] * 5, ["a", "bb", "ccc", "", "eé"]) == [1, 2, 3, 0, 2]
        assert sorted(sent["responses"] for _, _, sent in seen) == [["a", "bb"], ["ccc", ""], ["eé"]]
        assert {headers["Authorization"] for _, headers, _ in seen} == {"Bearer word"}
        ids, none = torch.tensor([[65, 66, 67]]), torch.zeros(1, 3, dtype=torch.bool)
        assert text_judge(scorer, ByteTokenizer())(ids, prompt_mask=none, mask=~none).tolist() == [3]
        assert scorer([], []) == []


def test_other_forms_are_sent_and_read():
    with server((200, b'{"data": [{"s": 1}, {"s": null}, {"s": 2}, {"s": 3}]}')) as (url, seen):
        scorer = HTTPScorer(
            url,
            body=lambda prompts, responses: {"inputs": responses},
            read=lambda reply: [entry["s"] for entry in reply["data"]],
            **QUICK,
        )
        assert scorer(*FOUR) == [1, None, 2, 3]
        assert seen[0][2] == {"inputs": FOUR[1]}


@pytest.mark.parametrize("fault", [(500, b"oops"), (503, b""), (429, b"slow down"), breaks, drips, hangs])
def test_what_may_pass_is_asked_again(fault):
    with server(fault, (200, None)) as (url, seen):
        assert HTTPScorer(url, first_wait=0.01, timeout=0.3)(*FOUR) == [1, 2, 3, 0]
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [((500, b"broken"), ConnectionError, r"status 500 .*'broken' \(attempt 3 of 3\)"), (hangs, TimeoutError, "3 of 3")],
)
def test_what_does_not_pass_ends_after_the_last_attempt(fault, error, message):
    with server(fault) as (url, seen), pytest.raises(error, match=message):
        HTTPScorer(url, first_wait=0.01, timeout=0.2, max_attempts=3)(*FOUR)
    assert len(seen) == 3


def test_a_server_that_is_not_there_is_said_so():
    with server((200, None)) as (url, _):
        pass
    with pytest.raises(ConnectionError, match=r"127.0.0.1.*refused.*attempt 2 of 2"):
        HTTPScorer(url, max_attempts=2, **QUICK)(*FOUR)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((400, b"no such model " * 99), ConnectionError, "status 400 .*'no such model "),
        ((401, b""), ConnectionError, "status 401"),
        ((307, b"", {"Location": "file:///etc/passwd"}), ConnectionError, "307, redirected to 'file:///etc/passwd'"),
        ((302, b"", {"Location": "http://127.0.0.1:9/"}), ConnectionError, "302, redirected to"),
        ((429, b"", {"Retry-After": "3600"}), ConnectionError, "asks to wait 3600 s, above longest_wait"),
        ((200, b"<html>"), ValueError, "a reply without scores, b'<html>'"),
        ((200, b"\xff\xfe"), ValueError, "a reply without scores"),
        ((200, b"[" * 200_000), ValueError, "a reply without scores"),
        ((200, b'{"score": 1}'), ValueError, "KeyError"),
        ((200, b'{"scores": [1, 2, 3]}'), ValueError, "3 scores for 4 responses"),
        ((200, b'{"scores": "1234"}'), ValueError, "a str for 4 responses"),
        ((200, b"[" + b"1," * 60_000 + b"1]"), ValueError, "more than max_reply_bytes"),
    ],
)
def test_what_cannot_pass_is_an_error_at_once(answer, error, message):
    limit = 100_000 if answer[1][:2] == b"[1" else 1 << 20
    with server(answer) as (url, seen), pytest.raises(error, match=message) as caught:
        HTTPScorer(f"{url}?key=secret", headers={"X": "secret"}, max_reply_bytes=limit, **QUICK)(*FOUR)
    assert len(seen) == 1
    assert len(str(caught.value)) < 600 and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "wait",
    ["1", format_datetime(datetime.now(UTC) + timedelta(days=-1), usegmt=True), "soon"],
    ids=["seconds", "date", "word"],  # the processes of a run collect at different times
)
def test_retry_after_is_obeyed_in_all_its_forms(wait):
    with server((503, b"", {"Retry-After": wait}), (200, None)) as (url, seen):
        HTTPScorer(url, **QUICK)(*FOUR)
        (first, *_), (second, *_) = seen
        assert second - first >= (1 if wait == "1" else 0)


def test_an_error_of_one_batch_stops_the_others():
    def fails_once(handler, stopped):
        handler.send_error(400 if handler.sent["responses"] == ["bb"] else 500)

    with server(fails_once) as (url, seen):
        with pytest.raises(ConnectionError, match="status 400"):
            HTTPScorer(url, batch_size=1, max_at_once=2, first_wait=0.04, timeout=5.0)(*FOUR)
        count = len(seen)
        time.sleep(0.5)
        assert len(seen) <= count + 1  # a request under way ends; none is repeated, and no other batch begins
        assert [""] not in [sent["responses"] for _, _, sent in seen]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"url": "http://"}, "name a host"),
        ({"url": "http://me:secret@host/"}, "holds a user or password"),
        ({"url": "http://host/a b"}, "a blank"),
        ({"url": "http://host", "timeout": 0}, "timeout"),
        ({"url": "http://host", "max_attempts": 0}, "max_attempts"),
        ({"url": "http://host", "first_wait": 99.0}, "first_wait"),
    ],
)
def test_an_address_that_cannot_serve_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        HTTPScorer(**arguments)
    assert "secret" not in str(caught.value)
