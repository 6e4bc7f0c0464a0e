"""Labels as token batches: texts encoded and cut to a length, labels of similar length side by side.

A label's texts stay together, so that one pass scores all that its loss compares. Knows no model.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.tensors import pad_ragged, split_rows
from palm_rlhf_pytorch.text.records import Label, Pair, Ranking, Rating, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import encode_with, response_tokenizer
from palm_rlhf_pytorch.training.ranks import Ranks

BUCKETS = 8  # lengths that differ by less than a factor of 2 ** (1 / 8) count as alike


class TokenText(NamedTuple):
    """Ids of a prompt and its response, int32 (n,), of which the first `prompt_length` are the prompt's."""

    ids: Tensor
    prompt_length: int


@dataclass(frozen=True)
class EncodedLabels:
    """Labels with their texts' ids.

    Attributes:
        labels: those that count: the ones of weight 0 are left out.
        texts: of each label, in the order of `label.texts`.
        cut_prompts: texts whose prompt lost its beginning, to fit the length.
        cut_responses: texts whose response alone is too long; they lost the prompt, the response's end and its EOS.
        weightless: labels left out.
    """

    labels: list[Label]
    texts: list[tuple[TokenText, ...]]
    cut_prompts: int
    cut_responses: int
    weightless: int

    @property
    def flat(self) -> list[TokenText]:
        """All texts, one label's after the other's."""
        return [text for texts in self.texts for text in texts]

    @property
    def weight(self) -> float:
        """How much they count in all."""
        return math.fsum(label.weight for label in self.labels)

    @property
    def digest(self) -> str:
        """SHA-256 over the texts and what is said of them."""
        digest = hashlib.sha256()
        for label, texts in zip(self.labels, self.texts, strict=True):
            digest.update(repr((label, [text.prompt_length for text in texts])).encode())
            for text in texts:
                digest.update(text.ids.numpy().data)
        return digest.hexdigest()


def encode_labels(
    labels: Sequence[Label], tokenizer: object, *, max_length: int, eos_token: int | None
) -> EncodedLabels:
    """Encode the texts of labels, and cut those that are too long from the left of the prompt.

    Args:
        labels: what people said.
        tokenizer: as `encode_with` takes it. Prompt and response are encoded apart, as when a policy writes the
            response; a tokenizer that adds tokens of its own to each is to be told not to.
        max_length: tokens of a text at most.
        eos_token: put after each response, as a policy ends it; None for nothing.

    Raises:
        ValueError: if max_length is below 1, there is no label that counts, or a response gives no token.
    """
    if max_length < 1:
        raise ValueError(f"max_length ({max_length}) must be at least 1")
    counted = [label for label in labels if label.weight > 0]
    if not counted:
        raise ValueError(f"there is nothing to learn from: {len(labels)} labels, none of a weight above 0")
    every = [text for label in counted for text in label.texts]
    prompts = _ids_of((text.prompt for text in every), tokenizer)
    responses = _ids_of((text.response for text in every), response_tokenizer(tokenizer))
    cut_prompts = cut_responses = 0
    known: dict[Text, TokenText] = {}
    for label in counted:
        for text in label.texts:
            prompt, response = prompts[text.prompt], responses[text.response]
            size = len(response) + (eos_token is not None)
            if size == 0:
                raise ValueError(f"a response of {_place(label)} is empty, and no eos_token ends it: leave it out")
            cut_responses += size > max_length
            cut_prompts += size <= max_length < size + len(prompt)
            if text not in known:
                known[text] = _cut(prompt, response, max_length=max_length, eos_token=eos_token)
    texts = [tuple(known[text] for text in label.texts) for label in counted]
    return EncodedLabels(counted, texts, cut_prompts, cut_responses, len(labels) - len(counted))


def _ids_of(texts: Iterable[str], tokenizer: object) -> dict[str, Tensor]:
    """Ids of each text, once."""
    parts = list(dict.fromkeys(text for text in texts if text))
    found = dict(zip(parts, (row.int() for row in encode_with(tokenizer, parts)), strict=True))
    return {"": torch.zeros(0, dtype=torch.int32)} | found


def _cut(prompt: Tensor, response: Tensor, *, max_length: int, eos_token: int | None) -> TokenText:
    end = response[:0] if eos_token is None else response.new_tensor([eos_token])
    response = torch.cat((response, end))[:max_length]
    prompt = prompt[max(0, len(prompt) + len(response) - max_length) :]
    return TokenText(torch.cat((prompt, response)), len(prompt))


def check_ratings(labels: Sequence[Label], *, num_bins: int, lowest: int) -> None:
    """Refuse ratings that a head with bins does not have; a scalar head takes any.

    Raises:
        ValueError: naming the first such rating and its place.
    """
    for label in labels:
        if num_bins and isinstance(label, Rating):
            value = label.value
            if value != int(value) or not lowest <= value < lowest + num_bins:
                raise ValueError(
                    f"{_place(label)} is {value:g}: {num_bins} bins take whole numbers from {lowest} to"
                    f" {lowest + num_bins - 1}; label_offset is the lowest, num_binned_output=0 takes any number"
                )


def _place(label: Label) -> str:
    kind = type(label).__name__.lower()
    return f"the {kind} in line {label.line}" if label.line else f"a {kind} ({label.texts[0].response[:40]!r})"


# batches


def plan_batches(
    encoded: EncodedLabels, *, max_tokens: int, max_labels: int, generator: torch.Generator | None = None
) -> list[list[int]]:
    """Cut labels into batches of similar length; padding included, a batch has at most max_tokens tokens.

    A label whose own texts are more than that is a batch of its own.

    Args:
        encoded: the labels.
        max_tokens: texts of a batch times the longest of them.
        max_labels: labels of a batch.
        generator: shuffles labels of about the same length, then the batches; None leaves them sorted.

    Returns:
        Label numbers of each batch; together they hold every label once.

    Raises:
        ValueError: if a limit is below 1.
    """
    for name, limit in (("max_tokens", max_tokens), ("max_labels", max_labels)):
        if limit < 1:
            raise ValueError(f"{name} ({limit}) must be at least 1")
    longest = [max(len(text.ids) for text in texts) for texts in encoded.texts]
    numbers = range(len(longest)) if generator is None else torch.randperm(len(longest), generator=generator).tolist()
    batches: list[list[int]] = []
    rows = width = 0
    for number in sorted(numbers, key=lambda number: -int(BUCKETS * math.log2(longest[number]))):
        own = len(encoded.texts[number])
        wider = max(width, longest[number])
        if not batches or len(batches[-1]) == max_labels or (rows + own) * wider > max_tokens:
            batches.append([])
            rows, wider = 0, longest[number]
        batches[-1].append(number)
        rows, width = rows + own, wider
    if generator is None:
        return batches
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


class Course:
    """The batches of a run, epoch after epoch, as far as one process goes through them.

    Args:
        encoded: labels to learn from.
        epochs: passes over them, each in an order of its own.
        seed: of these orders.
        max_tokens: as in `plan_batches`.
        max_labels: likewise.
        accumulate: batches an optimizer step, in each process.
        ranks: all processes. They share the batches; where these do not come out even, the first come once more.
    """

    def __init__(
        self,
        encoded: EncodedLabels,
        *,
        epochs: int,
        seed: int,
        max_tokens: int,
        max_labels: int,
        accumulate: int,
        ranks: Ranks,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate ({accumulate}) must be at least 1")
        generator = torch.Generator().manual_seed(seed)
        limits = {"max_tokens": max_tokens, "max_labels": max_labels}
        plan = [batch for _ in range(epochs) for batch in plan_batches(encoded, **limits, generator=generator)]
        share = accumulate * ranks.count
        even = list(islice(cycle(plan), -(-len(plan) // share) * share))
        self.encoded, self.own = encoded, even[ranks.rank :: ranks.count]
        self.num_steps = len(self.own) // accumulate
        self.mean_weight = epochs * encoded.weight / len(plan)  # of a batch

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's batches, as `label_batch` makes them."""
        return (label_batch(self.encoded, numbers) for numbers in self.own)


class PairRows(NamedTuple):
    """Pairs of a batch, (p,) each: rows of their texts, and what `bradley_terry_loss` takes."""

    chosen: Tensor
    rejected: Tensor
    preference: Tensor
    margin: Tensor
    weight: Tensor


class RankingRows(NamedTuple):
    """Rankings of a batch: rows of their texts, ranks, mask where there is a text, (r, k) each, and weights (r,)."""

    rows: Tensor
    ranks: Tensor
    mask: Tensor
    weight: Tensor


class NumberRows(NamedTuple):
    """Ratings or votes of a batch, (q,) each: rows of their texts, the number (1 for a thumb up), weights."""

    rows: Tensor
    values: Tensor
    weight: Tensor


class LabelRows(NamedTuple):
    """What is said of a batch's texts; a kind that is missing is None."""

    pairs: PairRows | None
    rankings: RankingRows | None
    ratings: NumberRows | None
    votes: NumberRows | None

    def to(self, device: torch.device) -> "LabelRows":
        """The same on another device."""
        kinds: list[Any] = [kind and type(kind)(*(tensor.to(device) for tensor in kind)) for kind in self]
        return LabelRows(*kinds)


def label_batch(encoded: EncodedLabels, numbers: Sequence[int]) -> dict[str, Any]:
    """One batch: seq, mask (b, n) and prompt_lengths (b,) of all texts, and `labels`, what is said of them."""
    texts = [text for number in numbers for text in encoded.texts[number]]
    seq, mask = pad_ragged([text.ids for text in texts])
    firsts = torch.tensor([0, *(len(encoded.texts[number]) for number in numbers)]).cumsum(dim=0).tolist()
    chosen = [(encoded.labels[number], first) for number, first in zip(numbers, firsts, strict=False)]
    return {
        "seq": seq.long(),
        "mask": mask,
        "prompt_lengths": torch.tensor([text.prompt_length for text in texts]),
        "labels": LabelRows(
            _pair_rows([(label, first) for label, first in chosen if isinstance(label, Pair)]),
            _ranking_rows([(label, first) for label, first in chosen if isinstance(label, Ranking)]),
            _number_rows([(label, first, label.value) for label, first in chosen if isinstance(label, Rating)]),
            _number_rows([(label, first, float(label.up)) for label, first in chosen if isinstance(label, Vote)]),
        ),
    }


def _pair_rows(pairs: Sequence[tuple[Pair, int]]) -> PairRows | None:
    if not pairs:
        return None
    chosen = torch.tensor([first for _, first in pairs])
    numbers = [(pair.preference, pair.margin or 0.0, pair.weight) for pair, _ in pairs]
    return PairRows(chosen, chosen + 1, *torch.tensor(numbers).unbind(dim=1))


def _ranking_rows(rankings: Sequence[tuple[Ranking, int]]) -> RankingRows | None:
    if not rankings:
        return None
    ranks, mask = pad_ragged([torch.tensor(ranking.ranks) for ranking, _ in rankings])
    rows, _ = pad_ragged([torch.arange(first, first + len(ranking.ranks)) for ranking, first in rankings])
    return RankingRows(rows, ranks, mask, torch.tensor([ranking.weight for ranking, _ in rankings]))


def _number_rows(numbers: Sequence[tuple[Label, int, float]]) -> NumberRows | None:
    if not numbers:
        return None
    values, weights = ([value for *_, value in numbers], [label.weight for label, *_ in numbers])
    return NumberRows(torch.tensor([first for _, first, _ in numbers]), torch.tensor(values), torch.tensor(weights))


@torch.no_grad()
def read_texts(judge: nn.Module, read: Callable[..., Tensor], texts: Sequence[TokenText], *, max_tokens: int) -> Tensor:
    """Numbers of texts, (..., b) on the CPU, from a method of a judge that gives (..., rows) for a batch of them.

    Args:
        judge: put into eval mode meanwhile; says by its parameters where the batches go.
        read: called as read(seq, mask, prompt_lengths=...).
        texts: b texts, at least one.
        max_tokens: tokens of a batch, padding included; a longer text is a batch of its own.
    """
    training, device = judge.training, next(judge.parameters()).device
    found: Tensor | None = None
    judge.eval()
    try:
        for rows, batch in text_batches(texts, max_tokens=max_tokens, device=device):
            numbers = read(**batch).float().cpu()
            found = torch.zeros(*numbers.shape[:-1], len(texts)) if found is None else found
            found[..., rows] = numbers
    finally:
        judge.train(training)
    assert found is not None, "there is at least one text"
    return found


def text_batches(
    texts: Sequence[TokenText], *, max_tokens: int, device: torch.device | None = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of texts of similar length: their places, and seq, mask and prompt_lengths, on a device."""
    lengths = [len(text.ids) for text in texts]
    for rows in split_rows(lengths, max_rows=len(lengths), max_tokens=max_tokens):
        seq, mask = pad_ragged([texts[row].ids for row in rows])
        prompts = torch.tensor([texts[row].prompt_length for row in rows], device=device)
        yield rows, {"seq": seq.long().to(device), "mask": mask.to(device), "prompt_lengths": prompts}
