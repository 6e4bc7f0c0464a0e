"""Settings of all trainers that learn from their own responses: each described, checked, with its default's reason.

`ppo_settings` and `group_settings` add what one method needs.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.training.metrics import GLOSSARY
from palm_rlhf_pytorch.typecheck import typecheck

S = TypeVar("S", bound="PolicySettings")
RENAMED = {"beta_s": "entropy_coef", "kl_div_loss_weight": "kl_coef", "lam": "gae_lambda"}  # what others call them


@typecheck
@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The keywords that every such trainer takes beside models and prompts.

    Attributes:
        actor_lr: learning rate of the policy. 1e-4 suits adapters and dim 256 to 512; 3e-4 dim 128, 1e-3 dim 64,
            3e-6 a model of 1B parameters trained whole.
        actor_wd: weight decay of the policy's matrices.
        betas: Adam's decay rates; its paper's.
        adam_eps: Adam's epsilon; 1e-5 as in Ziegler et al. At 1e9 parameters it cuts updates markedly: then 1e-8.
        actor_lora: train the policy as a low-rank adapter on the frozen trunk; False trains a copy of the weights.
        actor_lora_r: rank of the policy's adapter.
        actor_lora_alpha: its scale is alpha / r; None means r.
        actor_last_layers: train only so many layers, counted from the output; None all.
        actor_dropout: dropout of the policy's learning passes; above 0 the ratio starts off 1 by its noise, and
            the trainer warns of it.
        max_norm: gradient norms are clipped to it, of actor and critic each apart; None for no clipping.
        entropy_coef: weight of an entropy bonus; 0 in RLHF.
        kl_exact_coef: weight in the loss of the exact KL to the reference, over the whole vocabulary at each response
            token; 0.
        max_approx_kl: ends an update's learning after a step whose `policy/approx_kl` is above it, nats a token; None
            for none; 0.01 to 0.05 where it is used.
        ptx_coef: weight of a pretraining loss that is mixed into each step (https://arxiv.org/abs/2203.02155); needs
            the trainer's `pretraining`. 0 for none.
        ptx_length: tokens of each text of it; a step reads as many texts as it has responses.
        top_k: sample from the k likeliest tokens alone, and learn the policy that does so: it and the old one are cut
            to their own likeliest, the reference to its own and those that the policy keeps. None, as in most of the
            literature: all tokens.
        top_p: the same with the likeliest tokens that have this probability together.
        missing_eos_penalty: subtracted from the score, as it is learnt from, of a response without EOS; without effect
            where `eos_token` is None. None for none.
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
        keep_experience: updates whose responses stay on disk.
        save_every: updates between two checkpoints of a run with a `run_dir`.
        save_every_steps: optimizer steps between two checkpoints inside an update; None for none.
        save_rollouts: write a checkpoint between scoring and learning too: where sampling takes longest.
        keep_samples: responses of each update, the best and as many of the worst, that are written to samples.jsonl in
            the run_dir.
        log_samples_every: updates between two tables of them in trackers that show tables.
        keep_rollouts: last updates of which the same responses are kept token by token, in `rollouts` in the run_dir,
            for `palm-rlhf inspect`; 0 for none.
        keep_last: newest checkpoints that are kept.
        keep_best: name of a metric: the checkpoint where it was highest is kept too.
    """

    actor_lr: float = 1e-4
    actor_wd: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-5
    actor_lora: bool = True
    actor_lora_r: int = 8
    actor_lora_alpha: float | None = None
    actor_last_layers: int | None = None
    actor_dropout: float = 0.0
    max_norm: float | None = 1.0
    entropy_coef: float = 0.0
    kl_exact_coef: float = 0.0
    max_approx_kl: float | None = None
    ptx_coef: float = 0.0
    ptx_length: int = 128
    top_k: int | None = None
    top_p: float | None = None
    missing_eos_penalty: float | None = None
    missing_eos_score: float | None = None
    normalize_scores: bool = False
    epochs: int = 4
    minibatch_size: int = 16
    max_batch_size: int = 64
    max_batch_tokens: int = 4096
    activation_checkpointing: bool = False
    max_dropped: float = 0.1
    max_skipped_steps: int = 3
    judge_timeout: float | None = None
    keep_experience: int = 1
    save_every: int = 1
    save_every_steps: int | None = None
    save_rollouts: bool = False
    keep_samples: int = 3
    log_samples_every: int = 10
    keep_rollouts: int = 1
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
        self.check_positive(
            "epochs", "minibatch_size", "max_batch_size", "max_batch_tokens", "adam_eps", "max_skipped_steps",
            "keep_experience", "save_every", "keep_last", "log_samples_every",
        )  # fmt: skip
        self.check_positive("max_norm", "judge_timeout", "save_every_steps", "max_approx_kl", optional=True)
        self.check_least(
            "actor_lr", "actor_wd", "missing_eos_penalty", "kl_exact_coef", "ptx_coef", "keep_samples", "keep_rollouts"
        )
        self.check_share("max_dropped")
        check_sampling(temperature=1.0, top_k=self.top_k, top_p=self.top_p)
        if self.ptx_length < 2:
            raise ValueError(f"ptx_length ({self.ptx_length}) must be at least 2: a token is read from the one before")
        if self.ptx_coef and (self.top_k is not None or self.top_p is not None):
            raise ValueError(
                f"ptx_coef ({self.ptx_coef}) goes without top_k and top_p: a text holds tokens that these cut off"
            )
        if self.keep_best is not None and self.keep_best not in GLOSSARY:
            raise ValueError(f"keep_best ({self.keep_best!r}) names no metric; training/metrics.py lists them")

    def check_positive(self, *names: str, optional: bool = False) -> None:
        """Raise a ValueError unless these settings are above 0, or None where that is allowed."""
        for name in names:
            value = getattr(self, name)
            if not (value is None and optional) and not value > 0:
                raise ValueError(f"{name} ({value}) must be above 0" + (", or None" if optional else ""))

    def check_least(self, *names: str) -> None:
        """Raise a ValueError if one of these settings is below 0."""
        for name in names:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")

    def check_share(self, *names: str) -> None:
        """Raise a ValueError unless these settings are from 0 to 1."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to 1")

    def warn(self) -> None:
        """Warn of what is allowed but seldom meant."""
        if self.actor_dropout > 0:
            warnings.warn(
                f"actor_dropout ({self.actor_dropout}): the ratio will not start at 1, since dropout is on while"
                " learning and off while sampling; PPO is usually run without",
                stacklevel=3,
            )

    def check_update(self, num_responses: int) -> None:
        """Raise a ValueError if updates cannot have so many responses."""

    @property
    def first_kl_coef(self) -> float:
        """Price of a nat of KL in the reward of the first update."""
        raise NotImplementedError

    def next_kl_coef(self, kl_coef: float, kl: float, *, num_episodes: int) -> float:
        """The coefficient after a rollout of num_episodes with kl nats a response."""
        return kl_coef

    @classmethod
    def elsewhere(cls) -> dict[str, str]:
        """Names that belong to something else than the settings, and what to write there."""
        return {}

    @property
    def responses_per_prompt(self) -> int:
        """How often a prompt is answered when its turn comes."""
        return 1

    @property
    def starts_critic(self) -> bool:
        """Whether the critic begins as the reward model."""
        return False

    @property
    def stale_updates(self) -> int:
        """From how many earlier updates responses are learnt again."""
        return 0

    def plain(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def model_arguments(self) -> dict[str, Any]:
        """The part that shapes the ActorCritic."""
        own = self.hat_arguments("actor")
        return own | {name: getattr(self, name) for name in ("activation_checkpointing", "top_k", "top_p")}

    def hat_arguments(self, hat: str) -> dict[str, Any]:
        """The part that shapes a hat."""
        names = ("lora", "lora_r", "lora_alpha", "last_layers", "dropout")
        return {f"{hat}_{name}": getattr(self, f"{hat}_{name}") for name in names}

    def loss_arguments(self) -> dict[str, Any]:
        """The part that the loss takes."""
        return {"entropy_coef": self.entropy_coef, "kl_exact_coef": self.kl_exact_coef}

    def batch_limits(self) -> dict[str, int]:
        """The part that bounds a pass."""
        return {"max_batch_size": self.max_batch_size, "max_batch_tokens": self.max_batch_tokens}

    def run_arguments(self) -> dict[str, Any]:
        """The part that says what stays on disk."""
        keep = max(self.keep_experience, self.stale_updates)
        return {"keep_last": self.keep_last, "keep_best": self.keep_best, "keep_experience": keep}

    def doctor_arguments(self) -> dict[str, Any]:
        """The part that the doctor measures by."""
        return {"eos_token": False, "target_kl": None, "max_norm": self.max_norm, "critic": False}

    def learner_arguments(self) -> dict[str, Any]:
        """The part that the Learner takes."""
        names = (
            "actor_lr", "actor_wd", "betas", "adam_eps", "max_norm", "epochs", "minibatch_size", "max_batch_size",
            "max_batch_tokens", "max_skipped_steps", "max_approx_kl", "ptx_coef",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def settings_from(kind: type[S], given: Mapping[str, Any], *, trainer: str) -> S:
    """The settings that keywords of a trainer name, with warnings of what is seldom meant.

    Args:
        kind: of settings.
        given: the keywords.
        trainer: what took them, for messages.

    Raises:
        TypeError: if a keyword is unknown (with what it may have meant), or of the wrong type.
        ValueError: if a number is out of range.
    """
    check_names([field.name for field in fields(kind)], given, trainer=trainer, elsewhere=kind.elsewhere())
    settings = kind(**given)
    settings.warn()
    return settings


def check_names(
    known: Sequence[str], given: Mapping[str, Any], *, trainer: str, elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raise a TypeError for a keyword that is not known, with what it may have meant, or where it belongs."""
    for name in given:
        if name not in known:
            if elsewhere and name in elsewhere:
                raise TypeError(f"{trainer} has no argument {name!r}: {elsewhere[name]}")
            meant = RENAMED.get(name)
            meant = meant if meant in known else next(iter(get_close_matches(name, known, n=1)), None)
            hint = f"; did you mean {meant}?" if meant else "; palm_rlhf_pytorch/policy/settings.py lists all"
            raise TypeError(f"{trainer} has no argument {name!r}{hint}")
