"""A whole page: its policy allows inline styles and nothing else, and texts stay texts."""

from html.parser import HTMLParser

from palm_rlhf_pytorch.training.page import document, table


class Tags(HTMLParser):
    """Tags with their attributes, in order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_policy_stands_before_what_it_is_about():
    tags = Tags(document("a<b>", table(["n"], [["<script>"]]), style="p { color: red; }")).found
    names = [tag for tag, _ in tags]
    (policy,) = (told["content"] for tag, told in tags if told.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert names.index("meta") < names.index("style") and "script" not in names and "b" not in names
    assert not any(name.startswith("on") for _, told in tags for name in told)  # nor handlers: they would not run
