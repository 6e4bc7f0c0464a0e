"""Masked statistics, and ragged batches.

Pure functions of tensors. Masks are bool and True where an element counts; what a mask hides never reaches a result or
a gradient, be it NaN. Knows no model, no loss and no process group: statistics over several ranks come in through a
`reduce` function.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Scalars: how many elements were counted, their mean and their population variance."""

    count: Tensor  # type: ignore[assignment]  # shadows tuple.count
    mean: Tensor
    var: Tensor


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


class RunningMoments:
    """Count, mean and population variance of values that come in parts, in float64.

    Parts are joined as in Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample Variance": like two passes,
    it loses nothing to a large mean.
    """

    def __init__(self) -> None:
        self.count = self.mean = self.squares = 0.0  # squares: sum of squared deviations from the mean

    def add(self, x: Tensor, mask: Tensor) -> None:
        """Take in x where mask is True; both of one shape, on the CPU."""
        check_masked(mask, x=x)
        values = x.detach()[mask].double()
        count = len(values)
        if count == 0:
            return
        mean = float(values.mean())
        delta, total = mean - self.mean, self.count + count
        self.squares += float((values - mean).square().sum()) + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def compute(self, reduce: Callable[[Tensor], Tensor] = identity) -> Moments:
        """Moments of all that was taken in, over all ranks, float64; see `masked_moments` for what is empty."""
        total, count = reduce(torch.tensor([self.count * self.mean, self.count], dtype=torch.float64)).unbind()
        mean = total / count.clamp(min=1)
        own = self.squares + self.count * (self.mean - mean) ** 2
        return Moments(count, mean, reduce(own) / count.clamp(min=1))


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


def split_rows(lengths: Sequence[int], *, max_rows: int, max_tokens: int | None = None) -> list[list[int]]:
    """Cut rows into batches of similar length, so that little is padding; the longest come first.

    Args:
        lengths: tokens of each row, (b,), as numbers: asking a device for each batch would make it wait.
        max_rows: rows of a batch.
        max_tokens: rows times the longest of them; a longer row is a batch of its own. None for no limit.

    Returns:
        Row numbers of each batch, rising within it. Together they hold every row once.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        size = len(batches[-1]) + 1 if batches else 1
        full = not batches or size > max_rows
        if full or (max_tokens is not None and size * lengths[batches[-1][0]] > max_tokens):
            batches.append([])
        batches[-1].append(row)
    return [sorted(batch) for batch in batches]


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


def _zero_outside(x: Tensor, mask: Tensor) -> Tensor:
    # Not x * mask: a NaN or an infinity under the mask would come through.
    return at_least_float32(x).masked_fill(~mask, 0.0)


def _check_bool(mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: it must be torch.bool, True where an element counts (mask.bool())")
