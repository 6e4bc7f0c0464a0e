"""The same tokens under a policy and a reference: log-probabilities of both, and their KL over the whole vocabulary.

As in `logprobs`, logits are made a chunk of tokens at a time and dropped; the KL is exact, no estimate from the tokens
drawn (Schulman, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html, has those).
Where top-k or top-p cut the policy, the reference is cut to its own likeliest tokens and to whatever the policy keeps.
So the policy can choose nothing that has no log-probability under the reference, a KL is finite and at least 0, exactly
0 between equals, and the mean over what the policy draws of the difference of log-probabilities. Were the reference cut
to the policy's tokens alone, a policy that keeps one token would cost nothing, whichever it is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.logprobs import Readout, Softmax, check_ids, differentiable_once, flat_rows, pieces
from palm_rlhf_pytorch.truncation import Truncation


class ComparedLogprobs(NamedTuple):
    """Log-probabilities of the same tokens under a policy and a reference, and KL(policy || reference), all in nats."""

    logprobs: Tensor
    ref_logprobs: Tensor
    kl: Tensor


class RegularizedLogprobs(NamedTuple):
    """Log-probabilities of tokens under a policy, its entropy, and KL(policy || reference), all in nats."""

    logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def compared_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    chunk_size: int | None = None,
) -> ComparedLogprobs:
    """What two models say of the same tokens, each logit made once; without gradient.

    KL = sum_v p (log p - log q) over the whole vocabulary. `logprobs` have the bits that `chosen_logprobs` gives, as
    have `ref_logprobs` where nothing is cut, and KL is exactly 0 between equals.

    Args:
        hidden: features of the policy, (..., d).
        weight: its output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...).
        ref_hidden: features of the reference, (..., d).
        ref_weight: its output embedding, (v, d).
        temperature: see `chosen_logprobs`, as for the others.
        top_k: likewise.
        top_p: likewise.
        chunk_size: likewise.

    Raises:
        ValueError: if shapes do not fit, or temperature, top_k, top_p or chunk_size is out of range.
        TypeError: if ids or top_k are not integers.
    """
    check_ids(ids)
    readout = Readout.of(weight, temperature=temperature, truncation=Truncation(top_k, top_p), chunk_size=chunk_size)
    rows, ref_rows = _both_rows(hidden, weight, ids, ref_hidden, ref_weight)
    weight, ref_weight = weight.to(readout.dtype), ref_weight.to(readout.dtype)
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    parts = (x.split(readout.chunk_size) for x in (rows, ref_rows, ids.reshape(-1).long()))
    for part, ref_part, chosen in zip(*parts, strict=True):
        own, ref = _both(readout, part, weight, ref_part, ref_weight, chosen)
        found[0].append(own.logprobs(chosen))
        found[1].append(ref.logprobs(chosen))
        found[2].append(_kl_(own, ref))
    return ComparedLogprobs(*(torch.cat(each).reshape(ids.shape) for each in found))


def regularized_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    entropy_grad: bool = True,
    chunk_size: int | None = None,
) -> RegularizedLogprobs:
    """What `chosen_logprobs` gives, and the exact KL to a reference, with gradients of the policy for all three.

    dKL / d logit_j = p_j (log p_j - log q_j - KL) / temperature. The values have the bits of `chosen_logprobs` and
    `compared_logprobs`. The backward pass makes the logits of both models again, chunk by chunk; of the reference
    nothing gets a gradient, and where the distributions are cut the sets stay as they are.

    Args:
        hidden: features of the policy, (..., d).
        weight: its output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...).
        ref_hidden: features of the reference, (..., d).
        ref_weight: its output embedding, (v, d).
        temperature: see `chosen_logprobs`, as for the others.
        top_k: likewise.
        top_p: likewise.
        entropy_grad: likewise.
        chunk_size: likewise.

    Raises:
        ValueError: if shapes do not fit, or temperature, top_k, top_p or chunk_size is out of range.
        TypeError: if ids or top_k are not integers.
        RuntimeError: in a backward pass with create_graph=True.
    """
    check_ids(ids)
    readout = Readout.of(weight, temperature=temperature, truncation=Truncation(top_k, top_p), chunk_size=chunk_size)
    rows, ref_rows = _both_rows(hidden, weight, ids, ref_hidden, ref_weight)
    found = _Regularized.apply(
        rows, weight, ref_rows.detach(), ref_weight.detach(), ids.reshape(-1).long(), readout, entropy_grad
    )
    return RegularizedLogprobs(*(each.reshape(ids.shape) for each in found))


class _Regularized(torch.autograd.Function):
    """Log-probabilities, entropies and KL (m,) of rows (m, d), a chunk at a time, and their gradient by hand."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ref_rows: Tensor, ref_weight: Tensor, ids: Tensor, readout: Readout,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        weights = weight.to(readout.dtype), ref_weight.to(readout.dtype)
        for part, ref_part, chosen in zip(*(x.split(readout.chunk_size) for x in (rows, ref_rows, ids)), strict=True):
            own, ref = _both(readout, part, weights[0], ref_part, weights[1], chosen)
            found[0].append(own.logprobs(chosen))
            found[2].append(_kl_(own, ref))
            found[1].append(own.entropy_()[:, 0])
        ctx.set_materialize_grads(False)
        ctx.readout = readout
        ctx.save_for_backward(rows, weight, ref_rows, ref_weight, ids)
        logprobs, entropy, kl = (torch.cat(each) for each in found)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy, kl

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable_once("regularized_logprobs")
        rows, weight, ref_rows, ref_weight, ids = ctx.saved_tensors
        readout: Readout = ctx.readout
        product_ref_weight = ref_weight.to(readout.dtype)

        def slope(piece: slice, part: Tensor, product_weight: Tensor) -> Tensor:
            own, ref = _both(readout, part, product_weight, ref_rows[piece], product_ref_weight, ids[piece])
            grad_logprobs, grad_entropy, grad_kl = pieces(piece, *grads)
            # log p - log q, in the reference's memory
            apart = ref.shifted.neg_().add_(own.shifted).add_(ref.total.log() - own.total.log())
            slope = own.slope_(ids[piece], grad_logprobs, grad_entropy)
            if grad_kl is None:
                return slope
            probs = own.odds
            kl = (probs * apart).sum(dim=-1, keepdim=True)
            return slope.add_(apart.sub_(kl).mul_(probs).mul_(grad_kl[:, None]))

        found = readout.gradients(rows, weight, ctx.needs_input_grad[:2], slope)
        return *found, None, None, None, None, None


def _both_rows(
    hidden: Tensor, weight: Tensor, ids: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Features of both as (m, d), if they fit."""
    if len(ref_weight) != len(weight):
        raise ValueError(f"ref_weight {tuple(ref_weight.shape)} and weight {tuple(weight.shape)} must have one v")
    return flat_rows(hidden, weight, ids, "hidden"), flat_rows(ref_hidden, ref_weight, ids, "ref_hidden")


def _both(
    readout: Readout, rows: Tensor, weight: Tensor, ref_rows: Tensor, ref_weight: Tensor, ids: Tensor
) -> tuple[Softmax, Softmax]:
    """Policy and reference of a chunk."""
    own = readout.softmax(rows, weight, ids)
    return own, readout.softmax(ref_rows, ref_weight, ids, also=own.kept)


def _kl_(own: Softmax, ref: Softmax) -> Tensor:
    """KL (c,) of a chunk; uses the reference's `shifted` up."""
    gap = ref.shifted.neg_().add_(own.shifted).mul_(own.odds).sum(dim=-1, keepdim=True) / own.total
    return (gap - own.total.log() + ref.total.log())[:, 0]
