"""The demo's text and its judge: documentation of the Python installation, prompts from it, and a gold score.

The gold judge stands for a person whose taste can be seen in the text: real words, not repeated in a loop. It is a
plain Python function; the reward model never sees it, only the pairs it labels.
"""

import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
EDGES = ".,;:!?\"'()"
MEMORY = 6  # pairs of words that the gold judge looks back


class DemoText(NamedTuple):
    """Documents to train on, documents held out, and the words that a reader knows."""

    train: list[str]
    held_out: list[str]
    words: frozenset[str]


def demo_text(paragraphs: Sequence[str], *, held_out: float, seed: int, document_length: int = 600) -> DemoText:
    """Join paragraphs into documents, split those at random, and collect the words that occur at least three times.

    Args:
        paragraphs: plain sentences, a paragraph each; neighbours belong together.
        held_out: share of the documents that is kept from training.
        seed: of the split.
        document_length: a document ends with the paragraph that brings it to so many characters.
    """
    documents: list[list[str]] = [[]]
    for paragraph in paragraphs:
        documents[-1].append(paragraph)
        if sum(map(len, documents[-1])) >= document_length:
            documents.append([])
    joined = ["\n".join(document) for document in documents if document]
    shuffled = random.Random(seed).sample(joined, len(joined))
    cut = round(len(shuffled) * held_out)
    counts = Counter(word for paragraph in paragraphs for word in WORD.findall(paragraph.lower()))
    words = frozenset(word for word, count in counts.items() if count >= 3 and (len(word) > 1 or word in "ai"))
    return DemoText(shuffled[cut:], shuffled[:cut], words)


def prompts_of(documents: Iterable[str], *, shortest: int, longest: int, seed: int) -> list[str]:
    """Beginnings of the documents' paragraphs, cut after a word at a random length, with the space that follows."""
    chance = random.Random(seed)
    prompts = []
    for paragraph in (paragraph for document in documents for paragraph in document.split("\n")):
        wanted = chance.randint(shortest, longest)
        end = paragraph.rfind(" ", 0, wanted + 1)
        if end >= shortest - 8 and len(paragraph) > end + 16:
            prompts.append(paragraph[: end + 1])
    return list(dict.fromkeys(prompts))


def gold_score(response: str, words: frozenset[str], *, ended: bool) -> float:
    """Share of a response's letters and marks that stand in known words, from 0 to 1.

    A word counts when the reader knows it, it does not repeat the word before it, and the two were no pair among the
    last few. Length does not enter: it is a share, and what a word is worth depends on its neighbours alone. A last
    word that the length limit cut is left out.

    Args:
        response: text after the prompt.
        words: known words, in lower case.
        ended: the response came to its own end.
    """
    pieces = response.split()
    if not ended and pieces and not response[-1].isspace():
        pieces = pieces[:-1]
    total = good = 0
    before, recent = "", deque[tuple[str, str]](maxlen=MEMORY)
    for piece in pieces:
        word = piece.strip(EDGES).lower()
        total += len(piece)
        if word in words and word != before and (before, word) not in recent:
            good += len(piece)
        recent.append((before, word))
        before = word
    return good / total if total else 0.0


def distinct_2(responses: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all pairs, in all responses together; 0 where there is no pair.

    Li et al., "A Diversity-Promoting Objective Function", https://arxiv.org/abs/1510.03055
    """
    pairs = [pair for response in responses for pair in zip(response.split(), response.split()[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
