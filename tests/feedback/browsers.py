"""Headless Chromium for tests: skipped where it is not installed; fails on what its console reports."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.feedback.conftest import PASSWORD

AXE = os.environ.get("PALM_TEST_AXE", "")  # path of axe.min.js; .ci/run fetches it, and it is never shipped


@contextmanager
def browser(*, width: int = 1280, height: int = 860, dark: bool = False, script: bool = True) -> Iterator[Any]:
    """A browser of its own, with its own cookies."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    if not script:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    opened = selenium.Chrome(service=Service(driver), options=options)
    try:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        yield opened
    finally:
        opened.quit()


def log_in(opened: Any, address: str, name: str) -> None:
    """Log in as a person would."""
    opened.get(address + "/login/")
    for field, text in (("username", name), ("password", PASSWORD)):
        opened.find_element("name", field).send_keys(text)
    opened.find_element("css selector", "main button").click()
    wait_for(opened, lambda: not opened.current_url.endswith("/login/"))


def wait_for(opened: Any, ready: Any) -> Any:
    """What `ready` gives once it is true; elements that a swap took away meanwhile are looked for again."""
    from selenium.common.exceptions import (
        JavascriptException,
        NoSuchElementException,
        StaleElementReferenceException,
        WebDriverException,
    )
    from selenium.webdriver.support.wait import WebDriverWait

    def found(_: Any) -> Any:
        try:
            return ready()
        except WebDriverException as error:  # chromedriver's other word for a stale element
            if "does not belong to the document" in str(error):
                return None
            raise

    passing = [StaleElementReferenceException, NoSuchElementException, JavascriptException, IndexError]
    return WebDriverWait(opened, 20, poll_frequency=0.05, ignored_exceptions=passing).until(found)


def complaints(opened: Any) -> list[str]:
    """What the console holds."""
    return [entry["message"] for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def axe_violations(opened: Any) -> list[str]:
    """What axe finds against WCAG 2.0 to 2.2, A and AA, and its best practices."""
    if not AXE:
        pytest.skip("PALM_TEST_AXE names no axe.min.js (npm pack axe-core@4.14.1)")
    opened.execute_cdp_cmd("Runtime.evaluate", {"expression": Path(AXE).read_text(encoding="utf-8")})
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = opened.execute_async_script(
        "const done = arguments[1]; axe.run({runOnly: arguments[0]}).then(done, (error) => done({failed: `${error}`}))",
        tags,
    )
    assert "violations" in found, found
    return [f"{rule['id']}: {node['html'][:200]}" for rule in found["violations"] for node in rule["nodes"]]
