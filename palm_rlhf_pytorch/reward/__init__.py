"""Judges: text in, score out."""

from palm_rlhf_pytorch.reward.model import RewardModel

__all__ = ["RewardModel"]
