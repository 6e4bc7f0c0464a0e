"""Online methods on a bandit whose best policy is known: `python -m tests.learning --only bandit`.

Two prompts, six responses of one token, a small PaLM of which all weights are learnt, scores of deviation 1.

    PPO and RLOO, KL in the reward                    reference * exp(score / beta)
    Dr. GRPO, KL in the loss, as ratio * k3 or exact  reference * exp((g - 1) / g * score / beta), g a group's size
    GRPO and GSPO                                     no unique optimum with a KL penalty; without it the best response

At the optimum of the first two all responses earn the same, so that the noise ends there, and five seeds come within
.005 of it in total variation. With the KL in the loss the noise stays: by updates of 256 they end up to .03 off.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import one_hot

from palm_rlhf_pytorch.objectives.group import DR_GRPO, GRPO, GSPO, RLOO, GroupObjective
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from tests.learning.direct import CONTEXTS, NUM_ACTIONS, Bandit, Outcome, total_variation

BATCH, GROUP, LR = 256, 4, 2e-2


class Case(NamedTuple):
    """A trainer with its settings, and by what the score is multiplied in the exponent; None for the best response."""

    make: Callable[..., Any]
    tilt: float | None


def ppo(beta: float) -> Case:
    critic = {"critic_lora": False, "critic_lr": LR, "value_clip": None}
    make = partial(RLHFTrainer, actor_lr=LR, epochs=1, kl_coef=beta, normalize_scores=False, **critic)
    return Case(make, 1 / beta)


def rloo(beta: float) -> Case:
    return Case(groups(replace(RLOO, kl_coef=beta)), 1 / beta)


def kl_in_loss(beta: float) -> Case:
    return Case(groups(replace(DR_GRPO, kl_loss_coef=beta)), (GROUP - 1) / GROUP / beta)


def exact_kl_in_loss(beta: float) -> Case:
    return Case(groups(DR_GRPO, kl_exact_coef=beta), (GROUP - 1) / GROUP / beta)


def best_response(objective: GroupObjective) -> Case:
    # the clip holds each update back: without one an early lucky response is taken for the best
    wide = replace(objective, eps_clip=0.2, eps_clip_high=0.28)
    return Case(groups(wide, actor_lr=1e-2, epochs=4, group_size=8), None)


def groups(objective: GroupObjective, **settings: Any) -> Callable[..., GRPOTrainer]:
    defaults = {"actor_lr": LR, "epochs": 1, "group_size": GROUP}
    return partial(GRPOTrainer, objective=objective, **{**defaults, **settings})


CASES: dict[str, Case] = {
    "PPO, beta .5": ppo(0.5),
    "PPO, beta 1": ppo(1.0),
    "RLOO, beta .5": rloo(0.5),
    "RLOO, beta 1": rloo(1.0),
    "Dr. GRPO, ratio * k3 in the loss, beta .5": kl_in_loss(0.5),
    "Dr. GRPO, ratio * k3 in the loss, beta 1": kl_in_loss(1.0),
    "Dr. GRPO, exact KL in the loss, beta .5": exact_kl_in_loss(0.5),
    "Dr. GRPO, exact KL in the loss, beta 1": exact_kl_in_loss(1.0),
    "GRPO, best response": best_response(GRPO),
    "GSPO, best response": best_response(GSPO),  # of one token it is GRPO: its ratio is a mean over tokens
}


class Ending(NamedTuple):
    """Where a run ended: its figures, and the policy (2, 6), to be compared with other optima than its own."""

    outcome: Outcome
    bandit: Bandit
    policy: Tensor

    def distance_to(self, tilt: float) -> float:
        """Total variation to reference * exp(tilt * score)."""
        return total_variation(self.policy, self.bandit.optimum(tilt * self.bandit.scores.double()))


def run(case: Case, seed: int, *, name: str = "", num_updates: int = 100) -> Ending:
    """One method on one bandit; the learning rate falls to 0, as `train` lets it."""
    bandit = Bandit(seed)
    trainer = case.make(
        palm=bandit.palm,
        reward_model=bandit.judge,
        # each prompt many times over: what one of them gets in an update is a group
        prompt_token_ids=CONTEXTS.repeat(BATCH // (len(CONTEXTS) * GROUP), 1),
        actor_lora=False,
        minibatch_size=BATCH,
        max_batch_size=BATCH,
        seed=seed,
        accelerate_kwargs={"cpu": True},
    )
    trainer.train(BATCH * num_updates, max_new_tokens=1, update_timesteps=BATCH, preflight=False, use_tqdm=False)
    palm, scores = trainer.export_palm(), bandit.scores.double()
    best = one_hot(scores.argmax(dim=-1), NUM_ACTIONS).double()
    optimum = best if case.tilt is None else bandit.optimum(case.tilt * scores)
    outcome = bandit.outcome(name, seed, palm, optimum=optimum, num_tokens=2 * BATCH * num_updates)
    return Ending(outcome, bandit, bandit.distribution(palm))
