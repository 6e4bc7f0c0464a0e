"""Responses written while somebody waits: the page that waits, the thread that writes."""

import threading
import time

import pytest
import torch

pytest.importorskip("django", reason="needs the extra [feedback]")

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

HTMX = {"HTTP_HX_REQUEST": "true"}
PAGE, POLL = "/projects/live/", "/projects/live/written/"


def wait_for(fact, seconds=30):
    end = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def project(database):
    from palm_rlhf_pytorch.feedback.imports import add_items, make_project

    made = make_project("live", gold_every=0)
    add_items(made, [NewItem(prompt="Name a bird."), NewItem(prompt=[{"role": "user", "content": "Name a tree."}])])
    return made


@pytest.fixture
def browser(project, people):
    from django.test import Client

    client = Client()
    client.force_login(people("anna")[0])
    return client


@pytest.fixture
def writing(project):
    """Have a function write; gives when it was called with what."""
    from palm_rlhf_pytorch.feedback.live import Writer, set_writer

    writers = []

    def start(respond):
        writers.append(Writer(respond))
        set_writer(writers[-1])

    yield start
    set_writer(None)
    for writer in writers:
        writer.close()


def test_the_page_waits_until_the_responses_are_written_and_then_shows_them(browser, project, writing):
    free, asked = threading.Event(), []

    def respond(prompt, kind):
        asked.append((prompt, kind))
        assert free.wait(30)
        return [NewCompletion(text="A heron"), NewCompletion(text="A wren", source="m")]

    writing(respond)
    page = browser.get(PAGE).content.decode()
    assert "being written" in page and "Name a bird." in page and f'hx-get="{POLL}"' in page
    assert browser.get(PAGE).status_code == 200  # a reload asks for nothing twice
    assert browser.get(POLL, **HTMX).status_code == 204
    assert browser.get(POLL).headers["Location"] == PAGE
    free.set()
    wait_for(lambda: project.items.filter(ready=True).exists())
    shown = browser.get(POLL, **HTMX).content.decode()
    assert "A heron" in shown and "A wren" in shown and 'value="-3"' in shown
    assert asked == [("Name a bird.", Kind.PAIR)]


def test_a_prompt_without_answers_is_skipped_and_said_and_the_next_one_written(browser, project, writing):
    def respond(prompt, kind):
        if isinstance(prompt, str):
            raise ValueError("nothing came")
        return [NewCompletion(text="Oak"), NewCompletion(text="Elm")]

    writing(respond)
    assert b"being written" in browser.get(PAGE).content
    pages = []
    wait_for(lambda: pages.append(browser.get(POLL, **HTMX).content.decode()) or "Oak" in pages[-1])
    assert any("had no answers to that prompt" in page for page in pages)
    from palm_rlhf_pytorch.feedback.models import Assignment

    assert Assignment.objects.get(item__ready=False).reason == "not written: nothing came"


def test_a_mistake_in_the_thread_ends_neither_the_thread_nor_the_page(browser, writing, caplog):
    def respond(prompt, kind):
        if isinstance(prompt, str):
            raise KeyError("a mistake")
        return [NewCompletion(text="Oak"), NewCompletion(text="Elm")]

    writing(respond)
    wait_for(lambda: b"Oak" in browser.get(PAGE).content)
    assert "could not be written" in caplog.text


def test_a_server_without_a_model_takes_back_what_waits(browser, project, writing):
    from palm_rlhf_pytorch.feedback.live import set_writer
    from palm_rlhf_pytorch.feedback.models import Assignment

    free = threading.Event()

    def respond(prompt, kind):
        assert free.wait(30)
        raise ValueError("too late")

    writing(respond)
    assert b"being written" in browser.get(PAGE).content
    set_writer(None)
    assert b"Nothing left for you" in browser.get(PAGE).content
    assert not Assignment.objects.exists()
    free.set()


@pytest.mark.parametrize(("kind", "number"), [(Kind.PAIR, 2), (Kind.RANKING, 3)])
def test_a_model_answers_text_and_turns(django_ready, kind, number, monkeypatch):
    from palm_rlhf_pytorch.feedback import live
    from palm_rlhf_pytorch.feedback.live import responder
    from palm_rlhf_pytorch.feedback.sampling import Author

    torch.manual_seed(0)
    monkeypatch.setattr(live.secrets, "randbits", lambda bits: 5)  # by chance a response is empty, and left out
    palm = PaLM(num_tokens=ByteTokenizer().num_tokens, dim=8, depth=1, heads=2, dim_head=4).eval()
    author = Author(name="m", palm=palm, asking=ByteTokenizer(), settings={"max_new_tokens": 7})
    respond = responder([author], samples=3)
    for prompt in ("Name a bird.", [{"role": "user", "content": "Name a tree."}]):
        found = respond(prompt, kind)
        assert len({one.text.strip() for one in found} - {""}) == number and {one.source for one in found} == {"m"}
    with pytest.raises(ValueError, match=r"samples \(1\) must be from 2 to 4"):
        responder([author], samples=1)


def test_a_model_that_says_the_same_again_and_again_has_no_answer(django_ready):
    from palm_rlhf_pytorch.feedback.live import responder
    from palm_rlhf_pytorch.feedback.sampling import Author

    torch.manual_seed(0)
    palm = PaLM(num_tokens=ByteTokenizer().num_tokens, dim=8, depth=1, heads=2, dim_head=4).eval()
    author = Author(name="m", palm=palm, asking=ByteTokenizer(), settings={"max_new_tokens": 3, "temperature": 0.0})
    with pytest.raises(ValueError, match="after 3 tries"):
        responder([author], samples=2)("Name a bird.", Kind.PAIR)


def test_closing_a_writer_does_not_fail_where_its_thread_takes_the_last_item_first(django_ready, monkeypatch):
    from palm_rlhf_pytorch.feedback.live import Writer

    writer = Writer(lambda prompt, kind: [])
    monkeypatch.setattr(writer._waiting, "empty", lambda: False)  # as it was before the thread took what there was
    writer.close()
    assert not writer._thread.is_alive()
