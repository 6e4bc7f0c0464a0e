"""Small runs of direct trainers, the same in every process that asks for them."""

import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.dpo import DPOTrainer
from palm_rlhf_pytorch.policy.kto import KTOTrainer
from palm_rlhf_pytorch.text.records import Pair, Text

NUM_TOKENS, EOS = 13, 2
WORDS = ("ab", "cda", "b", "eeab", "fcd", "ghijab", "ca")


class Letters:
    """A tokenizer of small letters, 3 to 12; 2 ends a text."""

    eos_token = EOS

    def __call__(self, text):
        return [3 + "abcdefghij".index(letter) for letter in text]


def tiny_palm(seed=0, **options):
    """Distributions are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        palm = PaLM(
            **{"num_tokens": NUM_TOKENS, "dim": 12, "depth": 2, "dim_head": 6, "heads": 3, "ff_mult": 2} | options
        )
        torch.nn.init.normal_(palm.token_emb.weight, std=0.4)
    return palm


def some_pairs(count=11):
    """Responses with more a's than g's are preferred; prompts repeat, labels are soft, weights differ."""
    return [
        Pair(
            chosen=Text(WORDS[row % 5], "a" * (1 + row % 3) + WORDS[row % 7]),
            rejected=Text(WORDS[row % 5], "g" * (1 + row % 4)), preference=1 - 0.1 * (row % 3), weight=1 + row % 2,
        )
        for row in range(count)
    ]  # fmt: skip


def make_dpo(**options):
    """A trainer of three steps an epoch, each in passes of few tokens."""
    settings = {"lr": 1e-2, "minibatch_size": 4, "max_batch_tokens": 40, "accelerate_kwargs": {"cpu": True}}
    given = {"palm": tiny_palm(), "pairs": some_pairs(), "tokenizer": Letters()} | settings | options
    return DPOTrainer(**given)


def make_kto(**options):
    """The same from the pairs' votes, six steps an epoch."""
    settings = {"lr": 1e-2, "minibatch_size": 4, "max_batch_tokens": 40, "accelerate_kwargs": {"cpu": True}}
    given = {"palm": tiny_palm(), "votes": some_pairs(), "tokenizer": Letters()} | settings | options
    return KTOTrainer(**given)


def trained(trainer):
    """Copies of what is trained, by name."""
    return {name: weight.detach().clone() for name, weight in trainer.policy.named_parameters() if weight.requires_grad}


def run_of(folder, *, make, epochs=2, **options):
    """Trained weights and what was told of the last step."""
    trainer = make(held_out=some_pairs(5), run_dir=folder, **options)
    found = trainer.train(epochs, use_tqdm=False)
    return trained(trainer), found
