"""RLHFTrainer: a policy learns from a judge by PPO.

    prove:   the identities PPO rests on, on this model          (`preflight`)
    collect: prompts -> responses, log-probabilities, values     (`rollout`)
    score:   the judge's scores                                  (`score`)
    learn:   advantages, epochs of clipped steps                 (`learn`)
    save:    all of it, at any of these places                   (`train(resume="auto")` goes on there)

Ziegler et al., "Fine-Tuning Language Models from Human Preferences", https://arxiv.org/abs/1909.08593
Stiennon et al., "Learning to summarize from human feedback", https://arxiv.org/abs/2009.01325
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.arguments import Call
from palm_rlhf_pytorch.policy.judging import Judge
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.online import OnlineTrainer
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.settings import settings_from
from palm_rlhf_pytorch.policy.targets import Lesson
from palm_rlhf_pytorch.policy.watch import WatchSettings
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.typecheck import typecheck


class RLHFTrainer(OnlineTrainer):
    """Improves a PaLM against a judge, with a frozen reference that it must not stray far from.

    The `palm` given stays as it is; the improved model comes from `export_palm()`. All randomness follows from `seed`
    and counts of what was done; torch's, numpy's and Python's global random states are left alone, but for a resume,
    which puts them where the run had them: a judge may draw from them.
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
            **settings: the fields of PPOSettings and of PolicySettings, where each is described.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if prompts, models or a setting do not fit; the argument and its value are named.
        """
        sources = {
            "prompt_token_ids": prompt_token_ids, "prompt_mask": prompt_mask, "prompt_lengths": prompt_lengths,
            "pad_value": pad_value, "prompts": prompts, "prompts_path": prompts_path, "tokenizer": tokenizer,
        }  # fmt: skip
        chosen = settings_from(PPOSettings, settings, trainer="RLHFTrainer")
        super().__init__(
            palm, reward_model, held_out_judge=held_out_judge, settings=chosen, critic=True,
            loss=PPOLoss(**chosen.loss_arguments()), prompts=sources, seed=seed, run_dir=run_dir,
            metrics_path=metrics_path, accelerate_kwargs=accelerate_kwargs, pretraining=pretraining, watch=watch,
            optimizer=optimizer,
            log_with=log_with,
        )  # fmt: skip
        self.lesson = partial(
            Lesson, gamma=chosen.gamma, gae_lambda=chosen.gae_lambda, importance_cap=chosen.importance_cap
        )

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
        """Learn from num_episodes responses; learning rates fall linearly to 0 over this call's updates.

        With a `run_dir`, SIGTERM and Ctrl-C end the call after the step in hand, with all state saved; `stopped` then
        names the signal. A run that goes on from a checkpoint ends with the bits of one that was never interrupted. A
        run is one call: to make it longer, resume it with a larger num_episodes. What the judge is, is the caller's to
        keep the same.

        Args:
            num_episodes: responses to sample, score and learn from, over all processes; those before a resume count.
            max_seq_len: tokens of prompt and response together.
            max_new_tokens: tokens of a response, if that is to be less.
            eos_token: id that ends a response; None lets all run to their limit.
            temperature: of sampling, above 0; it enters every log-probability. 1 in most of the literature.
            update_timesteps: responses between two updates, over all processes; 64 as in Ziegler et al. The last
                update takes what is left.
            resume: "auto" goes on from the newest whole checkpoint of run_dir, or begins if there is none; a path
                goes on from that checkpoint; None begins.
            preflight: prove first, on this model, what PPO takes for granted; see `preflight`.
            use_tqdm: show progress, what preflight found and what the doctor advises (main process only).

        Returns:
            The metrics of each update of this call; their names are explained in `training/metrics.py`.

        Raises:
            ValueError: before anything is sampled, if a prompt is as long as max_seq_len, a number is out of range,
                run_dir holds a run that is not resumed, a checkpoint does not fit, or preflight finds a fault
                (PreflightError); while scoring, if too many scores are not finite numbers.
            FloatingPointError: if loss or gradient norm are not finite several steps in a row.
        """
        call = Call(num_episodes, max_seq_len, max_new_tokens, eos_token, temperature, update_timesteps)
        return self.run_call(call, resume=resume, preflight=preflight, use_tqdm=use_tqdm)
