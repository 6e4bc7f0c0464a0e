"""The demo's pairs: two answers to one prompt, in the gold judge's order, for a reward model to learn from."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf_pytorch.cli.demo_report import sample_responses
from palm_rlhf_pytorch.cli.demo_text import gold_score
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


class Pair(NamedTuple):
    """Ids of two texts with one prompt, the one the judge preferred first, and the prompt's tokens."""

    chosen: Tensor
    rejected: Tensor
    prompt_length: int


def split_pairs(pairs: Sequence[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and those of the first `count` whose prompt none of them has.

    Raises:
        ValueError: if there is none of the latter.
    """
    train = list(pairs[count:])
    seen = {tuple(pair.chosen[: pair.prompt_length].tolist()) for pair in train}
    held_out = [pair for pair in pairs[:count] if tuple(pair.chosen[: pair.prompt_length].tolist()) not in seen]
    if not held_out:
        raise ValueError(
            f"each of {count} pairs held out has a prompt of the {len(train)} trained on: give more prompts"
        )
    return train, held_out


def sample_pairs(
    palm: PaLM, words: frozenset[str], prompts: Sequence[str], *, num_pairs: int, max_new_tokens: int, seed: int
) -> list[Pair]:
    """Two responses to each prompt, in the gold judge's order.

    Two that it holds equal give no pair; nor do two of unequal length, from which a judge would learn that a short
    answer is the easiest good one.
    """
    chance = random.Random(seed)
    generator = torch.Generator(palm.token_emb.weight.device).manual_seed(seed)
    pairs: list[Pair] = []
    with tqdm(total=num_pairs, desc="2/4 sample pairs", unit="pair") as bar:
        for attempt in range(num_pairs):
            if len(pairs) >= num_pairs:
                break
            if attempt == 32 and len(pairs) < num_pairs / 8:  # far fewer than one in five
                raise ValueError(
                    f"only {len(pairs)} usable pairs among {attempt * 128}: the model has learnt too little"
                )
            batch = [chance.choice(prompts) for _ in range(128)]
            two = [sample_responses(palm, batch, max_new_tokens=max_new_tokens, generator=generator) for _ in range(2)]
            for index, prompt in enumerate(batch):
                first, second = (gold_score(found.texts[index], words, ended=bool(found.ended[index])) for found in two)
                lengths = sorted(len(found.ids[index]) for found in two)
                if abs(first - second) < 0.1 or lengths[0] < 0.9 * lengths[1]:
                    continue
                chosen, rejected = (two[0], two[1]) if first > second else (two[1], two[0])
                ids = TOKENIZER.encode(prompt)
                pairs.append(Pair(torch.cat((ids, chosen.ids[index])), torch.cat((ids, rejected.ids[index])), len(ids)))
            bar.update(min(len(pairs), num_pairs) - bar.n)
    return pairs[:num_pairs]


def pair_batches(pairs: Sequence[Pair], *, epochs: int, batch_size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches over all pairs, shuffled each epoch."""
    chance = random.Random(seed)
    for _ in range(epochs):
        order = chance.sample(list(pairs), len(pairs))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield _pair_batch(order[start : start + batch_size])


def _pair_batch(pairs: Sequence[Pair]) -> dict[str, Any]:
    chosen, mask = pad_ragged([pair.chosen for pair in pairs], pad_value=TOKENIZER.pad_token)
    rejected, rejected_mask = pad_ragged([pair.rejected for pair in pairs], pad_value=TOKENIZER.pad_token)
    lengths = torch.tensor([pair.prompt_length for pair in pairs])
    return {
        "seq": chosen, "mask": mask, "prompt_lengths": lengths,
        "rejected": rejected, "rejected_mask": rejected_mask, "rejected_prompt_lengths": lengths,
    }  # fmt: skip


@torch.no_grad()
def pair_accuracy(model: RewardModel, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose preferred text has the higher score."""
    device = model.head.weight.device
    batch = {name: value.to(device) for name, value in _pair_batch(pairs).items()}
    lengths = batch["prompt_lengths"]
    chosen = model(batch["seq"], batch["mask"], prompt_lengths=lengths)
    rejected = model(batch["rejected"], batch["rejected_mask"], prompt_lengths=lengths)
    return float((chosen > rejected).float().mean())
