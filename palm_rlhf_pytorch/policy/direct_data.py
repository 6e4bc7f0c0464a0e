"""Preferences as tokens: pairs and votes, cut to a length, with what is counted of them.

    Pair, Vote -> ids of prompt, response, EOS -> texts in batches, with labels and weights

Everything is on the CPU until a batch is asked for. Knows no model and no loss.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text.records import Pair, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import encode_with, response_tokenizer


class Cuts(NamedTuple):
    """Texts that were longer than the limit: prompts that lost their beginning, responses that lost their end."""

    prompts: int
    responses: int

    def __str__(self) -> str:
        return f"{self.prompts:,} prompts lost their beginning, {self.responses:,} responses their end"

    def and_also(self, other: "Cuts") -> "Cuts":
        """Both together."""
        return Cuts(self.prompts + other.prompts, self.responses + other.responses)


UNCUT = Cuts(0, 0)


class TokenTexts:
    """Prompts with their responses, as ids (n,) each, and how many of them are the prompt."""

    def __init__(self, ids: Sequence[Tensor], prompt_lengths: Sequence[int], cuts: Cuts = UNCUT) -> None:
        """Keep checked texts; each has at least one token of a prompt and one of a response."""
        self.cuts = cuts
        self.ids = [row.int() for row in ids]  # half of int64, and there may be many
        self.prompt_lengths = list(prompt_lengths)

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each text, prompt and response."""
        return [len(row) for row in self.ids]

    @property
    def response_lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(row) - prompt for row, prompt in zip(self.ids, self.prompt_lengths, strict=True)]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some texts: `ids` (b, n), padded on the right, `prompt_lengths` (b,) and `lengths` of responses (b,)."""
        ids, mask = pad_ragged([self.ids[row] for row in rows])
        prompt_lengths = torch.tensor([self.prompt_lengths[row] for row in rows])
        return {"ids": ids.long(), "prompt_lengths": prompt_lengths, "lengths": mask.sum(dim=-1) - prompt_lengths}

    def digest(self) -> str:
        """SHA-256 of all texts."""
        found = hashlib.sha256(np.asarray([self.prompt_lengths, self.lengths], dtype="<i8").tobytes())
        for row in self.ids:
            found.update(row.numpy().astype("<i4").data)
        return found.hexdigest()


class Examples(Protocol):
    """What is learnt from, as the trainers need it: some of its texts go through the model together."""

    texts: TokenTexts

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, rows: Sequence[int]) -> list[int]:
        """Numbers of the texts that a pass over some examples reads."""
        ...

    def sizes(self) -> list[int]:
        """Tokens of each example's longest text in that pass."""
        ...

    def counts(self) -> list[float]:
        """How much of a step's mean each example is, before weights: 1, or its tokens."""
        ...

    def facts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """What the loss is told of some examples beside their log-probabilities, (b,) each."""
        ...

    def digest(self) -> str:
        """SHA-256 of all that is learnt from."""
        ...


class PairExamples:
    """Pairs: texts 2 i and 2 i + 1 are chosen and rejected of pair i."""

    def __init__(self, texts: TokenTexts, labels: Tensor, weights: Tensor) -> None:
        """Keep pairs.

        Args:
            texts: two a pair.
            labels: probability that the first of them is preferred, (m,).
            weights: of mean 1, (m,).
        """
        self.texts, self.labels, self.weights = texts, labels, weights

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Sequence[int]) -> list[int]:
        """The chosen texts, then the rejected ones."""
        return [2 * row for row in rows] + [2 * row + 1 for row in rows]

    def sizes(self) -> list[int]:
        """Tokens of the longer text of each pair."""
        lengths = self.texts.lengths
        return [max(two) for two in zip(lengths[::2], lengths[1::2], strict=True)]

    def counts(self) -> list[float]:
        """1 a pair."""
        return [1.0] * len(self)

    def facts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Labels and weights."""
        return {"label": self.labels[list(rows)], "weight": self.weights[list(rows)]}

    def digest(self) -> str:
        """SHA-256 of texts, labels and weights."""
        return _digest(self.texts, self.labels, self.weights)


class VoteExamples:
    """Votes: text 2 i is what vote i judges, text 2 i + 1 another vote's response to its prompt."""

    def __init__(self, texts: TokenTexts, up: Tensor, weights: Tensor) -> None:
        """Keep votes.

        Args:
            texts: two a vote.
            up: True for a vote up, (m,).
            weights: of mean 1, (m,).
        """
        self.texts, self.up, self.weights = texts, up, weights

    def __len__(self) -> int:
        return len(self.up)

    def read(self, rows: Sequence[int]) -> list[int]:
        """The texts that are judged."""
        return [2 * row for row in rows]

    def mismatched(self, rows: Sequence[int]) -> list[int]:
        """Numbers of the texts that estimate the baseline."""
        return [2 * row + 1 for row in rows]

    def sizes(self) -> list[int]:
        """Tokens of each text that is judged."""
        return self.texts.lengths[::2]

    def counts(self) -> list[float]:
        """1 a vote."""
        return [1.0] * len(self)

    def facts(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Votes and weights."""
        return {"up": self.up[list(rows)], "weight": self.weights[list(rows)]}

    def digest(self) -> str:
        """SHA-256 of texts, votes and weights."""
        return _digest(self.texts, self.up, self.weights)


class Encoder:
    """Texts to ids, of at most max_length tokens; the texts say what had to be cut.

    Prompt and response are encoded apart, as they are when a response is sampled: no token spans the border. What a
    tokenizer puts before a response or after a prompt by itself (its begin and end tokens) is taken away.
    """

    def __init__(self, tokenizer: object, *, num_tokens: int, max_length: int, eos_token: int | None) -> None:
        """Make an encoder.

        Args:
            tokenizer: as in `encode_with`; its `bos_token_id` or `bos_token` stands for an empty prompt.
            num_tokens: ids go from 0 to num_tokens - 1.
            max_length: tokens of prompt and response; 2 at least.
            eos_token: ends each response; None takes the tokenizer's `eos_token_id` or `eos_token`, if it has one.

        Raises:
            ValueError: if a number is out of range.
        """
        if max_length < 2:
            raise ValueError(f"max_length ({max_length}) must be 2 or more: a token of the prompt, one of the response")
        self.tokenizer, self.num_tokens, self.max_length = tokenizer, num_tokens, max_length
        self.bos_token = token_of(tokenizer, "bos_token")
        self.eos_token = token_of(tokenizer, "eos_token") if eos_token is None else eos_token
        if self.eos_token is not None and not 0 <= self.eos_token < num_tokens:
            raise ValueError(f"eos_token ({self.eos_token}) must be from 0 to {num_tokens - 1}, or None")

    def __call__(self, groups: Sequence[Sequence[Text]], places: Sequence[str]) -> TokenTexts:
        """All texts of all groups; prompts in a group keep as many tokens as its longest response leaves.

        Args:
            groups: texts that are compared.
            places: what each group is called in errors.

        Raises:
            ValueError: naming the place, if a text has no token or one outside the vocabulary.
        """
        prompts = self._encoded({text.prompt: place for group, place in zip(groups, places, strict=True)
                                 for text in group}, self.tokenizer)  # fmt: skip
        responses = self._encoded({text.response: place for group, place in zip(groups, places, strict=True)
                                   for text in group}, response_tokenizer(self.tokenizer))  # fmt: skip
        ids, prompt_lengths, cuts = [], [], UNCUT
        for group, place in zip(groups, places, strict=True):
            ended = [self._ended(responses[text.response], place) for text in group]
            room = max(1, self.max_length - max(len(response) for response in ended))
            for text, response in zip(group, ended, strict=True):
                prompt = self._begun(prompts[text.prompt], place)
                kept = prompt[-room:]
                whole = torch.cat((kept, response))[: self.max_length]
                cuts = cuts.and_also(Cuts(len(kept) < len(prompt), len(whole) < len(kept) + len(response)))
                ids.append(whole)
                prompt_lengths.append(len(kept))
        return TokenTexts(ids, prompt_lengths, cuts)

    def _encoded(self, places: dict[str, str], tokenizer: object) -> dict[str, Tensor]:
        """Ids of different texts; none of an empty one."""
        texts = [text for text in places if text]
        found = dict(zip(texts, encode_with(tokenizer, texts), strict=True))
        for text, ids in found.items():
            if int(ids.max()) >= self.num_tokens:
                raise ValueError(
                    f"{places[text]} holds the id {int(ids.max())}, palm's go from 0 to {self.num_tokens - 1}:"
                    " tokenizer and palm must share a vocabulary"
                )
        return {"": torch.zeros(0, dtype=torch.long)} | {text: ids.cpu() for text, ids in found.items()}

    def _begun(self, prompt: Tensor, place: str) -> Tensor:
        if len(prompt) and prompt[-1] == self.eos_token:
            prompt = prompt[:-1]
        if len(prompt) == 0:
            if self.bos_token is None:
                raise ValueError(
                    f"{place} has an empty prompt, and the tokenizer names no bos_token to stand for it: leave the"
                    " record out, or give a tokenizer with one"
                )
            prompt = torch.tensor([self.bos_token])
        return prompt

    def _ended(self, response: Tensor, place: str) -> Tensor:
        if len(response) and response[0] == self.bos_token:
            response = response[1:]
        if self.eos_token is not None and not (len(response) and response[-1] == self.eos_token):
            response = torch.cat((response, torch.tensor([self.eos_token])))
        if len(response) == 0:
            raise ValueError(f"{place} has an empty response, and no eos_token to stand for it: leave the record out")
        return response


def pair_examples(pairs: Sequence[Pair], encoder: Encoder) -> PairExamples:
    """Pairs as tokens.

    Raises:
        ValueError: if there is none, or naming the pair at fault.
    """
    if not pairs:
        raise ValueError("pairs is empty: give at least one")
    texts = encoder([pair.texts for pair in pairs], [_place("pair", *item) for item in enumerate(pairs)])
    return PairExamples(texts, torch.tensor([float(pair.preference) for pair in pairs]), _weights(pairs))


def vote_examples(votes: Sequence[Vote], encoder: Encoder, *, seed: int, name: str = "votes") -> VoteExamples:
    """Votes as tokens, each with a response to another prompt in place of its own; which one follows from the seed.

    `name` is what errors call them.

    Raises:
        ValueError: if there is no vote, all have one prompt, or naming the vote at fault.
    """
    if not votes:
        raise ValueError(f"{name} is empty: give at least two, on different prompts")
    others = _other_prompts([vote.text.prompt for vote in votes], seed=seed, name=name)
    groups = [
        group
        for vote, other in zip(votes, others, strict=True)
        for group in ((vote.text,), (Text(vote.text.prompt, votes[other].text.response),))
    ]
    places = [_place("vote", index, vote) for index, vote in enumerate(votes) for _ in range(2)]
    return VoteExamples(encoder(groups, places), torch.tensor([vote.up for vote in votes]), _weights(votes))


def _other_prompts(prompts: Sequence[str], *, seed: int, name: str) -> list[int]:
    """For each prompt the next one that differs, in a cyclic order drawn from the seed."""
    if len(set(prompts)) < 2:
        raise ValueError(
            f"{name} ({len(prompts)}) all have one prompt: the baseline is read from responses to other prompts; give"
            " votes on several, or learn from pairs"
        )
    order = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts)).tolist()
    found, following = [0] * len(prompts), 0
    for place in reversed(range(2 * len(order))):  # twice round, so that the last has a next
        row, after = order[place % len(order)], order[(place + 1) % len(order)]
        following = after if prompts[after] != prompts[row] else following
        found[row] = following
    return found


def _weights(records: Sequence[Pair] | Sequence[Vote]) -> Tensor:
    """Weights scaled to mean 1, so that they say what counts more and not how fast is learnt."""
    weights = torch.tensor([float(record.weight) for record in records])
    if not float(weights.sum()) > 0:
        raise ValueError(f"all {len(weights)} records have weight 0: there is nothing to learn from")
    return weights / weights.mean()


def token_of(tokenizer: object, name: str) -> int | None:
    """A special id that a tokenizer names: `eos_token_id` in Hugging Face's, `eos_token` in ours."""
    found = (getattr(tokenizer, spelling, None) for spelling in (f"{name}_id", name))
    return next((value for value in found if isinstance(value, int)), None)


def _place(kind: str, index: int, record: Pair | Vote) -> str:
    return f"{kind} {index}" + (f" (line {record.line})" if record.line else "")


def _digest(texts: TokenTexts, *facts: Tensor) -> str:
    found = hashlib.sha256(texts.digest().encode())
    for tensor in facts:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
