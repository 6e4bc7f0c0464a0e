"""Rewards, advantages and returns: the worked example, tool tokens, a loop over single tokens."""

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.advantage import gae, monte_carlo_returns, shaped_rewards
from palm_rlhf_pytorch.tensors import masked_whiten

NAN = float("nan")


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def random_rollout() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    mask[1] = True
    mask[2] = False
    return rewards, values, mask


def advantages_of_tokens(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """One row and one token at a time over the counted tokens, as a sum of discounted temporal differences."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        steps = [t for t in range(mask.shape[1]) if mask[b, t]]
        deltas = []
        for i, t in enumerate(steps):
            after = values[b, steps[i + 1]].item() if i + 1 < len(steps) else 0.0
            deltas.append(rewards[b, t].item() + gamma * after - values[b, t].item())
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * gae_lambda) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


def test_rewards_match_the_worked_example() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    scores = torch.tensor([1.0], dtype=torch.float64)
    shaped = shaped_rewards(scores, row(-1, -0.5, -2), row(-1.2, -0.4, -1.5), mask, kl_coef=0.05)
    torch.testing.assert_close(shaped.kl, row(0.2, -0.1, -0.5))
    torch.testing.assert_close(shaped.kl.sum().item(), -0.4)
    torch.testing.assert_close(shaped.rewards, row(-0.01, 0.005, 1.025))


def test_advantages_match_the_worked_example() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    result = gae(row(-0.01, 0.005, 1.025), row(0.3, 0.4, 0.6), mask, gamma=1.0, gae_lambda=0.95)
    torch.testing.assert_close(result.advantages, row(0.6683125, 0.60875, 0.425))
    torch.testing.assert_close(result.returns, row(0.9683125, 1.00875, 1.025))


def test_advantages_step_over_tool_tokens() -> None:
    mask = torch.tensor([[True, False, True, True]])
    result = gae(row(0, 0, 0, 1), row(0.3, 0.9, 0.4, 0.6), mask, gae_lambda=0.95)
    torch.testing.assert_close(result.advantages, row(0.651, 0, 0.58, 0.4))
    torch.testing.assert_close(result.returns, row(0.951, 0, 0.98, 1.0))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_advantages_equal_a_loop_over_single_tokens(gamma: float, gae_lambda: float) -> None:
    rewards, values, mask = random_rollout()
    expected = advantages_of_tokens(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    torch.testing.assert_close(gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda).advantages, expected)


def test_gae_equals_returns_minus_values_when_lambda_is_one() -> None:
    rewards, values, mask = random_rollout()
    result = gae(rewards, values, mask, gamma=0.9, gae_lambda=1.0)
    returns = monte_carlo_returns(rewards, mask, gamma=0.9)
    torch.testing.assert_close(result.advantages, (returns - values) * mask)
    torch.testing.assert_close(result.returns, returns)


def test_monte_carlo_returns_sum_what_follows() -> None:
    mask = torch.tensor([[True, True, False, True]])
    torch.testing.assert_close(monte_carlo_returns(row(1, 2, NAN, 4), mask, gamma=0.5), row(3, 4, 0, 4))


def test_values_are_shifted_along_time_not_along_the_batch() -> None:
    values = torch.arange(1.0, 10.0).reshape(3, 3)
    result = gae(torch.zeros(3, 3), values, torch.ones(3, 3, dtype=torch.bool), gae_lambda=0.0)
    assert result.advantages.tolist() == [[1, 1, -3], [1, 1, -6], [1, 1, -9]]


def test_score_stands_on_the_last_counted_token() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True], [False, True, False], [True, True, True]])
    zeros = torch.zeros(4, 3)
    shaped = shaped_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), zeros, zeros, mask, kl_coef=0.1)
    assert shaped.rewards.tolist() == [[0, 1, 0], [0, 0, 2], [0, 3, 0], [0, 0, 4]]


def test_padding_reaches_neither_rewards_nor_advantages() -> None:
    mask = torch.tensor([[True, True, False], [False, False, False]])
    dirty = torch.tensor([[-1.0, -2.0, NAN], [NAN, float("-inf"), 7.0]])
    shaped = shaped_rewards(torch.tensor([1.0, 5.0]), dirty, dirty - 0.5, mask, kl_coef=0.1)
    torch.testing.assert_close(shaped.rewards, torch.tensor([[-0.05, 0.95, 0.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(shaped.kl, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    result = gae(torch.where(mask, shaped.rewards, NAN), torch.where(mask, 0.5, NAN), mask)
    assert result.advantages[~mask].eq(0).all() and result.returns[~mask].eq(0).all()
    torch.testing.assert_close(result.returns[0, 1], torch.tensor(0.95))


def test_kl_penalty_of_one_token_moves_the_advantages() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    logprobs, values, scores = torch.full((2, 3), -1.0), torch.zeros(2, 3), torch.tensor([1.0, 1.0])
    ref_logprobs = torch.full((2, 3), -1.0)
    ref_logprobs[0, 1] = -11.0
    shaped = shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.1)
    advantages = masked_whiten(gae(shaped.rewards, values, mask, gae_lambda=1.0).advantages, mask)
    # Returns (0, 0, 1) and (1, 1, 1): mean 2/3, deviation sqrt(2)/3.
    torch.testing.assert_close(advantages, torch.tensor([[-2.0, -2.0, 1.0], [1.0, 1.0, 1.0]]) / 2**0.5)


def test_no_gradient_flows_through_rewards_and_advantages() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    leaf = torch.zeros(1, 2, requires_grad=True)
    shaped = shaped_rewards(leaf.sum(dim=1), leaf, leaf, mask, kl_coef=0.1)
    result = gae(leaf, leaf, mask)
    assert not any(tensor.requires_grad for tensor in (*shaped, *result))


def test_rewards_refuse_bad_input() -> None:
    mask, zeros = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 1\).*\(2, 3\)"):
        shaped_rewards(torch.zeros(2, 1), zeros, zeros, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"ref_logprobs \(2, 2\), mask \(2, 3\)"):
        shaped_rewards(torch.zeros(2), zeros, zeros[:, :2], mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        shaped_rewards(torch.tensor([0.0, NAN]), zeros, zeros, mask, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"kl_coef \(-0.1\)"):
        shaped_rewards(torch.zeros(2), zeros, zeros, mask, kl_coef=-0.1)
    with pytest.raises(TypeError, match="torch.bool"):
        shaped_rewards(torch.zeros(2), zeros, zeros, mask.long(), kl_coef=0.1)


def test_advantages_refuse_bad_input() -> None:
    mask, zeros = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"values \(2, 1\), mask \(2, 3\)"):
        gae(zeros, zeros[:, :1], mask)
    with pytest.raises(ValueError, match=r"gamma \(1.1\)"):
        gae(zeros, zeros, mask, gamma=1.1)
    with pytest.raises(ValueError, match=r"gae_lambda \(-1\)"):
        gae(zeros, zeros, mask, gae_lambda=-1)
    with pytest.raises(ValueError, match=r"\(2, 0\)"):
        gae(zeros[:, :0], zeros[:, :0], mask[:, :0])
