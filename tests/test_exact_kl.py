"""Policy against reference, token by token: by hand, against whole distributions, and with gradients."""

from math import log
from typing import Any

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.exact_kl import compared_logprobs, regularized_logprobs
from palm_rlhf_pytorch.logprobs import chosen_logprobs

CUTS: list[dict[str, Any]] = [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.9}]


def random_heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """A policy, ids, and a reference unlike it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 5, 7, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 7, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(11, (3, 5), generator=generator)
    return hidden, weight, ids, {"ref_hidden": hidden.detach().flip(0), "ref_weight": weight.detach().roll(3, 0)}


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_compared_logprobs_equal_whole_distributions(chunk_size: int | None, temperature: float) -> None:
    hidden, weight, ids, reference = random_heads()
    found = compared_logprobs(hidden, weight, ids, **reference, temperature=temperature, chunk_size=chunk_size)
    own, ref = (
        (x.detach().double() @ w.detach().double().T / temperature).log_softmax(dim=-1)
        for x, w in ((hidden, weight), reference.values())
    )
    expected = [table.gather(-1, ids[..., None])[..., 0] for table in (own, ref)]
    torch.testing.assert_close(found.logprobs.double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.ref_logprobs.double(), expected[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.kl.double(), (own.exp() * (own - ref)).sum(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("chunk_size", [4, None])
def test_all_routes_give_the_same_bits(cut: dict[str, Any], chunk_size: int | None) -> None:
    hidden, weight, ids, reference = random_heads()
    options = {**cut, "temperature": 0.7, "chunk_size": chunk_size}
    compared = compared_logprobs(hidden, weight, ids, **reference, **options)
    regularized = regularized_logprobs(hidden, weight, ids, **reference, **options)
    chosen = chosen_logprobs(hidden, weight, ids, **options)
    assert torch.equal(compared.logprobs, chosen.logprobs) and torch.equal(regularized.logprobs, chosen.logprobs)
    assert torch.equal(regularized.entropy, chosen.entropy) and torch.equal(regularized.kl, compared.kl)
    assert regularized.kl.requires_grad and not compared.kl.requires_grad
    assert compared.kl.max() > 0.1


@pytest.mark.parametrize("cut", CUTS)
def test_kl_of_equals_is_exactly_zero_and_pulls_nowhere(cut: dict[str, Any]) -> None:
    hidden, weight, ids, _ = random_heads()
    reference = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    found = compared_logprobs(hidden, weight, ids, **reference, temperature=0.7, **cut)
    assert torch.equal(found.logprobs, found.ref_logprobs) and not found.kl.any()
    learnt = regularized_logprobs(hidden, weight, ids, **reference, temperature=0.7, **cut)
    assert not any(grad.any() for grad in torch.autograd.grad(learnt.kl.sum(), (hidden, weight)))


# masses of a policy and a reference; a feature of 1 makes their logarithms the logits
POLICY, REFERENCE = (torch.tensor(masses).log()[:, None] for masses in ([0.5, 0.3, 0.15, 0.05], [0.2, 0.1, 0.1, 0.6]))


@pytest.mark.parametrize(
    ("cut", "drawn", "logprob", "ref_logprob", "kl"),
    [
        # the policy keeps 0 and 1; the reference 3 and 0, and 1 because the policy does: 0.2, 0.1, 0.6 of 0.9
        ({"top_k": 2}, 0, log(5 / 8), log(2 / 9), 5 / 8 * log(5 / 8 * 9 / 2) + 3 / 8 * log(3 / 8 * 9)),
        # and 2, which was drawn, beside them: 0.5, 0.3, 0.15 of 0.95 against all four
        (
            {"top_k": 2}, 2, log(3 / 19), log(0.1),
            10 / 19 * log(10 / 19 / 0.2) + 6 / 19 * log(6 / 19 / 0.1) + 3 / 19 * log(3 / 19 / 0.1),
        ),
        # one token is all the policy has; it costs what it is worth to the reference beside its own, 0.2 of 0.8
        ({"top_p": 0.5}, 0, 0.0, log(1 / 4), log(4)),
    ],
)  # fmt: skip
def test_cut_distributions_are_compared_by_hand(
    cut: dict[str, Any], drawn: int, logprob: float, ref_logprob: float, kl: float
) -> None:
    one, ids = torch.ones(1, 1), torch.tensor([drawn])
    found = compared_logprobs(one, POLICY, ids, ref_hidden=one, ref_weight=REFERENCE, **cut)
    assert [part.item() for part in found] == pytest.approx([logprob, ref_logprob, kl], abs=1e-6)


@pytest.mark.parametrize("cut", CUTS)
def test_kl_is_the_mean_over_draws_of_the_difference_of_logprobs(cut: dict[str, Any]) -> None:
    hidden, weight, _, reference = random_heads(torch.float64)
    likeliest = (hidden @ weight.T).argmax(dim=-1)  # is in any set
    kl = compared_logprobs(hidden, weight, likeliest, **reference, **cut).kl
    mean, mass = torch.zeros_like(kl), torch.zeros_like(kl)
    for token in range(11):
        found = compared_logprobs(hidden, weight, torch.full_like(likeliest, token), **reference, **cut)
        in_set = found.kl == kl  # else it was added to it
        mean += (found.logprobs.exp() * (found.logprobs - found.ref_logprobs)).where(in_set, 0.0)
        mass += found.logprobs.exp().where(in_set, 0.0)
    torch.testing.assert_close(mass, torch.ones_like(mass))
    torch.testing.assert_close(mean, kl)
    assert kl.min() >= 0


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("frozen", "entropy_grad"), [("hidden", True), ("weight", False), ("", True)])
def test_gradients_are_those_of_finite_differences(cut: dict[str, Any], frozen: str, entropy_grad: bool) -> None:
    hidden, weight, ids, reference = random_heads(torch.float64)
    inputs = [x.detach().requires_grad_(name != frozen) for name, x in (("hidden", hidden), ("weight", weight))]

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        found = regularized_logprobs(
            hidden, weight, ids, **reference, temperature=0.7, entropy_grad=entropy_grad, chunk_size=4, **cut
        )
        assert found.entropy.requires_grad == entropy_grad
        return tuple(part for part in found if part.requires_grad)

    assert torch.autograd.gradcheck(outputs, tuple(inputs))


def test_under_autocast_gradients_are_those_of_the_plain_route() -> None:
    hidden, weight, ids, reference = random_heads()
    with torch.autocast("cpu", torch.bfloat16):
        found = regularized_logprobs(hidden, weight, ids, **reference, chunk_size=4)
        own, ref = (
            torch.nn.functional.linear(x, w).float().log_softmax(dim=-1)
            for x, w in ((hidden, weight), reference.values())
        )
    kl = (own.exp() * (own - ref)).sum(dim=-1)
    torch.testing.assert_close(found.kl, kl)
    expected = torch.autograd.grad(kl.sum(), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(found.kl.sum(), (hidden, weight)), expected, atol=3e-2, rtol=3e-2)


def test_no_logits_are_kept_for_the_backward_pass_and_no_second_derivative_is_given() -> None:
    hidden, weight, ids, reference = random_heads()
    kept: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        found = regularized_logprobs(hidden, weight, ids, **reference, chunk_size=4, top_k=3)
    assert kept and set(kept) <= {(15, 7), (11, 7), (15,)}
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(found.kl.sum(), hidden, create_graph=True)


def test_shapes_and_settings_that_do_not_fit_are_refused() -> None:
    hidden, weight, ids, reference = random_heads()
    for compare in (compared_logprobs, regularized_logprobs):
        with pytest.raises(ValueError, match=r"ref_hidden \(1, 5, 7\)"):
            compare(hidden, weight, ids, **reference | {"ref_hidden": hidden[:1]})
        with pytest.raises(ValueError, match=r"ref_weight \(9, 7\)"):
            compare(hidden, weight, ids, **reference | {"ref_weight": weight[:9]})
        with pytest.raises(ValueError, match=r"top_p \(1.5\)"):
            compare(hidden, weight, ids, **reference, top_p=1.5)
        with pytest.raises(TypeError, match="float32"):
            compare(hidden, weight, ids.float(), **reference)
