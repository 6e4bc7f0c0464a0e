"""What every trainer shares that learns from responses it samples itself: prompts, rollouts, judges, files.

Knows no loss and no loop; `policy/ppo.py` is one that adds them.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from palm_rlhf_pytorch.palm.copying import move_together
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.answers import best_response, sample_answers
from palm_rlhf_pytorch.policy.arguments import (
    Call,
    check_answer_arguments,
    check_judge,
    check_rollout_arguments,
)
from palm_rlhf_pytorch.policy.critic_start import start_critic
from palm_rlhf_pytorch.policy.doctor import Doctor
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.inspection import RolloutFiles
from palm_rlhf_pytorch.policy.judging import Judge, Judged, ask_source, judged
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.losses import Loss
from palm_rlhf_pytorch.policy.pretraining import pretraining_from
from palm_rlhf_pytorch.policy.prompts import PromptBatch, one_prompt, padding_of, prompts_from
from palm_rlhf_pytorch.policy.rollout import Prompting, Rollout, collect_rollout
from palm_rlhf_pytorch.policy.run import Flight, Run
from palm_rlhf_pytorch.policy.samples import SampleLog
from palm_rlhf_pytorch.policy.scores import counted_scores
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.trainer_state import restore_state, state_of
from palm_rlhf_pytorch.policy.watch import Watch, WatchSettings
from palm_rlhf_pytorch.reward.weighted import JudgeSum, ScoreNormalizer
from palm_rlhf_pytorch.training.checkpoint import load_checkpoint, save_checkpoint
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.trackers import tracked_accelerator
from palm_rlhf_pytorch.typecheck import typecheck

STREAMS = (
    "adapters",
    "sample",
    "order",
    "answer",
    "dropout",
    "pretraining",
)  # what random states are for; a place is for good


class PolicyTrainer:
    """Samples responses to prompts, has them judged, and keeps what a run needs to go on."""

    def __init__(
        self,
        palm: PaLM,
        judge: Judge,
        *,
        held_out_judge: Judge | None,
        settings: PolicySettings,
        loss: Loss,
        critic: bool,
        prompts: Mapping[str, Any],
        seed: int,
        run_dir: str | Path | None,
        metrics_path: str | Path | None,
        accelerate_kwargs: Mapping[str, Any] | None,
        pretraining: Tensor | np.ndarray | None = None,
        watch: WatchSettings | None = None,
        optimizer: OptimizerFactory | None = None,
        log_with: object | None = None,
    ) -> None:
        """Check and place what was given: arguments of `RLHFTrainer`, `prompts` being those of `prompts_from`.

        Beside them the `loss` that the learner takes its steps by, and whether there is a `critic`.
        """
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be 0 or above")
        self.settings, self.seed = settings, seed
        self.pretraining = pretraining_from(pretraining, settings, num_tokens=palm.num_tokens)
        self.prompts = prompts_from(num_tokens=palm.num_tokens, seed=seed, **prompts)
        self.pad_value: int | None = prompts["pad_value"]
        self.pad_token = padding_of(prompts["tokenizer"], self.pad_value)
        judges = [judge] if held_out_judge is None else [judge, held_out_judge]
        for each in judges:
            check_judge(each, palm)
        folder = run_dir or (metrics_path and Path(metrics_path).parent)
        self.accelerator, self.trackers = tracked_accelerator(accelerate_kwargs, log_with, folder=folder)
        self.ranks = Ranks(self.accelerator)
        self.run = Run(run_dir, self.ranks, **settings.run_arguments())
        self.metrics = MetricsLog(metrics_path or self.run.metrics_path, accelerator=self.accelerator)
        self.reward_model, self.held_out_judge, trunk = judge, held_out_judge, palm.share()
        modules = [each for each in judges if isinstance(each, nn.Module)]
        move_together(trunk, *modules, device=self.accelerator.device)  # a judge over the same palm keeps sharing it
        self.actor_critic = ActorCritic(
            trunk, critic=critic, generator=self.generator("adapters"), **settings.model_arguments()
        )
        if settings.starts_critic:
            start_critic(self.actor_critic, judge)
        self.learner = Learner(
            self.actor_critic, self.accelerator, loss=loss, optimizer=optimizer, pretraining=self.pretraining,
            **settings.learner_arguments(),
        )  # fmt: skip
        self.normalizer = ScoreNormalizer()
        self.doctor = Doctor(**settings.doctor_arguments())
        self.watch = None if watch is None else Watch(watch)
        self.run.keep_for(watch)
        if isinstance(judge, JudgeSum):
            self.metrics.define({f"reward/{name}": f"mean raw score of the judge {name!r}" for name in judge.judges})
        self.samples = SampleLog(
            self.run.samples_path, accelerator=self.accelerator, trackers=self.trackers,
            table_every=settings.log_samples_every,
        )  # fmt: skip
        self.kept_rollouts = RolloutFiles(self.run.rollouts_folder, keep=settings.keep_rollouts)
        self.tokenizer = prompts["tokenizer"]
        self.kl_coef = settings.first_kl_coef
        self.rollouts = self.answers = self.episodes = self.updates = self.saves = 0
        self.call: Call | None = None
        self.flight: Flight | None = None
        self.stopped: str | None = None
        self.trunk_digest: str | None = None

    @property
    def kind(self) -> str:
        """What its checkpoints are of."""
        return type(self).__name__

    def next_prompts(self, count: int) -> PromptBatch:
        """This process's share of the next prompts: ids (b, p), mask (b, p) and rows (b,), on the training device.

        Each prompt comes once before any comes again. Shares are equal: counts that do not divide are rounded up.
        """
        rows = self.prompts.next_share(count, self.ranks.rank, of=self.ranks.count)
        return PromptBatch(*self.prompts.select(rows), rows).to(self.accelerator.device)

    @typecheck
    def rollout(
        self,
        prompts: Tensor,
        prompt_mask: Tensor,
        prompt_rows: Tensor | None = None,
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
            prompt_rows: which of the trainer's prompts they are, (b,), for messages; None where they are others.
            max_seq_len: tokens of prompt and response together.
            max_new_tokens: tokens of a response, if that is to be less.
            eos_token: id that ends a response.
            temperature: of sampling, above 0.
            use_tqdm: show progress over the generated tokens.

        Raises:
            TypeError: if prompts are not integers, or prompt_mask is not bool.
            ValueError: if shapes, ids or a number do not fit.
        """
        sampling: dict[str, Any] = {
            "max_seq_len": max_seq_len,
            "max_new_tokens": max_new_tokens,
            "eos_token": eos_token,
        }
        check_rollout_arguments(prompts, prompt_mask, palm=self.actor_critic.palm, temperature=temperature, **sampling)
        rows = torch.full((len(prompts),), -1) if prompt_rows is None else prompt_rows
        batch = PromptBatch(prompts, prompt_mask, rows).to(self.accelerator.device)
        prompting = self.prompting(batch, temperature=temperature, **sampling)
        total = int(prompting.max_new_tokens.max()) * len(prompting.batches(self.settings.max_batch_size))
        show = use_tqdm and self.accelerator.is_main_process and total >= 256  # shorter ones are over at once
        with (
            tqdm(total=total, disable=not show, desc="generate", unit="token", leave=False) as bar,
            self.learner.whole(),
            self.accelerator.autocast(),
        ):
            rollout = collect_rollout(
                self.actor_critic, prompting, generator=partial(self.generator, "sample", self.rollouts),
                version=self.updates, on_step=bar.update, **self.settings.batch_limits(),
            )  # fmt: skip
        self.rollouts += 1
        return rollout

    def prompting(
        self, batch: PromptBatch, *, max_seq_len: int, max_new_tokens: int | None, **sampling: Any
    ) -> Prompting:
        """What to sample: the prompts, and the room that each leaves for a response."""
        room = max_seq_len - batch.mask.sum(dim=-1)
        room = room if max_new_tokens is None else room.clamp(max=max_new_tokens)
        return Prompting(batch.ids.masked_fill(~batch.mask, 0), batch.mask, batch.rows, room, **sampling)

    def experience(self) -> Experience:
        """The stored responses of the last updates, of this process: `keep_experience` says how many are kept.

        To have them judged anew (`rescore`), to read them (`to_jsonl`), or to learn from them with loops of your own.

        Raises:
            ValueError: if no update was made yet.
        """
        kept = self.run.kept(self.updates, self.run.keep_experience)
        if not kept:
            raise ValueError("no update was made yet: there are no responses to look at; call train first")
        return Experience(kept)

    def score(self, rollout: Rollout) -> Rollout:
        """The rollout with the judge's raw scores.

        Raises:
            TypeError: if the judge returns no tensor.
            ValueError: if their shape is not (b,), or more than max_dropped of them are NaN or infinite (fewer are
                left out, with a warning). An error that the judge itself raises passes through, with a note of the
                update, the responses and the prompts.
        """
        found = self.judged(rollout).to(rollout.device)
        return rollout._replace(scores=found.scores, rewards=found.rewards)

    def judged(self, source: Rollout | Experience) -> Judged:
        """What the judge says of all rows, on the CPU; errors as `score`, on every process alike."""
        found = self._judge(self.reward_model, source)
        counted_scores(
            found.scores, source.prompt_rows.to("cpu"), ranks=self.ranks, max_dropped=self.settings.max_dropped,
            where=f"update {self.updates + 1}",
        )  # fmt: skip
        return found

    def wants_more(self, flight: Flight) -> bool:
        """Whether to sample another round of prompts before learning; all processes say the same."""
        return False

    def held_out_scores(self, source: Rollout | Experience) -> Tensor | None:
        """The held-out judge's raw scores of all rows, (n,), on the CPU; None if there is no such judge."""
        return None if self.held_out_judge is None else self._judge(self.held_out_judge, source).scores

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

        Where FSDP spreads the weights all processes must call it, and each gets an answer of its own draws.

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
        total, show = (seq_len - len(prompt)) * -(-num_samples // limit), use_tqdm and self.accelerator.is_main_process
        with (
            tqdm(total=total, disable=not show, desc="generate", leave=False) as bar,
            self.learner.whole(),
            self.accelerator.autocast(),
        ):
            responses = sample_answers(
                self.actor_critic, prompt, max_new_tokens=seq_len - len(prompt),
                generator=generator or self.generator("answer", self.answers), max_batch_size=limit,
                on_step=bar.update, **numbers,
            )  # fmt: skip
        self.answers += 1  # counted apart from rollouts: to look at samples does not change the training
        return best_response(self.reward_model, prompt, responses, **self.settings.batch_limits())

    def export_palm(self) -> PaLM:
        """The improved PaLM: a model of its own, the actor's update merged into its weights, in eval mode.

        Where FSDP spreads the weights all processes must call it; each gets the whole model.
        """
        with self.learner.whole():
            return self.actor_critic.export_palm().eval()

    def save(self, path: str | Path) -> None:
        """Write all that training has changed (not the frozen trunk) to a folder, whole or not at all.

        In a run of several processes all of them must call it.
        """
        save_checkpoint(path, kind=self.kind, step=self.updates, accelerator=self.accelerator, **state_of(self))

    def load(self, path: str | Path) -> Self:
        """Go on where `save` was called, in a trainer of the same palm and settings; all is checked before any change.

        Raises:
            FileNotFoundError: if there is nothing at path.
            ValueError: if it is no trainer's checkpoint, or that of another palm or other settings.
        """
        restore_state(self, load_checkpoint(path, kind=self.kind))
        return self

    def generator(self, purpose: str, *counts: int, cpu: bool = False) -> torch.Generator:
        """Random state that follows from the seed, its purpose, how often it was needed, and the process."""
        rank = 0 if purpose == "adapters" else self.ranks.rank
        entropy = [self.seed, STREAMS.index(purpose), rank, *counts]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        device = "cpu" if cpu or purpose == "adapters" else self.accelerator.device
        return torch.Generator(device).manual_seed(int(state[0] >> 1))

    def learning_generator(self, update: int, purpose: str, *counts: int) -> torch.Generator:
        """Random state of learning in an update: on the CPU, whatever the device."""
        return self.generator(purpose, update, *counts, cpu=True)

    def _judge(self, judge: Judge, source: Rollout | Experience) -> Judged:
        """What a judge says; if it fails on one process, all of them raise."""
        with self.ranks.together():
            found = ask_source(
                judge, source, device=self.accelerator.device, where=f"update {self.updates + 1}",
                timeout=self.settings.judge_timeout, **self.settings.batch_limits(),
            )  # fmt: skip
        lengths = torch.tensor([steps for _, steps in source.spans()])
        return judged(judge, found, lengths, reduce=self.ranks.sum)
