"""Next-token cross entropy: hand-made probabilities, masks, and the chunked route."""

import math

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.language import chunked_next_token_loss, next_token_loss


def random_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 3, generator=generator, requires_grad=True)
    weight = torch.randn(7, 3, generator=generator, requires_grad=True)
    ids = torch.randint(7, (2, 5), generator=generator)
    return hidden, weight, ids, torch.tensor([[True] * 5, [False, True, True, False, False]])


def test_loss_predicts_each_token_from_those_before_it() -> None:
    probabilities = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.25, 0.65], [0.9, 0.05, 0.05]]])
    result = next_token_loss(probabilities.log(), torch.tensor([[2, 0, 1]]))
    # Token 0 after the first (.5), token 1 after the second (.25); the last position predicts nothing.
    torch.testing.assert_close(result.loss, torch.tensor(-(math.log(0.5) + math.log(0.25)) / 2))
    assert result.num_tokens.item() == 2


def test_loss_of_uniform_logits_is_the_logarithm_of_the_vocabulary() -> None:
    result = next_token_loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(result.loss, torch.tensor(2.0794415417))


def test_token_zero_is_learnt_by_default() -> None:
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    result = next_token_loss(logits, torch.zeros(1, 4, dtype=torch.long))
    result.loss.backward()
    assert result.num_tokens.item() == 3
    assert logits.grad is not None and logits.grad[0, :3, 0].lt(0).all()


def test_ignored_and_masked_targets_do_not_count() -> None:
    probabilities = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.1, 0.9], [0.2, 0.8]]])
    logits = probabilities.log().requires_grad_()
    ids = torch.tensor([[1, -100, 1, 0]])
    mask = torch.tensor([[True, True, True, False]])
    result = next_token_loss(logits, ids, mask=mask)
    result.loss.backward()
    torch.testing.assert_close(result.loss, torch.tensor(-math.log(0.25)))
    assert result.num_tokens.item() == 1
    assert logits.grad is not None and logits.grad[0, [0, 2, 3]].eq(0).all() and logits.grad[0, 1].ne(0).all()


def test_ignore_index_takes_a_token_out() -> None:
    probabilities = torch.tensor([[[0.5, 0.5], [0.75, 0.25], [0.1, 0.9]]])
    result = next_token_loss(probabilities.log(), torch.tensor([[1, 0, 1]]), ignore_index=0)
    torch.testing.assert_close(result.loss, torch.tensor(-math.log(0.25)))


@pytest.mark.parametrize("length", [1, 4])
def test_loss_without_targets_is_zero_with_finite_gradient(length: int) -> None:
    logits = torch.randn(2, length, 3, requires_grad=True)
    mask = torch.zeros(2, length, dtype=torch.bool)
    result = next_token_loss(logits, torch.ones(2, length, dtype=torch.long), mask=mask)
    result.loss.backward()
    assert result.loss.item() == 0 and result.num_tokens.item() == 0
    assert logits.grad is not None and logits.grad.eq(0).all()
    hidden = torch.randn(2, length, 3, requires_grad=True)
    chunked_next_token_loss(
        hidden, torch.randn(5, 3), torch.ones(2, length, dtype=torch.long), mask=mask
    ).loss.backward()
    assert hidden.grad is not None and hidden.grad.eq(0).all()


def test_chunked_loss_equals_the_plain_one_with_gradients() -> None:
    hidden, weight, ids, mask = random_batch()
    plain = next_token_loss(hidden @ weight.T, ids, mask=mask, ignore_index=6)
    chunked = chunked_next_token_loss(hidden, weight, ids, mask=mask, ignore_index=6)
    torch.testing.assert_close(chunked, plain)
    grads = torch.autograd.grad(chunked.loss, (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(plain.loss, (hidden, weight)))


def test_loss_of_half_precision_logits_is_float32() -> None:
    assert (
        next_token_loss(torch.zeros(1, 3, 5, dtype=torch.bfloat16), torch.ones(1, 3).long()).loss.dtype == torch.float32
    )


def test_loss_refuses_shapes_that_do_not_fit() -> None:
    hidden, weight, ids, mask = random_batch()
    with pytest.raises(ValueError, match=r"\(2, 5, 7\).*\(2, 4\)"):
        next_token_loss(hidden @ weight.T, ids[:, :4])
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*\(2, 4\)"):
        chunked_next_token_loss(hidden, weight, ids[:, :4])
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\)"):
        next_token_loss(hidden @ weight.T, ids, mask=mask[:, :4])
    with pytest.raises(TypeError, match="torch.bool"):
        next_token_loss(hidden @ weight.T, ids, mask=mask.long())
