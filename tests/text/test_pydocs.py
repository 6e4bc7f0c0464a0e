"""English prose out of the Python installation."""

import sys

import pytest

from palm_rlhf_pytorch.text import pydocs
from palm_rlhf_pytorch.text.pydocs import prose_paragraphs, python_documentation

SOURCE = '''"""The first paragraph is split
over two lines of the source."""

import module_that_does_not_exist

raise RuntimeError("this file must not be executed")


class Thing:
    """A thing with a long enough sentence to be kept."""

    def method(self):
        """Return nothing at all, and take some time over it.

        The first paragraph is split over two lines of the source.
        """
'''
TOPICS = """topics = {'b': 'The first topic is long enough to be kept here.\\n', 'a': 'Short.'}"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of four files."""
    files = {
        "zeta.py": SOURCE,
        "broken.py": "def (:\n",
        "test/test_zeta.py": '"""Documentation of a test is no documentation for anyone."""',
        "pydoc_data/topics.py": TOPICS,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(pydocs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


PARAGRAPHS = [
    "The first topic is long enough to be kept here.",
    "The first paragraph is split over two lines of the source.",
    "A thing with a long enough sentence to be kept.",
    "Return nothing at all, and take some time over it.",
]


def test_documentation_is_read_and_not_executed(library):
    assert python_documentation() == PARAGRAPHS
    assert "zeta" not in sys.modules


def test_documentation_ends_before_max_bytes(library):
    size = sum(len(paragraph) + 1 for paragraph in PARAGRAPHS[:2])
    assert python_documentation(max_bytes=size) == PARAGRAPHS[:2]
    assert python_documentation(max_bytes=size - 1) == PARAGRAPHS[:1]


def test_documentation_missing_or_bad_limit_raises(library):
    with pytest.raises(ValueError, match=r"max_bytes \(0\)"):
        python_documentation(max_bytes=0)
    for path in library.rglob("*.py"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no documentation"):
        python_documentation()


def test_prose_drops_code_tables_and_markup_lines():
    text = """Summary of the thing that now follows here.
==========================================

The `module` has a :class:`~package.Thing` and a "value" with *stress* on ``it``.

    >>> print("This looks like a sentence for a while.")
    This is the output and it would look like prose.

.. note:: This directive is dropped with everything in its line.

* An item of a list that runs on
  over a second line of text.

name    meaning    default value of the thing
----    -------    ------------------------

keyword: the first letter of this paragraph is small.

    Indented prose under a heading reads just as well.

This one has an accent, naïve as it may be, and is not ASCII.
"""
    assert prose_paragraphs(text) == [
        "Summary of the thing that now follows here.",
        "The module has a package.Thing and a value with stress on it.",
        "An item of a list that runs on over a second line of text.",
        "Indented prose under a heading reads just as well.",
    ]


def test_this_installation_gives_prose_twice_alike():
    paragraphs = python_documentation(max_bytes=100_000)
    assert paragraphs == python_documentation(max_bytes=100_000)
    assert len(set(paragraphs)) == len(paragraphs)
    assert 90_000 < sum(len(paragraph) + 1 for paragraph in paragraphs) <= 100_000
    for paragraph in paragraphs:
        assert paragraph.isascii() and paragraph.isprintable() and "  " not in paragraph and len(paragraph) >= 40
