"""GRPOTrainer: a policy learns from how its responses to one prompt compare, without a critic.

    prove:   the identities it rests on, on this model                       (`preflight`)
    collect: prompts -> several responses to each                            (`rollout`)
    score:   the judge's scores; more prompts where groups teach nothing     (`score`)
    learn:   advantages within groups, clipped steps                         (`learn`)
    save:    all of it, at any of these places                               (`train(resume="auto")` goes on there)

The papers, and what tells the methods apart, are in `objectives/group.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.arguments import Call
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.group_settings import GroupSettings
from palm_rlhf_pytorch.policy.groups import GroupLesson
from palm_rlhf_pytorch.policy.judging import Judge
from palm_rlhf_pytorch.policy.losses import GroupStepLoss
from palm_rlhf_pytorch.policy.online import OnlineTrainer
from palm_rlhf_pytorch.policy.progress import Progress
from palm_rlhf_pytorch.policy.prompts import PromptBatch
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.run import Flight
from palm_rlhf_pytorch.policy.scores import learnt_scores
from palm_rlhf_pytorch.policy.settings import settings_from
from palm_rlhf_pytorch.policy.targets import Source
from palm_rlhf_pytorch.policy.watch import WatchSettings
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.typecheck import typecheck


class GRPOTrainer(OnlineTrainer):
    """Improves a PaLM by GRPO or one of its kin: Dr. GRPO, DAPO, RLOO, GSPO.

    The `palm` given stays as it is; the improved model comes from `export_palm()`. Prompts of a batch that are alike
    are read once, so that a group shares one prefill. What `RLHFTrainer` says of seeds, files and processes holds here.
    """

    settings: GroupSettings

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
        held_out_judge: RewardModel | Judge | None = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        metrics_path: str | Path | None = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        pretraining: Tensor | np.ndarray | None = None,
        watch: WatchSettings | None = None,
        optimizer: OptimizerFactory | None = None,
        log_with: object | None = None,
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
            held_out_judge: a second judge, whose scores are logged and never learnt from.
            seed: of adapters, sampling, order and dropout; 0 or above.
            run_dir: folder of the run: its metrics, its experience, and the checkpoints from which `train` resumes.
                None keeps no checkpoints, and experience in a temporary folder.
            metrics_path: a JSONL file that gets a line for each update; by default metrics.jsonl in run_dir.
            accelerate_kwargs: passed to accelerate.Accelerator.
            pretraining: token ids (n,), a tensor, array or memory map, of which random windows are read in each step
                where `ptx_coef` asks for it.
            watch: when to end the run and go back to the best policy, by the held-out judge or by signs that the judge
                is being fooled (`policy/watch.py`); it needs a run_dir. None never does.
            optimizer: makes one of parameter groups, each with its lr and weight_decay, in place of fused AdamW:
                `training/optimizers.py` has `muon`; betas and adam_eps are AdamW's alone.
            log_with: trackers that get the metrics too: "wandb", "tensorboard", any that accelerate knows, a
                `GeneralTracker`, a list of them, or `training.trackers.Tracking`, which names project and run. They are
                started by `train` and closed at its end. Files go to `trackers` in the run's folder.
            **settings: the fields of GroupSettings and of PolicySettings, where each is described; `objective` first.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if prompts, models or a setting do not fit; the argument and its value are named.
        """
        sources = {
            "prompt_token_ids": prompt_token_ids, "prompt_mask": prompt_mask, "prompt_lengths": prompt_lengths,
            "pad_value": pad_value, "prompts": prompts, "prompts_path": prompts_path, "tokenizer": tokenizer,
        }  # fmt: skip
        chosen = settings_from(GroupSettings, settings, trainer="GRPOTrainer")
        super().__init__(
            palm, reward_model, held_out_judge=held_out_judge, settings=chosen, critic=False,
            loss=self._loss(chosen, max_length=1), prompts=sources, seed=seed, run_dir=run_dir,
            metrics_path=metrics_path, accelerate_kwargs=accelerate_kwargs, pretraining=pretraining, watch=watch,
            optimizer=optimizer,
            log_with=log_with,
        )  # fmt: skip
        self.lesson = self._lesson

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
        resume: str | Path | None = None,
        preflight: bool = True,
        use_tqdm: bool = True,
    ) -> list[dict[str, float]]:
        """Learn from num_episodes responses, `group_size` to a prompt; arguments and errors as `RLHFTrainer.train`.

        Args:
            num_episodes: responses to learn from, over all processes: a multiple of group_size.
            max_seq_len: tokens of prompt and response together.
            max_new_tokens: tokens of a response, if that is to be less.
            eos_token: id that ends a response; None lets all run to their limit.
            temperature: of sampling, above 0.
            update_timesteps: responses between two updates, over all processes: a multiple of group_size. Where groups
                are sampled again, so many are learnt from, as far as max_rounds finds them.
            resume: see there.
            preflight: see there.
            use_tqdm: see there.

        Returns:
            The metrics of each update of this call.

        Raises:
            ValueError: see there.
            FloatingPointError: see there.
        """
        call = Call(num_episodes, max_seq_len, max_new_tokens, eos_token, temperature, update_timesteps)
        self.settings.check_update(num_episodes)
        buffer, longest = self.settings.overlong_buffer, self._longest_response(call)
        if buffer is not None and 0 < longest < buffer:
            raise ValueError(
                f"overlong_buffer ({buffer}) must be at most the tokens that a response may have here ({longest})"
            )
        return self.run_call(call, resume=resume, preflight=preflight, use_tqdm=use_tqdm)

    def next_prompts(self, count: int) -> PromptBatch:
        """This process's share of the next prompts, each as often as a group has responses; `count` is responses."""
        size = self.settings.responses_per_prompt
        batch = super().next_prompts(-(-count // size))
        return PromptBatch(*(part.repeat_interleave(size, dim=0) for part in batch))

    def wants_more(self, flight: Flight) -> bool:
        """Whether too few groups of the rounds so far teach anything, and another round is allowed."""
        if len(flight.rounds) >= self.settings.max_rounds:
            return False
        rows, settings, normalizer = flight.sampled, self.settings, None
        assert rows.scores is not None, "asked after scoring"
        counted = rows.scores.isfinite()
        if settings.normalize_scores:  # as learning will, which alone fixes the scale
            normalizer = ScoreNormalizer()
            normalizer.restore(self.normalizer.state())
        scores = learnt_scores(
            rows, counted, normalizer, penalty=settings.missing_eos_penalty, replacement=settings.missing_eos_score,
            reduce=self.ranks.sum,
        )  # fmt: skip
        _, teaching = self._lesson(rows, scores, counted, kl_coef=self.kl_coef).weigh()
        return self.ranks.any(int(teaching.sum()) < self._groups_of(len(flight.rounds[0])))

    def learn_from(
        self,
        source: Rollout | Experience,
        *,
        num_fresh: int,
        progress: Progress | None = None,
        on_step: Callable[[Progress], object] | None = None,
    ) -> dict[str, float]:
        """As of every such trainer."""
        call = self.call
        longest = int(self._limits(source).max()) if call is None else self._longest_response(call)
        self.learner.loss = self._loss(self.settings, max_length=longest)
        return super().learn_from(source, num_fresh=num_fresh, progress=progress, on_step=on_step)

    def _groups_of(self, num_responses: int) -> int:
        return num_responses // self.settings.group_size

    def _longest_response(self, call: Call) -> int:
        """Tokens of the longest response there may be."""
        room = call.max_seq_len - int(self.prompts.lengths.min())
        return room if call.max_new_tokens is None else min(room, call.max_new_tokens)

    def _limits(self, source: Source) -> Tensor:
        """Tokens each response may have, (n,); without a call of `train` the longest of them stands for the limit."""
        spans, call = torch.tensor(list(source.spans())), self.call
        if call is None:
            return torch.full((len(spans),), int(self.ranks.max(spans[:, 1].max())))
        room = call.max_seq_len - spans[:, 0]
        return room if call.max_new_tokens is None else room.clamp(max=call.max_new_tokens)

    def _loss(self, settings: GroupSettings, *, max_length: int) -> GroupStepLoss:
        return GroupStepLoss(objective=settings.objective, max_length=max_length, **settings.loss_arguments())

    def _lesson(self, source: Source, scores: Tensor, counted: Tensor, **named: Any) -> GroupLesson:
        """What responses teach."""
        settings, flight = self.settings, self.flight
        again = settings.max_rounds > 1 and flight is not None
        return GroupLesson(
            source, scores, counted, objective=settings.objective, group_size=settings.group_size,
            limits=self._limits(source), overlong_buffer=settings.overlong_buffer,
            drop_truncated=settings.drop_truncated,
            max_groups=self._groups_of(len(flight.rounds[0])) if again and flight is not None else None,
            **named,
        )  # fmt: skip
