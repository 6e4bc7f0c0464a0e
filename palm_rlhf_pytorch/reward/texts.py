"""What a judge is given: tokens, which of them are real, which are the prompt, which it pools; and their labels.

Checks a user's tensors and puts them in one form. Knows no model. Padding may stand on either side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf_pytorch.tensors import check_token_ids


class Texts(NamedTuple):
    """A checked batch, (b, n) each.

    `seq` ids; `mask` True on real tokens, None where all are; `prompt_mask` True on the prompt; `pooled` True on the
    tokens whose features are averaged, at least one a row.
    """

    seq: Tensor
    mask: Tensor | None
    prompt_mask: Tensor
    pooled: Tensor


class Reading(NamedTuple):
    """What a judge's head says of texts in the labels' unit: `scores` (b,); with bins the ratings' `logits` (b, c)."""

    scores: Tensor
    logits: Tensor | None


def checked_texts(
    seq: Tensor,
    mask: Tensor | None,
    prompt_mask: Tensor | None,
    prompt_lengths: Tensor | None,
    *,
    num_tokens: int,
    negative_is_padding: bool,
    pool_prompt: bool,
    pool_last: bool,
    rejected: bool = False,
) -> Texts:
    """Check one batch of texts.

    Args:
        seq: token ids, (b, n).
        mask: True on real tokens, (b, n); None for all. What it hides may be any id.
        prompt_mask: True on the prompt's tokens, (b, n).
        prompt_lengths: real tokens of each prompt, (b,), in place of prompt_mask.
        num_tokens: ids go from 0 to num_tokens - 1.
        negative_is_padding: take negative ids for padding where there is no mask.
        pool_prompt: pool all real tokens, not the response's alone.
        pool_last: pool the last real token alone.
        rejected: name the arguments as those of the rejected texts.

    Raises:
        TypeError: if ids or lengths are not integers, or masks not bool.
        ValueError: if shapes, ids or lengths do not fit, the prompt is given twice, or a row has nothing to pool.
    """
    prefix, name = ("rejected_", "rejected") if rejected else ("", "seq")
    if prompt_mask is not None and prompt_lengths is not None:
        raise ValueError(f"{prefix}prompt_mask and {prefix}prompt_lengths say the same thing: give one of them")
    if mask is None and negative_is_padding:
        check_token_ids(seq, num_tokens, name=name, allow_negative=True)
        mask = seq >= 0 if bool((seq < 0).any()) else None
    if mask is not None:
        _check_mask(mask, seq, name=f"{prefix}mask", of=name)
        seq = seq.masked_fill(~mask, 0)
    check_token_ids(seq, num_tokens, name=name)
    real = torch.ones_like(seq, dtype=torch.bool) if mask is None else mask
    if prompt_mask is not None:
        _check_mask(prompt_mask, seq, name=f"{prefix}prompt_mask", of=name)
    elif prompt_lengths is not None:
        _check_lengths(prompt_lengths, seq, name=f"{prefix}prompt_lengths")
        prompt_mask = _first_tokens(real, prompt_lengths)
    else:
        prompt_mask = torch.zeros_like(real)
    pooled = real if pool_prompt else real & ~prompt_mask
    empty = ~pooled.any(dim=1)
    if bool(empty.any()):
        what = f"real token ({prefix}mask)" if pool_prompt else f"response token ({prefix}mask & ~{prefix}prompt_mask)"
        raise ValueError(
            f"{name_rows(empty)} of {name} without any {what}: nothing there to score; leave out such rows"
        )
    if pool_last:
        pooled = real & (real.cumsum(dim=1) == real.sum(dim=1, keepdim=True))
    return Texts(seq, mask, prompt_mask, pooled)


def same_prompt_lengths(texts: Texts) -> Tensor:
    """Real tokens of each prompt, (b,), for another response to the same prompts.

    Raises:
        ValueError: if a prompt is not the beginning of its text, so that its length does not tell it.
    """
    real = _real(texts)
    prompt = texts.prompt_mask & real
    lengths = prompt.sum(dim=1)
    scattered = (prompt != (_first_tokens(real, lengths) & real)).any(dim=1)
    if bool(scattered.any()):
        raise ValueError(
            f"prompt_mask of {name_rows(scattered)} is not the beginning of the text: give rejected_prompt_mask too"
        )
    return lengths


def join(first: Texts, second: Texts) -> Texts:
    """Two batches as one, (2b, n), padded on the right to the longer n."""
    length = max(first.seq.shape[1], second.seq.shape[1])
    masked = first.mask is not None or second.mask is not None or first.seq.shape != second.seq.shape

    def stack(upper: Tensor, lower: Tensor) -> Tensor:
        return torch.cat([F.pad(part, (0, length - part.shape[1])) for part in (upper, lower)])

    return Texts(
        stack(first.seq, second.seq),
        stack(_real(first), _real(second)) if masked else None,
        stack(first.prompt_mask, second.prompt_mask),
        stack(first.pooled, second.pooled),
    )


def check_labels(labels: Tensor, *, batch: int, num_bins: int, lowest: int) -> None:
    """Refuse labels that do not fit the head.

    Args:
        labels: one for each text, (b,).
        batch: b.
        num_bins: ratings, 0 for a scalar head.
        lowest: the lowest rating.

    Raises:
        TypeError: if bins get floats, or a scalar head gets integers.
        ValueError: if the shape is not (b,), a rating is out of range, or a number is not finite; rows are named.
    """
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {tuple(labels.shape)}: give one for each text, ({batch},)")
    if num_bins:
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            raise TypeError(f"labels are {labels.dtype}: bins take integers (labels.long())")
        wrong = (labels < lowest) | (labels > lowest + num_bins - 1)
        rule = f"from {lowest} to {lowest + num_bins - 1} with {num_bins} bins; label_offset says which is the lowest"
    else:
        if not labels.is_floating_point():
            raise TypeError(f"labels are {labels.dtype}: a scalar head takes floats (labels.float())")
        wrong, rule = ~labels.isfinite(), "finite; leave out texts without a rating"
    if bool(wrong.any()):
        raise ValueError(f"labels ({labels[wrong][:5].tolist()} in {name_rows(wrong)}) must be {rule}")


def name_rows(chosen: Tensor) -> str:
    """The True rows of (b,) in words: "rows 0, 3", at most five of them and their number."""
    rows = chosen.nonzero().flatten().tolist()
    listed = ", ".join(str(row) for row in rows[:5])
    return f"{'row' if len(rows) == 1 else 'rows'} {listed}" + (f", ... ({len(rows)} in all)" if len(rows) > 5 else "")


def _real(texts: Texts) -> Tensor:
    return torch.ones_like(texts.prompt_mask) if texts.mask is None else texts.mask


def _first_tokens(real: Tensor, lengths: Tensor) -> Tensor:
    """True up to the first lengths[i] real tokens of row i, (b, n); padding before them is included."""
    return real.cumsum(dim=1) <= lengths[:, None]


def _check_mask(mask: Tensor, seq: Tensor, *, name: str, of: str) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is {mask.dtype}: it must be torch.bool, True where a token counts ({name}.bool())")
    if mask.shape != seq.shape:
        raise ValueError(f"{name} {tuple(mask.shape)} must have the shape of {of} {tuple(seq.shape)}")


def _check_lengths(lengths: Tensor, seq: Tensor, *, name: str) -> None:
    batch, length = seq.shape
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"{name} are {lengths.dtype}: give integers ({name}.long())")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} {tuple(lengths.shape)} must be one number for each text, ({batch},)")
    wrong = (lengths < 0) | (lengths > length)
    if bool(wrong.any()):
        raise ValueError(
            f"{name} ({lengths[wrong][:5].tolist()} in {name_rows(wrong)}) must lie between 0 and the {length} tokens"
        )
