"""The address people know: ActorCritic and RLHFTrainer live in `policy`."""

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer

__all__ = ["ActorCritic", "RLHFTrainer"]
