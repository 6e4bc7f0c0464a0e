"""The critic that begins as the reward model, where the two are of one build.

Ouyang et al., "Training language models to follow instructions with human feedback", https://arxiv.org/abs/2203.02155
(the value function is initialised from the reward model); Stiennon et al., https://arxiv.org/abs/2009.01325, likewise.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.config import BEHAVIOUR, SHAPING
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.reward.files import identical
from palm_rlhf_pytorch.reward.model import RewardModel


@torch.no_grad()
def start_critic(actor_critic: ActorCritic, reward_model: object) -> None:
    """Copy a reward model's adapter (or trunk) and head into the critic, whose values then are in normalised scores.

    The value of a token is what the head makes of the state before it,
        V = ((w . h + c) - mean) / deviation,
    with the shift and scale of `RewardModel.normalize_scores`. Of a text that ends there it is the score, where the
    reward model reads the last token (pool_last=True). Where it takes the mean over a response, it is that state's part
    of the mean, which spreads wider than the mean does: what the first updates explain can be below nothing.

    It is a start, not the reward model: the prompt and response embeddings that this adds to the tokens have no place
    in the critic, whose states are off by what these make of them. They start at 0 and move as far as the reward
    model's training took them; what is missing the critic learns, as it learns everything else.

    Under LoRA the two must stand on the same trunk, to the bit, and their adapters have one shape. Where both are whole
    copies they must be built alike; that they were copied from one trunk is the caller's to know.

    Args:
        actor_critic: its critic is overwritten, before anything else is made of it; nothing else changes.
        reward_model: a RewardModel, which stays as it is.

    Raises:
        ValueError: if the reward model cannot be the critic; all reasons are named, and nothing has changed.

    Warns:
        UserWarning: if the reward model takes a mean.
    """
    critic, head = actor_critic.critic, actor_critic.value_head
    if critic is None or head is None:
        raise ValueError("critic_from_reward_model: there is no critic; build the ActorCritic with critic=True")
    if not isinstance(reward_model, RewardModel):
        raise ValueError(
            f"critic_from_reward_model: the judge is a {type(reward_model).__name__}, whose weights are no critic's;"
            " it takes a RewardModel, or leave it off: the critic then starts at 0"
        )
    reasons = [*_of_the_scores(reward_model), *_of_the_trunk(actor_critic, reward_model)]
    if reasons:
        raise ValueError(
            f"critic_from_reward_model: the critic cannot start as the reward model: {'; '.join(reasons)}. Leave it"
            " off: the critic then starts at 0"
        )
    if not reward_model.settings.pool_last:
        warnings.warn(
            "critic_from_reward_model: the reward model scores the mean of a response's tokens, the critic one of them:"
            " where tokens differ its values begin far off; train it with pool_last=True, or give critic_warmup",
            stacklevel=2,
        )
    if critic.adapter is not None and reward_model.adapter is not None:
        _copy(critic.adapter, reward_model.adapter)
    elif critic.copy is not None:
        _copy(critic.copy, reward_model.palm)
    head.weight.copy_(reward_model.head.weight / reward_model.score_std)
    head.bias.copy_((reward_model.head.bias - reward_model.score_mean) / reward_model.score_std)


def _of_the_scores(judge: RewardModel) -> Iterator[str]:
    """Why the judge's scores could not be values."""
    if not judge.palm.causal:
        yield "it is not causal: its features of a token would read what follows; train one on a causal trunk"
    if judge.settings.num_binned_output:
        yield f"its head has {judge.settings.num_binned_output} bins; train one with a scalar head, num_binned_output=0"
    if float(judge.score_mean) == 0 and float(judge.score_std) == 1:
        yield "its scores were not normalised; call reward_model.normalize_scores on reference responses"


def _of_the_trunk(actor_critic: ActorCritic, judge: RewardModel) -> Iterator[str]:
    """Why its weights would not fit the critic's, or would mean something else there."""
    critic, trunk = actor_critic.critic, actor_critic.palm
    assert critic is not None
    mine, theirs = _facts(trunk), _facts(judge.palm)
    other = [f"{name} {theirs.get(name)}, not {value}" for name, value in mine.items() if theirs.get(name) != value]
    if other:
        yield f"its trunk is another ({', '.join(other)}); train it on the palm given"
        return
    if (critic.adapter is None) != (judge.adapter is None):
        built, asked = ("an adapter", "a copy") if critic.adapter is None else ("a copy", "an adapter")
        yield f"it is {built} of the trunk, the critic {asked}; set critic_lora={critic.adapter is None}"
    elif critic.adapter is not None and judge.adapter is not None:
        built, asked = _shape(judge.adapter), _shape(critic.adapter)
        if built != asked:
            knobs = "critic_lora_r, critic_lora_alpha and critic_last_layers"
            yield f"its adapter has {built}, the critic's {asked}; set {knobs}"
        if not _same_weights(trunk, judge.palm):
            yield "its trunk has other weights, to which its adapter belongs; train it on the palm given"
    elif critic.copy is not None and not all(weight.requires_grad for weight in critic.copy.parameters()):
        yield "the critic's copy is of some layers only; leave critic_last_layers at None"


def _facts(palm: PaLM) -> dict[str, Any]:
    """What must agree for weights to mean the same."""
    config = palm.config
    facts = {name: config[name] for name in SHAPING + BEHAVIOUR if name != "causal"}
    return facts | {"dtype": palm.token_emb.weight.dtype}


def _same_weights(first: PaLM, second: PaLM) -> bool:
    weights = zip(first.named_base_parameters(), second.named_base_parameters(), strict=True)
    return all(mine == theirs and identical(one, other) for (mine, one), (theirs, other) in weights)


def _shape(adapter: Adapter) -> str:
    """In words, what must agree for two adapters to be of one shape."""
    layers = sorted(map(int, adapter.layers))
    r, alpha = adapter.config["r"], adapter.config["alpha"]
    return f"rank {r}, alpha {r if alpha is None else alpha:g}, layers {layers[0]} to {layers[-1]}"


def _copy(target: torch.nn.Module, source: torch.nn.Module) -> None:
    weights = dict(source.named_parameters())
    for name, weight in target.named_parameters():
        weight.copy_(weights[name])
