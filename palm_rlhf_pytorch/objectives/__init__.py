"""Every loss: pure functions of tensors that return records, loss first, with the paper in each docstring."""

from palm_rlhf_pytorch.objectives.advantage import (
    Advantages,
    ShapedRewards,
    gae,
    monte_carlo_returns,
    shaped_rewards,
)
from palm_rlhf_pytorch.objectives.language import LanguageLoss, chunked_next_token_loss, next_token_loss
from palm_rlhf_pytorch.objectives.policy_gradient import (
    PolicyLoss,
    ValueLoss,
    adaptive_kl_coef,
    explained_variance,
    kl_abs,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    policy_loss,
    value_loss,
)
from palm_rlhf_pytorch.objectives.preference import PreferenceLoss, bradley_terry_loss

__all__ = [
    "Advantages",
    "LanguageLoss",
    "PolicyLoss",
    "PreferenceLoss",
    "ShapedRewards",
    "ValueLoss",
    "adaptive_kl_coef",
    "bradley_terry_loss",
    "chunked_next_token_loss",
    "explained_variance",
    "gae",
    "kl_abs",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "monte_carlo_returns",
    "next_token_loss",
    "policy_loss",
    "shaped_rewards",
    "value_loss",
]
