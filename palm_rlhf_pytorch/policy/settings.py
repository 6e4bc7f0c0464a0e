"""PPO's settings: each described, checked, and with the reason of its default."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.typecheck import typecheck


@typecheck
@dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """The keywords RLHFTrainer takes beside models and prompts.

    Attributes:
        actor_lr: learning rate of the policy. 1e-4 suits adapters and dim 256 to 512; 3e-4 dim 128, 1e-3 dim 64,
            3e-6 a model of 1B parameters trained whole.
        critic_lr: learning rate of the critic; one to three times the actor's.
        actor_wd: weight decay of the policy's matrices.
        critic_wd: weight decay of the critic's.
        betas: Adam's decay rates; its paper's.
        adam_eps: Adam's epsilon; 1e-5 as in Ziegler et al. At 1e9 parameters it cuts updates markedly: then 1e-8.
        actor_lora: train the policy as a low-rank adapter on the frozen trunk; False trains a copy of the weights.
        critic_lora: the same for the critic.
        actor_lora_r: rank of the policy's adapter.
        critic_lora_r: rank of the critic's.
        actor_lora_alpha: its scale is alpha / r; None means r.
        critic_lora_alpha: the same for the critic.
        actor_last_layers: train only so many layers, counted from the output; None all.
        critic_last_layers: the same for the critic.
        actor_dropout: dropout of the policy's learning passes; above 0 the ratio starts off 1 by its noise.
        critic_dropout: dropout of the critic's learning passes.
        max_norm: gradient norms of actor and critic are clipped to it, each apart; None for no clipping.
        eps_clip: half-width of the ratio's trust region; 0.2 in the PPO paper.
        dual_clip: bound on the ratio where the advantage is negative; None for none; 3 in Ye et al. 2019.
        value_clip: how far a value counts as moved from the old one, in units of the normalised score; None for raw scores.
        gamma: discount per token; 1 as in all of RLHF.
        gae_lambda: GAE's lambda; 0.95.
        kl_coef: price of a nat of KL to the reference, in units of the normalised score; 0.05.
        target_kl_nats_per_response: the KL an adaptive controller steers to; None keeps kl_coef fixed.
        kl_horizon: episodes over which the controller acts; 10,000 cannot act in a run of a thousand.
        entropy_coef: weight of an entropy bonus; 0 in RLHF.
        missing_eos_penalty: subtracted from the normalised score of a response without EOS; without effect where
            `eos_token` is None. 1.0; None for none.
        missing_eos_score: replaces that score instead; None for none.
        normalize_scores: shift and scale scores to mean 0, deviation 1 over the first rollout.
        epochs: passes over each rollout; 4.
        minibatch_size: sequences in an optimizer step, over all processes.
        max_batch_size: sequences in one pass of a model; memory follows it, results do not.
    """

    actor_lr: float = 1e-4
    critic_lr: float = 2e-4
    actor_wd: float = 0.0
    critic_wd: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-5
    actor_lora: bool = True
    critic_lora: bool = True
    actor_lora_r: int = 8
    critic_lora_r: int = 8
    actor_lora_alpha: float | None = None
    critic_lora_alpha: float | None = None
    actor_last_layers: int | None = None
    critic_last_layers: int | None = None
    actor_dropout: float = 0.0
    critic_dropout: float = 0.0
    max_norm: float | None = 1.0
    eps_clip: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    gamma: float = 1.0
    gae_lambda: float = 0.95
    kl_coef: float = 0.05
    target_kl_nats_per_response: float | None = None
    kl_horizon: int = 10_000
    entropy_coef: float = 0.0
    missing_eos_penalty: float | None = 1.0
    missing_eos_score: float | None = None
    normalize_scores: bool = True
    epochs: int = 4
    minibatch_size: int = 16
    max_batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the setting and its value.
        """
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, int | float)):
                raise ValueError(f"{name} ({value}) must be finite")
        positive = ("eps_clip", "epochs", "minibatch_size", "max_batch_size", "kl_horizon", "adam_eps")
        optional = ("max_norm", "dual_clip", "value_clip", "target_kl_nats_per_response")
        for name in positive + optional:
            value = getattr(self, name)
            if not (value is None and name in optional) and not value > 0:
                raise ValueError(f"{name} ({value}) must be above 0" + (", or None" if name in optional else ""))
        for name in ("actor_lr", "critic_lr", "actor_wd", "critic_wd", "kl_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to 1")
        if self.target_kl_nats_per_response is not None and self.kl_coef == 0:
            raise ValueError("kl_coef (0) cannot be steered to target_kl_nats_per_response: start it above 0")

    def plain(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def model_arguments(self) -> dict[str, Any]:
        """The part that shapes the ActorCritic."""
        names = ("lora", "lora_r", "lora_alpha", "last_layers", "dropout")
        return {f"{hat}_{name}": getattr(self, f"{hat}_{name}") for hat in ("actor", "critic") for name in names}

    def learner_arguments(self) -> dict[str, Any]:
        """The part that the Learner takes."""
        names = (
            "actor_lr", "critic_lr", "actor_wd", "critic_wd", "betas", "adam_eps", "max_norm", "eps_clip", "dual_clip",
            "value_clip", "entropy_coef", "epochs", "minibatch_size", "max_batch_size",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def check_train_arguments(
    prompts: Prompts,
    *,
    palm: PaLM,
    num_episodes: int,
    max_seq_len: int,
    max_new_tokens: int | None,
    eos_token: int | None,
    temperature: float,
    update_timesteps: int,
) -> None:
    """Refuse what would fail later, before anything is sampled.

    Raises:
        ValueError: naming the argument and its value.
    """
    for name, count in (("num_episodes", num_episodes), ("update_timesteps", update_timesteps)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1, or None")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature ({temperature}) must be above 0: a greedy policy has nothing to explore")
    if eos_token is not None and not 0 <= eos_token < palm.num_tokens:
        raise ValueError(f"eos_token ({eos_token}) must be from 0 to {palm.num_tokens - 1}, or None")
    longest = int(prompts.lengths.argmax())
    if int(prompts.lengths[longest]) >= max_seq_len:
        raise ValueError(
            f"max_seq_len ({max_seq_len}) counts the prompt: prompt {longest} has {int(prompts.lengths[longest])} tokens"
            " and leaves no room for a response; shorten it or raise max_seq_len"
        )
