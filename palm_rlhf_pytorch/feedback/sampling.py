"""Items for people to judge, out of what models write; what would teach reward models most comes first.

Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", https://arxiv.org/abs/1112.5745
(reward/asking.py). Knows models and judges, no database.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch.feedback.codes import Kind
from palm_rlhf_pytorch.feedback.formats import MAX_COMPLETIONS, MAX_SOURCE, NewCompletion, NewItem
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.asking import information
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.labels import encode_labels, read_texts
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.chats import ChatTokenizer, stop_strings
from palm_rlhf_pytorch.text.records import Ranking, Rating, Text
from palm_rlhf_pytorch.text.tokenizer import Tokenizer

ROWS = 64  # texts that are continued in one batch
MAX_SAMPLES = 4  # of each model to a prompt


@dataclass(frozen=True, kw_only=True)
class Author:
    """A model that writes responses.

    Args:
        name: which people are not shown.
        palm: the model.
        asking: its tokenizer, or one that says each prompt to the assistant.
        settings: how it writes, as `PaLM.generate_text` takes it: max_new_tokens, temperature, top_k, top_p, stop.

    Raises:
        ValueError: if the name is empty or longer than MAX_SOURCE.
    """

    name: str
    palm: PaLM
    asking: Tokenizer | ChatTokenizer
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_SOURCE:
            raise ValueError(f"name ({self.name[:40]!r}) of a model must have 1 to {MAX_SOURCE} characters")

    def write(self, prompts: Sequence[str], *, generator: torch.Generator) -> list[str]:
        """A response to each prompt; the same prompt again is given another one.

        Raises:
            ValueError: as `PaLM.generate_text`.
        """
        asked: list[str] | list[Tensor] = list(prompts)
        options = {"tokenizer": self.asking, **self.settings}
        if isinstance(self.asking, ChatTokenizer):
            tokenizer = self.asking.tokenizer
            asked = [self.asking(prompt) for prompt in prompts]
            stops = (*stop_strings(tokenizer), *self.settings.get("stop", ()))
            options |= {"tokenizer": tokenizer, "stop": stops, "eos_token": self.asking.eos_token}
        texts = self.palm.generate_text(asked, generator=generator, **options)
        return [text.replace("\0", "\N{REPLACEMENT CHARACTER}") for text in texts]  # which no database takes


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What reward models say of responses.

    Args:
        judge: one reward model, or an ensemble, whose members can disagree.
        asking: as it was trained with.
        max_length: tokens of prompt and response, longer prompts lose their beginning.
        max_tokens: tokens of a batch, padding included.
    """

    judge: RewardModel | RewardEnsemble
    asking: Tokenizer | ChatTokenizer
    max_length: int = 1024
    max_tokens: int = 8192

    def scores(self, prompt_texts: Sequence[tuple[str, Sequence[str]]]) -> list[Tensor]:
        """Scores (m, k) by each of m members of the k responses to each prompt, in the labels' unit."""
        labels = [_unsaid(prompt, texts) for prompt, texts in prompt_texts]
        if not labels:
            return []
        encoded = encode_labels(labels, self.asking, max_length=self.max_length, eos_token=self.asking.eos_token)
        found = read_texts(self.judge, self._members, encoded.flat, max_tokens=self.max_tokens)
        return list(found.split([len(texts) for _, texts in prompt_texts], dim=1))

    def _members(self, seq: Tensor, mask: Tensor | None = None, **told: Any) -> Tensor:
        if isinstance(self.judge, RewardEnsemble):
            return self.judge.read(seq, mask, **told)
        return self.judge.read(seq, mask, **told).scores[None]


class Sampled(NamedTuple):
    """Items, the first the most worth a person's time; and prompts whose responses were empty or all the same."""

    items: list[NewItem]
    passed_over: int


def sample_items(
    authors: Sequence[Author],
    prompts: Sequence[str],
    *,
    kind: int,
    samples: int,
    seed: int,
    reader: Reader | None = None,
    per_prompt: int | None = None,
    count: int | None = None,
    use_tqdm: bool = False,
) -> Sampled:
    """Items out of what models write to prompts.

    Of a pair project each two different responses to a prompt are an item, and with two authors each two that are not
    of the same one; elsewhere all responses to a prompt are. Empty responses, which teach a reward model nothing, and
    repeated ones are left out.

    Args:
        authors: one model, or two that are to be compared.
        prompts: a prompt that is there twice counts once.
        kind: of question.
        samples: responses of each author to each prompt, up to MAX_SAMPLES.
        seed: of the samples; the same one gives the same texts.
        reader: scores the responses, and by it items are ordered (`worth`); None leaves them in the prompts' order.
        per_prompt: items of a prompt at most, those worth most; None for all.
        count: items at most, likewise.
        use_tqdm: show a bar.

    Raises:
        ValueError: if a number is out of range, or the authors are not one or two of different names.
    """
    check_request(authors, kind, samples=samples, per_prompt=per_prompt, count=count)
    prompts = list(dict.fromkeys(prompts))
    written = list(_written(authors, prompts, samples=samples, seed=seed, use_tqdm=use_tqdm))
    asked = zip(prompts, written, strict=True)
    groups = [group for prompt, texts in asked for group in _groups(prompt, texts, kind, across=len(authors) > 1)]
    scores = reader.scores([(group.prompt, group.texts) for group in groups]) if reader else [None] * len(groups)
    items = [_item(group, kind, told) for group, told in zip(groups, scores, strict=True)]
    items.sort(key=lambda item: -item.priority)
    passed_over = len(prompts) - len({item.prompt for item in items if isinstance(item.prompt, str)})
    return Sampled(list(_most_worth(items, per_prompt))[:count], passed_over)


def check_request(
    authors: Sequence[Author], kind: int, *, samples: int, per_prompt: int | None, count: int | None
) -> None:
    """Raise a ValueError where `sample_items`, whose arguments these are, would."""
    if not 1 <= len({author.name for author in authors}) == len(authors) <= 2:
        names = ", ".join(author.name for author in authors)
        raise ValueError(f"authors ({names}) must be one model, or two of different names")
    least = 1 if kind == Kind.RATING or len(authors) == 2 else 2
    if not least <= samples <= MAX_SAMPLES:
        raise ValueError(f"samples ({samples}) must be from {least} to {MAX_SAMPLES}")
    assert MAX_SAMPLES * 2 <= MAX_COMPLETIONS, "what two authors write fits into an item"
    for name, number in (("per_prompt", per_prompt), ("count", count)):
        if number is not None and number < 1:
            raise ValueError(f"{name} ({number}) must be at least 1")


def worth(scores: Tensor, kind: int) -> float:
    """How much a judgement of k responses would teach, by scores (m, k) of m reward models.

    Of pairs and rankings, the mean over each two of what the answer would tell about which member is right (nats);
    of ratings, the members' deviation, mean over responses. One reward model cannot disagree with itself: what counts
    then is how far its answer is from certain (nats), and for ratings nothing.
    """
    if kind == Kind.RATING:
        return float(scores.double().std(dim=0, correction=0).mean())
    first, second = torch.tensor(list(combinations(range(scores.shape[1]), 2))).unbind(dim=1)
    differences = scores[:, first] - scores[:, second]
    if len(scores) > 1:
        return float(information(differences).gain.mean())
    chance = differences.double().sigmoid()
    return float((torch.special.entr(chance) + torch.special.entr(1 - chance)).mean())


class _Group(NamedTuple):
    """Responses to one prompt that are judged together, and who wrote each."""

    prompt: str
    texts: tuple[str, ...]
    names: tuple[str, ...]


def _written(
    authors: Sequence[Author], prompts: Sequence[str], *, samples: int, seed: int, use_tqdm: bool
) -> Iterator[list[tuple[str, str]]]:
    """Of each prompt, the different responses that are not empty, each with its author's name."""
    found: list[list[tuple[str, str]]] = [[] for _ in prompts]
    rows = [row for row in range(len(prompts)) for _ in range(samples)]
    with tqdm(total=len(rows) * len(authors), desc="sample", unit="response", disable=not use_tqdm) as bar:
        for number, author in enumerate(authors):  # of the same random numbers, models that are alike write the same
            generator = torch.Generator(author.palm.device).manual_seed(seed + number)
            for start in range(0, len(rows), ROWS):
                batch = rows[start : start + ROWS]
                texts = author.write([prompts[row] for row in batch], generator=generator)
                for row, text in zip(batch, texts, strict=True):
                    found[row].append((text, author.name))
                bar.update(len(batch))
    for responses in found:
        different: dict[str, tuple[str, str]] = {}
        for text, name in responses:  # of two alike, the first
            different.setdefault(text.strip(), (text, name))
        yield [written for shown, written in different.items() if shown]


def _groups(prompt: str, written: Sequence[tuple[str, str]], kind: int, *, across: bool) -> Iterator[_Group]:
    """What is judged together: each two responses of a pair project, `across` two authors; else all."""
    if kind != Kind.PAIR:
        if len(written) >= (1 if kind == Kind.RATING else 2):
            yield _Group(prompt, tuple(text for text, _ in written), tuple(name for _, name in written))
        return
    for (first, own), (second, other) in combinations(written, 2):
        if not across or own != other:
            yield _Group(prompt, (first, second), (own, other))


def _item(group: _Group, kind: int, scores: Tensor | None) -> NewItem:
    told = [None] * len(group.texts) if scores is None else scores.mean(dim=0).tolist()
    parts = zip(group.texts, group.names, told, strict=True)
    return NewItem(
        prompt=group.prompt,
        completions=tuple(NewCompletion(text=text, source=name, score=score) for text, name, score in parts),
        priority=0.0 if scores is None else worth(scores, kind),
    )


def _most_worth(items: Sequence[NewItem], per_prompt: int | None) -> Iterator[NewItem]:
    """Items, of each prompt no more than so many."""
    taken: Counter[str] = Counter()
    for item in items:
        taken[str(item.prompt)] += 1
        if per_prompt is None or taken[str(item.prompt)] <= per_prompt:
            yield item


def _unsaid(prompt: str, texts: Sequence[str]) -> Ranking | Rating:
    """A label of these texts that is never learnt from."""
    read = tuple(Text(prompt, text) for text in texts)
    return Ranking(texts=read, ranks=tuple(range(len(read)))) if len(read) > 1 else Rating(text=read[0], value=0.0)
