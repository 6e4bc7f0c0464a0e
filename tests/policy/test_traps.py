"""Faults of the original that no other file of this room would notice, and the defaults of the settings."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from palm_rlhf_pytorch.policy import ppo
from palm_rlhf_pytorch.policy import trainer as trainers
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.targets import Targets
from palm_rlhf_pytorch.reward.model import RewardModel
from tests.policy.helpers import GivenLesson, seeded_by


def held(*modules: nn.Module) -> int:
    """Bytes of the parameters of all modules together, shared ones once."""
    storages = [parameter.untyped_storage() for module in modules for parameter in module.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_palm_judge_and_trainer_hold_the_base_weights_once(make_trainer, make_palm):
    palm = make_palm()
    judge = RewardModel(palm)
    trainer = make_trainer(palm, reward_model=judge)
    trained = [*trainer.learner.actor.values(), *trainer.learner.critic.values(), *judge.finetune_parameters()]
    assert held(palm, judge, trainer.actor_critic) == held(palm) + 4 * sum(p.numel() for p in trained)


def test_trainer_moves_judge_and_trunk_together(make_palm, monkeypatch):
    palm = make_palm()
    moved = []
    monkeypatch.setattr(trainers, "move_together", lambda *modules, device: moved.append((modules, device)))
    judge = RewardModel(palm)
    trainer = ppo.RLHFTrainer(palm=palm, reward_model=judge, prompt_token_ids=torch.tensor([[1, 2]]))
    (((trunk, found), device),) = moved
    assert found is judge and device == trainer.accelerator.device
    names = dict(trunk.named_parameters())
    assert all(p.data_ptr() == names[name].data_ptr() for name, p in trainer.actor_critic.palm.named_parameters())


def test_modes_of_a_judge_come_back_after_its_error(make_trainer):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.live, self.still = nn.Dropout(0.5), nn.Dropout(0.5).eval()

        def forward(self, sequences, **masks):
            assert not self.live.training
            raise OSError("no answer")

    judge = Broken()
    with pytest.raises(OSError, match="no answer"):
        make_trainer(reward_model=judge).train(4, max_new_tokens=2, preflight=False, use_tqdm=False)
    assert [module.training for module in (judge, judge.live, judge.still)] == [True, True, False]


def test_defaults_are_those_of_the_literature():
    defaults = PPOSettings()
    expected = {
        "kl_coef": 0.05, "target_kl_nats_per_response": None, "kl_horizon": 10_000, "gamma": 1.0, "gae_lambda": 0.95,
        "eps_clip": 0.2, "dual_clip": None, "value_clip": 0.2, "epochs": 4, "entropy_coef": 0.0, "max_norm": 1.0,
        "betas": (0.9, 0.999), "adam_eps": 1e-5, "normalize_scores": True, "missing_eos_penalty": 1.0,
        "missing_eos_score": None, "actor_dropout": 0.0, "critic_dropout": 0.0, "actor_lr": 1e-4,
    }  # fmt: skip
    assert {name: getattr(defaults, name) for name in expected} == expected
    assert 1 <= defaults.critic_lr / defaults.actor_lr <= 3


def one_token(actor_critic: ActorCritic) -> Rollout:
    """One response of one token, as the policy sees it now."""
    sequences, lengths = torch.tensor([[3, 7]]), torch.tensor([1])
    seen = actor_critic.observe(sequences, lengths, 1)
    return Rollout(
        sequences=sequences, prompt_lengths=lengths, lengths=lengths, logprobs=seen.logprobs,
        ref_logprobs=seen.ref_logprobs, values=seen.values, sampler_logprobs=seen.logprobs, kl_exact=seen.kl_exact,
        ended=lengths == 1, prompt_rows=lengths, versions=lengths, temperature=1.0, eos_token=None,
    )  # fmt: skip


def losses(actor_critic: ActorCritic, *, ratio: float, moved: float, advantage: float, gain: float, **settings):
    """Metrics of a step on a token whose ratio, and whose value's distance from the old one and the return, are given.

    Learning rates are 0, so that the one step sees what was given.
    """
    rollout = one_token(actor_critic)
    old = rollout._replace(logprobs=rollout.logprobs - math.log(ratio), values=rollout.values - moved)
    zeros = torch.zeros(1, 1)
    targets = Targets(zeros, zeros, zeros + advantage, rollout.values + gain)
    chosen = PPOSettings(actor_lr=0.0, critic_lr=0.0, epochs=1, **settings)
    loss = PPOLoss(**chosen.loss_arguments())
    learner = Learner(actor_critic, Accelerator(cpu=True), loss=loss, **chosen.learner_arguments())
    return learner.update(GivenLesson(old, targets), random=seeded_by(0))


@pytest.mark.parametrize(
    ("settings", "ratio", "advantage", "expected"),
    [
        ({}, 1.5, 2.0, -2.4),  # -2 * 1.2
        ({"eps_clip": 0.3}, 1.5, 2.0, -2.6),
        ({"eps_clip": 0.3}, 0.5, -2.0, 1.4),
        ({}, 10.0, -1.0, 10.0),
        ({"dual_clip": 3.0}, 10.0, -1.0, 3.0),
    ],
)
def test_clips_of_the_settings_reach_the_policy_loss(make_palm, settings, ratio, advantage, expected):
    metrics = losses(ActorCritic(make_palm()), ratio=ratio, moved=0.0, advantage=advantage, gain=0.0, **settings)
    assert metrics["policy/loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    # the value has moved by 1 on to its return: without a clip no error is left, with one the rest of the way counts
    [({"value_clip": None}, 0.0), ({}, 0.5 * 0.8**2), ({"value_clip": 0.4}, 0.5 * 0.6**2)],
)
def test_clip_of_the_settings_reaches_the_value_loss(make_palm, settings, expected):
    metrics = losses(ActorCritic(make_palm()), ratio=1.0, moved=1.0, advantage=0.0, gain=0.0, **settings)
    assert metrics["value/loss"] == pytest.approx(expected, abs=1e-5)


def test_adam_of_the_settings_reaches_the_optimizer(make_trainer):
    trainer = make_trainer(betas=(0.7, 0.8), adam_eps=1e-3, actor_wd=0.25, critic_wd=0.5)
    groups = trainer.learner.optimizer.param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.7, 0.8), 1e-3)}
    assert {group["weight_decay"] for group in groups} >= {0.25, 0.5}


def test_gamma_and_lambda_of_the_settings_reach_the_targets(make_trainer):
    """Returns of a two-token response with values 1 and 3, no KL, score 8."""
    for settings, expected in (
        ({"gamma": 0.5, "gae_lambda": 1.0}, [4.0, 8.0]),  # .5 * 8
        ({"gamma": 1.0, "gae_lambda": 0.0}, [3.0, 8.0]),  # the next value
        ({"gamma": 0.5, "gae_lambda": 0.5}, [2.75, 8.0]),  # 1 + (.5 * 3 - 1) + .25 * (8 - 3)
    ):
        trainer = make_trainer(normalize_scores=False, value_clip=None, **settings)
        sequences, zeros = torch.tensor([[3, 7, 2]]), torch.zeros(1, 2)
        rollout = Rollout(
            sequences=sequences, prompt_lengths=torch.tensor([1]), lengths=torch.tensor([2]), logprobs=zeros,
            ref_logprobs=zeros, values=torch.tensor([[1.0, 3.0]]), sampler_logprobs=zeros, kl_exact=zeros,
            ended=torch.tensor([True]), prompt_rows=torch.tensor([0]), versions=torch.tensor([0]), temperature=1.0,
            eos_token=None, scores=torch.tensor([8.0]),
        )  # fmt: skip
        metrics = trainer.learn(rollout)
        assert metrics["returns/mean"] == pytest.approx(sum(expected) / 2)
