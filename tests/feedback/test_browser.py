"""The pages in headless Chromium: without page loads, by keys, without JavaScript, on a phone, for everybody."""

import threading
import time

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")

from tests.feedback.browsers import axe_violations, browser, complaints, log_in, wait_for

PAGES = ("/", "/projects/birds/", "/projects/frogs/", "/projects/newts/", "/projects/birds/instructions/",
         "/projects/birds/statistics/", "/projects/empty/", "/nothing")  # fmt: skip


@pytest.fixture
def address(database):
    """Address of a server in this process."""
    from palm_rlhf_pytorch.feedback.server import make_server

    server = make_server("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.effective_port}"
    server.task_dispatcher.shutdown()
    server.close()


@pytest.fixture
def models(database):
    from palm_rlhf_pytorch.feedback import models

    return models


@pytest.fixture
def three_projects(make_project, people):
    """A project of each kind, and judgements that give the statistics something to draw."""
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import Answer, submit
    from palm_rlhf_pytorch.feedback.models import Completion

    anna, ben = people("anna", "ben")
    rules = {"rules": ["is rude"], "instructions": "Be fair.\nTake your time.", "required": 2}
    birds = make_project(items=30, **rules)
    make_project(items=5, name="frogs", kind=2, completions=3, rules=["lies"])
    make_project(items=5, name="newts", kind=3, completions=4)
    make_project(items=0, name="empty")
    Completion.objects.filter(place=1).update(score=0.5, text="A much longer answer. " * 60)
    Completion.objects.filter(place=0).update(score=0.1)
    for user in (anna, ben):
        for number in range(25):
            words = ({"is rude": "no"}, {"is rude": "unsure"})
            submit(claim(birds, user).pk, user, Answer(choice=number % 7 - 3, rules=words))


def press(opened, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(opened).send_keys(key).perform()


def shown(opened):
    """The assignment on the page."""
    return int(opened.find_element("css selector", "#judgement [name=assignment]").get_attribute("value"))


def next_item(opened, before):
    """Wait until another item is shown, and takes answers: quick second presses are not taken for any."""
    found = wait_for(opened, lambda: shown(opened) if shown(opened) != before else None)
    time.sleep(0.35)
    return found


def test_two_people_get_different_items_and_a_reload_resumes(address, make_project, people, models):
    make_project(items=4)
    people("anna", "ben")
    with browser() as one, browser() as other:
        for opened, name in ((one, "anna"), (other, "ben")):
            log_in(opened, address, name)
            opened.get(address + "/projects/birds/")
        first, second = shown(one), shown(other)
        items = {models.Assignment.objects.get(pk=pk).item_id for pk in (first, second)}
        assert len(items) == 2
        one.refresh()
        assert shown(one) == first


@pytest.mark.parametrize("htmx", [True, False])
def test_keys_judge_without_a_page_load_and_not_while_a_note_is_typed(address, make_project, people, models, htmx):
    make_project(items=6)
    people("anna")
    with browser() as opened:
        if not htmx:  # the control: all of it works, and each key loads a page
            opened.execute_cdp_cmd("Network.enable", {})
            opened.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*htmx*.js*"]})
        log_in(opened, address, "anna")
        opened.get(address + "/projects/birds/")
        begun = opened.execute_script("return performance.timeOrigin")
        first = shown(opened)
        press(opened, "2")
        second = next_item(opened, first)
        assert opened.execute_script("return document.activeElement.tagName") == "H1"
        press(opened, "n")
        note = wait_for(opened, lambda: opened.switch_to.active_element)
        assert note.get_attribute("id") == "note"
        press(opened, "4 s u")
        assert (note.get_attribute("value"), shown(opened)) == ("4 s u", second)
        press(opened, "\ue00c")  # Escape
        press(opened, "4")
        third = next_item(opened, second)
        press(opened, "u")
        assert next_item(opened, third) == second
        assert opened.find_element("id", "note").get_attribute("value") == "4 s u"
        press(opened, "b")
        third = next_item(opened, second)
        press(opened, "s")
        wait_for(opened, lambda: opened.switch_to.active_element.get_attribute("id") == "reason")
        press(opened, "7 is not a choice here\ue007")  # Enter
        next_item(opened, third)
        loads = opened.execute_script("return performance.timeOrigin") != begun
        assert loads is not htmx
        assert not [line for line in complaints(opened) if "ERR_BLOCKED_BY_CLIENT" not in line]
    judged = models.Judgement.objects.order_by("pk")
    assert [(one.choice, one.note) for one in judged] == [(-2, ""), (None, "4 s u")]
    assert models.Assignment.objects.get(pk=third).reason == "7 is not a choice here"


def test_responses_are_rated_and_ordered_by_keys(address, three_projects, models):
    with browser() as opened:
        log_in(opened, address, "anna")
        opened.get(address + "/projects/frogs/")
        first = shown(opened)
        press(opened, "5")
        press(opened, "1")
        press(opened, "\ue007")
        wait_for(opened, lambda: "missing: C" in opened.find_element("id", "wrong").text)
        assert shown(opened) == first
        press(opened, "3")
        press(opened, "\ue007")
        next_item(opened, first)
        opened.get(address + "/projects/newts/")
        first = shown(opened)
        press(opened, "4")
        wait_for(opened, lambda: opened.find_elements("css selector", ".order h2")[2].text.endswith("D"))
        assert "up" in opened.switch_to.active_element.text
        opened.switch_to.active_element.click()
        wait_for(opened, lambda: opened.find_elements("css selector", ".order h2")[1].text.endswith("D"))
        opened.find_element("css selector", "[value='1 out']").send_keys("\ue007")
        wait_for(opened, lambda: opened.find_elements("css selector", ".response.out h2")[0].text.endswith("B"))
        assert opened.switch_to.active_element.get_attribute("value") == "2 out"  # what took its place
        opened.find_element("css selector", "button.submit").click()
        next_item(opened, first)
        assert "/projects/newts/" == opened.current_url.removeprefix(address)
    rated, ranked = models.Judgement.objects.order_by("-pk")[:2][::-1]
    assert [rated.ratings[str(pk)] for pk in rated.assignment.order] == [5, 1, 3]
    assert [ranked.assignment.order.index(pk) for pk in ranked.ranking] == [0, 3, 2]


def test_the_second_of_two_quick_presses_or_clicks_judges_nothing(address, make_project, people, models):
    make_project(items=5)
    people("anna")
    with browser() as opened:
        log_in(opened, address, "anna")
        opened.get(address + "/projects/birds/")
        first = shown(opened)
        # a press while the first is on its way, and one just after the next item has come
        opened.execute_script(
            "const press = () => document.querySelector('[data-key=\"1\"]').click();"
            "document.addEventListener('htmx:afterSwap', () => setTimeout(press, 50), {once: true}); press(); press();"
        )
        second = next_item(opened, first)
        # the second click of a double click
        opened.execute_script(
            "const click = new MouseEvent('click', {detail: 2, bubbles: true, cancelable: true});"
            "document.querySelector('[data-key=\"2\"]').dispatchEvent(click)"
        )
        press(opened, "7")
        next_item(opened, second)
    assert [one.choice for one in models.Judgement.objects.order_by("pk")] == [-3, 3]


def test_markup_in_an_answer_stays_text(address, make_project, people, models):
    make_project(items=1)
    people("anna")
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"><h1>big</h1>"
    models.Completion.objects.update(text=evil)
    with browser() as opened:
        log_in(opened, address, "anna")
        opened.get(address + "/projects/birds/")
        assert evil in [text.text for text in opened.find_elements("css selector", ".response .text")]
        assert "taken" not in opened.title and len(opened.find_elements("tag name", "h1")) == 1
        assert not complaints(opened)


def test_without_javascript_every_kind_is_judged_by_plain_forms(address, three_projects, models):
    before = models.Judgement.objects.count()
    with browser(script=False, width=390) as opened:
        log_in(opened, address, "anna")
        opened.get(address + "/projects/birds/")
        first = shown(opened)
        opened.find_element("css selector", "[name=choice][value='3']").click()
        second = next_item(opened, first)
        opened.find_element("css selector", ".up summary").click()
        opened.find_element("css selector", "[name=preset]").click()
        next_item(opened, second)
        opened.find_element("css selector", "[data-key=u]").click()
        assert next_item(opened, -1) == second
        opened.find_element("css selector", "[value=bad]").click()
        next_item(opened, second)
        opened.get(address + "/projects/newts/")
        assert opened.execute_script("return typeof htmx") == "undefined"
        button = opened.find_element("css selector", "[value='3 up']")
        opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        wait_for(opened, lambda: opened.find_elements("css selector", ".order h2")[2].text.endswith("D"))
        opened.find_element("css selector", "button.submit").click()
        wait_for(opened, lambda: models.Judgement.objects.count() == before + 3)


def test_a_server_that_is_away_is_said_and_what_is_sent_again_counts(address, make_project, people, models):
    make_project(items=2)
    people("anna")
    with browser() as opened:
        log_in(opened, address, "anna")
        opened.get(address + "/projects/birds/")
        first = shown(opened)
        opened.execute_cdp_cmd("Network.enable", {})
        away = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        opened.execute_cdp_cmd("Network.emulateNetworkConditions", away)
        press(opened, "6")
        wait_for(opened, lambda: opened.find_element("id", "offline").is_displayed())
        assert shown(opened) == first and not models.Judgement.objects.exists()
        opened.execute_cdp_cmd("Network.emulateNetworkConditions", away | {"offline": False})
        press(opened, "6")
        next_item(opened, first)
        assert not opened.find_element("id", "offline").is_displayed()
    assert models.Judgement.objects.get().choice == 2


@pytest.mark.slow
@pytest.mark.parametrize(("dark", "width"), [(False, 1280), (True, 1280), (False, 390)])
def test_axe_finds_nothing_and_no_page_scrolls_sideways(address, three_projects, dark, width):
    with browser(width=width, height=844, dark=dark) as opened:
        opened.get(address + "/login/")
        found = {"/login/": axe_violations(opened)}
        log_in(opened, address, "anna")
        for page in PAGES:
            opened.get(address + page)
            assert opened.execute_script("return document.documentElement.scrollWidth") <= width, page
            found[page] = axe_violations(opened)
        opened.get(address + "/projects/birds/")
        for summary in opened.find_elements("css selector", ".quiet summary, .up summary"):
            opened.execute_script("arguments[0].parentElement.open = true", summary)
        found["opened"] = axe_violations(opened)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        assert not [line for line in complaints(opened) if "404" not in line]
        opened.execute_script("document.querySelector('h1').innerHTML = '<img src=/static/palm_feedback/icon.svg>'")
        assert "image-alt" in str(axe_violations(opened))  # the control
    assert not {page: lines for page, lines in found.items() if lines}
