"""Trainers that sample, are judged and learn, update after update: the proof, the plan, the run, one update's learning.

What a method adds is its loss, its settings and what its rows teach: `policy/ppo.py`, `policy/grpo.py`.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from palm_rlhf_pytorch.policy.arguments import Call, check_train_arguments
from palm_rlhf_pytorch.policy.diagnostics import lesson_from
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.judging import raw_scores
from palm_rlhf_pytorch.policy.loop import Loop, begin
from palm_rlhf_pytorch.policy.plan import Plan, memory_to_learn, plan
from palm_rlhf_pytorch.policy.preflight import Report, preflight
from palm_rlhf_pytorch.policy.progress import Progress
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.targets import Lesson
from palm_rlhf_pytorch.policy.trainer import PolicyTrainer


class OnlineTrainer(PolicyTrainer):
    """Adds learning to what samples and judges."""

    lesson: Callable[..., Lesson] = Lesson  # makes what responses teach, see `lesson_from`
    taught: Lesson | None = None  # what the last update has learnt from, until its rollouts are kept

    def run_call(
        self, call: Call, *, resume: str | Path | None, preflight: bool, use_tqdm: bool
    ) -> list[dict[str, float]]:
        """What `train` does; its metrics."""
        check_train_arguments(
            self.prompts, self.settings, palm=self.actor_critic.palm, num_episodes=call.num_episodes,
            update_timesteps=call.update_timesteps, **call.sampling,
        )  # fmt: skip
        self.call = begin(self, call, resume)
        self.doctor.run = self.doctor.run._replace(eos_token=call.eos_token is not None)
        loop = Loop(self, self.call, use_tqdm=use_tqdm)
        with self.trackers.running(self.configuration, step=self.updates):
            if preflight:
                loop.prove()
            history, self.stopped = loop.run()
        return history

    @property
    def configuration(self) -> dict[str, Any]:
        """What the run is, for trackers: method, settings, model, the call of `train` if there is one."""
        own = {"trainer": self.kind, "seed": self.seed, **self.settings.plain()}
        own |= {"processes": self.ranks.count, "mixed_precision": self.accelerator.mixed_precision}
        return own | {"palm": self.actor_critic.palm.config, "call": {} if self.call is None else asdict(self.call)}

    def preflight(
        self,
        *,
        max_seq_len: int = 2048,
        max_new_tokens: int | None = None,
        eos_token: int | None = None,
        temperature: float = 1.0,
    ) -> Report:
        """Prove on the models, prompts and settings of this trainer what PPO takes for granted; nothing changes.

        A fault is in the report, with its cause and remedy, and raises nothing. Arguments are those of `train`.
        """
        room: dict[str, Any] = {"max_seq_len": max_seq_len, "max_new_tokens": max_new_tokens}
        alone = self.learner.sharding is None  # of weights that are spread no piece can be tried on its own
        memory = partial(memory_to_learn, self, temperature=temperature, **room) if alone else None
        with self.learner.whole():
            return preflight(self, eos_token=eos_token, temperature=temperature, memory=memory, **room)

    def plan(self, num_episodes: int = 50_000, **arguments: Any) -> Plan:
        """Memory and time of a call of `train` with these arguments, after timing a piece of each phase; not with FSDP.

        Args:
            num_episodes: as in `train`.
            **arguments: max_seq_len, max_new_tokens, eos_token, temperature and update_timesteps, as there.
        """
        if self.learner.sharding is not None:
            raise ValueError("plan measures one process with whole weights: it knows no FSDP; plan without it")
        return plan(self, num_episodes, **arguments)

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Take the method's steps on a scored rollout, then let the KL controller act; returns the diagnostics.

        Learning rates are those of the settings, or of the last update where `train` has run.

        Raises:
            ValueError: if the rollout has no scores, not one a response, or too many that are not finite.
            FloatingPointError: if loss or gradient norm are not finite several steps in a row; each such step leaves
                the weights as they were.
        """
        if rollout.scores is None:
            raise ValueError(
                "rollout has no scores: call score(rollout) first, or set them by rollout._replace(scores=)"
            )
        scores = raw_scores(rollout.scores, len(rollout.sequences), where="this rollout")
        return self.learn_from(rollout._replace(scores=scores).to("cpu"), num_fresh=len(rollout.sequences))

    def learn_from(
        self,
        source: Rollout | Experience,
        *,
        num_fresh: int,
        progress: Progress | None = None,
        on_step: Callable[[Progress], object] | None = None,
    ) -> dict[str, float]:
        """What `learn` does, on rows on the CPU or on disk, or the rest of it.

        Args:
            source: scored responses.
            num_fresh: how many of them this update has sampled; the others are learnt from again.
            progress: where an interrupted update goes on.
            on_step: called after each optimizer step, see `Learner.update`.
        """
        lesson, metrics = lesson_from(
            source, self.settings, ranks=self.ranks, normalizer=self.normalizer, kl_coef=self.kl_coef,
            version=min(self.updates, int(source.versions.max())),  # a rollout handed in may be older than the policy
            kind=self.lesson,
        )  # fmt: skip
        self.taught = lesson if self.kept_rollouts.folder is not None else None
        random = partial(self.learning_generator, self.updates)
        metrics |= self.learner.update(lesson, random=random, progress=progress, on_step=on_step)
        episodes = num_fresh * self.ranks.count
        self.episodes += episodes
        self.updates += 1
        if isfinite(kl := metrics["objective/kl"]):  # no response may have counted
            self.kl_coef = self.settings.next_kl_coef(self.kl_coef, kl, num_episodes=episodes)
        return metrics | {"episodes": float(self.episodes)}
