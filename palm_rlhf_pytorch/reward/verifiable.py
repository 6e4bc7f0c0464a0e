"""Rewards that can be checked: the right answer, the right form, a pattern, a length, arithmetic that comes out.

    solved = text_judge(each(right_answer({"12+7=": "19"}, read=number_of)), tokenizer)
    solved = text_judge(each(right_answer(gsm8k_answers)), tokenizer)  # prompt -> "... #### 72"

Each is a function of one prompt and one response (`each` makes a judge's of it), of texts; those of length read ids as
well. A response that says nothing readable scores 0, for that is the model's mistake; a prompt without an answer, or
without a sum to work out, is the user's, and an error.
Cobbe et al., "Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168 (the form of answers)
"""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from palm_rlhf_pytorch.reward.expression import evaluate, numbers_of

Check = Callable[[str, str], float]  # prompt, response -> score
LengthCheck = Callable[[Any, Any], float]  # the same, of texts or of ids
Read = Callable[[str], object]  # what a text says, or None; compared by ==

# Digits are bounded and ASCII: int() takes "٤٢", and takes seconds over a million digits. What a digit follows directly
# is part of something else: a date, a version, a time.
_NUMBER = re.compile(
    r"[\s:=*_]{0,8}(?P<before>[-+−$€£ ]{0,4})"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]{1,40})?(?P<part>\.[0-9]{1,40})?(?:\s?/\s?(?P<under>[0-9]{1,40}))?"
    r"(?![0-9]|[.,:/^*+\-−×xX][0-9]|[eE][-+]?[0-9])"
)
_SUM = re.compile(r"[0-9(+\-−.][0-9.+\-−*×⋅/÷%() \t]{0,400}")
_JOINED = re.compile(r"[0-9)] ?[+\-−*×⋅/÷%]")


def right_answer(answers: Mapping[str, str | int | float], *, read: Read | None = None) -> Check:
    """1 where the response's answer equals that of its prompt, else 0.

    Args:
        answers: by prompt; blanks around a prompt do not matter. A worked solution as in GSM8K, or the answer alone.
        read: what a text says, of a response and of an answer alike, None if nothing; `final_answer` by default. See
            also `number_of`, `tagged` and `words_of`.

    Raises:
        ValueError: if an answer cannot be read, or two prompts differ in blanks alone. The check: if it is asked about
            a prompt without an answer.
    """
    reader = final_answer if read is None else read
    known: dict[str, object] = {}
    for prompt, answer in answers.items():
        said = reader(str(answer))
        if said is None and read is None:
            said = number_of(str(answer))
        if said is None:
            raise ValueError(
                f"answers holds {answer!r} for the prompt {prompt[:80]!r}, in which `read` finds no answer"
            )
        if known.setdefault(prompt.strip(), said) != said:
            raise ValueError(
                f"answers holds two answers for the prompt {prompt[:80]!r}: {known[prompt.strip()]}, {said}"
            )

    def check(prompt: str, response: str) -> float:
        if prompt.strip() not in known:
            raise ValueError(f"answers ({len(known)} of them) holds none for the prompt {prompt[:80]!r}: add it")
        return float(reader(response) == known[prompt.strip()])

    return check


def final_answer(text: str) -> Fraction | None:
    """The number after the last "####", as GSM8K writes answers; None where there is none.

    Of several only the last counts, so that guessing twice gains nothing.
    """
    _, marker, answer = text.rpartition("####")
    return number_of(answer) if marker else None


def number_of(text: str) -> Fraction | None:
    """The number a text begins with, exactly: "$1,234.50 in all" is 2469/2; None where it begins with another thing.

    Read are thousands separators, one sign, currency signs, decimals, a fraction like 3/4, and any unit behind.
    Not read are numbers of more than 40 digits, digits of other scripts, powers of ten, and what goes on as another
    kind of thing: 12:30, 1.2.3, 1,23, 6*7.
    """
    found = _NUMBER.match(text.lstrip())
    if found is None or not (found["whole"] or found["part"]):
        return None
    under = int(found["under"] or 1)
    signs = found["before"].count("-") + found["before"].count("−") + found["before"].count("+")
    if under == 0 or signs > 1:
        return None
    number = Fraction(f"{(found['whole'] or '0').replace(',', '')}{found['part'] or ''}") / under
    return -number if "-" in found["before"] or "−" in found["before"] else number


def words_of(text: str) -> str | None:
    """A text without regard to case, blanks and the full stop at its end; None if nothing is left."""
    return " ".join(text.casefold().split()).rstrip(".") or None


def tagged(name: str, read: Read = words_of) -> Read:
    """Reads what stands between <name> and </name>, the last time they do; a text without a pair says nothing."""

    def inside(text: str) -> object:
        before, closing, _ = text.rpartition(f"</{name}>")
        _, opening, content = before.rpartition(f"<{name}>")
        return read(content) if opening and closing else None

    return inside


def in_tags(*names: str) -> Check:
    """1 where the response is <a>...</a><b>...</b> and nothing else but blanks, each tag once, in this order; else 0.

    Raises:
        ValueError: if no name is given, or one twice.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names ({list(names)}) must be at least one, none of them twice")
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]

    def check(prompt: str, response: str) -> float:
        if any(response.count(tag) != 1 for tag in tags):
            return 0.0
        places = [response.index(tag) for tag in tags]
        ends = [place + len(tag) for place, tag in zip(places, tags, strict=True)]
        between = [response[: places[0]], response[ends[-1] :]]
        between += [response[end:start] for end, start in zip(ends[1:-1:2], places[2::2], strict=True)]
        return float(places == sorted(places) and not any(part.strip() for part in between))

    return check


def near_length(target: int, *, spread: int, measure: Callable[[Any], int] = len) -> LengthCheck:
    """1 at a length, falling evenly to 0 at `spread` from it on either side: max(0, 1 - |length - target| / spread).

    Args:
        target: the best length, in characters of a text, in tokens for a judge of ids.
        spread: how far off scores nothing.
        measure: another length, such as `lambda text: len(text.split())` for words.

    Raises:
        ValueError: if target is below 0, or spread is below 1.
    """
    if target < 0 or spread < 1:
        raise ValueError(f"target ({target}) must be 0 or above, spread ({spread}) at least 1")
    return lambda prompt, response: max(0.0, 1 - abs(measure(response) - target) / spread)


def at_most(limit: int, *, slack: int = 0, measure: Callable[[Any], int] = len) -> LengthCheck:
    """1 up to a length, then falling evenly to 0, which it reaches `slack` + 1 beyond; arguments as in `near_length`.

    Raises:
        ValueError: if limit or slack is below 0.
    """
    if limit < 0 or slack < 0:
        raise ValueError(f"limit ({limit}) and slack ({slack}) must be 0 or above")
    return lambda prompt, response: min(1.0, max(0.0, 1 - (measure(response) - limit) / (slack + 1)))


def works_out(question: Callable[[str], str] | None = None, *, read: Read = number_of) -> Check:
    """1 where the response says what the prompt's own expression comes to, else 0: "what is 3*(4+5)?" and "27".

    Args:
        question: the expression in a prompt; `sum_in` by default.
        read: the number in a response; `final_answer` where it has to stand behind "####".

    Raises:
        ValueError: the check, if a prompt's expression cannot be evaluated.
    """

    def check(prompt: str, response: str) -> float:
        try:
            right = evaluate((question or sum_in)(prompt))
        except ValueError as error:
            error.add_note(f"in the prompt {prompt[:80]!r}")
            raise
        return float(read(response) == right)

    return check


def sum_in(text: str) -> str:
    """The longest piece of arithmetic in a text: "3*(4+5)" of "what is 3*(4+5)?".

    Raises:
        ValueError: if there is no digit in it.
    """
    found = [piece.strip() for piece in _SUM.findall(text) if re.search("[0-9]", piece)]
    if not found:
        raise ValueError(f"no arithmetic in {text[:80]!r}")
    # a year or a page is longer than a small sum
    return max(found, key=lambda piece: (bool(_JOINED.search(piece)), len(piece))).rstrip(". \t")


class Task(NamedTuple):
    """Numbers to use once each, none below 0, and what they are to come to."""

    numbers: Sequence[int]
    target: int


def reaches_target(tasks: Mapping[str, Task], *, expression: Read = str.strip, tried: float = 0.0) -> Check:
    """1 for an expression that uses each of its prompt's numbers once and comes to its target ("countdown").

    Args:
        tasks: by prompt; blanks around a prompt do not matter.
        expression: the expression in a response; all of it by default. See `tagged`. "=" ends it.
        tried: score of an expression of the right numbers that comes to something else.

    Raises:
        ValueError: if tried is not between 0 and 1, or numbers are missing or below 0. The check: if it is asked about
            a prompt without a task.
    """
    if not 0 <= tried < 1:
        raise ValueError(f"tried ({tried}) must be at least 0 and below 1")
    for prompt, task in tasks.items():
        if not task.numbers or min(task.numbers) < 0:
            raise ValueError(
                f"tasks holds the numbers {list(task.numbers)} for {prompt[:80]!r}: give some, none below 0"
            )
    known = {prompt.strip(): task for prompt, task in tasks.items()}

    def check(prompt: str, response: str) -> float:
        task = known.get(prompt.strip())
        if task is None:
            raise ValueError(f"tasks ({len(known)} of them) holds none for the prompt {prompt[:80]!r}: add it")
        written = str(expression(response) or "").partition("=")[0]
        try:
            used, value = numbers_of(written), evaluate(written)
        except ValueError:
            return 0.0
        if Counter(used) != Counter(map(Fraction, task.numbers)):
            return 0.0
        return 1.0 if value == task.target else tried

    return check


def matches(pattern: str, *, timeout: float = 1.0) -> Callable[[list[str], list[str]], list[float | None]]:
    """1 where a regular expression is found in the response, else 0; of whole batches, without `each`.

    A pattern like (a+)+$ can take years over forty characters, and a thread cannot be stopped. So a process of its own,
    started for each batch, does the search, and is killed over a response that takes too long; that response has no
    score (None), as with any judge that fails: a few are left out, many stop a run.

    Args:
        pattern: as for re.search; its flags stand in it, (?is)...
        timeout: seconds that one response may take.

    Raises:
        ValueError: if pattern is no regular expression, or timeout is not above 0.
    """
    if not timeout > 0:
        raise ValueError(f"timeout ({timeout}) must be above 0 seconds")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern ({pattern!r}) is no regular expression: {error}") from error

    def check(prompts: list[str], responses: list[str]) -> list[float | None]:
        scores: list[float | None] = []
        while len(scores) < len(responses):
            found = _searched(pattern, responses[len(scores) :], timeout)
            scores += [float(mark == "1") for mark in found]
            if len(scores) < len(responses):
                scores.append(None)  # the one it was killed over
        return scores

    return check


# Reads [pattern, seconds, texts], and writes 1 or 0 for each text. An alarm, which no one catches, ends it.
_SEARCH = """
import json, re, signal, sys
pattern, seconds, texts = json.load(sys.stdin)
search = re.compile(pattern).search
for text in texts:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    found = search(text)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(int(found is not None), end="", flush=True)
"""


def _searched(pattern: str, responses: list[str], timeout: float) -> str:
    """A mark for each response, 1 or 0, as far as the process that searches them got in time."""
    task = json.dumps([pattern, timeout, responses])
    done = subprocess.run([sys.executable, "-I", "-S", "-c", _SEARCH], input=task, capture_output=True, text=True)
    if done.returncode not in (0, -signal.SIGALRM):
        raise RuntimeError(f"searching for {pattern!r} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout
