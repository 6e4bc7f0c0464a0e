"""What RLHFTrainer is asked to do: arguments refused before any work, and a call of `train` as a record."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import check_masked, check_token_ids


@dataclass
class Call:
    """A call of `train`: its arguments, and how many episodes and updates of it are done."""

    num_episodes: int
    max_seq_len: int
    max_new_tokens: int | None
    eos_token: int | None
    temperature: float
    update_timesteps: int
    done: int = 0
    updates: int = 0

    @property
    def sampling(self) -> dict[str, Any]:
        """The arguments that shape a response."""
        names = ("max_seq_len", "max_new_tokens", "eos_token", "temperature")
        return {name: getattr(self, name) for name in names}

    @property
    def size(self) -> int:
        """Responses of the next update."""
        return min(self.update_timesteps, self.num_episodes - self.done)

    def place(self, size: int) -> tuple[int, int]:
        """Number of the next update, which has `size` responses, from 1, and of how many."""
        after = -(-(self.num_episodes - self.done - size) // self.update_timesteps)
        return self.updates + 1, self.updates + 1 + max(0, after)

    def resumed(self, kept: dict[str, Any]) -> "Call":
        """This call where the one in a checkpoint stood; another num_episodes makes the run longer or shorter.

        Raises:
            ValueError: if another argument differs.
        """
        free = ("num_episodes", "done", "updates")
        differing = [
            f"{name}: checkpoint {kept.get(name)}, train {value}"
            for name, value in asdict(self).items()
            if name not in free and kept.get(name) != value
        ]
        if differing:
            raise ValueError(f"train cannot resume with other arguments than the run's ({'; '.join(differing)})")
        return replace(self, done=kept["done"], updates=kept["updates"])


def check_train_arguments(
    prompts: Prompts,
    settings: PolicySettings,
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
    for size in (min(num_episodes, update_timesteps), num_episodes % update_timesteps):  # of all updates, and the last
        settings.check_update(size)
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
    if isinstance(judge, RewardModel | RewardEnsemble) and judge.palm.num_tokens != palm.num_tokens:
        raise ValueError(
            f"reward_model reads {judge.palm.num_tokens} token ids, palm writes {palm.num_tokens}: they must share a"
            " vocabulary"
        )


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
