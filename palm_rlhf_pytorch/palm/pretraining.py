"""Pretraining: a PaLM learns to predict the next token of text, in windows drawn from all of it.

    text files -> tokens in a file (text/corpus.py) -> random windows (text/excerpts.py) -> next-token loss

Documents in a window see only themselves. Knows no command line.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.text_training import HeldOutText, TextLoop, TextLoss, TextTraining, text_bytes
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.excerpts import Excerpt, Windows, read_windows
from palm_rlhf_pytorch.text.tokenizer import Tokenizer
from palm_rlhf_pytorch.training.ranks import Ranks

MAX_WINDOWS = 256  # that a model is judged by
DEFAULT_LOOP = TextLoop(lr=3e-4, description="pretrain")


def pretrain(
    palm: PaLM,
    tokens: Excerpt | Tensor | np.ndarray,
    tokenizer: Tokenizer,
    *,
    num_steps: int,
    held_out: Excerpt | Tensor | np.ndarray | None = None,
    length: int = 256,
    batch_size: int = 8,
    documents: bool = True,
    seed: int = 0,
    loop: TextLoop = DEFAULT_LOOP,
) -> TextTraining:
    """Train all base weights on random windows of text.

    Args:
        palm: trained in place, where it is, or where the loop's accelerator places it.
        tokens: what to learn from: a part of a corpus (`split_corpus`), or ids (n,), an array or a memory map, whose
            documents end with the tokenizer's eos_token.
        tokenizer: that the ids are of.
        num_steps: optimizer steps.
        held_out: what to judge by; None judges by nothing.
        length: tokens of a window.
        batch_size: windows of a batch, in each process; an optimizer step takes `loop.accumulate` of them.
        documents: keep the documents of a window apart; False lets each see those before it.
        seed: of the windows. Dropout draws from torch's global random state.
        loop: learning rate, evaluation, checkpoints and the rest; its default learning rate suits some 100M weights,
            3e-3 a model of dim 128.

    Raises:
        ValueError: if an argument is out of range, the tokenizer has more ids than the model, there are too few
            tokens, or `fit` refuses or ends.
    """
    if tokenizer.num_tokens > palm.num_tokens:
        raise ValueError(f"tokenizer has {tokenizer.num_tokens} ids, the model num_tokens={palm.num_tokens}")
    check_length(length, palm.max_length, name="length")
    ranks = Ranks(loop.accelerator)
    windows = Windows(
        as_excerpt(tokens, tokenizer), length=length, batch_size=batch_size, seed=seed, documents=documents,
        rank=ranks.rank, ranks=ranks.count,
    )  # fmt: skip
    judged = None
    if held_out is not None:
        judged = held_out_windows(held_out, tokenizer, length=length, batch_size=batch_size, documents=documents)
    return loop.run(
        TextLoss(palm), windows, num_steps=num_steps, data=windows.digest, held_out=judged,
        parameters=palm.palm_parameters(),
    )  # fmt: skip


def as_excerpt(tokens: Excerpt | Tensor | np.ndarray, tokenizer: Tokenizer) -> Excerpt:
    """Tokens as an excerpt, whichever they are."""
    return tokens if isinstance(tokens, Excerpt) else Excerpt.of(tokens, eos_token=tokenizer.eos_token)


def held_out_windows(
    tokens: Excerpt | Tensor | np.ndarray, tokenizer: Tokenizer, *, length: int, batch_size: int = 16,
    documents: bool = True, max_windows: int = MAX_WINDOWS,
) -> HeldOutText:  # fmt: skip
    """Windows of text to judge by, which follow one another, each beginning with the last token of the one before.

    Of more than max_windows, that many are taken at even distances. A last one that would be shorter is left out.

    Args:
        tokens: see `pretrain`; at least two.
        tokenizer: that the ids are of.
        length: tokens of a window, at least two; a shorter text is one window.
        batch_size: windows at once.
        documents: keep documents apart.
        max_windows: windows at most.

    Raises:
        ValueError: if length or the number of tokens is below two, or they stand for no text.
    """
    excerpt = as_excerpt(tokens, tokenizer)
    places, length = _places(len(excerpt), length, max_windows)
    batches = [
        read_windows(excerpt, some, length, documents=documents)
        for some in torch.from_numpy(places).split(max(1, batch_size))
    ]
    num_bytes = sum(_predicted_bytes(batch, tokenizer) for batch in batches)
    if num_bytes < 1:
        raise ValueError(f"held_out ({len(excerpt)} tokens) holds no text that could be predicted; hold more out")
    return HeldOutText(batches, num_bytes)


@torch.no_grad()
def bits_per_byte(
    palm: PaLM, tokens: Tensor, *, length: int, batch_size: int = 16, max_windows: int = MAX_WINDOWS,
    tokenizer: Tokenizer | None = None,
) -> float:  # fmt: skip
    """Mean loss of a model over a text, in bits for each byte predicted.

    Windows are those of `held_out_windows`; the text is one document.

    Args:
        palm: the model; its mode is left as it was.
        tokens: ids of the text, (n,), at least two.
        length: tokens of a window, at least two.
        batch_size: windows at once.
        max_windows: windows at most.
        tokenizer: that the ids are of; None where each is a byte.

    Raises:
        ValueError: if length or the number of tokens is below two.
    """
    if tokenizer is not None:
        judged = held_out_windows(
            tokens, tokenizer, length=length, batch_size=batch_size, max_windows=max_windows, documents=False
        )
        return judged.evaluate(TextLoss(palm))["eval/bits_per_byte"]
    excerpt = Excerpt.of(tokens)
    places, length = _places(len(excerpt), length, max_windows)
    batches = [read_windows(excerpt, some, length) for some in torch.from_numpy(places).split(batch_size)]
    return HeldOutText(batches, 1).evaluate(TextLoss(palm))["eval/loss"] / math.log(2)


def _predicted_bytes(batch: Mapping[str, Tensor], tokenizer: Tokenizer) -> int:
    """Bytes of the tokens that windows predict: all but the first, and the first of each document."""
    total = 0
    for number, row in enumerate(batch["seq"]):
        firsts = batch["begins"][number].nonzero().flatten().tolist() if "begins" in batch else []
        total += text_bytes(tokenizer, row)
        total -= sum(text_bytes(tokenizer, row[place : place + 1]) for place in {0, *firsts})
    return total


def _places(tokens: int, length: int, max_windows: int) -> tuple[np.ndarray, int]:
    """Where windows begin, and their length."""
    if length < 2 or tokens < 2:
        raise ValueError(f"length ({length}) and the number of tokens ({tokens}) must be at least 2")
    length = min(length, tokens)
    count = (tokens - length) // (length - 1) + 1
    chosen = np.linspace(0, count - 1, min(count, max_windows)).round().astype(np.int64)
    return chosen * (length - 1), length
