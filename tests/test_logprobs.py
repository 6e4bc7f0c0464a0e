"""Log-probabilities of chosen tokens: by hand, and against the plain route over the whole vocabulary."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch import logprobs
from palm_rlhf_pytorch.logprobs import chosen_logprobs, logprobs_of

NAN = float("nan")


def random_head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 7, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 7, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(11, (3, 5), generator=generator)


@pytest.mark.parametrize("chunk_size", [1, 4, 15, 1024])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_chosen_logprobs_equal_log_softmax_with_gradients(chunk_size: int, temperature: float) -> None:
    hidden, weight, ids = random_head()
    chosen = chosen_logprobs(hidden, weight, ids, temperature=temperature, chunk_size=chunk_size)
    plain = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    expected = plain.gather(-1, ids[..., None])[..., 0]
    expected_entropy = torch.distributions.Categorical(logits=plain).entropy()
    torch.testing.assert_close(chosen.logprobs, expected)
    torch.testing.assert_close(chosen.entropy, expected_entropy)
    factor = torch.linspace(-1, 2, 15).reshape(3, 5)
    grads = torch.autograd.grad((chosen.logprobs * factor + chosen.entropy).sum(), (hidden, weight))
    expected_grads = torch.autograd.grad((expected * factor + expected_entropy).sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected_grads)


def test_chosen_logprobs_of_bfloat16_weights_are_float32() -> None:
    hidden, weight, ids = random_head(torch.bfloat16)
    chosen = chosen_logprobs(hidden, weight, ids, temperature=0.7, chunk_size=4)
    plain = torch.log_softmax((hidden @ weight.T).float() / 0.7, dim=-1)
    assert chosen.logprobs.dtype == chosen.entropy.dtype == torch.float32
    torch.testing.assert_close(chosen.logprobs, plain.gather(-1, ids[..., None])[..., 0])
    chosen.logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16 and weight.grad.isfinite().all()


def test_chosen_logprobs_are_the_same_bits_with_and_without_gradient() -> None:
    hidden, weight, ids = random_head()
    with torch.no_grad():
        old = chosen_logprobs(hidden, weight, ids, chunk_size=4).logprobs
    assert torch.equal(old, chosen_logprobs(hidden, weight, ids, chunk_size=4).logprobs)


def test_chosen_logprobs_keep_no_logits_for_the_backward_pass() -> None:
    hidden, weight, ids = random_head()
    kept: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        chosen_logprobs(hidden, weight, ids, chunk_size=4)
    assert not [shape for shape in kept if len(shape) == 2 and shape[-1] == 11 and shape != (11, 7)]


def test_chosen_logprobs_of_no_token_are_empty() -> None:
    hidden, weight, ids = random_head()
    chosen = chosen_logprobs(hidden[:0], weight, ids[:0])
    assert chosen.logprobs.shape == (0, 5)
    chosen.logprobs.sum().backward()


@pytest.mark.parametrize("cut", [{}, {"top_k": 3, "top_p": 0.95}])
@pytest.mark.parametrize("entropy_grad", [True, False])
@pytest.mark.parametrize("frozen", ["hidden", "weight", ""])
def test_gradients_are_those_of_finite_differences(cut: dict[str, Any], entropy_grad: bool, frozen: str) -> None:
    hidden, weight, ids = random_head(torch.float64)
    inputs = [x.detach().requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("weight", weight))]

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = chosen_logprobs(hidden, weight, ids, temperature=0.7, entropy_grad=entropy_grad, chunk_size=4, **cut)
        assert found.entropy.requires_grad == entropy_grad
        return tuple(found)[: 1 + entropy_grad]

    assert torch.autograd.gradcheck(outputs, tuple(inputs))


@pytest.mark.parametrize("entropy_grad", [True, False])
def test_backward_pass_makes_logits_again_only_where_it_must(
    entropy_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, ids = random_head()
    plain = torch.log_softmax(hidden @ weight.T / 0.7, dim=-1).gather(-1, ids[..., None])[..., 0]
    factor = torch.linspace(-1, 2, 15).reshape(3, 5)
    (expected,) = torch.autograd.grad((plain * factor).sum(), hidden)
    chosen = chosen_logprobs(hidden, weight.detach(), ids, temperature=0.7, entropy_grad=entropy_grad, chunk_size=4)
    products = []
    monkeypatch.setattr(logprobs, "linear", lambda x, w: products.append(x.shape) or torch.nn.functional.linear(x, w))
    (found,) = torch.autograd.grad((chosen.logprobs * factor).sum(), hidden)
    torch.testing.assert_close(found, expected)
    assert len(products) == (8 if entropy_grad else 0)  # of 4 chunks: logits, and their gradient's product


def test_autocast_multiplies_in_bfloat16_forwards_and_backwards() -> None:
    hidden, weight, ids = random_head()
    factor = torch.linspace(-1, 2, 15).reshape(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        plain = torch.nn.functional.linear(hidden, weight)
        assert plain.dtype == torch.bfloat16
        expected = torch.log_softmax(plain.float(), dim=-1).gather(-1, ids[..., None])[..., 0]
        entire = chosen_logprobs(hidden, weight, ids, chunk_size=4).logprobs
        quick = chosen_logprobs(hidden, weight.detach(), ids, entropy_grad=False, chunk_size=4).logprobs
    assert torch.equal(entire, quick) and entire.dtype == torch.float32
    torch.testing.assert_close(entire, expected)
    expected_grads = torch.autograd.grad((expected * factor).sum(), (hidden, weight))
    grads = torch.autograd.grad((entire * factor).sum(), (hidden, weight))
    torch.testing.assert_close(grads, expected_grads, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(torch.autograd.grad((quick * factor).sum(), hidden)[0], grads[0], atol=2e-2, rtol=2e-2)


def test_second_derivative_is_refused() -> None:
    hidden, weight, ids = random_head()
    chosen = chosen_logprobs(hidden, weight, ids).logprobs.sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(chosen, hidden, create_graph=True)


# mass 0.1, 0.4, 0.05, 0.3, 0.15
FIVE = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()[:, None]


@pytest.mark.parametrize(
    ("cut", "chosen", "others"),
    [
        ({"top_k": 2}, 0.4, [0.3]),
        ({"top_k": 2}, 0.15, [0.4, 0.3]),  # what was drawn stays, beside the two
        ({"top_p": 0.75}, 0.3, [0.4, 0.15]),
        ({"top_p": 0.75}, 0.05, [0.4, 0.3, 0.15]),
        ({"top_k": 3, "top_p": 0.8}, 0.3, [0.4]),  # of the three the first two hold 0.82
        ({"top_k": 1}, 0.4, []),
    ],
)
def test_logprobs_of_a_cut_distribution_by_hand(cut: dict[str, Any], chosen: float, others: list[float]) -> None:
    ids = (FIVE[:, 0] - math.log(chosen)).abs().argmin()[None]
    found = chosen_logprobs(torch.ones(1, 1), FIVE, ids, **cut)
    left = [p / (chosen + sum(others)) for p in (chosen, *others)]
    assert found.logprobs.item() == pytest.approx(math.log(left[0]), abs=1e-6)
    assert found.entropy.item() == pytest.approx(-sum(p * math.log(p) for p in left), abs=1e-6)


def test_gradient_of_a_cut_distribution_leaves_out_what_is_cut() -> None:
    # softmax over tokens 1, 3 and, drawn, 4: 8/17, 6/17, 3/17
    logits = FIVE.T.clone().requires_grad_()
    found = chosen_logprobs(logits, torch.eye(5), torch.tensor([4]), top_k=2)
    (grad,) = torch.autograd.grad(found.logprobs.sum(), logits)
    torch.testing.assert_close(grad, torch.tensor([[0.0, -8 / 17, 0.0, -6 / 17, 14 / 17]]))


def test_entropy_of_uniform_distribution_is_plus_its_logarithm() -> None:
    chosen = chosen_logprobs(torch.zeros(1, 3), torch.ones(8, 3), torch.tensor([5]))
    torch.testing.assert_close(chosen.entropy, torch.tensor([2.0794415417]))
    torch.testing.assert_close(chosen.logprobs, torch.tensor([-2.0794415417]))


def test_logprobs_are_exact_in_the_tail_with_gradient() -> None:
    logits = torch.tensor([[0.0, -60.0]], requires_grad=True)
    logprobs = logprobs_of(logits, torch.tensor([1]))
    assert logprobs.item() == -60.0
    (grad,) = torch.autograd.grad(logprobs.sum(), logits)
    assert grad.tolist() == [[-1.0, 1.0]]
    chosen = chosen_logprobs(logits, torch.eye(2), torch.tensor([1])).logprobs
    assert chosen.item() == -60.0
    (grad,) = torch.autograd.grad(chosen.sum(), logits)
    assert grad.tolist() == [[-1.0, 1.0]]


def test_logprobs_divide_logits_by_the_temperature() -> None:
    logits = torch.tensor([[math.log(0.5), math.log(0.3), math.log(0.2)]])
    # At temperature 1/2 probabilities are squared: .25, .09, .04 of .38.
    logprobs = logprobs_of(logits, torch.tensor([1]), temperature=0.5)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.09 / 0.38)]))


def test_logprobs_of_half_precision_logits_are_float32() -> None:
    logprobs = logprobs_of(torch.zeros(2, 20_000, dtype=torch.float16), torch.tensor([0, 19_999]))
    torch.testing.assert_close(logprobs, torch.full((2,), -math.log(20_000)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_logprobs_refuse_temperature_not_above_zero(temperature: float) -> None:
    hidden, weight, ids = random_head()
    with pytest.raises(ValueError, match="temperature"):
        chosen_logprobs(hidden, weight, ids, temperature=temperature)
    with pytest.raises(ValueError, match="temperature"):
        logprobs_of(hidden, ids, temperature=temperature)


def test_logprobs_refuse_shapes_that_do_not_fit() -> None:
    hidden, weight, ids = random_head()
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5, 7\)"):
        logprobs_of(hidden, ids[:, :4])
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 5, 7\)"):
        chosen_logprobs(hidden, weight, ids[:, :4])
    with pytest.raises(ValueError, match=r"\(3, 5, 7\).*\(7, 11\)"):
        chosen_logprobs(hidden, weight.T, ids)
    for name, value in {"chunk_size": 0, "top_k": 0, "top_p": 1.5}.items():
        with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
            chosen_logprobs(hidden, weight, ids, **{name: value})
    with pytest.raises(TypeError, match="float32"):
        logprobs_of(hidden, ids.float())
