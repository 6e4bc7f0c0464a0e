"""PPO's settings: each described, checked, and with the reason of its default."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from accelerate.tracking import get_available_trackers
from torch import Tensor

from palm_rlhf_pytorch.objectives.policy_gradient import adaptive_kl_coef
from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import check_masked, check_token_ids
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
        )
        optional = ("max_norm", "dual_clip", "value_clip", "target_kl_nats_per_response")
        for name in positive + optional:
            value = getattr(self, name)
            if not (value is None and name in optional) and not value > 0:
                raise ValueError(f"{name} ({value}) must be above 0" + (", or None" if name in optional else ""))
        for name in ("actor_lr", "critic_lr", "actor_wd", "critic_wd", "kl_coef", "missing_eos_penalty"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0")
        if self.eps_clip >= 1:
            raise ValueError(f"eps_clip ({self.eps_clip}) must be below 1; 0.2 is usual")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"dual_clip ({self.dual_clip}) must be above 1, or None; 3 is usual")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be from 0 to 1")
        if self.target_kl_nats_per_response is not None and self.kl_coef == 0:
            raise ValueError("kl_coef (0) cannot be steered to target_kl_nats_per_response: start it above 0")

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

    def learner_arguments(self) -> dict[str, Any]:
        """The part that the Learner takes."""
        names = (
            "actor_lr", "critic_lr", "actor_wd", "critic_wd", "betas", "adam_eps", "max_norm", "eps_clip", "dual_clip",
            "value_clip", "entropy_coef", "epochs", "minibatch_size", "max_batch_size",
            "max_batch_tokens",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def check_train_arguments(
    prompts: Prompts,
    settings: PPOSettings,
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
    batch = min(num_episodes, update_timesteps)
    if settings.target_kl_nats_per_response is not None and batch >= 5 * settings.kl_horizon:
        raise ValueError(
            f"update_timesteps ({update_timesteps}) must be below 5 times kl_horizon ({settings.kl_horizon})"
        )
    check_sampling_arguments(
        prompts.lengths, palm=palm, max_seq_len=max_seq_len, max_new_tokens=max_new_tokens, eos_token=eos_token,
        temperature=temperature,
    )  # fmt: skip


def check_rollout_arguments(prompts: Tensor, prompt_mask: Tensor, *, palm: PaLM, **sampling: Any) -> None:
    """Refuse prompts that are not token ids (b, p) with their mask, and what `check_sampling_arguments` refuses.

    Raises:
        TypeError: if prompts are not integers, or prompt_mask is not bool.
        ValueError: naming the argument and its value.
    """
    check_masked(prompt_mask, prompts=prompts)
    check_token_ids(prompts.masked_fill(~prompt_mask, 0), palm.num_tokens, name="prompts")
    check_sampling_arguments(prompt_mask.sum(dim=-1), palm=palm, **sampling)


def check_answer_arguments(
    palm: PaLM, *, seq_len: int, num_samples: int, eos_token: int | None, temperature: float
) -> None:
    """Refuse what sampling an answer would stumble over after its first tokens; arguments as in RLHFTrainer.generate.

    Raises:
        ValueError: naming the argument and its value.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples ({num_samples}) must be at least 1")
    check_sampling(temperature=temperature, top_k=None, top_p=None)
    check_length(seq_len, palm.max_length, name="seq_len")
    _check_eos(eos_token, palm)


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


def check_judge(judge: object, palm: PaLM) -> None:
    """Raise unless a judge can score what palm writes.

    Raises:
        TypeError: if it is a language model, not a judge.
        ValueError: if it is a reward model of another vocabulary.
    """
    if isinstance(judge, PaLM):
        raise TypeError(
            "reward_model is a PaLM, which gives logits: make a judge of it, RewardModel(palm), and train it"
        )
    if isinstance(judge, RewardModel) and judge.palm.num_tokens != palm.num_tokens:
        raise ValueError(
            f"reward_model reads {judge.palm.num_tokens} token ids, palm writes {palm.num_tokens}: they must share a"
            " vocabulary"
        )


def check_trackers(log_with: object) -> None:
    """Raise an ImportError, which names the extra, for a tracker of accelerate's that is not installed."""
    names = log_with if isinstance(log_with, list | tuple) else [log_with]
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if isinstance(name, str) and name != "all" and name not in available:
            extra = f"palm-rlhf-pytorch[{name}]" if name in ("wandb", "tensorboard") else name
            raise ImportError(f"log_with names {name!r}, which is not installed: pip install {extra}")


def check_sampling_arguments(
    lengths: Tensor,
    *,
    palm: PaLM,
    max_seq_len: int,
    max_new_tokens: int | None,
    eos_token: int | None,
    temperature: float,
) -> None:
    """Refuse settings of a rollout that leave no room for a response, or that name no distribution.

    Args:
        lengths: tokens of each prompt, (b,).
        palm: the model that samples.
        max_seq_len: as in `RLHFTrainer.rollout`.
        max_new_tokens: likewise.
        eos_token: likewise.
        temperature: likewise.

    Raises:
        ValueError: naming the argument and its value.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1, or None")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature ({temperature}) must be above 0: a greedy policy has nothing to explore")
    _check_eos(eos_token, palm)
    if int(lengths.min()) < 1:
        raise ValueError(f"prompt {int(lengths.argmin())} is all padding: a prompt takes at least one token")
    row, longest = int(lengths.argmax()), int(lengths.max())
    if longest >= max_seq_len:
        raise ValueError(
            f"max_seq_len ({max_seq_len}) counts the prompt: prompt {row} has {longest} tokens and leaves no room for a"
            " response; shorten it or raise max_seq_len"
        )
    total = max_seq_len if max_new_tokens is None else min(max_seq_len, longest + max_new_tokens)
    if total > palm.max_length:
        raise ValueError(
            f"max_seq_len ({max_seq_len}) lets rows grow to {total} tokens: beyond {palm.max_length} palm's xPos scales"
            " leave the range of its dtype; lower max_seq_len or max_new_tokens"
        )


def _check_eos(eos_token: int | None, palm: PaLM) -> None:
    if eos_token is not None and not 0 <= eos_token < palm.num_tokens:
        raise ValueError(f"eos_token ({eos_token}) must be from 0 to {palm.num_tokens - 1}, or None")
