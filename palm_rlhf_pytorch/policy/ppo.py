"""RLHFTrainer: a policy learns from a judge by PPO.

    collect: prompts -> responses, log-probabilities, values     (`rollout`)
    score:   the judge's scores                                  (`score`)
    learn:   advantages, epochs of clipped steps                 (`learn`)

Ziegler et al., "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593
Stiennon et al., "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm

from palm_rlhf_pytorch.palm.copying import move_together
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.diagnostics import headline, rollout_metrics, timing_metrics
from palm_rlhf_pytorch.policy.learning import Learner, make_targets
from palm_rlhf_pytorch.policy.prompts import one_prompt, prompts_from
from palm_rlhf_pytorch.policy.rollout import Rollout, collect_rollout, sample_answers
from palm_rlhf_pytorch.policy.scores import Judge, ScoreNormalizer, best_response, judge_sequences, learnt_scores
from palm_rlhf_pytorch.policy.settings import (
    check_answer_arguments,
    check_judge,
    check_rollout_arguments,
    check_trackers,
    check_train_arguments,
    settings_from,
)
from palm_rlhf_pytorch.policy.trainer_state import load_trainer, save_trainer
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizer import linear_to_zero, scale_learning_rates
from palm_rlhf_pytorch.typecheck import typecheck


class RLHFTrainer:
    """Improves a PaLM against a judge, with a frozen reference that it must not stray far from.

    The `palm` given stays as it is; the improved model comes from `export_palm()`. All randomness follows from `seed`
    and counts of what was done; torch's, numpy's and Python's global random states are left alone.
    """

    @typecheck
    def __init__(
        self,
        *,
        palm: PaLM,
        reward_model: RewardModel | Judge,
        prompt_token_ids: Tensor | Sequence[Any] | None = None,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        prompts_path: str | Path | None = None,
        tokenizer: object | None = None,
        pad_value: int | None = None,
        seed: int = 0,
        metrics_path: str | Path | None = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """Prepare training; nothing is sampled yet.

        Args:
            palm: a causal PaLM, the reference and the start of the policy; its scopes are left out.
            reward_model: a RewardModel, or any callable `(sequences, prompt_mask=, mask=) -> scores (b,)`; sequences
                are ids (b, n) padded on the right, both masks are False on padding.
            prompt_token_ids: prompts as ids, (m, p), or a list of 1-D tensors of unequal lengths.
            prompt_mask: True on the real tokens of (m, p), padding on either side.
            prompt_lengths: the same as lengths, padding on the right, (m,).
            prompts: prompts as text, with `tokenizer`.
            prompts_path: a UTF-8 file of prompts, one a line, with `tokenizer`.
            tokenizer: any callable from text to ids, Hugging Face's included.
            pad_value: id that pads the ends of `prompt_token_ids` where neither mask nor lengths are given; a token
                of that id elsewhere stays. None: every id is a token.
            seed: of adapters, sampling, order and dropout; 0 or above.
            metrics_path: a JSONL file that gets a line for each update.
            accelerate_kwargs: passed to accelerate.Accelerator; `log_with` there names trackers.
            **settings: the fields of PPOSettings, where each is described.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if prompts, models or a setting do not fit; the argument and its value are named.
        """
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be 0 or above")
        self.settings = settings_from(settings)
        self.prompts = prompts_from(
            num_tokens=palm.num_tokens, seed=seed, prompt_token_ids=prompt_token_ids, prompt_mask=prompt_mask,
            prompt_lengths=prompt_lengths, pad_value=pad_value, prompts=prompts, prompts_path=prompts_path,
            tokenizer=tokenizer,
        )  # fmt: skip
        check_judge(reward_model, palm)
        check_trackers((accelerate_kwargs or {}).get("log_with"))
        self.seed = seed
        self.accelerator = Accelerator(**(accelerate_kwargs or {}))
        if self.accelerator.log_with:
            kept = {name: str(value) for name, value in self.settings.plain().items()}  # some trackers take no lists
            self.accelerator.init_trackers("palm-rlhf", config={"seed": seed, **kept})
        self.metrics = MetricsLog(metrics_path, accelerator=self.accelerator)
        self.reward_model, trunk = reward_model, palm.share()
        judges = [reward_model] if isinstance(reward_model, nn.Module) else []
        move_together(trunk, *judges, device=self.accelerator.device)  # a judge over the same palm keeps sharing it
        self.actor_critic = ActorCritic(trunk, generator=self._generator("adapters"), **self.settings.model_arguments())
        self.learner = Learner(self.actor_critic, self.accelerator, **self.settings.learner_arguments())
        self.normalizer = ScoreNormalizer()
        self.kl_coef = self.settings.kl_coef
        self.rollouts = self.answers = self.episodes = self.updates = 0

    @typecheck
    def train(
        self,
        num_episodes: int = 50_000,
        *,
        max_seq_len: int = 2048,
        max_new_tokens: int | None = None,
        eos_token: int | None = None,
        temperature: float = 1.0,
        update_timesteps: int = 64,
        use_tqdm: bool = True,
    ) -> list[dict[str, float]]:
        """Learn from num_episodes responses; learning rates fall linearly to 0 over this call's updates.

        Args:
            num_episodes: responses to sample, score and learn from, over all processes.
            max_seq_len: tokens of prompt and response together.
            max_new_tokens: tokens of a response, if that is to be less.
            eos_token: id that ends a response; None lets all run to their limit.
            temperature: of sampling, above 0; it enters every log-probability. 1 in most of the literature.
            update_timesteps: responses between two updates, over all processes; 64 as in Ziegler et al. The last
                update takes what is left.
            use_tqdm: show progress (main process only).

        Returns:
            The metrics of each update; their names are explained in `training/metrics.py`.

        Raises:
            ValueError: before anything is sampled, if a prompt is as long as max_seq_len or a number is out of range;
                while scoring, if the judge's scores are not finite numbers, one a response.
        """
        check_train_arguments(
            self.prompts, self.settings, palm=self.actor_critic.palm, num_episodes=num_episodes,
            max_seq_len=max_seq_len, max_new_tokens=max_new_tokens, eos_token=eos_token, temperature=temperature,
            update_timesteps=update_timesteps,
        )  # fmt: skip
        sizes = [min(update_timesteps, num_episodes - done) for done in range(0, num_episodes, update_timesteps)]
        history = []
        with tqdm(total=num_episodes, disable=not (use_tqdm and self._is_main), desc="ppo", unit="episode") as bar:
            for number, size in enumerate(sizes, start=1):
                scale_learning_rates(self.learner.optimizer, linear_to_zero(number, len(sizes)))
                started = time.perf_counter()
                rollout = self.rollout(  # 1. collect
                    *self.next_prompts(size), max_seq_len=max_seq_len, max_new_tokens=max_new_tokens,
                    eos_token=eos_token, temperature=temperature, use_tqdm=use_tqdm,
                )  # fmt: skip
                rollout = self.score(rollout)  # 2. score
                sampled = time.perf_counter()
                metrics = self.learn(rollout)  # 3. learn
                metrics |= timing_metrics(rollout, started, sampled, reduce=self._sum_over_ranks)
                self.metrics.log(metrics, step=self.updates)
                history.append(metrics)
                bar.set_postfix(headline(metrics), refresh=False)
                bar.update(size)
        return history

    def next_prompts(self, count: int) -> tuple[Tensor, Tensor]:
        """This process's share of the next prompts: ids (b, p) and mask (b, p), on the training device.

        Each prompt comes once before any comes again. Shares are equal: counts that do not divide are rounded up.
        """
        rows = self.prompts.next_share(count, self.accelerator.process_index, of=self.accelerator.num_processes)
        ids, mask = self.prompts.select(rows)
        return ids.to(self.accelerator.device), mask.to(self.accelerator.device)

    @typecheck
    def rollout(
        self,
        prompts: Tensor,
        prompt_mask: Tensor,
        *,
        max_seq_len: int = 2048,
        max_new_tokens: int | None = None,
        eos_token: int | None = None,
        temperature: float = 1.0,
        use_tqdm: bool = False,
    ) -> Rollout:
        """Sample a response to each prompt, with log-probabilities, reference log-probabilities and values.

        Args:
            prompts: ids, (b, p), padding on either side.
            prompt_mask: True on real tokens, (b, p).
            max_seq_len: tokens of prompt and response together.
            max_new_tokens: tokens of a response, if that is to be less.
            eos_token: id that ends a response.
            temperature: of sampling, above 0.
            use_tqdm: show progress over the generated tokens.

        Raises:
            TypeError: if prompts are not integers, or prompt_mask is not bool.
            ValueError: if shapes, ids or a number do not fit.
        """
        check_rollout_arguments(
            prompts, prompt_mask, palm=self.actor_critic.palm, max_seq_len=max_seq_len, max_new_tokens=max_new_tokens,
            eos_token=eos_token, temperature=temperature,
        )  # fmt: skip
        prompts, prompt_mask = prompts.to(self.accelerator.device), prompt_mask.to(self.accelerator.device)
        prompts = prompts.masked_fill(~prompt_mask, 0)
        room = max_seq_len - prompt_mask.sum(dim=-1)
        room = room if max_new_tokens is None else room.clamp(max=max_new_tokens)
        passes = -(-len(prompts) // self.settings.max_batch_size)
        show = use_tqdm and self._is_main and int(room.max()) * passes >= 256  # shorter ones are over at once
        with (
            tqdm(total=int(room.max()) * passes, disable=not show, desc="generate", unit="token", leave=False) as bar,
            self.accelerator.autocast(),
        ):
            rollout = collect_rollout(
                self.actor_critic, prompts, prompt_mask, max_new_tokens=room, temperature=temperature,
                eos_token=eos_token, generator=self._generator("sample", self.rollouts),
                on_step=bar.update, **self.settings.batch_limits(),
            )  # fmt: skip
        self.rollouts += 1
        return rollout

    def score(self, rollout: Rollout) -> Rollout:
        """The rollout with the judge's raw scores.

        Raises:
            TypeError: if the judge returns no tensor.
            ValueError: if a score is NaN or infinite (rows are named), or their shape is not (b,). An error that the
                judge itself raises passes through, with a note of the update and the rows.
        """
        scores = judge_sequences(
            self.reward_model, rollout.sequences, rollout.prompt_mask, rollout.mask,
            where=f"update {self.updates + 1}", **self.settings.batch_limits(),
        )  # fmt: skip
        return rollout._replace(scores=scores)

    def learn(self, rollout: Rollout) -> dict[str, float]:
        """Take PPO's steps on a scored rollout, then let the KL controller act; returns the diagnostics.

        Learning rates are those of the settings, or of the last update where `train` has run.

        Raises:
            ValueError: if the rollout has no scores, or scores that are not one finite number a response.
            FloatingPointError: if a gradient norm is not finite; the weights are then as before that step.
        """
        settings, reduce = self.settings, self._sum_over_ranks
        scores = learnt_scores(
            rollout, self.normalizer if settings.normalize_scores else None, penalty=settings.missing_eos_penalty,
            replacement=settings.missing_eos_score, reduce=reduce,
        )  # fmt: skip
        targets = make_targets(
            rollout, scores, kl_coef=self.kl_coef, gamma=settings.gamma, gae_lambda=settings.gae_lambda, reduce=reduce
        )
        metrics = rollout_metrics(rollout, targets, scores, kl_coef=self.kl_coef, gamma=settings.gamma, reduce=reduce)
        metrics |= self.learner.update(rollout, targets, generator=self._generator("order", self.updates, cpu=True))
        episodes = len(rollout.sequences) * self.accelerator.num_processes
        self.episodes += episodes
        self.updates += 1
        self.kl_coef = settings.next_kl_coef(self.kl_coef, metrics["objective/kl"], num_episodes=episodes)
        return metrics | {"episodes": float(self.episodes)}

    @torch.no_grad()
    @typecheck
    def generate(
        self,
        seq_len: int,
        prompt: Tensor,
        *,
        num_samples: int = 4,
        temperature: float = 1.0,
        eos_token: int | None = None,
        pad_value: int | None = None,
        use_tqdm: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The best of several responses by the judge's score.

        Args:
            seq_len: tokens of prompt and response together.
            prompt: ids of one prompt, (p,), p below seq_len.
            num_samples: responses to choose from.
            temperature: of sampling; 0 makes them all alike.
            eos_token: id that ends a response.
            pad_value: id that pads the end of the prompt, if it is padded.
            use_tqdm: show progress over the generated tokens.
            generator: random state, on the training device; None follows from the trainer's seed.

        Returns:
            Prompt and best response, its EOS included, (<= seq_len,).

        Raises:
            ValueError: if the prompt is empty, too long or out of the vocabulary, or a number is out of range.
        """
        palm, limit, device = self.actor_critic.palm, self.settings.max_batch_size, self.accelerator.device
        prompt = one_prompt(prompt, num_tokens=palm.num_tokens, pad_value=pad_value, seq_len=seq_len).to(device)
        numbers: dict[str, Any] = {"num_samples": num_samples, "eos_token": eos_token, "temperature": temperature}
        check_answer_arguments(palm, seq_len=seq_len, **numbers)
        total, show = (seq_len - len(prompt)) * -(-num_samples // limit), use_tqdm and self._is_main
        with tqdm(total=total, disable=not show, desc="generate", leave=False) as bar, self.accelerator.autocast():
            responses = sample_answers(
                self.actor_critic, prompt, max_new_tokens=seq_len - len(prompt),
                generator=generator or self._generator("answer", self.answers), max_batch_size=limit,
                on_step=bar.update, **numbers,
            )  # fmt: skip
        self.answers += 1  # counted apart from rollouts: to look at samples does not change the training
        return best_response(self.reward_model, prompt, responses, **self.settings.batch_limits())

    def export_palm(self) -> PaLM:
        """The improved PaLM: a model of its own, the actor's update merged into its weights, in eval mode."""
        return self.actor_critic.export_palm().eval()

    def save(self, path: str | Path) -> None:
        """Write what training has changed (not the frozen trunk) to one file, atomically; main process only."""
        if self._is_main:
            save_trainer(self, path)

    def load(self, path: str | Path) -> Self:
        """Go on where `save` was called, in a trainer of the same palm and settings; all is checked before any change.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no trainer's checkpoint, or that of another palm or other settings.
        """
        load_trainer(self, path)
        return self

    @property
    def _is_main(self) -> bool:
        return self.accelerator.is_main_process

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _generator(self, purpose: str, count: int = 0, *, cpu: bool = False) -> torch.Generator:
        """Random state that follows from the seed, its purpose, how often it was needed, and the process."""
        rank = 0 if purpose == "adapters" else self.accelerator.process_index
        stream = ("adapters", "sample", "order", "answer").index(purpose)
        state = np.random.SeedSequence([self.seed, stream, count, rank]).generate_state(1, np.uint64)
        device = "cpu" if cpu or purpose == "adapters" else self.accelerator.device
        return torch.Generator(device).manual_seed(int(state[0] >> 1))
