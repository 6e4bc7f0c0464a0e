"""PPO on a contextual bandit whose best policy is known: reference * exp(score / kl_coef).

A table of logits and one of values, one-token responses, no model: only the objectives are at work. The settings in
which the test means something: scores of deviation 1 and kl_coef of .5 to 1. At .05 the best policy is within .002 of a
one-hot, and everything that climbs passes. Whitening leaves the optimum where it is but magnifies what noise is left,
so the learning rate goes to 0: held constant the policy stays about .01 away. The step must be large enough to arrive
(.02 at first; with 1e-5 nothing moves), and each KL estimator but k1, put in the reward, must arrive elsewhere.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.logprobs import logprobs_of
from palm_rlhf_pytorch.objectives.advantage import gae, shaped_rewards
from palm_rlhf_pytorch.objectives.policy_gradient import kl_abs, kl_exact, kl_k2, kl_k3, policy_loss, value_loss
from palm_rlhf_pytorch.tensors import masked_whiten

NUM_CONTEXTS, NUM_ACTIONS, BATCH, NUM_ROLLOUTS, NUM_EPOCHS, LR = 2, 6, 512, 300, 4, 0.02

Reward = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def k1_reward(scores: Tensor, logits: Tensor, ref_logits: Tensor, actions: Tensor, kl_coef: float) -> Tensor:
    logprobs, ref_logprobs = logprobs_of(logits, actions), logprobs_of(ref_logits, actions)
    mask = torch.ones_like(actions, dtype=torch.bool)
    return shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef).rewards


def reward_with(estimator: Callable[[Tensor, Tensor], Tensor]) -> Reward:
    def reward(scores: Tensor, logits: Tensor, ref_logits: Tensor, actions: Tensor, kl_coef: float) -> Tensor:
        kl = estimator(logprobs_of(logits, actions), logprobs_of(ref_logits, actions))
        return scores[:, None] - kl_coef * kl

    return reward


def exact_reward(scores: Tensor, logits: Tensor, ref_logits: Tensor, actions: Tensor, kl_coef: float) -> Tensor:
    return scores[:, None] - kl_coef * kl_exact(logits, ref_logits)


def total_variation(policy: Tensor, optimum: Tensor) -> float:
    return (policy - optimum).abs().sum(dim=-1).mean().item() / 2


def distance_after_ppo(reward: Reward, *, kl_coef: float) -> tuple[float, float]:
    """Mean total variation between policy and optimum over the contexts, before and after training."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(NUM_CONTEXTS, NUM_ACTIONS, generator=generator)
    table = (table - table.mean(dim=-1, keepdim=True)) / table.std(dim=-1, correction=0, keepdim=True)
    reference = 0.5 * torch.randn(NUM_CONTEXTS, NUM_ACTIONS, generator=generator)
    optimum = (reference + table / kl_coef).softmax(dim=-1)
    policy = reference.clone().requires_grad_()
    values = torch.zeros(NUM_CONTEXTS, requires_grad=True)
    optimizer = torch.optim.Adam([policy, values], lr=LR, eps=1e-5)
    before = total_variation(policy.detach().softmax(dim=-1), optimum)
    mask = torch.ones(BATCH, 1, dtype=torch.bool)
    for rollout in range(NUM_ROLLOUTS):
        optimizer.param_groups[0]["lr"] = LR * (1 - rollout / NUM_ROLLOUTS)
        with torch.no_grad():
            contexts = torch.randint(NUM_CONTEXTS, (BATCH, 1), generator=generator)
            old_logits, old_values = policy[contexts], values[contexts].clone()
            actions = torch.multinomial(old_logits[:, 0].softmax(dim=-1), 1, generator=generator)
            old_logprobs = logprobs_of(old_logits, actions)
            rewards = reward(table[contexts, actions][:, 0], old_logits, reference[contexts], actions, kl_coef)
            advantages, returns = gae(rewards, old_values, mask)
            advantages = masked_whiten(advantages, mask)
        for _ in range(NUM_EPOCHS):
            surrogate = policy_loss(logprobs_of(policy[contexts], actions), old_logprobs, advantages, mask)
            critic = value_loss(values[contexts], old_values, returns, mask)
            optimizer.zero_grad()
            (surrogate.loss + critic.loss).backward()
            optimizer.step()
    return before, total_variation(policy.detach().softmax(dim=-1), optimum)


@pytest.mark.parametrize("kl_coef", [0.5, 1.0])
def test_ppo_reaches_the_known_optimum(kl_coef: float) -> None:
    before, after = distance_after_ppo(k1_reward, kl_coef=kl_coef)
    assert before > 0.3
    assert after < 0.01


@pytest.mark.parametrize(
    "reward",
    [reward_with(kl_k2), reward_with(kl_k3), reward_with(kl_abs), exact_reward],
    ids=["k2", "k3", "abs", "exact"],
)
def test_other_estimators_in_the_reward_miss_the_optimum(reward: Reward) -> None:
    _, after = distance_after_ppo(reward, kl_coef=1.0)
    assert after > 0.1
