"""Next-token cross entropy under a mask: the loss of pretraining and of supervised fine-tuning.

Pure functions of tensors. Knows no model and no tokenizer: what is padding, prompt or response, a mask says.
Bengio et al., "A Neural Probabilistic Language Model", https://www.jmlr.org/papers/v3/bengio03a.html
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch.products import linear, product_dtype, transposed
from palm_rlhf_pytorch.tensors import at_least_float32, check_masked

# logits of a chunk: few enough to be small beside a model, many enough that the products are efficient
CHUNK_LOGITS, CHUNK_LOGITS_GPU = 2**23, 2**27


class LanguageLoss(NamedTuple):
    """Scalars: `loss`, nats per predicted token, and `num_tokens`, how many tokens were predicted."""

    loss: Tensor
    num_tokens: Tensor


def next_token_loss(
    logits: Tensor, ids: Tensor, *, mask: Tensor | None = None, ignore_index: int = -100
) -> LanguageLoss:
    """Cross entropy of each token given those before it, averaged over the tokens that count.

    L = -mean(log softmax(logits[:, i])[ids[:, i + 1]])

    Args:
        logits: (b, n, v).
        ids: the tokens the logits were computed from, (b, n).
        mask: True where a token counts as a target, (b, n); None for all. A response mask trains on responses only.
            With padding on the left, leave out each row's first token too: padding alone would have to predict it.
        ignore_index: a target with this id does not count. -100 as in torch, no token's id; id 0 is a token like any.

    Returns:
        LanguageLoss in float32. Without any target (also when n is 1) the loss is 0 and its gradient zero.

    Raises:
        ValueError: if shapes do not fit.
        TypeError: if mask is not bool.
    """
    if ids.ndim != 2 or logits.shape[:-1] != ids.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and ids {tuple(ids.shape)} must be (b, n, v) and (b, n)")
    counted = _counted_targets(ids, mask, ignore_index)
    targets = ids[:, 1:].long().masked_fill(~counted, -100)
    loss = F.cross_entropy(
        at_least_float32(rearrange(logits[:, :-1], "b n v -> (b n) v")),
        rearrange(targets, "b n -> (b n)"),
        ignore_index=-100,
        reduction="sum",
    )
    return LanguageLoss(loss / counted.sum().clamp(min=1), counted.sum())


def chunked_next_token_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    ignore_index: int | None = -100,
    chunk_size: int | None = None,
) -> LanguageLoss:
    """The same loss from features and output embedding, without a (b, n, v) tensor of logits ever being kept.

    Where gradients are wanted they are formed while a chunk's logits are at hand, in the forward pass: no product is
    taken twice. Logits are in weight's dtype, or autocast's; the rest, and the sums over chunks, in float32.

    Args:
        hidden: features after the model's last norm, (b, n, d).
        weight: output embedding, (v, d).
        ids: see `next_token_loss`, as for `mask` and `ignore_index`.
        mask: True where a token counts as a target, (b, n); None for all.
        ignore_index: a target with this id does not count; None where there is none, which spares a look at the ids.
        chunk_size: tokens worked on at a time; None for what suits the device.

    Returns:
        LanguageLoss, equal to that of `next_token_loss(hidden @ weight.T, ids, ...)`; differentiable once.

    Raises:
        ValueError: if shapes do not fit, or chunk_size is not positive.
        TypeError: if mask is not bool.
        RuntimeError: in a backward pass with create_graph=True; `next_token_loss` can do that.
    """
    if ids.ndim != 2 or hidden.shape[:-1] != ids.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and ids {tuple(ids.shape)} must be (b, n, d) and (b, n)")
    if chunk_size is None:
        budget = CHUNK_LOGITS if hidden.device.type == "cpu" else CHUNK_LOGITS_GPU
        chunk_size = max(1, budget // len(weight))
    elif chunk_size < 1:
        raise ValueError(f"chunk_size ({chunk_size}) must be at least 1")
    if mask is None and ignore_index is None:
        rows, targets = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten().long()
    else:
        counted = _counted_targets(ids, mask, ignore_index)
        rows, targets = hidden[:, :-1][counted], ids[:, 1:][counted].long()
    loss: Tensor = _MeanLoss.apply(rows, weight, targets, product_dtype(weight), chunk_size, torch.is_grad_enabled())
    return LanguageLoss(loss, torch.tensor(len(rows), device=loss.device))


def target_mask(real: Tensor | None, starts: Tensor | None, chosen: Tensor | None) -> Tensor | None:
    """Tokens that a loss is over, (b, n): those chosen that have a token of their own text before them.

    Args:
        real: True on tokens, False on padding, (b, n); None where all are real.
        starts: True on the first token of each document, (b, n); None where a row is one.
        chosen: True on tokens that are to be targets, (b, n); None for all.

    Returns:
        The mask, None where every token counts (a row's first one has no logits in any case).
    """
    if real is not None:  # the first real token after padding has nothing to be predicted from
        real = real & F.pad(real[:, :-1], (1, 0), value=False)
    parts = [part for part in (real, None if starts is None else ~starts, chosen) if part is not None]
    return None if not parts else torch.stack(parts).all(dim=0)


class _MeanLoss(torch.autograd.Function):
    """Mean cross entropy of rows (m, d) against targets (m,), and its gradients d L / d rows, d L / d weight.

    With p = softmax(rows @ weight.T) and y the targets' one-hots, G = (p - y) / m: d rows = G @ weight and
    d weight = G.T @ rows. The factor 1 / m goes to the small matrices, the features. Gradients
    wait in float32 for the factor of the loss: a gradient scaler's, say.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, chunk_size: int, grad: bool
    ) -> Tensor:
        needs_rows, needs_weight = (grad and needed for needed in ctx.needs_input_grad[:2])
        scale = 1 / max(1, len(rows))
        grad_rows = torch.empty_like(at_least_float32(rows)) if needs_rows else None
        grad_weight: Tensor | None = None
        losses = []
        with torch.autocast(rows.device.type, enabled=False):
            factor = weight.to(dtype)
            exact = torch.float32 if dtype == torch.float16 else dtype  # float16 has no room for small p, nor for 1 / m
            grad_factor = factor.to(exact)
            for start in range(0, len(rows), chunk_size):
                piece = slice(start, start + chunk_size)
                part, chosen = rows[piece], targets[piece, None]
                logprobs = at_least_float32(linear(part.to(dtype), factor)).log_softmax(dim=-1)
                losses.append(-logprobs.gather(-1, chosen).sum())
                if not (needs_rows or needs_weight):
                    continue
                error = logprobs.exp_().scatter_add_(-1, chosen, logprobs.new_full((), -1).expand_as(chosen)).to(exact)
                if grad_rows is not None:
                    grad_rows[piece] = linear(error, grad_factor.t()) * scale
                if needs_weight:
                    grad_weight = _add_product(grad_weight, error, (at_least_float32(part) * scale).to(exact))
        if needs_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        ctx.dtypes = rows.dtype, weight.dtype
        ctx.save_for_backward(grad_rows, grad_weight)
        return torch.stack(losses).sum() * scale if losses else at_least_float32(rows).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would say nothing where the loss itself is what is derived
            raise RuntimeError("the chunked loss is differentiable once: take next_token_loss to use create_graph=True")
        found = ctx.saved_tensors
        if grad.device.type != "cpu" or float(grad) != 1:  # asking CUDA would wait for it
            found = tuple(None if x is None else x * grad for x in found)
        cast = (None if x is None else x.to(dtype) for x, dtype in zip(found, ctx.dtypes, strict=True))
        return *cast, None, None, None, None


def _add_product(total: Tensor | None, error: Tensor, rows: Tensor) -> Tensor:
    """Of total + error.T @ rows the sum, in place, in at least float32; None is nothing yet."""
    if total is None:
        return at_least_float32(transposed(error, rows))
    return total.addmm_(error.t(), rows) if error.dtype == total.dtype else total.add_(transposed(error, rows))


def _counted_targets(ids: Tensor, mask: Tensor | None, ignore_index: int | None) -> Tensor:
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    check_masked(mask, ids=ids)
    return mask[:, 1:] if ignore_index is None else mask[:, 1:] & (ids[:, 1:] != ignore_index)
