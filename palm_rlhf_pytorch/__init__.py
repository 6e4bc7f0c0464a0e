"""RLHF on a PaLM language model: train a PaLM, train a reward model, improve the PaLM with PPO, GRPO or DPO.

    text  ->  palm  ->  reward  ->  policy  ->  (people judge)  feedback  ->  text
    words     a model    a judge     learns from
    to ids    of text    of text     the judge

Rooms, from the ground up: tensors, rotary, attention and lora are bricks; `text` makes ids of words, writes chats and
corpora as ids, and reads what people said; `objectives` holds every loss as a pure function; `training` what all
trainers share: optimizers, checkpoints, metrics, trackers, curves; `palm` the language model, published ones too, and
how it learns from text and dialogues; `reward` the judges; `policy` PPO, the group methods, and what learns straight
from preferences; `feedback` the pages in which people judge; `cli` the command `palm-rlhf`. A file imports only from
lower floors.
The name palm-rlhf-pytorch on PyPI belongs to the original project: install this package from its repository.
Read first: palm/transformer.py, reward/model.py, policy/rollout.py, objectives/policy_gradient.py, policy/ppo.py.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when it is first asked for: who builds a PaLM need not wait for PPO
    from palm_rlhf_pytorch.palm.transformer import PaLM
    from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
    from palm_rlhf_pytorch.policy.dpo import DPOTrainer
    from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
    from palm_rlhf_pytorch.policy.kto import KTOTrainer
    from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
    from palm_rlhf_pytorch.policy.rejection import RejectionTrainer
    from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
    from palm_rlhf_pytorch.reward.model import RewardModel

__all__ = [
    "ActorCritic",
    "DPOTrainer",
    "GRPOTrainer",
    "KTOTrainer",
    "PaLM",
    "RLHFTrainer",
    "RejectionTrainer",
    "RewardEnsemble",
    "RewardModel",
]

_FILES = {
    "ActorCritic": "policy.actor_critic",
    "DPOTrainer": "policy.dpo",
    "GRPOTrainer": "policy.grpo",
    "KTOTrainer": "policy.kto",
    "PaLM": "palm.transformer",
    "RLHFTrainer": "policy.ppo",
    "RejectionTrainer": "policy.rejection",
    "RewardEnsemble": "reward.ensemble",
    "RewardModel": "reward.model",
}
_ROOMS = ("objectives", "palm", "policy", "reward", "text", "training")


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a room, imported now."""
    if name in _FILES:
        return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
