"""Masked statistics, ragged batches, and log-probabilities of chosen tokens.

Pure functions of tensors. Masks are bool and True where an element counts; what a mask hides never reaches a result or
a gradient, be it NaN. Knows no model, no loss and no process group: statistics over several ranks come in through a
`reduce` function.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class ChosenLogprobs(NamedTuple):
    """Log-probabilities of chosen tokens, and the entropy of the distributions they were chosen from, both in nats."""

    logprobs: Tensor
    entropy: Tensor


class Moments(NamedTuple):
    """Scalars: how many elements were counted, their mean and their population variance."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    var: Tensor


def chosen_logprobs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, chunk_size: int = 1024
) -> ChosenLogprobs:
    """Log-probability of each id under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    Works through the tokens in chunks and recomputes a chunk's logits in the backward pass, so that no more than
    (chunk_size, v) logits exist at a time. The product is taken in weight's dtype, as a model's own logits are; all
    that follows is in float32 (float64 stays). It is the one path for old, new and reference log-probabilities, so that
    their ratio is exactly 1 before the first step.

    Args:
        hidden: features after the model's last norm, (..., d).
        weight: output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...). The caller has checked the range.
        temperature: divides the logits; above 0. The temperature of sampling belongs in every log-probability.
        chunk_size: tokens worked on at a time.

    Returns:
        ChosenLogprobs with `logprobs` and `entropy`, in nats, both (...) and differentiable.

    Raises:
        ValueError: if shapes do not fit, or temperature or chunk_size is not positive.
        TypeError: if ids are not integers.
    """
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[-1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., d) and (v, d) with one d"
        )
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"ids {tuple(ids.shape)} must be hidden {tuple(hidden.shape)} without its last axis")
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    _check_ids(ids)
    _check_temperature(temperature)
    compute = partial(_chunk_logprobs, temperature=temperature)
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(hidden.reshape(-1, hidden.shape[-1]).split(chunk_size), ids.reshape(-1).split(chunk_size), strict=True)
    logprobs, entropy = zip(*(compute(part, weight, chosen) for part, chosen in chunks), strict=True)
    return ChosenLogprobs(torch.cat(logprobs).reshape(ids.shape), torch.cat(entropy).reshape(ids.shape))


def logprobs_of(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability (nats) of each id under softmax(logits / temperature), in float32.

    log p = logit - logsumexp(logits), both over the temperature: exact far into the tail, where a probability clamped
    above 0 would be constant and without gradient.

    Args:
        logits: (..., v).
        ids: the chosen tokens, in [0, v), (...). The caller has checked the range.
        temperature: divides the logits; above 0.

    Returns:
        (...), float32 (float64 stays).

    Raises:
        ValueError: if ids have not the shape of logits without its last axis, or temperature is not positive.
        TypeError: if ids are not integers.
    """
    if logits.shape[:-1] != ids.shape:
        raise ValueError(f"ids {tuple(ids.shape)} must be logits {tuple(logits.shape)} without its last axis")
    _check_ids(ids)
    _check_temperature(temperature)
    scaled = at_least_float32(logits) / temperature
    return scaled.gather(-1, ids.long()[..., None])[..., 0] - scaled.logsumexp(dim=-1)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean of x where mask is True, sum(x m) / sum(m), in float32 (float64 stays); 0 where nothing is counted.

    Args:
        x: values, (...).
        mask: bool, of x's shape or of its leading axes: (b, n) masks the positions of (b, n, d).
        dim: axes of x to average over; None for all, which gives a scalar.

    Raises:
        ValueError: if mask has neither x's shape nor that of its leading axes.
        TypeError: if mask is not bool.
    """
    _check_bool(mask)
    if x.shape[: mask.ndim] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} must have the shape of x {tuple(x.shape)}, or of its leading axes")
    mask = mask[(...,) + (None,) * (x.ndim - mask.ndim)].expand_as(x)
    axes = tuple(range(x.ndim)) if dim is None else dim
    return _zero_outside(x, mask).sum(dim=axes) / mask.sum(dim=axes).clamp(min=1)


def identity(x: Tensor) -> Tensor:
    """The tensor itself: the `reduce` of a single process."""
    return x


def masked_moments(x: Tensor, mask: Tensor, *, reduce: Callable[[Tensor], Tensor] = identity) -> Moments:
    """Count, mean and population variance of x where mask is True, in float32, in two passes.

    The mean comes first and the squared deviations from it second, so that a large mean does not cancel the variance.

    Args:
        x: values, (...).
        mask: bool, of x's shape.
        reduce: sums a tensor over all ranks and returns the sum, for statistics over them all; called twice. By
            default this rank alone.

    Returns:
        Moments of scalars; an empty mask gives count 0, mean 0, variance 0.

    Raises:
        ValueError: if shapes differ.
        TypeError: if mask is not bool.
    """
    check_masked(mask, x=x)
    values = _zero_outside(x, mask)
    total, count = reduce(torch.stack([values.sum(), mask.sum().to(values.dtype)])).unbind()
    mean = total / count.clamp(min=1)
    squares = reduce(_zero_outside((values - mean).square(), mask).sum())
    return Moments(count, mean, squares / count.clamp(min=1))


def masked_whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = identity,
    eps: float = 1e-8,
) -> Tensor:
    """Shift x to mean 0 and scale it to variance 1 over the True elements; zero outside the mask.

    (x - mean) * rsqrt(var + eps), with the population variance. Call it once on a whole rollout, not on minibatches:
    one element alone is whitened to 0.

    Args:
        x: values, (...).
        mask: bool, of x's shape.
        shift_mean: False adds the mean back, so that only the scale changes (as for rewards, not advantages).
        reduce: see `masked_moments`.
        eps: added to the variance; 1e-8 as in openai/lm-human-preferences.

    Raises:
        ValueError: if shapes differ.
        TypeError: if mask is not bool.
    """
    _, mean, var = masked_moments(x, mask, reduce=reduce)
    whitened = (_zero_outside(x, mask) - mean) * torch.rsqrt(var + eps)
    return _zero_outside(whitened if shift_mean else whitened + mean, mask)


def pad_ragged(sequences: Sequence[Tensor], *, pad_value: float = 0, left: bool = False) -> tuple[Tensor, Tensor]:
    """Stack sequences of unequal length into one batch, padded on the right, or on the left.

    Args:
        sequences: at least one 1-D tensor, all of one dtype and device; a length of 0 is a row of padding.
        pad_value: fills the rest. The mask, never this value, tells padding from tokens.
        left: True aligns the ends, False the beginnings.

    Returns:
        The batch, (b, n) with n the longest length, and its mask, (b, n), True where a value of a sequence stands.

    Raises:
        ValueError: if there is no sequence, or one is not 1-D.
        TypeError: if dtypes differ.
    """
    if not sequences:
        raise ValueError("sequences is empty: give at least one 1-D tensor")
    for row, sequence in enumerate(sequences):
        if sequence.ndim != 1:
            raise ValueError(f"sequences[{row}] has shape {tuple(sequence.shape)}: it must be 1-D")
        if sequence.dtype != sequences[0].dtype:
            raise TypeError(f"sequences[{row}] is {sequence.dtype}, sequences[0] {sequences[0].dtype}: give one dtype")
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=sequences[0].device)
    mask = lengths_to_mask(lengths, max(len(sequence) for sequence in sequences))
    mask = mask.flip(-1) if left else mask
    padded = torch.full(mask.shape, pad_value, dtype=sequences[0].dtype, device=sequences[0].device)
    padded[mask] = torch.cat(list(sequences))
    return padded, mask


def lengths_to_mask(lengths: Tensor, length: int) -> Tensor:
    """Bool mask (b, length), True for the first lengths[i] places of row i.

    Args:
        lengths: integers from 0 to length, (b,).
        length: number of columns.

    Raises:
        ValueError: if lengths is not 1-D, or one is below 0 or above length.
        TypeError: if lengths are not integers.
    """
    if lengths.ndim != 1:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: it must be (b,)")
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"lengths are {lengths.dtype}: give integers")
    if bool(((lengths < 0) | (lengths > length)).any()):
        raise ValueError(f"lengths ({lengths.tolist()}) must lie between 0 and length ({length})")
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def align_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its beginning, in order; ids and mask (b, n) in, ids and mask (b, n) out."""
    order = mask.int().argsort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order), mask.gather(-1, order)


def align_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its end, in order; ids and mask (b, n) in, ids and mask (b, n) out."""
    order = mask.int().argsort(dim=-1, stable=True)
    return ids.gather(-1, order), mask.gather(-1, order)


def check_token_ids(ids: Tensor, num_tokens: int, *, name: str, allow_negative: bool = False) -> None:
    """Refuse what is not (b, n) integers from 0 to num_tokens - 1.

    Asks the device for the extremes, which waits on CUDA: call it where tokens come in from a user, not in a loop.

    Raises:
        TypeError: if ids are no tensor of integers.
        ValueError: if ids are not (b, n) with neither 0, or one is out of range (its value and place are named).
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} is a {type(ids).__name__}: give a tensor of token ids, (batch, tokens)")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} holds {ids.dtype}: token ids must be integers (ids.long())")
    if ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: it must be (batch, tokens), neither of them 0")
    low, high = (int(extreme) for extreme in ids.aminmax())
    if high < num_tokens and (low >= 0 or allow_negative):
        return
    worst = high if high >= num_tokens else low
    row, column = (ids == worst).nonzero()[0].tolist()
    hint = "; say padding by a mask, not by negative ids" if worst < 0 else ""
    raise ValueError(
        f"{name} holds the id {worst} (row {row}, place {column}): ids go from 0 to {num_tokens - 1}{hint}"
    )


def split_rows(lengths: Tensor, *, max_rows: int, max_tokens: int) -> list[Tensor]:
    """Cut rows, in their order, into batches of at most max_rows whose padded size stays within max_tokens.

    Args:
        lengths: tokens of each row, (b,).
        max_rows: rows of a batch.
        max_tokens: rows times the longest of them; a longer row is a batch of its own.

    Returns:
        Row numbers of each batch, on the device of lengths.
    """
    batches: list[list[int]] = []
    longest = 0
    for row, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if not batches or len(batches[-1]) == max_rows or (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = length
        batches[-1].append(row)
    return [torch.tensor(batch, device=lengths.device) for batch in batches]


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or untouched when it is float64: softmax, logs and sums are taken in this dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError that names every tensor with its shape unless all shapes are the same."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes must be the same: {shapes}")


def check_masked(mask: Tensor, **tensors: Tensor) -> None:
    """Raise a TypeError unless mask is bool, a ValueError with all shapes unless every tensor has the mask's."""
    _check_bool(mask)
    check_same_shape(**tensors, mask=mask)


def _chunk_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    logits = at_least_float32(F.linear(hidden.to(weight.dtype), weight)) / temperature
    logprobs = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logprobs.gather(-1, ids.long()[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(dim=-1)


def _zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    # Not x * mask: a NaN or an infinity under the mask would come through.
    return at_least_float32(x).masked_fill(~mask, 0.0)


def _check_bool(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: it must be torch.bool, True where an element counts (mask.bool())")


def _check_ids(ids: Tensor) -> None:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids are {ids.dtype}: token ids must be integers (ids.long())")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0: greedy choice has no log-probabilities")
