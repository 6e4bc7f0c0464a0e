"""The policy learns: from a judge (PPO, GRPO and its kin, the best of several), or straight from preferences."""

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.dpo import DPOTrainer
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.kto import KTOTrainer
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.policy.rejection import RejectionTrainer
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.watch import WatchSettings

__all__ = [
    "ActorCritic",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "RLHFTrainer",
    "RejectionTrainer",
    "Rollout",
    "WatchSettings",
]
