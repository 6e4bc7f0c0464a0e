"""English prose that every machine has: the documentation of the Python installation it runs under.

Docstrings of the standard library's modules and the help topics of `pydoc`, read from their source files with `ast`:
nothing is imported, executed or downloaded. It knows no tensors and no tokens.
"""

import ast
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
MIN_LENGTH = 40
MIN_LETTER_RATIO = 0.85
MIN_WORD_RATIO = 0.8
SENTENCE_ENDS = (".", "!", "?")

BULLET = re.compile(r"(?:[*+-]|\(?(?:\d+|[a-z])[.)])\s+(?=\S)")
ROLE = re.compile(r":[a-z:]+:`~?!?([^`<]+?)(?:\s*<[^`>]*>)?`")
QUOTED_WORD = re.compile(r"\"([^\"\s]+)\"|``?([^`]+?)``?|\*\*?(\w[^*]*)\*\*?")
PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z]+(?:['-][A-Za-z]+)*[)\"']*[.,;:!?]*[)\"']*")


def python_documentation(*, max_bytes: int = 2_000_000) -> list[str]:
    """Paragraphs of plain English from the standard library's documentation.

    Each paragraph is one line of ASCII: whitespace joined, markup removed, at least 40 characters that begin with a
    capital, end a sentence and are letters and spaces to 85 %. No paragraph occurs twice. Files are taken in the
    order of their paths, so two runs under one installation give the same list.

    Args:
        max_bytes: the list ends before the paragraph that would exceed it, counting one newline for each.

    Returns:
        The paragraphs; within a file, a module's and its classes' before those of methods.

    Raises:
        ValueError: if max_bytes is not positive.
        FileNotFoundError: if the installation holds no documentation (a standard library without sources).
    """
    if max_bytes < 1:
        raise ValueError(f"max_bytes ({max_bytes}) must be positive")
    root = Path(sysconfig.get_paths()["stdlib"])
    kept: dict[str, None] = {}
    size = 0
    for path in _source_files(root):
        for text in _documentation(path):
            for paragraph in prose_paragraphs(text):
                if paragraph in kept:
                    continue
                size += len(paragraph) + 1
                if size > max_bytes:
                    return list(kept)
                kept[paragraph] = None
    if not kept:
        raise FileNotFoundError(f"no documentation in Python sources under {root}; pass text files of your own instead")
    return list(kept)


def prose_paragraphs(text: str) -> list[str]:
    """Paragraphs of a documentation string that read as prose, each on one line.

    Code, doctests, tables, underlines and reST directives fall out, because their lines do not make sentences.
    """
    paragraphs = (_without_markup(" ".join(lines)) for lines in _blocks(text))
    return [paragraph for paragraph in paragraphs if _is_prose(paragraph)]


def _source_files(root: Path) -> list[Path]:
    files = (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _documentation(path: Path) -> Iterator[str]:
    """Documentation strings of one source file, in its order; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            # old modules hold invalid escape sequences, of which the user is not the author
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    if path.parent.name == "pydoc_data":
        yield from _topics(tree)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                yield docstring


def _topics(tree: ast.Module) -> Iterator[str]:
    """Texts of `pydoc_data/topics.py`, one dictionary literal from the topic's name to its help."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield inspect.cleandoc(value.value)


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of lines of one indentation, between blank lines and underlines; a bullet's marker is removed."""
    block: list[str] = []
    indent = 0
    for line in text.expandtabs().splitlines():
        content = line.strip() if any(map(str.isalnum, line)) else ""
        bullet = BULLET.match(content)
        margin = len(line) - len(line.lstrip()) + (bullet.end() if bullet else 0)
        if block and (not content or bullet or margin != indent):
            yield block
            block = []
        if content:
            block.append(content[bullet.end() :] if bullet else content)
            indent = margin
    if block:
        yield block


def _without_markup(paragraph: str) -> str:
    paragraph = ROLE.sub(r"\1", paragraph)
    paragraph = QUOTED_WORD.sub(lambda match: next(group for group in match.groups() if group is not None), paragraph)
    return " ".join(paragraph.split())


def _is_prose(paragraph: str) -> bool:
    if len(paragraph) < MIN_LENGTH or not paragraph.isascii() or not paragraph.isprintable():
        return False
    if not paragraph[0].isupper() or not paragraph.endswith(SENTENCE_ENDS) or paragraph.endswith(".."):
        return False
    if any(mark in paragraph for mark in (">>>", "::", "http:", "https:", "->", " = ", "==", "\\", "|")):
        return False
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    words = paragraph.split()
    plain = sum(PLAIN_WORD.fullmatch(word) is not None for word in words)
    return letters >= MIN_LETTER_RATIO * len(paragraph) and plain >= MIN_WORD_RATIO * len(words)
