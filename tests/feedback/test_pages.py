"""Pages without a browser: what each answers to right, wrong, late, foreign and hostile requests."""

import re
from datetime import timedelta

import pytest

from tests.feedback.conftest import PASSWORD

pytest.importorskip("django", reason="needs the extra [feedback]")
JUDGE = "/projects/birds/"


@pytest.fixture
def log_in(people):
    """Makes a person and gives a browser, without JavaScript, in which they are logged in."""
    from django.test import Client

    def make(name, **options):
        people(name)
        client = Client(**options)
        assert client.login(username=name, password=PASSWORD)
        return client

    return make


@pytest.fixture
def models(database):
    from palm_rlhf_pytorch.feedback import models

    return models


def held(page):
    """The assignment whose form a page shows."""
    return int(re.search(r'name="assignment" value="(\d+)"', page.content.decode())[1])


def shown_texts(page):
    return re.findall(r'<div class="text" dir="auto">(.*?)</div>', page.content.decode(), re.DOTALL)


def said(page):
    """What a page says above the item: messages and errors."""
    return " ".join(re.findall(r'<p class="notice[^>]*>(.*?)</p>', page.content.decode(), re.DOTALL))


@pytest.mark.parametrize("own_project", [False, True])
def test_nothing_but_the_login_page_answers_without_login(make_project, people, monkeypatch, own_project):
    from django.conf import settings
    from django.test import Client

    if own_project:  # of the user's, whose settings ask for no login
        monkeypatch.setattr(settings, "MIDDLEWARE", [one for one in settings.MIDDLEWARE if "LoginRequired" not in one])
    make_project()
    pages = ["/", *(JUDGE + name for name in ("", "order/", "skip/", "undo/", "instructions/", "statistics/"))]
    for page in pages:
        for answer in (Client().get(page), Client().post(page, {"assignment": 1, "choice": 1})):
            assert (answer.status_code, answer["Location"].partition("?")[0]) == (302, "/login/"), page


def test_passwords_are_not_looked_at_while_nobody_is_let_in(people, monkeypatch):
    from django.contrib.auth import forms
    from django.test import Client

    from palm_rlhf_pytorch.feedback import events

    def never(*_, **__):
        raise AssertionError("a password was checked")

    monkeypatch.setattr(events, "LOGIN_FAILURES", events.Limit(1, 60))
    people("anna")
    assert Client().post("/login/", {"username": "anna", "password": "no such herons"}).status_code == 422
    monkeypatch.setattr(forms, "authenticate", never)
    answer = Client().post("/login/", {"username": "anna", "password": "no such herons"})
    assert answer.status_code == 429 and b'value="anna"' in answer.content


def test_login_lets_in_and_holds_up_those_who_guess(people, monkeypatch):
    from django.test import Client

    from palm_rlhf_pytorch.feedback import events

    monkeypatch.setattr(events, "LOGIN_FAILURES", events.Limit(2, 60))
    people("anna")
    right, wrong = {"username": "anna", "password": PASSWORD}, {"username": "anna", "password": "no such herons"}
    client = Client()
    assert client.post("/login/?next=/projects/birds/", right | {"next": "/projects/birds/"})["Location"] == JUDGE
    assert Client().post("/login/", right | {"next": "https://evil.example/"})["Location"] == "/"
    for _ in range(2):
        answer = Client().post("/login/", wrong)
        assert answer.status_code == 422 and "do not go together" in said(answer)
    answer = Client().post("/login/", right)
    assert answer.status_code == 429 and 50 <= int(answer["Retry-After"]) <= 61
    assert "too many" in said(answer).lower() and b"no such herons" not in answer.content
    assert client.post("/logout/")["Location"] == "/login/"
    assert client.get("/").status_code == 302


def test_a_choice_is_stored_as_it_was_shown_and_the_next_item_comes(make_project, log_in, models):
    make_project(items=2, rules=["is rude", "lies"])
    client = log_in("anna")
    first = client.get(JUDGE)
    assert [int(number) for number in re.findall(r'name="choice" value="(-?\d)"', first.content.decode())] == [
        -3, -2, -1, 0, 1, 2, 3,
    ]  # fmt: skip
    form = {"assignment": held(first), "choice": -2, "note": " two\r\nlines ", "rule-1-0": "yes", "rule-1-1": "maybe"}
    answer = client.post(JUDGE, form)
    assert (answer.status_code, answer["Location"]) == (302, JUDGE)
    judgement = models.Judgement.objects.get()
    _, second = judgement.assignment.order
    assert (judgement.choice, judgement.note) == (-2, "two\nlines")
    assert judgement.rules == {str(second): {"is rude": "yes"}}
    assert held(client.get(JUDGE)) != form["assignment"]
    assert client.get(JUDGE)["Cache-Control"].startswith("max-age=0, no-cache, no-store")


def test_completions_are_shown_in_the_order_drawn_and_sources_are_not(make_project, log_in, models):
    make_project(items=1)
    client = log_in("anna")
    page = client.get(JUDGE)
    assignment = models.Assignment.objects.get()
    assert shown_texts(page)[1:] == [completion.text for completion in assignment.shown]
    models.Assignment.objects.update(order=assignment.order[::-1])
    assert shown_texts(client.get(JUDGE))[1:] == [completion.text for completion in reversed(assignment.shown)]
    assert b"source0" not in page.content and b"source1" not in page.content


def test_text_of_a_model_stays_text(make_project, log_in, models):
    make_project(items=1)
    evil = "</div><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7|add:1 }}\n  kept"
    models.Completion.objects.filter(place=1).update(text=evil)
    models.Item.objects.update(prompt=[{"role": "<b>user", "content": evil}])
    page = log_in("anna").get(JUDGE).content.decode()
    assert "<script>alert" not in page and "<img" not in page and "<b>user" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2 and "{{ 7|add:1 }}\n  kept" in page


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "Choice is missing"),
        ({"choice": "9"}, "Choice is missing"),
        ({"choice": "many"}, "Choice is missing"),
        ({"choice": "1", "note": "x" * 4001}, "4,001 characters long; 4,000 fit"),
        ({"choice": "1", "note": "a\0b"}, "null character"),
    ],
)
def test_a_wrong_form_is_shown_again_with_what_was_typed(make_project, log_in, models, form, message):
    make_project(items=1, rules=["is rude"])
    client = log_in("anna")
    number = held(client.get(JUDGE))
    answer = client.post(JUDGE, {"note": "kept", "rule-0-0": "no"} | form | {"assignment": number})
    assert answer.status_code == 422 and message in said(answer) and held(answer) == number
    assert form.get("note", "kept") in answer.content.decode()
    assert re.search(r'name="rule-0-0" value="no" checked', answer.content.decode())
    assert not models.Judgement.objects.exists()


def test_ratings_that_are_missing_are_named_and_those_given_are_kept(make_project, log_in, models):
    make_project(items=1, completions=3, kind=2)
    client = log_in("anna")
    number = held(client.get(JUDGE))
    answer = client.post(JUDGE, {"assignment": number, "rating-1": 4, "rating-2": 6})
    assert answer.status_code == 422 and "missing: A, C" in said(answer)
    assert re.findall(r'name="(rating-\d)" value="(\d)"[^>]* checked', answer.content.decode()) == [("rating-1", "4")]
    client.post(JUDGE, {"assignment": number, "rating-0": 1, "rating-1": 4, "rating-2": 5})
    judgement = models.Judgement.objects.get()
    assert [judgement.ratings[str(pk)] for pk in judgement.assignment.order] == [1, 4, 5]
    assert "closed this item" in said(client.post(JUDGE, {"assignment": number}, follow=True))


@pytest.mark.parametrize(("kind", "form"), [(1, {"choice": 1}), (2, {}), (3, {"ranking": [0, 1]})])
def test_what_is_not_written_yet_cannot_be_judged(make_project, people, log_in, models, kind, form):
    from django.contrib.auth import get_user_model

    from palm_rlhf_pytorch.feedback.claims import claim

    project, client = make_project(items=1, completions=0, kind=kind), log_in("anna")
    models.Item.objects.update(ready=False)
    waits = claim(project, get_user_model().objects.get(), live=True)
    answer = client.post(JUDGE, form | {"assignment": waits.pk}, headers={"HX-Request": "true"})
    assert answer.status_code == 200 and not models.Judgement.objects.exists()


def test_responses_move_up_down_out_and_in_and_an_untouched_order_is_asked_about(make_project, log_in, models):
    make_project(items=2, completions=4, kind=3)
    client = log_in("anna")
    number = held(client.get(JUDGE))

    def order_in(page):
        found = page.content.decode()
        return [[int(place) for place in re.findall(rf'name="{name}" value="(\d)"', found)] for name in
                ("ranking", "left")]  # fmt: skip

    form = {"assignment": number, "ranking": [0, 1, 2, 3]}
    for move, expected in (
        ("2 up", [[0, 2, 1, 3], []]),
        ("0 up", [[0, 1, 2, 3], []]),
        ("0 down", [[1, 0, 2, 3], []]),
        ("1 out", [[0, 2, 3], [1]]),
        ("nonsense", [[0, 1, 2, 3], []]),
        ("99 out", [[0, 1, 2, 3], []]),
    ):
        page = client.post(JUDGE + "order/", form | {"move": move, "note": "kept"})
        assert order_in(page) == expected, move
        assert ">\nkept</textarea>" in page.content.decode()
    assert order_in(client.post(JUDGE + "order/", form | {"ranking": [3, 0], "left": [1, 2], "move": "2 in"})) == [
        [3, 0, 2],
        [1],
    ]
    answer = client.post(JUDGE, form)
    assert answer.status_code == 422 and "submit again" in said(answer)
    assert 'name="confirmed"' in answer.content.decode()
    client.post(JUDGE, {"assignment": number, "ranking": [3, 0, 2], "left": [1], "confirmed": 1})
    judgement = models.Judgement.objects.get()
    assert [judgement.assignment.order.index(pk) for pk in judgement.ranking] == [3, 0, 2]


def test_a_form_sent_twice_counts_once_and_a_stale_one_changes_nothing(make_project, log_in, models):
    make_project(items=2)
    client = log_in("anna")
    number = held(client.get(JUDGE))
    client.post(JUDGE, {"assignment": number, "choice": 3})
    answer = client.post(JUDGE, {"assignment": number, "choice": -3}, follow=True)
    assert "the first answer counts" in said(answer)
    assert held(answer) != number
    assert "judged this item" in said(client.post(JUDGE + "skip/", {"assignment": number}, follow=True))
    assert [judgement.choice for judgement in models.Judgement.objects.all()] == [3]


@pytest.mark.parametrize("named", ["theirs", "", "x", "-1", "999999", "9" * 30])
def test_what_is_anothers_or_not_there_is_a_page_that_says_so(make_project, log_in, models, named):
    make_project(items=2)
    anna, ben = log_in("anna"), log_in("ben")
    theirs = held(anna.get(JUDGE))
    mine = held(ben.get(JUDGE))
    for page in ("", "skip/", "order/"):
        answer = ben.post(JUDGE + page, {"assignment": theirs if named == "theirs" else named, "choice": 1})
        assert answer.status_code == 404 and "do not hold this item" in answer.content.decode()
    assert not models.Judgement.objects.exists() and held(ben.get(JUDGE)) == mine


def test_a_lease_that_ran_out_says_so_and_gives_another_item(make_project, log_in, models):
    from django.utils import timezone

    make_project(items=1)
    anna, ben = log_in("anna"), log_in("ben")
    mine = held(anna.get(JUDGE))
    models.Assignment.objects.update(expires=timezone.now() - timedelta(seconds=1))
    ben.post(JUDGE, {"assignment": held(ben.get(JUDGE)), "choice": 1})
    answer = anna.post(JUDGE, {"assignment": mine, "choice": 2}, follow=True)
    assert "time for this item ran out" in said(answer) and "Nothing left" in answer.content.decode()
    assert models.Judgement.objects.get().choice == 1


def test_skip_keeps_the_reason_and_undo_brings_back_what_was_said(make_project, log_in, models):
    make_project(items=3, rules=["is rude"])
    client = log_in("anna")
    first = held(client.get(JUDGE))
    client.post(JUDGE + "skip/", {"assignment": first, "reason": "", "preset": "Not my field"})
    assert models.Assignment.objects.get(pk=first).reason == "Not my field"
    second = held(client.get(JUDGE))
    client.post(JUDGE, {"assignment": second, "choice": "bad", "note": "both <lie>", "rule-0-0": "unsure"})
    back = client.post(JUDGE + "undo/", follow=True)
    page = back.content.decode()
    assert held(back) == second and "Taken back" in said(back)
    assert "both &lt;lie&gt;</textarea>" in page
    assert re.search(r'name="rule-0-0" value="unsure" checked', page)
    assert re.search(r'value="bad"[^>]* aria-current="true"', page)
    assert "nothing to take back" in said(client.post(JUDGE + "undo/", follow=True))
    assert client.get(JUDGE + "undo/")["Location"] == JUDGE  # where a login on the way leads


def test_htmx_is_answered_by_the_next_item_at_once(make_project, log_in):
    make_project(items=2)
    client = log_in("anna")
    number = held(client.get(JUDGE))
    answer = client.post(JUDGE, {"assignment": number, "choice": 1}, headers={"HX-Request": "true"})
    assert answer.status_code == 200 and held(answer) != number


def test_a_form_without_its_token_and_one_too_large_are_refused_clearly(make_project, log_in, models):
    from django.test import Client

    make_project(items=1)
    strict = log_in("anna", enforce_csrf_checks=True)
    number = held(strict.get(JUDGE))
    for token in ({}, {"csrfmiddlewaretoken": "x" * 64}):
        answer = strict.post(JUDGE, {"assignment": number, "choice": 1} | token)
        assert answer.status_code == 403 and "open the page again" in answer.content.decode()
    client = log_in("ben")
    answer = client.post(JUDGE, {"assignment": number, "choice": 1, "note": "x" * 10_000_000})
    assert answer.status_code == 413 and "Nothing was stored" in answer.content.decode()
    assert Client().get("/login/", headers={"host": "evil.example"}).status_code == 400
    assert not models.Judgement.objects.exists()


def test_too_fast_is_said_and_nothing_typed_is_lost(make_project, log_in, monkeypatch):
    from palm_rlhf_pytorch.feedback import events

    monkeypatch.setattr(events, "JUDGEMENTS", events.Limit(1, 60))
    make_project(items=2)
    client = log_in("anna")
    client.post(JUDGE, {"assignment": held(client.get(JUDGE)), "choice": 1})
    answer = client.post(JUDGE, {"assignment": held(client.get(JUDGE)), "choice": 1, "note": "kept"})
    assert answer.status_code == 429 and answer["Retry-After"] and "kept</textarea>" in answer.content.decode()


def test_projects_are_chosen_and_their_pages_exist(make_project, log_in):
    make_project(items=1, instructions="Be <fair>.", rules=["is rude"])
    make_project(items=2, name="frogs", kind=2, completions=3)
    client = log_in("anna")
    home = client.get("/").content.decode()
    assert "/projects/birds/" in home and "/projects/frogs/" in home and "0 of 2 judgements" in home
    assert "Be &lt;fair&gt;." in client.get(JUDGE + "instructions/").content.decode()
    assert "nothing to draw yet" in client.get("/projects/frogs/statistics/").content.decode()
    for page in ("/projects/newts/", "/projects/newts/statistics/", "/newts"):
        answer = client.get(page)
        assert answer.status_code == 404 and "no such page" in answer.content.decode()
    for page in ("/", JUDGE, JUDGE + "instructions/", JUDGE + "statistics/"):
        policy = client.get(page)["Content-Security-Policy"]
        assert "script-src 'self'" in policy and "unsafe" not in policy
        assert not re.search(r"<script(?! src=)|\sstyle=|\son\w+=", client.get(page).content.decode())


def test_pages_do_not_ask_the_database_more_for_a_longer_queue(make_project, log_in, models):
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    make_project(items=1)
    project = make_project(items=0, name="frogs")
    items = [models.Item(project=project, key=f"{number:064}", prompt="What?") for number in range(500)]
    models.Item.objects.bulk_create(items)
    texts = [models.Completion(item=item, place=place, text="It is.") for item in items for place in (0, 1)]
    models.Completion.objects.bulk_create(texts)
    client = log_in("anna")
    counts = []
    for name in ("birds", "frogs"):
        with CaptureQueriesContext(
            connection,
        ) as queries:
            page = client.get(f"/projects/{name}/")
        assert page.status_code == 200 and len(page.content) < 20_000
        counts.append(len(queries))
    assert counts[0] == counts[1] < 25
