"""PPO's settings: each described, checked, and with the reason of its default."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from palm_rlhf_pytorch.objectives.policy_gradient import adaptive_kl_coef
from palm_rlhf_pytorch.training.metrics import GLOSSARY
from palm_rlhf_pytorch.typecheck import typecheck

RENAMED = {"beta_s": "entropy_coef", "kl_div_loss_weight": "kl_coef", "lam": "gae_lambda"}  # what others call them


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
        actor_dropout: dropout of the policy's learning passes; above 0 the ratio starts off 1 by its noise, and
            RLHFTrainer warns of it.
        critic_dropout: dropout of the critic's learning passes.
        max_norm: gradient norms of actor and critic are clipped to it, each apart; None for no clipping.
        eps_clip: half-width of the ratio's trust region; 0.2 in the PPO paper.
        dual_clip: bound on the ratio where the advantage is negative; None for none; 3 in Ye et al. 2019.
        value_clip: how far a value counts as moved from the old one, in units of the normalised score; None for raw
            scores.
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
        max_batch_size: sequences generated together, and at most so many in any pass. Memory follows it; what is
            learnt from a rollout does not, but which responses are drawn does.
        max_batch_tokens: tokens, padding included, in one pass that learns or scores; memory follows it, results do
            not. 4096 keeps a step of the README's model at about 5 GB.
        activation_checkpointing: keep a layer's input alone for the backward pass and compute the layer again there:
            less memory, more time, the same gradients.
        max_dropped: largest share of an update's responses that may go without a finite score; more stops training.
        max_skipped_steps: steps in a row with a loss or gradient norm that is not finite, after which training stops.
        judge_timeout: seconds that one call of the judge may take; None waits as long as it takes.
        max_staleness: learn again from the responses of so many updates before, with importance weights; 0 as in PPO.
        importance_cap: bound on these weights; 2.
        keep_experience: updates whose responses stay on disk; at least as many as max_staleness needs do.
        save_every: updates between two checkpoints of a run with a `run_dir`.
        save_every_steps: optimizer steps between two checkpoints inside an update; None for none.
        save_rollouts: write a checkpoint between scoring and learning too: where sampling takes longest.
        keep_last: newest checkpoints that are kept.
        keep_best: name of a metric: the checkpoint where it was highest is kept too.
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
    max_batch_tokens: int = 4096
    activation_checkpointing: bool = False
    max_dropped: float = 0.1
    max_skipped_steps: int = 3
    judge_timeout: float | None = None
    max_staleness: int = 0
    importance_cap: float = 2.0
    keep_experience: int = 1
    save_every: int = 1
    save_every_steps: int | None = None
    save_rollouts: bool = False
    keep_last: int = 2
    keep_best: str | None = None

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the setting and its value.
        """
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(number) for number in numbers if isinstance(number, int | float)):
                raise ValueError(f"{name} ({value}) must be finite")
        positive = (
            "eps_clip",
            "epochs",
            "minibatch_size",
            "max_batch_size",
            "max_batch_tokens",
            "kl_horizon",
            "adam_eps",
            "max_skipped_steps",
            "importance_cap",
            "keep_experience",
            "save_every",
            "keep_last",
        )
        optional = (
            "max_norm",
            "dual_clip",
            "value_clip",
            "target_kl_nats_per_response",
            "judge_timeout",
            "save_every_steps",
        )
        for name in positive + optional:
            value = getattr(self, name)
            if not (value is None and name in optional) and not value > 0:
                raise ValueError(f"{name} ({value}) must be above 0" + (", or None" if name in optional else ""))
        for name in (
            "actor_lr",
            "critic_lr",
            "actor_wd",
            "critic_wd",
            "kl_coef",
            "missing_eos_penalty",
            "max_staleness",
        ):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if self.eps_clip >= 1:
            raise ValueError(f"eps_clip ({self.eps_clip}) must be below 1; 0.2 is usual")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip ({self.dual_clip}) must be above 1, or None; 3 is usual")
        for name in ("gamma", "gae_lambda", "max_dropped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to 1")
        if self.target_kl_nats_per_response is not None and self.kl_coef == 0:
            raise ValueError("kl_coef (0) cannot be steered to target_kl_nats_per_response: start it above 0")
        if self.keep_best is not None and self.keep_best not in GLOSSARY:
            raise ValueError(f"keep_best ({self.keep_best!r}) names no metric; training/metrics.py lists them")

    def warn(self) -> None:
        """Warn of what is allowed but seldom meant."""
        if self.actor_dropout > 0:
            warnings.warn(
                f"actor_dropout ({self.actor_dropout}): the ratio will not start at 1, since dropout is on while"
                " learning and off while sampling; PPO is usually run without",
                stacklevel=3,
            )
        if not self.normalize_scores and self.value_clip is not None:
            warnings.warn(
                f"value_clip ({self.value_clip}) is meant for normalised scores; with normalize_scores=False values"
                " move by about so much an update, whatever the size of the scores: value_clip=None is usual then",
                stacklevel=3,
            )

    def next_kl_coef(self, kl_coef: float, kl: float, *, num_episodes: int) -> float:
        """The coefficient after a rollout of num_episodes with kl nats a response; without a target the same."""
        target = self.target_kl_nats_per_response
        if target is None:
            return kl_coef
        return adaptive_kl_coef(
            kl_coef, kl, target_kl_nats_per_response=target, num_episodes=num_episodes, horizon=self.kl_horizon
        )

    def plain(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def model_arguments(self) -> dict[str, Any]:
        """The part that shapes the ActorCritic."""
        names = ("lora", "lora_r", "lora_alpha", "last_layers", "dropout")
        hats = {f"{hat}_{name}": getattr(self, f"{hat}_{name}") for hat in ("actor", "critic") for name in names}
        return hats | {"activation_checkpointing": self.activation_checkpointing}

    def batch_limits(self) -> dict[str, int]:
        """The part that bounds a pass."""
        return {"max_batch_size": self.max_batch_size, "max_batch_tokens": self.max_batch_tokens}

    def run_arguments(self) -> dict[str, Any]:
        """The part that says what stays on disk."""
        keep = max(self.keep_experience, self.max_staleness)
        return {"keep_last": self.keep_last, "keep_best": self.keep_best, "keep_experience": keep}

    def doctor_arguments(self) -> dict[str, Any]:
        """The part that the doctor measures by."""
        return {"eos_token": False, "target_kl": self.target_kl_nats_per_response, "max_norm": self.max_norm}

    def learner_arguments(self) -> dict[str, Any]:
        """The part that the Learner takes."""
        names = (
            "actor_lr", "critic_lr", "actor_wd", "critic_wd", "betas", "adam_eps", "max_norm", "eps_clip", "dual_clip",
            "value_clip", "entropy_coef", "epochs", "minibatch_size", "max_batch_size",
            "max_batch_tokens", "max_skipped_steps",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def settings_from(given: Mapping[str, Any]) -> PPOSettings:
    """The settings that keywords of RLHFTrainer name, with warnings of what is seldom meant.

    Raises:
        TypeError: if a keyword is unknown (with what it may have meant), or of the wrong type.
        ValueError: if a number is out of range.
    """
    known = [field.name for field in fields(PPOSettings)]
    for name in given:
        if name not in known:
            meant = RENAMED.get(name) or next(iter(get_close_matches(name, known, n=1)), None)
            hint = f"; did you mean {meant}?" if meant else "; palm_rlhf_pytorch/policy/settings.py lists all"
            raise TypeError(f"RLHFTrainer has no argument {name!r}{hint}")
    settings = PPOSettings(**given)
    settings.warn()
    return settings
