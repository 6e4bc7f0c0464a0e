"""Log-probabilities of chosen tokens, from features and an output embedding, without a vocabulary a token being kept.

Logits are made a chunk of tokens at a time, reduced to a few numbers a token, and dropped. Old, new and reference
log-probabilities all come from `_softmax` here, so that their ratio is 1 before the first step: exactly, where products
round alike whatever the number of rows, else up to that rounding.
Knows no model, no loss and no batch: what is read out, the caller has picked.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.products import linear, product_dtype
from palm_rlhf_pytorch.tensors import at_least_float32

# logits of a chunk: few enough to stay in a CPU's cache between the passes over them, many enough to fill a GPU
CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**22, 2**25


class ChosenLogprobs(NamedTuple):
    """Log-probabilities of chosen tokens, and the entropy of the distributions they were chosen from, both in nats."""

    logprobs: Tensor
    entropy: Tensor


class ComparedLogprobs(NamedTuple):
    """Log-probabilities of the same tokens under a policy and a reference, and KL(policy || reference), all in nats."""

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    entropy_grad: bool = True,
    chunk_size: int | None = None,
) -> ChosenLogprobs:
    """Log-probability of each id under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    The product is taken in weight's dtype (autocast's where that is on), as a model's own logits are; all that follows
    is in float32 (float64 stays). Where the weight is frozen and the entropy needs no gradient, the forward pass keeps
    each token's gradient, d log p / d hidden = (weight[id] - softmax @ weight) / temperature, of the size of hidden,
    and the backward pass takes no product at all; else it makes the logits again, chunk by chunk.

    Args:
        hidden: features after the model's last norm, (..., d).
        weight: output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...). The caller has checked the range.
        temperature: divides the logits; above 0. The temperature of sampling belongs in every log-probability.
        entropy_grad: whether the entropy is part of a loss; False where it is only looked at.
        chunk_size: tokens worked on at a time; None for as many as make a few million logits.

    Returns:
        ChosenLogprobs with `logprobs` and `entropy`, in nats, both (...) and differentiable, once.

    Raises:
        ValueError: if shapes do not fit, or temperature or chunk_size is not positive.
        TypeError: if ids are not integers.
        RuntimeError: in a backward pass with create_graph=True.
    """
    _check_ids(ids)
    _check_temperature(temperature)
    rows, chunk_size = _rows(hidden, weight, ids, "hidden"), _chunk_size(weight, chunk_size)
    forward_grad = torch.is_grad_enabled() and rows.requires_grad and not (weight.requires_grad or entropy_grad)
    logprobs, entropy = _Chosen.apply(
        rows, weight, ids.reshape(-1).long(), temperature, chunk_size, product_dtype(weight), entropy_grad,
        forward_grad,
    )  # fmt: skip
    return ChosenLogprobs(logprobs.reshape(ids.shape), entropy.reshape(ids.shape))


@torch.no_grad()
def compared_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> ComparedLogprobs:
    """What two models say of the same tokens, each logit made once; without gradient.

    KL = sum_v p (log p - log q) over the whole vocabulary. `logprobs` and `ref_logprobs` have the bits that
    `chosen_logprobs` gives, and KL is exactly 0 between equals.

    Args:
        hidden: features of the policy, (..., d).
        weight: its output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...).
        ref_hidden: features of the reference, (..., d).
        ref_weight: its output embedding, (v, d).
        temperature: see `chosen_logprobs`, as for `chunk_size`.
        chunk_size: tokens worked on at a time.

    Raises:
        ValueError: if shapes do not fit, or temperature or chunk_size is not positive.
        TypeError: if ids are not integers.
    """
    _check_ids(ids)
    _check_temperature(temperature)
    chunk_size = _chunk_size(weight, chunk_size)
    rows, ref_rows = _rows(hidden, weight, ids, "hidden"), _rows(ref_hidden, ref_weight, ids, "ref_hidden")
    weight, ref_weight = (w.to(product_dtype(w)) for w in (weight, ref_weight))
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    parts = (x.split(chunk_size) for x in (rows, ref_rows, ids.reshape(-1).long()))
    for part, ref_part, chosen in zip(*parts, strict=True):
        own, ref = _softmax(part, weight, temperature), _softmax(ref_part, ref_weight, temperature)
        found[0].append(_logprobs(own, chosen))
        found[1].append(_logprobs(ref, chosen))
        gap = own.shifted.sub_(ref.shifted).mul_(own.odds).sum(dim=-1, keepdim=True) / own.total
        found[2].append((gap - own.total.log() + ref.total.log())[:, 0])
    return ComparedLogprobs(*(torch.cat(pieces).reshape(ids.shape) for pieces in found))


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


class _Softmax(NamedTuple):
    """Of a chunk: logits minus the largest of their row, exp of that, (c, v), and its sum, (c, 1); all its own memory.

    softmax = odds / total, log softmax = shifted - log(total).
    """

    shifted: Tensor
    odds: Tensor
    total: Tensor


def _softmax(rows: Tensor, weight: Tensor, temperature: float) -> _Softmax:
    shifted = at_least_float32(linear(rows.to(weight.dtype), weight))
    if temperature != 1:
        shifted /= temperature
    shifted -= shifted.amax(dim=-1, keepdim=True)
    odds = shifted.exp()
    return _Softmax(shifted, odds, odds.sum(dim=-1, keepdim=True))


def _logprobs(softmax: _Softmax, ids: Tensor) -> Tensor:
    return (softmax.shifted.gather(-1, ids[:, None]) - softmax.total.log())[:, 0]


class _Chosen(torch.autograd.Function):
    """Log-probabilities and entropies (m,) of rows (m, d), a chunk at a time, and their gradient by hand."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ids: Tensor, temperature: float, chunk_size: int, dtype: torch.dtype,
        entropy_grad: bool, forward_grad: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logprobs, entropies, slopes = [], [], []
        product_weight = weight.to(dtype)
        for part, chosen in zip(rows.split(chunk_size), ids.split(chunk_size), strict=True):
            softmax = _softmax(part, product_weight, temperature)
            shifted, odds, total = softmax
            logprobs.append(_logprobs(softmax, chosen))
            entropies.append((total.log() - shifted.mul_(odds).sum(dim=-1, keepdim=True) / total)[:, 0])
            if forward_grad:
                grad = odds.div_(total).neg_()
                grad.scatter_add_(-1, chosen[:, None], torch.ones_like(total))
                slopes.append(linear(grad.to(dtype), product_weight.t()).to(rows.dtype) / temperature)
        ctx.set_materialize_grads(False)
        ctx.options = temperature, chunk_size, dtype
        ctx.forward_grad = forward_grad
        ctx.save_for_backward(*((torch.cat(slopes),) if forward_grad else (rows, weight, ids)))
        entropy = torch.cat(entropies)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would leave second derivatives out without a word
            raise RuntimeError("chosen_logprobs is differentiable once: for create_graph=True use logprobs_of(logits)")
        found: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.forward_grad:
            (slopes,) = ctx.saved_tensors
            found = (None if grad_logprobs is None else (slopes * grad_logprobs[:, None]).to(slopes.dtype), None)
        elif grad_logprobs is not None or grad_entropy is not None:
            found = _gradients(ctx, grad_logprobs, grad_entropy)
        return *found, None, None, None, None, None, None


def _gradients(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and weight, from logits made again; sums over chunks are in float32."""
    rows, weight, ids = ctx.saved_tensors
    temperature, chunk_size, dtype = ctx.options
    needs_rows, needs_weight = ctx.needs_input_grad[:2]
    product_weight = weight.to(dtype)
    grad_rows = torch.empty_like(rows) if needs_rows else None
    grad_weight = at_least_float32(torch.zeros_like(weight)) if needs_weight else None
    for start in range(0, len(rows), chunk_size):
        piece = slice(start, start + chunk_size)
        part = rows[piece].to(dtype)
        shifted, odds, total = _softmax(part, product_weight, temperature)
        probs, grad = odds.div_(total), torch.zeros_like(odds)
        if grad_entropy is not None:  # dH / d logit = -p (log p + H)
            logprobs = shifted.sub_(total.log())
            entropy = -(probs * logprobs).sum(dim=-1, keepdim=True)
            grad = logprobs.add_(entropy).mul_(probs).mul_(-grad_entropy[piece, None])
        if grad_logprobs is not None:  # d log p[id] / d logit = 1[id] - p
            given = grad_logprobs[piece, None].to(probs.dtype)
            grad.addcmul_(probs, given, value=-1).scatter_add_(-1, ids[piece, None], given)
        grad = (grad / temperature).to(dtype)
        if grad_rows is not None:
            grad_rows[piece] = linear(grad, product_weight.t()).to(rows.dtype)
        if grad_weight is not None:
            grad_weight += grad.t() @ part
    return grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype)


def _rows(hidden: Tensor, weight: Tensor, ids: Tensor, name: str) -> Tensor:
    """Features as (m, d), if they fit the output embedding (v, d) and the ids (...)."""
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[-1:]:
        raise ValueError(
            f"{name} {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., d) and (v, d) with one d"
        )
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"ids {tuple(ids.shape)} must be {name} {tuple(hidden.shape)} without its last axis")
    return hidden.reshape(-1, hidden.shape[-1])


def _chunk_size(weight: Tensor, chunk_size: int | None) -> int:
    if chunk_size is None:
        return max(1, (CHUNK_LOGITS if weight.device.type == "cpu" else CHUNK_LOGITS_GPU) // len(weight))
    if chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    return chunk_size


def _check_ids(ids: Tensor) -> None:
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids are {ids.dtype}: token ids must be integers (ids.long())")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0: greedy choice has no log-probabilities")
