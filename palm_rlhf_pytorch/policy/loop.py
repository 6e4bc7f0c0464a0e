"""The loop of a trainer's `train`: update after update, each of which can stop at any step and go on from disk.

    collect -> score -> learn -> record -> save

What an update has done so far is its `Flight`; a checkpoint taken at any place holds it. Knows how a run goes on, not
what a policy or a judge is.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from palm_rlhf_pytorch.policy.arguments import Call
from palm_rlhf_pytorch.policy.diagnostics import headline, timing_metrics
from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.inspection import RolloutFiles
from palm_rlhf_pytorch.policy.judging import Judged
from palm_rlhf_pytorch.policy.preflight import Report
from palm_rlhf_pytorch.policy.progress import Progress
from palm_rlhf_pytorch.policy.prompts import PromptBatch
from palm_rlhf_pytorch.policy.rollback import roll_back
from palm_rlhf_pytorch.policy.rollout import Prompting, observed, rollout_parts, row_batches
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.policy.run import Flight
from palm_rlhf_pytorch.policy.samples import SampleLog
from palm_rlhf_pytorch.policy.targets import Lesson
from palm_rlhf_pytorch.policy.trainer_state import Trainer, restore_state, state_of
from palm_rlhf_pytorch.policy.watch import Verdict
from palm_rlhf_pytorch.training.checkpoint import load_checkpoint
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizer import linear_to_zero, scale_learning_rates
from palm_rlhf_pytorch.training.stopping import Stopped, StopSignal


class Trainable(Trainer, Protocol):
    """What the loop asks of a trainer beside its state."""

    metrics: MetricsLog
    samples: SampleLog
    kept_rollouts: RolloutFiles
    taught: Lesson | None
    tokenizer: Any

    def next_prompts(self, count: int) -> PromptBatch:
        """This process's share of the next prompts."""
        ...

    def prompting(
        self, batch: PromptBatch, *, max_seq_len: int, max_new_tokens: int | None, **sampling: Any
    ) -> Prompting:
        """What to sample, on the training device."""
        ...

    def generator(self, purpose: str, *counts: int, cpu: bool = False) -> torch.Generator:
        """A random state that follows from the seed."""
        ...

    def judged(self, source: Experience) -> Judged:
        """What the judge says of all rows; not too many are without a score."""
        ...

    def wants_more(self, flight: Flight) -> bool:
        """Whether to sample another round before learning; all processes say the same."""
        ...

    def held_out_scores(self, source: Experience) -> Tensor | None:
        """The held-out judge's, if there is one."""
        ...

    def preflight(
        self, *, max_seq_len: int, max_new_tokens: int | None, eos_token: int | None, temperature: float
    ) -> Report:
        """Proof of what PPO takes for granted."""
        ...

    def learn_from(
        self,
        source: Experience,
        *,
        num_fresh: int,
        progress: Progress | None,
        on_step: Callable[[Progress], object] | None,
    ) -> dict[str, float]:
        """Steps of learning on scored responses."""
        ...


def begin(trainer: Trainable, call: Call, resume: str | Path | None) -> Call:
    """The call, or what is left of the one in a checkpoint, with the trainer's state as it was there.

    Args:
        trainer: takes over the state.
        call: of `train`.
        resume: "auto" for the newest whole checkpoint of the run, if there is one; a path; None to begin.

    Raises:
        ValueError: if there is nothing to resume from, the folder holds a run that is not resumed, or a checkpoint
            does not fit the trainer or the call.
    """
    run, found = trainer.run, None
    if resume == "auto":
        if run.checkpoints is None:
            raise ValueError("resume='auto' looks into run_dir: give RLHFTrainer one, or resume=path")
        found = run.checkpoints.latest(kind=trainer.kind)
    elif resume is not None:
        found = load_checkpoint(resume, kind=trainer.kind)
    elif not run.begun and run.checkpoints is not None and run.checkpoints.steps():
        raise ValueError(
            f"run_dir ({run.folder}) holds a run already: resume='auto' goes on with it, another folder begins anew"
        )
    if found is not None:
        kept = found.values.get("call")
        if found.values.get("seed") != trainer.seed:
            raise ValueError(
                f"seed ({trainer.seed}) is not the run's, {found.values.get('seed')}: build the trainer so"
            )
        try:
            call = call if kept is None else call.resumed(kept)
        except (KeyError, AttributeError) as error:
            raise ValueError(f"{found.path} is not what a trainer writes: its call of train lacks {error}") from error
        restore_state(trainer, found)
    elif trainer.flight is not None:  # an update that was not finished: its prompts come again
        trainer.prompts.taken, trainer.flight = trainer.flight.taken, None
    if resume is not None or (not run.begun and trainer.metrics.path == run.metrics_path):
        trainer.metrics.rewind(trainer.updates)  # of a run that came further than its last checkpoint, or to none
        trainer.samples.rewind(trainer.updates)
        trainer.kept_rollouts.rewind(trainer.updates, main=trainer.accelerator.is_main_process)
    run.begun = True
    return call


class Loop:
    """Runs the updates of a call of `train`."""

    def __init__(self, trainer: Trainable, call: Call, *, use_tqdm: bool) -> None:
        self.trainer, self.call = trainer, call
        self.show = use_tqdm and trainer.accelerator.is_main_process
        self.unsaved = False  # whether anything was done since the last checkpoint
        self.verdict: Verdict | None = None
        self.stop = StopSignal(trainer.ranks, enabled=trainer.run.checkpoints is not None)

    def run(self) -> tuple[list[dict[str, float]], str | None]:
        """All updates that are left; their metrics, and the signal that ended them early, if one did."""
        history: list[dict[str, float]] = []
        if self.call.done or self.trainer.flight is not None:
            place = f"{self.call.done} of {self.call.num_episodes} episodes"
            self.say(f"going on after update {self.trainer.updates}, at {place}")
        done, total = self.call.done, self.call.num_episodes
        name = type(self.trainer).__name__.removesuffix("Trainer").lower().replace("rlhf", "ppo")
        with self.stop, tqdm(total=total, initial=done, disable=not self.show, desc=name, unit="episode") as bar:
            try:
                while self.call.done < total:
                    history.append(self.update(bar))
                    if self.verdict is not None:
                        self.say(roll_back(self.trainer, self.verdict))
                        return history, "watch"
                    self.stop.check()
            except Stopped:
                if self.unsaved:
                    self.save()
                self.say(f"stopped by {self.stop.name} with all state saved; train(resume='auto') goes on from there")
        return history, self.stop.name

    def prove(self) -> None:
        """Run preflight, show what it found, and go no further if there is a fault on any process."""
        report = self.trainer.preflight(**self.call.sampling)
        self.say(report.table())
        if not self.show and self.trainer.accelerator.is_main_process:
            for check in report.warnings:
                warnings.warn(f"preflight, {check.name}: {check.found}; {check.remedy}", stacklevel=4)
        with self.trainer.ranks.together():
            report.raise_failures()

    def say(self, text: str) -> None:
        """Tell the user something, above the progress bar."""
        if self.show:
            tqdm.write(text, file=sys.stderr)

    def update(self, bar: tqdm) -> dict[str, float]:
        """One update, or what is left of it."""
        trainer, self.unsaved = self.trainer, True
        size = self.call.size if trainer.flight is None else trainer.flight.size
        scale_learning_rates(trainer.learner.optimizer, linear_to_zero(*self.call.place(size)))
        started = time.perf_counter()
        while self.score(flight := self.collect()):  # 1. collect  2. score
            flight.rounds.append(trainer.run.round(len(flight.rounds), trainer.updates))
        sampled = time.perf_counter()
        metrics = self.learn(flight) | flight.figures  # 3. learn
        tokens = sum(length for _, length in flight.sampled.spans())
        metrics |= timing_metrics(tokens, started, sampled, ranks=trainer.ranks, device=trainer.accelerator.device)
        self.call.done += flight.size
        self.call.updates += 1
        trainer.flight = None
        trainer.rollouts += 1
        with trainer.ranks.together():
            trainer.run.prune(trainer.updates)
            trainer.metrics.log(metrics, step=trainer.updates)  # 4. record
        trainer.samples.log_extremes(
            flight.sampled, trainer.settings.keep_samples, step=trainer.updates, ranks=trainer.ranks,
            tokenizer=trainer.tokenizer, held_out_scores=flight.held_out_scores,
        )  # fmt: skip
        trainer.kept_rollouts.add(trainer, held_out_scores=flight.held_out_scores)
        for finding in trainer.doctor.examine(metrics):
            self.say(f"update {trainer.updates}: {finding}")
        if trainer.watch is not None:
            self.verdict = trainer.watch.examine(metrics, step=trainer.updates)
        bar.set_postfix(headline(metrics), refresh=False)
        bar.update(flight.size)
        last = self.call.done >= self.call.num_episodes or self.verdict is not None
        if last or trainer.updates % trainer.settings.save_every == 0:
            self.save(metrics)  # 5. save
        if trainer.watch is not None:
            trainer.run.pin(trainer.watch.best_step)
        return metrics

    def collect(self) -> Flight:
        """Sample responses to the next prompts, batch by batch onto the disk; those that are there stay."""
        trainer, settings = self.trainer, self.trainer.settings
        taken = trainer.prompts.taken
        if trainer.flight is None:
            trainer.flight = Flight(taken, self.call.size, [trainer.run.round(0, trainer.updates)])
        flight = trainer.flight
        trainer.prompts.taken = flight.taken
        batch = trainer.next_prompts(flight.size)
        for _ in flight.rounds[1:]:  # each answers the prompts after those of the round before
            batch = trainer.next_prompts(flight.size)
        prompting = trainer.prompting(batch, **self.call.sampling)
        batches, there = prompting.batches(settings.max_batch_size), len(flight.file)
        first = next((n for n, end in enumerate(_ends(batches)) if end > there), len(batches))
        with (
            self._bar(prompting, batches[first:]) as bar,
            trainer.learner.whole(),
            trainer.accelerator.autocast(),
            trainer.ranks.together(),
        ):

            def on_token() -> None:
                bar.update()
                self.stop.check_alone()

            parts = rollout_parts(
                trainer.actor_critic, prompting, batches, first=first, version=trainer.updates,
                generator=partial(trainer.generator, "sample", trainer.rollouts, *flight.stream),
                max_batch_tokens=settings.max_batch_tokens, on_step=on_token,
            )  # fmt: skip
            for number, part in enumerate(parts, start=first):
                known = there - (_ends(batches)[number] - len(batches[number]))
                flight.file.append(part.select(torch.arange(max(known, 0), len(batches[number]))).to("cpu"))
                self.stop.check_alone()
        self.stop.check()
        return flight

    def score(self, flight: Flight) -> bool:
        """Have the judges score the responses that are not scored yet; whether to sample more before learning.

        If one fails, what was sampled is saved, so that the run goes on from there.
        """
        trainer = self.trainer
        try:
            # by all if one has to: a disk may have refused one process's scores alone
            if trainer.ranks.any(flight.file.scores is None and len(flight.file) > 0):
                found = trainer.judged(Experience([flight.file]))
                with trainer.ranks.together():
                    flight.file.set_scores(found.scores, found.rewards)
                flight.add_parts(found.parts, trainer.ranks)
            more = trainer.wants_more(flight)
            if not more and flight.held_out is None:
                flight.set_held_out(trainer.held_out_scores(flight.sampled), trainer.ranks)
        except Exception:  # on every process alike
            self.save()
            raise
        if trainer.settings.save_rollouts and flight.progress is None:
            self.save()
        self.stop.check()
        return more

    def learn(self, flight: Flight) -> dict[str, float]:
        """Learn from the responses, or go on with that."""
        trainer = self.trainer
        if trainer.settings.stale_updates and flight.refreshed is None:
            with trainer.learner.whole(), trainer.ranks.together():
                flight.refreshed = self._refreshed(flight)

        def on_step(progress: Progress) -> None:
            flight.progress, self.unsaved = progress, True
            every = trainer.settings.save_every_steps
            if every is not None and (progress.steps + progress.skipped) % every == 0:
                self.save()
            self.stop.check()

        return trainer.learn_from(
            flight.experience, num_fresh=len(flight.rounds[0]), progress=flight.progress, on_step=on_step
        )

    def save(self, metrics: dict[str, float] | None = None) -> None:
        """Write a checkpoint of everything, if the run keeps any."""
        trainer = self.trainer
        if trainer.run.checkpoints is not None:
            trainer.saves += 1
            trainer.run.checkpoints.save(trainer.saves, kind=trainer.kind, metrics=metrics or {}, **state_of(trainer))
            self.unsaved = False

    def _refreshed(self, flight: Flight) -> RolloutFile:
        """Older responses that are still to be learnt from, as the policy and the critic see them now.

        `logprobs` and `values` are the present ones, `sampler_logprobs` those of the policy that sampled.
        """
        trainer, settings = self.trainer, self.trainer.settings
        target = trainer.run.file("refreshed", trainer.updates)
        limits = {"max_rows": settings.max_batch_size, "max_tokens": settings.max_batch_tokens}
        sampling = (flight.file.temperature, flight.file.eos_token)
        for file in trainer.run.kept(trainer.updates, settings.stale_updates):
            if (file.temperature, file.eos_token) != sampling:  # of an earlier call of train, with other arguments
                continue
            spans = file.spans()
            for rows in row_batches(spans, range(len(spans)), device=torch.device("cpu"), **limits):
                old = Experience([file]).select(rows)
                with trainer.accelerator.autocast():
                    new = observed(
                        trainer.actor_critic, old.to(trainer.accelerator.device),
                        max_batch_tokens=settings.max_batch_tokens,
                    )  # fmt: skip
                target.append(new.to("cpu")._replace(sampler_logprobs=old.logprobs))
        return target

    @contextmanager
    def _bar(self, prompting: Prompting, batches: list[list[int]]) -> Iterator[tqdm]:
        """Progress over generated tokens, if there are so many that one waits."""
        total = int(prompting.max_new_tokens.max()) * len(batches)
        with tqdm(
            total=total, disable=not (self.show and total >= 256), desc="generate", unit="token", leave=False
        ) as bar:
            yield bar


def _ends(batches: list[list[int]]) -> list[int]:
    """How many rows there are up to the end of each batch."""
    return torch.tensor([0, *map(len, batches)]).cumsum(0)[1:].tolist()
