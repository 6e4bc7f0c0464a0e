"""What to ask a person next: the pairs of responses whose judgement would teach an ensemble of reward models most.

Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", https://arxiv.org/abs/1112.5745:
most is learnt where members are sure of opposite things. A pair that all of them hold for a tie is a coin's toss to
people too, and teaches nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.labels import encode_labels, read_texts
from palm_rlhf_pytorch.text.columns import read_columns
from palm_rlhf_pytorch.text.datasets import BadRecord, Labels, read_each, source_rows, stop_at_bad_record
from palm_rlhf_pytorch.text.dialogues import FieldError
from palm_rlhf_pytorch.text.records import Label, Pair

PREFERRED = ("chosen", "rejected")
# columns that say which response is preferred, or by how much: for a question they are taken away
JUDGEMENTS = ("choice", "label", "preference", "tie", "margin", "strength", "annotator", "annotator_id", "worker",
              "worker_id", "weight")  # fmt: skip


def best_questions(
    ensemble: RewardEnsemble,
    pairs: Sequence[Pair],
    tokenizer: object,
    *,
    eos_token: int | None,
    max_length: int = 1024,
    max_tokens_per_batch: int = 8192,
    per_prompt: int | None = 1,
) -> list["Question"]:
    """Pairs by what their judgement would teach, the most first; of equals, the one nearest to an even chance.

    Args:
        ensemble: of reward models; its members should have learnt from different samples of the labels (`bootstrap`).
        pairs: to be judged; what they say of preference is not looked at.
        tokenizer: as the members were trained with, like eos_token and max_length.
        eos_token: likewise.
        max_length: likewise.
        max_tokens_per_batch: tokens of a batch, padding included.
        per_prompt: so many questions about one prompt at most, whose answers would tell much the same; None for all.

    Raises:
        ValueError: if there is no pair, or a number is out of range.
    """
    if per_prompt is not None and per_prompt < 1:
        raise ValueError(f"per_prompt ({per_prompt}) must be at least 1, or None")
    counted = [Pair(chosen=pair.chosen, rejected=pair.rejected, group=pair.group) for pair in pairs]
    encoded = encode_labels(counted, tokenizer, max_length=max_length, eos_token=eos_token)
    scores = read_texts(ensemble, ensemble.read, encoded.flat, max_tokens=max_tokens_per_batch)
    found = information(scores[:, ::2] - scores[:, 1::2])
    numbers = zip(counted, *(tensor.tolist() for tensor in found), strict=True)
    questions = [Question(pair, *told) for pair, *told in numbers]
    # what is below a millionth of a nat is rounding
    questions.sort(key=lambda question: (-round(question.gain, 6), abs(question.probability - 0.5)))
    asked: Counter[str] = Counter()
    chosen = []
    for question in questions:
        prompt = question.pair.chosen.prompt
        asked[prompt] += bool(prompt)
        if per_prompt is None or asked[prompt] <= per_prompt:
            chosen.append(question)
    return chosen


class Information(NamedTuple):
    """Of pairs, (b,) each: `gain` (nats), `probability` that the first is preferred, and the members' `deviation`.

    The deviation is that of the members' score differences, in units of log-odds.
    """

    gain: Tensor
    probability: Tensor
    deviation: Tensor


class Question(NamedTuple):
    """A pair to be judged, with what an ensemble expects of the answer; see `Information`."""

    pair: Pair
    gain: float
    probability: float
    deviation: float

    def row(self) -> dict[str, Any]:
        """Columns for a file: a person writes "a", "b" or "tie" for `choice`, and `read_labels` reads the pair."""
        first, second = self.pair.texts
        same = first.prompt == second.prompt
        texts = {"prompt": first.prompt} if same and first.prompt else {}
        texts |= {"response_a": first.response, "response_b": second.response} if same else {
            "response_a": first.prompt + first.response, "response_b": second.prompt + second.response,
        }  # fmt: skip
        group = {} if self.pair.group is None else {"group": self.pair.group}
        expected = {"gain": self.gain, "probability_a": self.probability, "deviation": self.deviation}
        return texts | group | {"choice": None, "expected": expected}


def read_questions(path: str | Path, *, on_bad_record: Callable[[BadRecord], None] = stop_at_bad_record) -> Labels:
    """Pairs of a file that `read_labels` would read once they are judged; judgements that are there are left out.

    Of chosen and rejected texts, which of them comes first is drawn by their content, so that nobody is led.

    Args:
        path: JSON lines, a JSON array, CSV or TSV, as in `read_labels`.
        on_bad_record: likewise.

    Raises:
        FileNotFoundError, ValueError: if the file is missing, of no known kind, or holds no pair.
    """
    labels = Labels()
    for read in read_each(source_rows(path), _question, on_bad_record):
        labels.rows += 1
        if isinstance(read, BadRecord):
            labels.bad.append(read)
        else:
            labels.records += read
    if not labels.records:
        raise ValueError(f"{path} holds no pair" + (f"; the first bad record: {labels.bad[0]}" if labels.bad else ""))
    return labels


def _question(columns: Mapping[str, object], line: int) -> list[Label]:
    """The pair of a row."""
    found = read_columns(_unjudged(columns), line=line).labels
    if not isinstance(found[0], Pair):
        raise FieldError("", "holds no pair; give response_a and response_b, or chosen and rejected")
    return found


def _unjudged(columns: Mapping[str, object]) -> dict[str, object]:
    """A row for `read_columns` that says nothing about which text is better."""
    row = {name: value for name, value in columns.items() if name not in JUDGEMENTS}
    texts = [row[name] for name in PREFERRED if name in row]
    if len(texts) == len(PREFERRED):
        row |= zip(PREFERRED, sorted(texts, key=_drawn), strict=True)
    return row | {"tie": True}


def _drawn(text: object) -> bytes:
    return hashlib.sha256(repr(text).encode("utf-8", "surrogatepass")).digest()


def information(differences: Tensor) -> Information:
    """What the answers about pairs would tell which member is right (BALD).

    gain = H(mean p) - mean H(p),  p = sigma(difference),  H(p) = -p log p - (1 - p) log(1 - p)

    Args:
        differences: score of the first response minus that of the second, by each member, (m, b).

    Raises:
        ValueError: if they are not (m, b) with m of at least two.
    """
    if differences.ndim != 2 or len(differences) < 2:
        raise ValueError(f"differences have shape {tuple(differences.shape)}: they must be (m, b), m two or more")
    differences = differences.double()
    probabilities = differences.sigmoid()
    probability = probabilities.mean(dim=0)
    gain = _entropy(probability) - _entropy(probabilities).mean(dim=0)
    return Information(gain.clamp(min=0), probability, differences.std(dim=0, correction=0))


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability) + torch.special.entr(1 - probability)
