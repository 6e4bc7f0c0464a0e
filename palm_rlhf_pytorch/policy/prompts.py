"""Prompts to learn from: read from ids or text, checked once, handed out in an order that a seed fixes.

An epoch is a permutation of all prompts, drawn from (seed, epoch) alone: where training stands is two numbers.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import align_left, check_token_ids, lengths_to_mask, pad_ragged
from palm_rlhf_pytorch.text.datasets import read_prompts
from palm_rlhf_pytorch.text.tokenizer import encode_with


class PromptBatch(NamedTuple):
    """Some prompts: ids (b, p), mask (b, p), True on real tokens, and which of all prompts they are, (b,)."""

    ids: Tensor
    mask: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "PromptBatch":
        """The same on a device."""
        return PromptBatch(*(part.to(device) for part in self))


class Prompts:
    """All prompts, padded on the right: ids (m, p) and lengths (m,), at least 1; on the CPU."""

    def __init__(self, ids: Tensor, lengths: Tensor, *, seed: int) -> None:
        """Keep checked prompts.

        Args:
            ids: (m, p), padded on the right.
            lengths: real tokens of each, (m,).
            seed: of the order.
        """
        self.ids, self.lengths, self.seed = ids, lengths, seed
        self.taken = 0  # prompts handed out since the start, over all processes
        self._order: tuple[tuple[int, int], Tensor] | None = None
        self._digest: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def next_rows(self, count: int) -> Tensor:
        """Row numbers of the next prompts, (count,): each prompt once before any comes again."""
        rows = []
        while count > 0:
            epoch, place = divmod(self.taken, len(self))
            part = self._epoch_order(epoch)[place : place + count]
            rows.append(part)
            self.taken += len(part)
            count -= len(part)
        return torch.cat(rows)

    def next_share(self, count: int, rank: int, *, of: int) -> Tensor:
        """One rank's equal share of the next `count` rows, rounded up; all `of` ranks must take theirs."""
        if count < 1:
            raise ValueError(f"count ({count}) of prompts must be at least 1")
        share = -(-count // of)
        return self.next_rows(share * of)[rank * share : (rank + 1) * share]

    def digest(self) -> str:
        """SHA-256 of all prompts: what a run learns from must be what it learnt from before."""
        if self._digest is None:
            found = hashlib.sha256(self.lengths.numpy().tobytes())
            found.update(self.ids.contiguous().numpy().data)
            self._digest = found.hexdigest()
        return self._digest

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids (b, p) and mask (b, p) of some prompts, padded to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        return self.ids[rows, :longest], lengths_to_mask(lengths, longest)

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != (self.seed, epoch):
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._order = ((self.seed, epoch), torch.from_numpy(order))
        return self._order[1]


def prompts_from(
    *,
    num_tokens: int,
    seed: int,
    prompt_token_ids: Tensor | Sequence[Tensor] | None = None,
    prompt_mask: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
    pad_value: int | None = None,
    prompts: Sequence[str] | None = None,
    prompts_path: str | Path | None = None,
    tokenizer: object | None = None,
) -> Prompts:
    """Prompts from exactly one source.

    Args:
        num_tokens: vocabulary size, which ids must stay below.
        seed: of the order in which they are handed out.
        prompt_token_ids: ids, (m, p), or a list of 1-D tensors of any lengths.
        prompt_mask: True on real tokens of (m, p), padding on either side.
        prompt_lengths: real tokens at the beginning of each row of (m, p).
        pad_value: without mask or lengths, the run of this id at the end of a row is padding; elsewhere it is a token.
        prompts: texts.
        prompts_path: a UTF-8 file, one prompt a line, blank lines skipped.
        tokenizer: makes ids of texts: any callable, or an object with `encode`; Hugging Face's too.

    Raises:
        TypeError: if ids are not integers, or prompts are one text.
        ValueError: if there is no source or more than one, no prompt, an empty or all-padding one, an id out of
            range, or padding that cannot be told from tokens.
    """
    sources = {"prompt_token_ids": prompt_token_ids, "prompts": prompts, "prompts_path": prompts_path}
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise ValueError(f"give one source of prompts out of {', '.join(sources)}, not {' and '.join(given) or 'none'}")
    if prompt_token_ids is not None and tokenizer is not None:
        raise ValueError("prompt_token_ids are ids already: leave the tokenizer out, or give prompts as text")
    if pad_value is not None and not isinstance(prompt_token_ids, Tensor):
        raise ValueError(
            f"pad_value ({pad_value}) goes with a (prompts, tokens) tensor; lists and texts have no padding"
        )
    if isinstance(prompts, str):
        raise TypeError(f"prompts is one text ({prompts[:40]!r}): give a list of texts, [prompt]")
    if prompt_token_ids is None:
        if tokenizer is None:
            raise ValueError(f"{given[0]} are text: give the tokenizer that makes token ids of them")
        texts = read_prompts(prompts_path) if prompts_path is not None else list(prompts or ())
        if not texts:
            raise ValueError(f"{given[0]} ({prompts_path or 'an empty list'}) holds no prompt")
        prompt_token_ids = encode_with(tokenizer, texts)
    if isinstance(prompt_token_ids, Tensor):
        ids, lengths = _from_matrix(prompt_token_ids, prompt_mask, prompt_lengths, pad_value)
    else:
        if prompt_mask is not None or prompt_lengths is not None:
            raise ValueError(
                "prompt_mask and prompt_lengths go with a (prompts, tokens) tensor; a list says its lengths"
            )
        ids, lengths = _from_list(prompt_token_ids)
    check_token_ids(ids, num_tokens, name="prompt_token_ids")
    return Prompts(ids.long(), lengths, seed=seed)


def padding_of(tokenizer: object | None, pad_value: int | None) -> int | None:
    """The id that pads, if the caller or the tokenizer names one: pad_token_id in Hugging Face's, pad_token in ours."""
    found = [getattr(tokenizer, name, None) for name in ("pad_token_id", "pad_token")]
    return next((value for value in (pad_value, *found) if isinstance(value, int)), None)


def one_prompt(prompt: Tensor, *, num_tokens: int, pad_value: int | None, seq_len: int) -> Tensor:
    """A single prompt, checked, its padding cut off, (p,).

    Raises:
        TypeError: if ids are not integers.
        ValueError: if it is not one prompt (p,), empty, all padding, out of the vocabulary, or not below seq_len.
    """
    if prompt.ndim != 1:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: give one prompt, (p,)")
    only = prompts_from(num_tokens=num_tokens, seed=0, prompt_token_ids=prompt[None], pad_value=pad_value)
    length = int(only.lengths[0])
    if length >= seq_len:
        raise ValueError(f"seq_len ({seq_len}) counts the prompt: it must be above the prompt's {length} tokens")
    return only.ids[0, :length]


def _from_list(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if len(rows) == 0:
        raise ValueError("prompt_token_ids is an empty list: give at least one prompt")
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise TypeError(f"prompt {number} is a {type(row).__name__}: it must be a tensor of token ids")
        if row.ndim != 1 or len(row) == 0:
            raise ValueError(f"prompt {number} has shape {tuple(row.shape)}: it must be 1-D, with at least one token")
        if row.is_floating_point() or row.dtype == torch.bool:
            raise TypeError(f"prompt {number} holds {row.dtype}: token ids must be integers (ids.long())")
    ids, mask = pad_ragged([row.detach().cpu().long() for row in rows])
    return ids, mask.sum(dim=-1)


def _from_matrix(
    ids: Tensor, mask: Tensor | None, lengths: Tensor | None, pad_value: int | None
) -> tuple[Tensor, Tensor]:
    """Rows padded on the right, and their lengths."""
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"prompt_token_ids has shape {tuple(ids.shape)}: it must be (prompts, tokens), neither of them 0"
        )
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"prompt_token_ids holds {ids.dtype}: token ids must be integers (ids.long())")
    if mask is not None and lengths is not None:
        raise ValueError("give prompt_mask or prompt_lengths, not both: they say the same")
    ids = ids.detach().cpu()
    if mask is not None:
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(f"prompt_mask ({tuple(mask.shape)}, {mask.dtype}) must be boolean, {tuple(ids.shape)}")
        ids, mask = align_left(ids, mask.cpu())
        ids = ids.masked_fill(~mask, 0)
        lengths = mask.sum(dim=-1)
    elif lengths is not None:
        if lengths.shape != ids.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"prompt_lengths ({tuple(lengths.shape)}, {lengths.dtype}) must be whole numbers, ({len(ids)},)"
            )
        lengths = lengths.cpu()
        ids = ids.masked_fill(~lengths_to_mask(lengths, ids.shape[1]), 0)
    elif pad_value is not None:
        lengths = _without_trailing(ids, pad_value)
        ids = ids.masked_fill(~lengths_to_mask(lengths, ids.shape[1]), 0)
    else:
        lengths = torch.full((len(ids),), ids.shape[1])
    if int(lengths.min()) < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} is all padding: a prompt takes at least one token")
    return ids, lengths


def _without_trailing(ids: Tensor, pad_value: int) -> Tensor:
    """Length of each row up to its last token that is not pad_value."""
    real = ids != pad_value
    lengths = torch.where(real, torch.arange(1, ids.shape[1] + 1), 0).amax(dim=-1)
    left = ~real[:, 0] & (lengths > 0)
    if bool(left.any()):
        row = int(left.int().argmax())
        raise ValueError(
            f"prompt {row} begins with pad_value ({pad_value}): whether that is padding on the left or a token cannot"
            " be told; give prompt_mask or prompt_lengths"
        )
    return lengths
