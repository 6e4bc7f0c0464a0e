"""PPO's settings beside those of every trainer, with the reason of each default."""

import warnings
from dataclasses import dataclass
from typing import Any

from palm_rlhf_pytorch.objectives.policy_gradient import adaptive_kl_coef
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.typecheck import typecheck


@typecheck
@dataclass(frozen=True, kw_only=True)
class PPOSettings(PolicySettings):
    """The keywords RLHFTrainer takes beside models and prompts: these, and those of PolicySettings.

    Attributes:
        critic_lr: learning rate of the critic; one to three times the actor's.
        critic_wd: weight decay of the critic's.
        critic_lora: the same for the critic.
        critic_lora_r: rank of the critic's.
        critic_lora_alpha: the same for the critic.
        critic_last_layers: the same for the critic.
        critic_dropout: dropout of the critic's learning passes.
        critic_warmup: updates in the beginning in which the critic alone learns; 0.
        critic_from_reward_model: start the critic as the reward model, which must share the trunk, be causal, have an
            adapter of the critic's shape, and a scalar head with normalised scores; else it starts at 0. It helps where
            the score shows early in a response; take a reward model with pool_last, and a critic_warmup.
        eps_clip: half-width of the ratio's trust region; 0.2 in the PPO paper.
        dual_clip: bound on the ratio where the advantage is negative; None for none; 3 in Ye et al. 2019.
        value_clip: how far a value counts as moved from the old one, in units of the normalised score; None for raw
            scores.
        gamma: discount per token; 1 as in all of RLHF.
        gae_lambda: GAE's lambda; 0.95.
        kl_coef: price of a nat of KL to the reference, in units of the normalised score; 0.05.
        target_kl_nats_per_response: the KL an adaptive controller steers to; None keeps kl_coef fixed.
        kl_horizon: episodes over which the controller acts; 10,000 cannot act in a run of a thousand.
        max_staleness: learn again from the responses of so many updates before, with importance weights; 0 as in PPO.
        importance_cap: bound on these weights; 2.
        missing_eos_penalty: 1.0, in units of the normalised score.
        normalize_scores: on: unnormalised scores teach length.
    """

    critic_lr: float = 2e-4
    critic_wd: float = 0.0
    critic_lora: bool = True
    critic_lora_r: int = 8
    critic_lora_alpha: float | None = None
    critic_last_layers: int | None = None
    critic_dropout: float = 0.0
    critic_warmup: int = 0
    critic_from_reward_model: bool = False
    eps_clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.05
    target_kl_nats_per_response: float | None = None
    kl_horizon: int = 10_000
    max_staleness: int = 0
    importance_cap: float = 2.0
    missing_eos_penalty: float | None = 1.0
    normalize_scores: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the setting and its value.
        """
        super().__post_init__()
        self.check_positive("eps_clip", "kl_horizon", "importance_cap")
        self.check_positive("dual_clip", "value_clip", "target_kl_nats_per_response", optional=True)
        self.check_least("critic_lr", "critic_wd", "kl_coef", "max_staleness", "critic_warmup")
        self.check_share("gamma", "gae_lambda")
        if self.eps_clip >= 1:
            raise ValueError(f"eps_clip ({self.eps_clip}) must be below 1; 0.2 is usual")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip ({self.dual_clip}) must be above 1, or None; 3 is usual")
        if self.target_kl_nats_per_response is not None and self.kl_coef == 0:
            raise ValueError("kl_coef (0) cannot be steered to target_kl_nats_per_response: start it above 0")

    def warn(self) -> None:
        """Warn of what is allowed but seldom meant."""
        super().warn()
        if not self.normalize_scores and self.value_clip is not None:
            warnings.warn(
                f"value_clip ({self.value_clip}) is meant for normalised scores; with normalize_scores=False values"
                " move by about so much an update, whatever the size of the scores: value_clip=None is usual then",
                stacklevel=3,
            )

    def check_update(self, num_responses: int) -> None:
        """Raise a ValueError if the KL controller could not act on updates of so many responses."""
        if self.target_kl_nats_per_response is not None and num_responses >= 5 * self.kl_horizon:
            raise ValueError(f"update_timesteps ({num_responses}) must be below 5 times kl_horizon ({self.kl_horizon})")

    @property
    def first_kl_coef(self) -> float:
        """Price of a nat of KL in the reward of the first update."""
        return self.kl_coef

    def next_kl_coef(self, kl_coef: float, kl: float, *, num_episodes: int) -> float:
        """The coefficient after a rollout of num_episodes with kl nats a response; without a target the same."""
        target = self.target_kl_nats_per_response
        if target is None:
            return kl_coef
        return adaptive_kl_coef(
            kl_coef, kl, target_kl_nats_per_response=target, num_episodes=num_episodes, horizon=self.kl_horizon
        )

    @property
    def starts_critic(self) -> bool:
        """Whether the critic begins as the reward model."""
        return self.critic_from_reward_model

    @property
    def stale_updates(self) -> int:
        """From how many earlier updates responses are learnt again."""
        return self.max_staleness

    def model_arguments(self) -> dict[str, Any]:
        """The part that shapes the ActorCritic."""
        return super().model_arguments() | self.hat_arguments("critic")

    def loss_arguments(self) -> dict[str, Any]:
        """The part that the loss takes."""
        own = {"eps_clip": self.eps_clip, "dual_clip": self.dual_clip, "value_clip": self.value_clip}
        return super().loss_arguments() | own

    def doctor_arguments(self) -> dict[str, Any]:
        """The part that the doctor measures by."""
        return super().doctor_arguments() | {"target_kl": self.target_kl_nats_per_response, "critic": True}

    def learner_arguments(self) -> dict[str, Any]:
        """The part that the Learner takes."""
        names = ("critic_lr", "critic_wd", "critic_warmup")
        return super().learner_arguments() | {name: getattr(self, name) for name in names}
