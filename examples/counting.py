"""The task of the examples: to count from one number to another. A rule says who is right: every claim can be checked.

It knows questions, what a careless teacher answers, and the rule; no model.
"""

import argparse
import random
import re
from difflib import SequenceMatcher
from pathlib import Path

LARGEST, SPANS = 30, (2, 3, 4, 5)
MAX_NEW_TOKENS = 24  # bytes of an answer


def options(doc):
    """The command line of every example: what its docstring says, --quick and --out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds: shows that it runs, not how well")
    parser.add_argument("--out", type=Path, default=Path("example-run"), help="folder that the examples share")
    return parser


def questions(*, held_out):
    """Four fifths of all questions to be judged on, or the fifth on which no answer is ever judged."""
    numbers = range(LARGEST + 1)
    pairs = [(start, end) for start in numbers for end in numbers if abs(start - end) in SPANS]
    random.Random(0).shuffle(pairs)
    cut = len(pairs) // 5
    return [f"From {start} to {end}?" for start, end in (pairs[:cut] if held_out else pairs[cut:])]


def asked(question):
    """A question as a dialogue puts it; the answer begins with the space behind it."""
    return f"\n\nHuman: {question}\n\nAssistant:"


def wanted(question):
    """The right answer."""
    start, end = map(int, re.findall(r"\d+", question))
    step = 1 if end > start else -1
    return " ".join(map(str, range(start, end + step, step)))


def careless(question, chance):
    """A teacher's answer: half of them leave out a number or go on for one too many."""
    numbers = wanted(question).split()
    if chance.random() < 0.25:
        del numbers[chance.randrange(1, len(numbers))]
    elif chance.random() < 1 / 3:
        numbers.append(str(2 * int(numbers[-1]) - int(numbers[-2])) if int(numbers[-1]) else "0")
    return " ".join(numbers)


def rule(prompt, answer):
    """From 0 to 1: how much of the right answer it is, by its numbers and by its characters."""
    right, said = wanted(prompt), answer.strip()
    pairs = ((right.split(), said.split()), (right, said))
    return sum(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs) / 2


def share_right(prompts, answers):
    """Share of the answers that are right."""
    return sum(rule(*pair) == 1 for pair in zip(prompts, answers, strict=True)) / len(prompts)
