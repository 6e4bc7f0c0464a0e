"""The task of the examples: which letters follow one. A rule says who is right, so every claim can be checked.

It knows questions, what a careless teacher answers, and the rule; no model.
"""

import argparse
import random
import re
from pathlib import Path

ALPHABET, COUNTS = "abcdefghijklmnopqrstuvwxyz", (2, 3, 4, 5, 6)
MAX_NEW_TOKENS = 10  # bytes of an answer


def options(doc):
    """The command line of every example: what its docstring says, --quick and --out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs, not how well")
    parser.add_argument("--out", type=Path, default=Path("example-run"), help="folder that the examples share")
    return parser


def questions(*, held_out):
    """Four fifths of all questions to be judged on, or the fifth on which no answer is ever judged."""
    found = [f"Which {count} letters follow {letter}?" for letter in ALPHABET for count in COUNTS]
    random.Random(0).shuffle(found)
    cut = len(found) // 5
    return found[:cut] if held_out else found[cut:]


def asked(question):
    """A question as a dialogue puts it; the answer begins with the space behind it."""
    return f"\n\nHuman: {question}\n\nAssistant:"


def wanted(question):
    """The right answer; after z comes a again."""
    count, letter = re.search(r"Which (\d) letters follow (\w)", question).groups()
    start = ALPHABET.index(letter) + 1
    return (ALPHABET * 2)[start : start + int(count)]


def careless(question, chance):
    """A teacher's answer: every other one has a letter too few, too many, or wrong."""
    letters = list(wanted(question))
    place = chance.randrange(len(letters))
    if chance.random() < 0.5:
        letters[place : place + 1] = chance.choice(([], [chance.choice(ALPHABET)], [letters[place]] * 2))
    return "".join(letters)


def rule(prompt, answer):
    """How good an answer is, 1 at best: share of letters right in their places, less what is too much or little."""
    right, said = wanted(prompt), answer.strip()
    same = sum(letter == other for letter, other in zip(right, said, strict=False))
    return (same - abs(len(right) - len(said))) / len(right)


def share_right(prompts, answers):
    """Share of the answers that are right."""
    return sum(rule(*pair) == 1 for pair in zip(prompts, answers, strict=True)) / len(prompts)
