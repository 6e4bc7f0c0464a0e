"""What trainers share that learn straight from texts, without sampling: steps, files, evaluation, proof.

    reference: log-probabilities of all texts, once        (`Reference`)
    prove:     that policy and reference start alike ...   (`preflight`)
    learn:     epochs over all examples                    (`training.supervised.fit`)

Knows no loss: `policy/dpo.py` and `policy/kto.py` bring theirs.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.direct_checks import prove
from palm_rlhf_pytorch.policy.direct_data import Cuts, Encoder, Examples
from palm_rlhf_pytorch.policy.direct_model import DirectPolicy, Objective, Reference, Tally, check_whole, digest_of
from palm_rlhf_pytorch.policy.direct_settings import DirectSettings
from palm_rlhf_pytorch.policy.direct_steps import Steps
from palm_rlhf_pytorch.policy.judging import evaluating
from palm_rlhf_pytorch.policy.preflight import Report
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.manifest import CheckpointError, read_manifest, step_name
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import Saves
from palm_rlhf_pytorch.training.supervised import fit
from palm_rlhf_pytorch.training.trackers import tracked_accelerator
from palm_rlhf_pytorch.typecheck import typecheck

HELD_OUT = ("loss", "accuracy", "margin")  # figures of held-out examples that are logged


class StepLog(MetricsLog):
    """A metrics file whose lines hold more than `fit` knows of: what the steps' passes have tallied."""

    def __init__(self, path: Path | None, accelerator: Accelerator, more: Callable[[], dict[str, float]]) -> None:
        super().__init__(path, accelerator=accelerator)
        self.more = more

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Record one step; call it on every process."""
        super().log({**metrics, **self.more()}, step)


class DirectTrainer:
    """Trains a policy on examples against a reference, and keeps what a run needs to go on."""

    def __init__(
        self,
        palm: PaLM,
        objective: Objective,
        *,
        name: str,
        loss_name: str,
        settings: DirectSettings,
        encoder: Encoder,
        examples: Examples,
        held_out: Examples | None,
        seed: int,
        run_dir: str | Path | None,
        reference_path: str | Path | None,
        metrics_path: str | Path | None,
        accelerate_kwargs: Mapping[str, Any] | None,
        optimizer: OptimizerFactory | None = None,
        log_with: object | None = None,
    ) -> None:
        """Check and place what was given.

        Args:
            palm: the reference and the start of the policy.
            objective: the loss of a batch, see `direct_model`.
            name: of the metrics, "dpo" or "kto".
            loss_name: the loss with its numbers; a run resumes with no other.
            settings: see there.
            encoder: what made the examples' ids.
            examples: what is learnt from.
            held_out: what is only looked at.
            seed: of the adapter and the order; 0 or above.
            run_dir: folder of the run.
            reference_path: where the reference's log-probabilities are kept; None for run_dir.
            metrics_path: a JSONL file that gets a line for each step; None for run_dir.
            accelerate_kwargs: passed to accelerate.Accelerator.
            optimizer: makes one of parameter groups, in place of fused AdamW.
            log_with: see RLHFTrainer.
        """
        if seed < 0:
            raise ValueError(f"seed ({seed}) must be 0 or above")
        self.name, self.loss_name, self.settings, self.seed = name, loss_name, settings, seed
        self.optimizer = optimizer
        self.encoder, self.examples, self.held_out = encoder, examples, held_out
        folder = run_dir or (metrics_path and Path(metrics_path).parent)
        self.accelerator, self.trackers = tracked_accelerator(accelerate_kwargs, log_with, folder=folder)
        check_whole(self.accelerator)
        self.ranks = Ranks(self.accelerator)
        generator = torch.Generator().manual_seed(seed)
        self.policy = DirectPolicy(palm, objective, generator=generator, **settings.hat())
        self.policy.to(self.accelerator.device)
        self.folder = None if run_dir is None else Path(run_dir).resolve()  # wherever the program goes meanwhile
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"run_dir ({run_dir}) is not a folder")
        metrics = metrics_path or (self.folder and self.folder / "metrics.jsonl")
        self.metrics = StepLog(None if metrics is None else Path(metrics), self.accelerator, self.figures)
        stored = reference_path or (self.folder and self.folder / "reference.safetensors")
        self._stored = Reference(
            None if stored is None else Path(stored), ranks=self.ranks, accelerator=self.accelerator,
            max_batch_tokens=settings.max_batch_tokens,
        )  # fmt: skip
        self._reference: dict[str, Tensor] | None = None
        self._trunk: str | None = None
        self.latest: dict[str, float] = {}  # figures of the last step
        self.steps = 0
        self.stopped: str | None = None
        if any(self.cuts):
            self._warn(
                f"max_length ({encoder.max_length}) is short: {self.cuts}; raise it, or shorten the texts", stacklevel=5
            )

    @typecheck
    def train(
        self,
        num_epochs: int = 1,
        *,
        num_steps: int | None = None,
        resume: Literal["auto"] | None = None,
        preflight: bool = True,
        use_tqdm: bool = True,
    ) -> dict[str, float]:
        """Learn from all examples, num_epochs times; the learning rate warms up, then falls along a cosine.

        With a `run_dir`, SIGTERM and Ctrl-C end the call after the step in hand, with all state saved; `stopped` then
        names the signal. A run that goes on from a checkpoint ends with the bits of one that was never interrupted.

        Args:
            num_epochs: passes over all examples.
            num_steps: optimizer steps, in place of num_epochs.
            resume: "auto" goes on from the newest whole checkpoint of run_dir, or begins if there is none.
            preflight: prove first, on this model, what the loss takes for granted; see `preflight`.
            use_tqdm: show progress, and what preflight found (main process only).

        Returns:
            The metrics of the last step and the last evaluation; names are explained in `training/metrics.py`.

        Raises:
            ValueError: before the first step, if a number is out of range, run_dir holds a run that is not resumed or
                does not fit, or preflight finds a fault (PreflightError); later, if several steps in a row are not
                finite.
        """
        self.stopped = None
        settings, saves = self.settings, self._saves(resume)
        steps = self._plan(num_epochs, num_steps)
        self.reference(use_tqdm=use_tqdm)
        config = {"trainer": type(self).__name__, "seed": self.seed, "loss": self.loss_name, **asdict(settings)}
        config |= {"palm": self.policy.palm.config, "num_steps": steps.num_steps, "processes": self.ranks.count}
        with self.trackers.running(config):
            if preflight:
                self._prove(use_tqdm=use_tqdm)
            found = fit(
                self.policy, self._batches(steps), num_steps=steps.num_steps, accumulate=steps.accumulate,
                lr=settings.lr, weight_decay=settings.weight_decay, max_norm=settings.max_norm,
                warmup_steps=int(settings.warmup * steps.num_steps), accelerator=self.accelerator,
                metrics=self.metrics, progress=use_tqdm, evaluate=None if self.held_out is None else self.evaluate,
                eval_every=settings.eval_every, description=self.name, saves=saves,
                optimizer=self.optimizer,
            )  # fmt: skip
        self.steps += steps.num_steps
        self.stopped = None if saves is None else saves.stopped
        return found | self.latest

    def check_call(self, num_epochs: int = 1, *, num_steps: int | None = None, resume: str | None = None) -> None:
        """Raise the ValueError that `train` would, for its arguments or the run in run_dir; nothing is read or written.

        To be called before `evaluate` or `reference`, which replace the stored reference of another run.
        """
        self._saves(resume)
        self._plan(num_epochs, num_steps)

    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and margin of the held-out examples as `eval/...`; to be called on every process.

        Raises:
            ValueError: if there are none.
        """
        if self.held_out is None:
            raise ValueError("there are no held-out examples: give held_out to the trainer")
        examples, reference, tally = self.held_out, self.reference()["held_out"], Tally()
        rows = list(range(len(examples)))
        every = Steps(
            examples, num_steps=1, minibatch_size=len(rows), max_batch_tokens=self.settings.max_batch_tokens, seed=0,
            ranks=self.ranks,
        )  # fmt: skip
        with evaluating(self.policy), torch.no_grad(), self.accelerator.autocast():
            for _, passes in every:
                common = self.common_facts(examples, reference, rows)
                for part, share in passes:
                    batch = self.batch(examples, reference, part) | common
                    tensors = {name: self._placed(value) for name, value in batch.items()}
                    ids, prompts, lengths = (tensors.pop(name) for name in ("ids", "prompt_lengths", "lengths"))
                    found = self.policy.objective(self.policy.logprobs(ids, prompts, lengths), lengths, **tensors)
                    tally.add(found[1], counted=share > 0)
        figures = tally.taken(self.ranks)
        return {f"eval/{name}": figures[name] for name in HELD_OUT if name in figures}

    def preflight(self) -> Report:
        """Prove on this model and these examples what the loss takes for granted; nothing changes."""
        self.reference()
        return prove(self)

    def reference(self, *, use_tqdm: bool = False) -> dict[str, Tensor]:
        """Log-probabilities of all texts under the reference, (m,) each: `train`, and `held_out` if there are such."""
        if self._reference is None:
            texts = {"train": self.examples.texts}
            if self.held_out is not None:
                texts["held_out"] = self.held_out.texts
            digests = [self.trunk_digest(), *(part.digest() for part in texts.values())]
            self._reference = self._stored(self.policy, texts, digest=" ".join(digests), progress=use_tqdm)
        return self._reference

    def batch(self, examples: Examples, reference: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """What a pass over some examples takes, on the CPU."""
        read = examples.read(rows)
        return examples.texts.batch(read) | {"ref_logprobs": reference[read]} | examples.facts(rows)

    def common_facts(self, examples: Examples, reference: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """What the loss is told of a whole step, over all ranks; nothing, unless a trainer has more to say."""
        return {}

    def complaint(self, figures: Mapping[str, float]) -> str | None:
        """What is to be said of a step's figures, once, if anything is."""
        return None

    def checks(self) -> dict[str, Callable[[], Any]]:
        """Checks of a trainer's own for `preflight`."""
        return {}

    def export_palm(self) -> PaLM:
        """The improved PaLM: a model of its own, the update merged into its weights, in eval mode."""
        return self.policy.export_palm()

    def figures(self) -> dict[str, float]:
        """Figures of the step that was just made, by their names in the log; to be asked for on every process."""
        found = self.policy.tally.taken(self.ranks)
        self.latest = {f"{self.name}/{name}": value for name, value in found.items()}
        if (complaint := self.complaint(found)) is not None:
            self._warn(complaint)
        return self.latest

    @property
    def cuts(self) -> Cuts:
        """How many texts had to be cut, held-out ones included."""
        found = self.examples.texts.cuts
        return found if self.held_out is None else found.and_also(self.held_out.texts.cuts)

    def trunk_digest(self) -> str:
        """The digest of the frozen trunk, taken once."""
        if self._trunk is None:
            self._trunk = digest_of(self.policy.palm)
        return self._trunk

    def _plan(self, num_epochs: int, num_steps: int | None) -> Steps:
        for name, count in (("num_epochs", num_epochs), ("num_steps", num_steps)):
            if count is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        settings = self.settings
        return Steps(
            self.examples, num_steps=num_steps or num_epochs * -(-len(self.examples) // settings.minibatch_size),
            minibatch_size=settings.minibatch_size, max_batch_tokens=settings.max_batch_tokens, seed=self.seed,
            ranks=self.ranks,
        )  # fmt: skip

    def _batches(self, steps: Steps) -> Iterator[dict[str, Any]]:
        reference = self.reference()["train"]
        for rows, passes in steps:
            common = self.common_facts(self.examples, reference, rows)
            for part, share in passes:
                yield self.batch(self.examples, reference, part) | common | {"share": share}

    def _saves(self, resume: str | None) -> Saves | None:
        """Where checkpoints go; a folder that cannot be gone on with is refused before any work."""
        if self.folder is None:
            if resume is not None:
                raise ValueError("resume='auto' looks into run_dir: give the trainer one")
            return None
        checkpoints = Checkpoints(
            self.folder / "checkpoints", keep_last=self.settings.keep_last, accelerator=self.accelerator
        )
        if checkpoints.steps() and resume is None:
            raise ValueError(
                f"run_dir ({self.folder}) holds a run already: resume='auto' goes on with it, another folder begins"
                " anew"
            )
        told = f"{len(self.examples)} examples {self.examples.digest()[:16]}, palm {self.trunk_digest()[:16]}"
        told += f", {self.loss_name}, seed {self.seed}, minibatch_size {self.settings.minibatch_size}"
        _refuse_other_run(checkpoints, told)
        return Saves(checkpoints, every=self.settings.save_every, resume=resume is not None, data=told)

    def _prove(self, *, use_tqdm: bool) -> None:
        report, main = prove(self), self.accelerator.is_main_process
        if use_tqdm and main:
            tqdm.write(report.table(), file=sys.stderr)
        elif main:
            for check in report.warnings:
                warnings.warn(f"preflight, {check.name}: {check.found}; {check.remedy}", stacklevel=4)
        with self.ranks.together():
            report.raise_failures()

    def _placed(self, value: Any) -> Any:
        return value.to(self.accelerator.device) if isinstance(value, Tensor) else value

    def _warn(self, text: str, *, stacklevel: int = 4) -> None:
        if self.accelerator.is_main_process:
            warnings.warn(text, stacklevel=stacklevel)


def _refuse_other_run(checkpoints: Checkpoints, told: str) -> None:
    """Raise a ValueError where `fit` would, but before the reference is read: it may take long, and replaces a file."""
    for step in checkpoints.steps()[-1:]:
        with suppress(CheckpointError):  # a damaged one: fit takes an earlier one, or says so
            path = checkpoints.folder / step_name(step)
            data = read_manifest(path).values.get("data")
            if isinstance(data, list) and told not in data:
                raise ValueError(f"{path} was written by another run ({data[0]}; now {told})")
