"""RLHFTrainer on a contextual bandit whose best policy is known: reference * exp(score / kl_coef).

One-token responses of a small PaLM; the settings in which the test means something are told in
`tests/objectives/test_known_optimum.py`. Seeds tried end .0035 to .0047 from the optimum in total variation (starting
from .57 at kl_coef .5 with whole copies, .22 at 1 with adapters); the bound is .01. The controls end above .3.
"""

import pytest
import torch

from palm_rlhf_pytorch.objectives.advantage import ShapedRewards
from palm_rlhf_pytorch.objectives.policy_gradient import kl_k2, kl_k3
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy import targets
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.preflight import PreflightError

CONTEXTS, NUM_ACTIONS, BATCH, NUM_ROLLOUTS = torch.tensor([[0], [1]]), 6, 256, 100


def total_variation(policy, optimum):
    return float((policy - optimum).abs().sum(dim=-1).mean()) / 2


def distances(*, lora, kl_coef, optimum_at=None, preflight=True):
    """Mean total variation between policy and optimum over the contexts, before and after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=NUM_ACTIONS, dim=16, depth=1, dim_head=8, heads=2)
        torch.nn.init.normal_(palm.token_emb.weight, std=0.3)
        table = torch.randn(len(CONTEXTS), NUM_ACTIONS)
    table = (table - table.mean(dim=-1, keepdim=True)) / table.std(dim=-1, correction=0, keepdim=True)
    reference = palm(CONTEXTS)[:, -1].detach()
    optimum = (reference + table / (optimum_at or kl_coef)).softmax(dim=-1)
    trainer = RLHFTrainer(
        palm=palm, reward_model=lambda sequences, **masks: table[sequences[:, 0], sequences[:, 1]],
        prompt_token_ids=CONTEXTS, actor_lora=lora, critic_lora=lora, actor_lr=1e-2, critic_lr=1e-2, kl_coef=kl_coef,
        minibatch_size=BATCH, max_batch_size=BATCH, normalize_scores=False, value_clip=None,
    )  # fmt: skip
    trainer.train(BATCH * NUM_ROLLOUTS, max_new_tokens=1, update_timesteps=BATCH, preflight=preflight, use_tqdm=False)
    policy = trainer.export_palm()(CONTEXTS)[:, -1].detach()
    return total_variation(reference.softmax(dim=-1), optimum), total_variation(policy.softmax(dim=-1), optimum)


@pytest.mark.parametrize(("lora", "kl_coef"), [(True, 1.0), (False, 0.5)])
def test_trainer_reaches_the_known_optimum(lora, kl_coef):
    before, after = distances(lora=lora, kl_coef=kl_coef)
    assert before > 0.2
    assert after < 0.01


@pytest.mark.parametrize("estimator", [kl_k2, kl_k3])
def test_another_estimator_in_the_reward_misses_the_optimum(estimator, monkeypatch):
    def shaped(scores, logprobs, ref_logprobs, mask, *, kl_coef):
        kl = estimator(logprobs, ref_logprobs)
        return ShapedRewards(scores[:, None] - kl_coef * kl, kl)

    monkeypatch.setattr(targets, "shaped_rewards", shaped)
    with pytest.raises(PreflightError, match="score placement"):  # it would not come to that
        distances(lora=False, kl_coef=1.0)
    _, after = distances(lora=False, kl_coef=1.0, preflight=False)
    assert after > 0.1


def test_another_coefficient_misses_the_optimum():
    _, after = distances(lora=False, kl_coef=1.0, optimum_at=0.5)
    assert after > 0.1
