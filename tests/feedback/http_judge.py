"""A person in a browser without JavaScript: logs in, reads the forms of a page, presses its buttons."""

import http.cookiejar
import urllib.parse
import urllib.request
from html.parser import HTMLParser


class Forms(HTMLParser):
    """Hidden fields of each form of a page, by the form's address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: dict[str, dict[str, str]] = {}
        self.action = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "form":
            self.action = given.get("action") or ""
        if tag == "input" and given.get("type") == "hidden":
            self.fields.setdefault(self.action, {})[given["name"]] = given.get("value") or ""


class Judge:
    """Somebody who is logged in; `htmx` asks as a page with JavaScript does, for the next page without a redirect."""

    def __init__(self, address: str, name: str, password: str, *, htmx: bool = False) -> None:
        self.address = address
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
        self.headers: dict[str, str] = {}
        (login,) = Forms(self.open("/login/")).fields.values()
        self.open("/login/", login | {"username": name, "password": password})
        self.headers = {"HX-Request": "true"} if htmx else {}

    def open(self, path: str, fields: dict[str, str] | None = None) -> str:
        """A page, where redirects end; an HTTPError for what the server refuses, a URLError where it is gone."""
        data = None if fields is None else urllib.parse.urlencode(fields).encode()
        with self.opener.open(urllib.request.Request(self.address + path, data, self.headers), timeout=60) as answer:
            return answer.read().decode()

    def judge(self, project: str, page: str | None = None, **answer: str) -> tuple[str, str] | None:
        """Answer the item of a page, or of the project's own; gives the assignment and the next page.

        None where nothing is left. When it returns, the server has said that the answer is stored.
        """
        path = f"/projects/{project}/"
        fields = Forms(self.open(path) if page is None else page).fields.get(path)
        if fields is None:
            return None
        return fields["assignment"], self.open(path, fields | answer)
