"""A person who judges pairs in the feedback app, played by a script: it logs in, reads the pages, presses the buttons.

Its taste is simple: it likes plain language, short words, and says by how much. Now and then it errs, as people do.
`8_feedback.md` shows it at work; in earnest people take its place, and nothing else changes.

    python feedback_judge.py http://127.0.0.1:8000 anna --password-file anna.password
"""

import argparse
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from html.parser import HTMLParser
from http.cookiejar import CookieJar
from pathlib import Path


class Page(HTMLParser):
    """What the script looks at in a page: hidden fields of its forms, each the first of its name; the responses."""

    def __init__(self, html: str) -> None:
        """Read a page."""
        super().__init__()
        self.fields, self.responses = dict[str, str](), list[str]()
        self.inside = list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note hidden fields, and where responses are."""
        given = {name: value or "" for name, value in attrs}
        if tag == "input" and given.get("type") == "hidden":
            self.fields.setdefault(given["name"], given["value"])
        if tag in ("article", "div"):
            self.inside.append(given.get("class", ""))
            if tag == "article":
                self.responses.append("")

    def handle_endtag(self, tag: str) -> None:
        """Note where they end."""
        if tag in ("article", "div"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        """Take what is said in a response."""
        if self.inside[-1:] == ["text"] and self.inside[:-1] and "response" in self.inside[-2]:
            self.responses[-1] += data


class Browser:
    """Pages by address, with cookies, as a browser without JavaScript asks for them."""

    def __init__(self, base: str) -> None:
        """Start at an address, without cookies."""
        self.base = base.rstrip("/")
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    def open(self, path: str, fields: dict[str, str] | None = None) -> Page:
        """The page that an address, or a form sent to it, ends at; waits where the server asks to."""
        data = None if fields is None else urllib.parse.urlencode(fields).encode()
        request = urllib.request.Request(self.base + path, data, {"Referer": self.base + path})
        while True:
            try:
                with self.opener.open(request, timeout=60) as answer:
                    return Page(answer.read().decode())
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503):
                    raise
                time.sleep(float(error.headers.get("Retry-After", 1)))

    def log_in(self, name: str, password: str) -> None:
        """Log in.

        Raises:
            urllib.error.HTTPError: if name and password do not go together.
        """
        page = self.open("/login/")
        self.open("/login/", page.fields | {"username": name, "password": password})


def judge_all(browser: Browser, project: str, taste: "Taste") -> Iterator[int]:
    """Judge until nothing is left; gives each choice."""
    path = f"/projects/{project}/"
    page = browser.open(path)
    while "assignment" in page.fields:
        choice = taste.choice(*page.responses)
        yield choice
        page = browser.open(path, page.fields | {"choice": str(choice)})


class Taste:
    """Likes short words."""

    def __init__(self, *, errs: float, seed: int) -> None:
        """Turn round a share `errs` of the choices."""
        self.errs, self.chance = errs, random.Random(seed)

    def choice(self, first: str, second: str) -> int:
        """-3 where the first response is much better, 0 for a tie, 3 where the second is; a step is half a letter."""
        difference = letters_per_word(first) - letters_per_word(second)
        steps = min(3, int(abs(difference) / 0.5))
        side = -1 if difference < 0 else 1
        return steps * (-side if self.chance.random() < self.errs else side)


def letters_per_word(text: str) -> float:
    """Mean length of words."""
    words = re.findall(r"\w+", text)
    return sum(map(len, words)) / max(len(words), 1)


def main() -> None:
    """Judge everything that is in the queue."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url", help="where `palm-rlhf feedback serve` listens")
    parser.add_argument("name", help="of the person, as `palm-rlhf feedback adduser` added it")
    parser.add_argument("--password-file", type=Path, required=True, help="its first line is the password")
    parser.add_argument("--project", default="feedback", help="as it stands in the address")
    parser.add_argument("--errs", type=float, default=0.05, help="share of the choices that are turned round")
    args = parser.parse_args()
    browser = Browser(args.url)
    browser.log_in(args.name, args.password_file.read_text(encoding="utf-8").splitlines()[0])
    taste = Taste(errs=args.errs, seed=sum(args.name.encode()))
    print(f"{args.name} judged {len(list(judge_all(browser, args.project, taste)))} pairs")


if __name__ == "__main__":
    main()
