"""The policy learns from a judge: ActorCritic and RLHFTrainer."""

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.rollout import Rollout

__all__ = ["ActorCritic", "RLHFTrainer", "Rollout"]
