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


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
def test_chunked_loss_equals_the_plain_one_with_gradients(chunk_size: int | None) -> None:
    hidden, weight, ids, mask = random_batch()
    plain = next_token_loss(hidden @ weight.T, ids, mask=mask, ignore_index=6)
    chunked = chunked_next_token_loss(hidden, weight, ids, mask=mask, ignore_index=6, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, plain, atol=0, rtol=1e-6)
    grads = torch.autograd.grad(3 * chunked.loss, (hidden, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(3 * plain.loss, (hidden, weight)))


def test_chunked_loss_without_anything_to_leave_out_counts_every_target() -> None:
    hidden, weight, ids, _ = random_batch()
    plain = next_token_loss(hidden @ weight.T, ids)
    chunked = chunked_next_token_loss(hidden, weight, ids, ignore_index=None)
    torch.testing.assert_close(chunked, plain, atol=0, rtol=1e-6)
    assert int(chunked.num_tokens) == ids[:, 1:].numel()


def test_chunked_loss_has_the_gradient_of_finite_differences() -> None:
    hidden, weight, ids, mask = random_batch()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return chunked_next_token_loss(hidden, weight, ids, mask=mask, chunk_size=2).loss

    doubled = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(loss, doubled)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_chunked_loss_gives_a_gradient_to_what_asks_for_one(trained: str) -> None:
    hidden, weight, ids, _ = random_batch()
    (frozen,) = {hidden, weight} - {hidden if trained == "hidden" else weight}
    frozen.requires_grad_(False)
    wanted = hidden if trained == "hidden" else weight
    (grad,) = torch.autograd.grad(chunked_next_token_loss(hidden, weight, ids).loss, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(next_token_loss(hidden @ weight.T, ids).loss, wanted)[0])
    with torch.no_grad():
        assert not chunked_next_token_loss(hidden, weight, ids).loss.requires_grad


def test_chunked_loss_goes_backward_twice_with_the_same_gradient() -> None:
    hidden, weight, ids, _ = random_batch()
    loss = chunked_next_token_loss(hidden, weight, ids).loss
    once = [grad.clone() for grad in torch.autograd.grad(loss, (hidden, weight), retain_graph=True)]
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([hidden.grad, weight.grad], [2 * grad for grad in once])


def test_chunked_loss_says_that_its_gradient_has_none() -> None:
    hidden, weight, ids, _ = random_batch()
    with pytest.raises(RuntimeError, match="differentiable once.*next_token_loss"):
        torch.autograd.grad(chunked_next_token_loss(hidden, weight, ids).loss, hidden, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_chunked_loss_of_many_small_probabilities_keeps_its_gradient(dtype: torch.dtype) -> None:
    """In float16 a share of 1e-4 of a token in 300 would be 3e-7: five steps from 0."""
    hidden, weight = torch.randn(1, 300, 4).to(dtype).requires_grad_(), (torch.randn(9001, 4) * 0.1).to(dtype)
    weight.requires_grad_()
    ids = torch.randint(9001, (1, 300))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    wanted = torch.autograd.grad(1000 * next_token_loss(exact[0] @ exact[1].T, ids).loss, exact)
    found = torch.autograd.grad(1000 * chunked_next_token_loss(hidden, weight, ids).loss, (hidden, weight))
    for grad, right in zip(found, wanted, strict=True):
        assert grad.dtype == dtype
        assert float((grad.double() - right).norm() / right.norm()) < 0.02


def test_chunked_loss_keeps_no_logits() -> None:
    hidden, weight, ids = torch.randn(1, 65, 2), torch.randn(301, 2, requires_grad=True), torch.randint(301, (1, 65))
    hidden.requires_grad_()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        chunked_next_token_loss(hidden, weight, ids, chunk_size=16)
        assert max(sizes) <= weight.numel()
        sizes.clear()
        next_token_loss(hidden @ weight.T, ids)
    assert max(sizes) >= 64 * 301


def test_chunked_loss_under_autocast_rounds_products_alone() -> None:
    hidden, weight, ids, mask = random_batch()
    with torch.autocast("cpu", torch.bfloat16):
        chunked = chunked_next_token_loss(hidden, weight, ids, mask=mask, chunk_size=2)
    rounded = hidden.bfloat16().double() @ weight.bfloat16().double().T
    plain = next_token_loss(rounded.bfloat16(), ids, mask=mask)
    torch.testing.assert_close(chunked.loss, plain.loss.float(), atol=0, rtol=1e-3)
    found = torch.autograd.grad(chunked.loss, (hidden, weight))
    exact = torch.autograd.grad(next_token_loss(hidden @ weight.T, ids, mask=mask).loss, (hidden, weight))
    for grad, wanted in zip(found, exact, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, wanted, atol=2e-2 * float(wanted.abs().max()), rtol=0)


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
    with pytest.raises(ValueError, match=r"chunk_size \(0\)"):
        chunked_next_token_loss(hidden, weight, ids, chunk_size=0)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 4\)"):
        next_token_loss(hidden @ weight.T, ids, mask=mask[:, :4])
    with pytest.raises(TypeError, match="torch.bool"):
        next_token_loss(hidden @ weight.T, ids, mask=mask.long())
