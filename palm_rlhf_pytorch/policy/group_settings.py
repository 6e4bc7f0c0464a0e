"""Settings of the group methods beside those of every trainer, with the reason of each default."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

from palm_rlhf_pytorch.objectives.group import GRPO, GroupObjective
from palm_rlhf_pytorch.policy.run import MAX_ROUNDS
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.typecheck import typecheck


@typecheck
@dataclass(frozen=True, kw_only=True)
class GroupSettings(PolicySettings):
    """The keywords GRPOTrainer takes beside models and prompts: these, and those of PolicySettings.

    Scores are learnt from as the judge gives them, and nothing is subtracted where a response did not end: pass
    normalize_scores=True or missing_eos_penalty to change that.

    Attributes:
        objective: GRPO, DR_GRPO, DAPO, RLOO or GSPO of `objectives.group`, or one made of their parts.
        group_size: responses to each prompt; 8 for GRPO, 4 is enough for RLOO, 16 in DAPO.
        max_rounds: dynamic sampling: prompts whose responses have all earned the same are left out, and others sampled
            in their place, up to so many rounds of `update_timesteps` responses; 1 for none. 10 where DAPO is used.
        overlong_buffer: tokens before max_new_tokens over which a penalty grows to -1, DAPO's; None for none.
        drop_truncated: leave responses that ran into their limit out of the loss and the group.
        actor_lr: as in PolicySettings.
        epochs: 1: groups are sampled anew for each pass.
    """

    objective: GroupObjective = GRPO
    group_size: int = 8
    max_rounds: int = 1
    overlong_buffer: int | None = None
    drop_truncated: bool = False
    epochs: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing.

        Raises:
            ValueError: naming the setting and its value.
        """
        super().__post_init__()
        self.check_positive("overlong_buffer", optional=True)
        if self.group_size < 2:
            raise ValueError(
                f"group_size ({self.group_size}) must be at least 2: one response has none to compare with"
            )
        if not 1 <= self.max_rounds <= MAX_ROUNDS:
            raise ValueError(f"max_rounds ({self.max_rounds}) must be from 1 to {MAX_ROUNDS}")

    def warn(self) -> None:
        """Warn of what is allowed but seldom meant."""
        super().warn()
        if self.minibatch_size % self.group_size:
            warnings.warn(
                f"minibatch_size ({self.minibatch_size}) is no multiple of group_size ({self.group_size}): that is"
                " allowed, responses of a group may be learnt from in different steps",
                stacklevel=3,
            )

    def check_update(self, num_responses: int) -> None:
        """Raise a ValueError unless an update's responses are whole groups."""
        if num_responses % self.group_size:
            raise ValueError(
                f"update_timesteps and num_episodes count responses ({num_responses} in an update or in all): they must"
                f" be multiples of group_size ({self.group_size})"
            )

    @classmethod
    def elsewhere(cls) -> dict[str, str]:
        """Names that belong to the objective."""
        return {
            field.name: f"it belongs to the objective: objective=dataclasses.replace(GRPO, {field.name}=...)"
            for field in fields(GroupObjective)
        }

    @property
    def responses_per_prompt(self) -> int:
        """How often a prompt is answered when its turn comes."""
        return self.group_size

    @property
    def first_kl_coef(self) -> float:
        """Price of a nat of KL in the reward."""
        return self.objective.kl_coef

    def plain(self) -> dict[str, Any]:
        """All settings as JSON-able values."""
        found = {field.name: getattr(self, field.name) for field in fields(self)} | {
            "objective": self.objective.plain()
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
