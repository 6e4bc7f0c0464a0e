"""What users hand to a language model, checked before any work is lost: tokens, masks, prompts, lengths.

Pure functions; each message names the argument, its value, and what would do. Knows no module.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import check_masked, check_token_ids


class Prompts(NamedTuple):
    """Prompts that have been checked.

    ids: (b, p).
    mask: True on real tokens, (b, p), or None where all are.
    room: new tokens each row may take, at least 1, (b,).
    """

    ids: Tensor
    mask: Tensor | None
    room: Tensor


def check_tokens(
    seq: Tensor, mask: Tensor | None, *, num_tokens: int, causal: bool, predicting: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Tokens and mask of a forward pass.

    Args:
        seq: token ids, (b, n); negative ones are padding where the model is not causal.
        mask: True on real tokens, (b, n), or None.
        num_tokens: vocabulary of the model.
        causal: whether each token sees only those before it.
        predicting: whether the loss of predicting each token is asked for (`return_loss`).

    Returns:
        Ids that are all in range, (b, n), and the mask of the real ones, None where all are.

    Raises:
        TypeError: if seq does not hold integers, or mask is not bool.
        ValueError: if shapes do not fit, an id is out of range, a row is all padding, or there is nothing to predict.
    """
    if mask is not None and isinstance(seq, Tensor):
        check_masked(mask, seq=seq)
        seq = seq.masked_fill(~mask, 0)  # what a mask hides may be any id
    check_token_ids(seq, num_tokens, name="seq", allow_negative=not causal)
    if predicting and not causal:
        raise ValueError("return_loss: with causal=False a token sees its successor; build the model with causal=True")
    if predicting and seq.shape[1] < 2:
        raise ValueError("return_loss: seq has 1 token a row; predicting a next token takes at least 2")
    seq = seq.long()
    if not causal:
        mask = seq >= 0 if mask is None else mask & (seq >= 0)
        seq = seq.clamp(min=0)
    if mask is None or bool(mask.all()):
        return seq, None
    _check_rows(mask, name="seq")
    return seq, mask


def check_marks(seq: Tensor, *, documents: Tensor | None, loss_mask: Tensor | None, predicting: bool) -> None:
    """Raise unless documents are integers and loss_mask is bool, both of seq's shape, and there is a loss to mask.

    Args:
        seq: token ids, (b, n).
        documents: number of each token's document, (b, n), or None.
        loss_mask: True on targets of the loss, (b, n), or None.
        predicting: whether the loss is asked for (`return_loss`).
    """
    if documents is not None:
        if documents.is_floating_point() or documents.is_complex() or documents.dtype == torch.bool:
            raise TypeError(f"documents are {documents.dtype}: give integers, the same one on all tokens of a document")
        if documents.shape != seq.shape:
            raise ValueError(f"documents {tuple(documents.shape)} must have the shape of seq {tuple(seq.shape)}")
    if loss_mask is not None:
        check_masked(loss_mask, seq=seq)
        if not predicting:
            raise ValueError("loss_mask says which tokens the loss is over: give return_loss=True with it")


def check_prompts(
    prompt: Tensor, prompt_mask: Tensor | None, *, num_tokens: int, seq_len: int, device: torch.device
) -> Prompts:
    """What a user gave as prompts, checked and moved to the device.

    Args:
        prompt: token ids, (n,) or (b, n).
        prompt_mask: True on real tokens, of the same shape, or None where all are.
        num_tokens: vocabulary of the model.
        seq_len: tokens of prompt and response together, for each row.
        device: where the model is.

    Raises:
        TypeError: if prompt does not hold integers, or prompt_mask is not bool.
        ValueError: if shapes do not fit, an id is out of range, a row is empty or all padding, or a prompt leaves no
            room within seq_len.
    """
    if prompt.dim() == 1:
        prompt, prompt_mask = prompt[None], None if prompt_mask is None else prompt_mask[None]
    if prompt_mask is not None:
        check_prompt_mask(prompt_mask, prompt)
        prompt = prompt.masked_fill(~prompt_mask, 0)  # what a mask hides may be any id
    check_token_ids(prompt, num_tokens, name="prompt")
    if prompt_mask is None:
        lengths = torch.full((prompt.shape[0],), prompt.shape[1], device=device)
    else:
        prompt_mask = prompt_mask.to(device)
        lengths = prompt_mask.sum(dim=-1)
    if int(lengths.max()) >= seq_len:
        raise ValueError(
            f"seq_len ({seq_len}) counts the prompt: it must be above the longest prompt's {int(lengths.max())} tokens"
        )
    return Prompts(prompt.to(device, torch.long), prompt_mask, seq_len - lengths)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Raise a ValueError unless the generator draws on the device."""
    if generator is not None and generator.device.type != device.type:
        raise ValueError(
            f"generator draws on {generator.device}, the model is on {device}; use torch.Generator(device={device})"
        )


def check_prompt_mask(prompt_mask: Tensor, prompt: Tensor) -> None:
    """Raise unless the mask is bool, has the prompt's shape, and leaves a token in each row."""
    if prompt_mask.dtype != torch.bool:
        raise TypeError(f"prompt_mask is {prompt_mask.dtype}: it must be torch.bool, True on real tokens")
    if prompt_mask.shape != prompt.shape:
        raise ValueError(f"prompt_mask {tuple(prompt_mask.shape)} must have the prompt's shape {tuple(prompt.shape)}")
    _check_rows(prompt_mask, name="prompt")


def check_length(tokens: int, limit: int | float, *, name: str, positions: Tensor | None = None) -> None:
    """Raise a ValueError if rows are longer than the model can place.

    Args:
        tokens: length of the rows, padding included.
        limit: tokens that a row may have.
        name: of the argument to blame.
        positions: of the tokens; a row may be too long only by its padding. Looked at when it matters, since that
            waits for the device.
    """
    if tokens > limit and (positions is None or int(positions.max()) >= limit):
        raise ValueError(
            f"{name} ({tokens} tokens): xPos scales leave the range of the model's dtype beyond {limit}; build it with"
            " a larger rotary_xpos_scale_base, or None, or in bfloat16 or float32 if it is float16"
        )


def _check_rows(mask: Tensor, *, name: str) -> None:
    empty = ~mask.any(dim=-1)
    if bool(empty.any()):
        raise ValueError(f"{name}: row {int(empty.int().argmax())} is all padding; a row takes at least one real token")
