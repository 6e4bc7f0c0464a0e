"""Log-probabilities of chosen tokens, from features and an output embedding, without a vocabulary a token being kept.

Logits are made a chunk of tokens at a time, reduced to a few numbers a token, and dropped. Old, new and reference
log-probabilities all come from `Readout.softmax` here, so that their ratio is 1 before the first step: exactly, where
products round alike whatever the number of rows, else up to that rounding.
Knows no model, no loss and no batch: what is read out, the caller has picked. `exact_kl` compares two models.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.products import linear, product_dtype, transposed
from palm_rlhf_pytorch.tensors import at_least_float32
from palm_rlhf_pytorch.truncation import Truncation

# logits of a chunk: few enough to stay in a CPU's cache between the passes over them, many enough to fill a GPU
CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**22, 2**25


class ChosenLogprobs(NamedTuple):
    """Log-probabilities of chosen tokens, and the entropy of the distributions they were chosen from, both in nats."""

    logprobs: Tensor
    entropy: Tensor


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    entropy_grad: bool = True,
    chunk_size: int | None = None,
) -> ChosenLogprobs:
    """Log-probability of each id under softmax(hidden @ weight.T / temperature), and that distribution's entropy.

    The product is taken in weight's dtype (autocast's where that is on), as a model's own logits are; all that follows
    is in float32 (float64 stays). Where the weight is frozen and the entropy needs no gradient, the forward pass keeps
    each token's gradient, d log p / d hidden = (weight[id] - softmax @ weight) / temperature, of the size of hidden,
    and the backward pass takes no product at all; else it makes the logits again, chunk by chunk.

    With top_k or top_p the distribution is the cut one, over the tokens that `Truncation` keeps and the chosen one,
    which so always has a probability. Gradients take the set as it is.

    Args:
        hidden: features after the model's last norm, (..., d).
        weight: output embedding, (v, d).
        ids: the chosen tokens, in [0, v), (...). The caller has checked the range.
        temperature: divides the logits; above 0. The temperature of sampling belongs in every log-probability.
        top_k: the cut of sampling, which belongs there too; None for none.
        top_p: likewise.
        entropy_grad: whether the entropy is part of a loss; False where it is only looked at.
        chunk_size: tokens worked on at a time; None for as many as make a few million logits.

    Returns:
        ChosenLogprobs with `logprobs` and `entropy`, in nats, both (...) and differentiable, once.

    Raises:
        ValueError: if shapes do not fit, or temperature, top_k, top_p or chunk_size is out of range.
        TypeError: if ids or top_k are not integers.
        RuntimeError: in a backward pass with create_graph=True.
    """
    check_ids(ids)
    readout = Readout.of(weight, temperature=temperature, truncation=Truncation(top_k, top_p), chunk_size=chunk_size)
    rows = flat_rows(hidden, weight, ids, "hidden")
    forward_grad = torch.is_grad_enabled() and rows.requires_grad and not (weight.requires_grad or entropy_grad)
    logprobs, entropy = _Chosen.apply(rows, weight, ids.reshape(-1).long(), readout, entropy_grad, forward_grad)
    return ChosenLogprobs(logprobs.reshape(ids.shape), entropy.reshape(ids.shape))


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
    check_ids(ids)
    _check_temperature(temperature)
    scaled = at_least_float32(logits) / temperature
    return scaled.gather(-1, ids.long()[..., None])[..., 0] - scaled.logsumexp(dim=-1)


class Softmax(NamedTuple):
    """Of a chunk: logits minus the largest of their row, exp of that, (c, v), and its sum, (c, 1); all its own memory.

    softmax = odds / total, log softmax = shifted - log(total). Where a distribution is cut, `kept` is True on what
    stays, (c, v), and odds are 0 elsewhere.
    """

    shifted: Tensor
    odds: Tensor
    total: Tensor
    kept: Tensor | None

    def logprobs(self, ids: Tensor) -> Tensor:
        """Log-probabilities (c,) of ids (c,)."""
        return (self.shifted.gather(-1, ids[:, None]) - self.total.log())[:, 0]

    def entropy_(self) -> Tensor:
        """Entropy (c, 1); uses `shifted` up."""
        return self.total.log() - self.shifted.mul_(self.odds).sum(dim=-1, keepdim=True) / self.total

    def slope_(self, ids: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
        """Gradient of the tempered logits, (c, v), by those of log-probabilities and entropies, (c,).

        Uses `shifted` up, and leaves probabilities in the place of `odds`.
        """
        probs, slope = self.odds.div_(self.total), torch.zeros_like(self.odds)
        if grad_entropy is not None:  # dH / d logit = -p (log p + H)
            logprobs = self.shifted.sub_(self.total.log())
            entropy = -(probs * logprobs).sum(dim=-1, keepdim=True)
            slope = logprobs.add_(entropy).mul_(probs).mul_(-grad_entropy[:, None])
        if grad_logprobs is not None:  # d log p[id] / d logit = 1[id] - p
            given = grad_logprobs[:, None].to(probs.dtype)
            slope.addcmul_(probs, given, value=-1).scatter_add_(-1, ids[:, None], given)
        return slope


class Readout(NamedTuple):
    """How rows become distributions: what divides logits, what cuts them, how many rows at a time, in which dtype."""

    temperature: float
    truncation: Truncation
    chunk_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, *, temperature: float, truncation: Truncation, chunk_size: int | None) -> "Readout":
        """By an output embedding (v, d).

        Raises:
            ValueError: if a number is out of range.
            TypeError: if top_k is no integer.
        """
        _check_temperature(temperature)
        truncation.check()
        if chunk_size is None:
            chunk_size = max(1, (CHUNK_LOGITS if weight.device.type == "cpu" else CHUNK_LOGITS_GPU) // len(weight))
        if chunk_size < 1:
            raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
        return cls(temperature, truncation, chunk_size, product_dtype(weight))

    def softmax(self, rows: Tensor, weight: Tensor, ids: Tensor, *, also: Tensor | None = None) -> Softmax:
        """Of rows (c, d) by an embedding (v, d) in the readout's dtype.

        Args:
            rows: features.
            weight: the embedding.
            ids: the chosen tokens, (c,), which no cut leaves out.
            also: True on what else it does not, (c, v).
        """
        shifted = at_least_float32(linear(rows.to(weight.dtype), weight))
        if self.temperature != 1:
            shifted /= self.temperature
        shifted -= shifted.amax(dim=-1, keepdim=True)
        odds, kept = shifted.exp(), self.truncation.kept(shifted)
        if kept is not None:
            kept.scatter_(-1, ids[:, None], True)
            kept = kept if also is None else kept.logical_or_(also)
            odds.masked_fill_(~kept, 0.0)
        return Softmax(shifted, odds, odds.sum(dim=-1, keepdim=True), kept)

    def gradients(
        self, rows: Tensor, weight: Tensor, needed: tuple[bool, bool], slope: Callable[[slice, Tensor, Tensor], Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of rows (m, d) and weight (v, d), a chunk at a time; sums over chunks are in float32.

        Args:
            rows: features.
            weight: the embedding.
            needed: which of the two.
            slope: gives, of some rows (which of them, the rows, the embedding in the readout's dtype), the gradient of
                the tempered logits, (c, v).
        """
        product_weight = weight.to(self.dtype)
        grad_rows = torch.empty_like(rows) if needed[0] else None
        grad_weight = at_least_float32(torch.zeros_like(weight)) if needed[1] else None
        for start in range(0, len(rows), self.chunk_size):
            piece = slice(start, start + self.chunk_size)
            part = rows[piece].to(self.dtype)
            grad = (slope(piece, part, product_weight) / self.temperature).to(self.dtype)
            if grad_rows is not None:
                grad_rows[piece] = linear(grad, product_weight.t()).to(rows.dtype)
            if grad_weight is not None:
                grad_weight += transposed(grad, part)
        return grad_rows, None if grad_weight is None else grad_weight.to(weight.dtype)


def flat_rows(hidden: Tensor, weight: Tensor, ids: Tensor, name: str) -> Tensor:
    """Features as (m, d), if they fit the output embedding (v, d) and the ids (...)."""
    if weight.ndim != 2 or hidden.shape[-1:] != weight.shape[-1:]:
        raise ValueError(
            f"{name} {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (..., d) and (v, d) with one d"
        )
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(f"ids {tuple(ids.shape)} must be {name} {tuple(hidden.shape)} without its last axis")
    return hidden.reshape(-1, hidden.shape[-1])


def pieces(piece: slice, *grads: Tensor | None) -> Iterator[Tensor | None]:
    """A piece of each gradient, of those there are."""
    return (grad if grad is None else grad[piece] for grad in grads)


def differentiable_once(name: str) -> None:
    """Raise in a backward pass that is itself recorded: once_differentiable would say nothing of what it leaves out."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once: for create_graph=True use logprobs_of(logits)")


class _Chosen(torch.autograd.Function):
    """Log-probabilities and entropies (m,) of rows (m, d), a chunk at a time, and their gradient by hand."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ids: Tensor, readout: Readout, entropy_grad: bool, forward_grad: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, slopes = [], [], []
        product_weight = weight.to(readout.dtype)
        for part, chosen in zip(rows.split(readout.chunk_size), ids.split(readout.chunk_size), strict=True):
            softmax = readout.softmax(part, product_weight, chosen)
            logprobs.append(softmax.logprobs(chosen))
            entropies.append(softmax.entropy_()[:, 0])
            if forward_grad:
                grad = softmax.odds.div_(softmax.total).neg_()
                grad.scatter_add_(-1, chosen[:, None], torch.ones_like(softmax.total))
                slope = linear(grad.to(readout.dtype), product_weight.t())
                slopes.append(slope.to(rows.dtype) / readout.temperature)
        ctx.set_materialize_grads(False)
        ctx.readout, ctx.forward_grad = readout, forward_grad
        ctx.save_for_backward(*((torch.cat(slopes),) if forward_grad else (rows, weight, ids)))
        entropy = torch.cat(entropies)
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        differentiable_once("chosen_logprobs")
        found: tuple[Tensor | None, Tensor | None] = (None, None)
        if ctx.forward_grad:
            (slopes,) = ctx.saved_tensors
            found = (None if grad_logprobs is None else (slopes * grad_logprobs[:, None]).to(slopes.dtype), None)
        elif grad_logprobs is not None or grad_entropy is not None:
            rows, weight, ids = ctx.saved_tensors

            def slope(piece: slice, part: Tensor, product_weight: Tensor) -> Tensor:
                softmax = ctx.readout.softmax(part, product_weight, ids[piece])
                return softmax.slope_(ids[piece], *pieces(piece, grad_logprobs, grad_entropy))

            found = ctx.readout.gradients(rows, weight, ctx.needs_input_grad[:2], slope)
        return *found, None, None, None, None


def check_ids(ids: Tensor) -> None:
    """Raise a TypeError unless ids are integers."""
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids are {ids.dtype}: token ids must be integers (ids.long())")


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature ({temperature}) must be above 0: greedy choice has no log-probabilities")
