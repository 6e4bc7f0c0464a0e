"""Metrics: what each name means, a JSON-lines file of them, running means.

Formulae: section 6 of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and its later implementations. Knows no
model; what a trainer logs must stand in `GLOSSARY`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.training.atomic import replacing

GLOSSARY: dict[str, str] = {
    "step": "number of optimizer steps (supervised) or updates (policy) done when the line was written",
    "episodes": "number of responses sampled and learnt from so far, over all processes",
    "policy/loss": "clipped surrogate loss, mean over response tokens, -E[min(r A, clip(r) A)]",
    "policy/approx_kl": "KL(old || new) since sampling by k3, mean over response tokens of ratio - 1 - log ratio, nats",
    "policy/approx_kl_k2": "mean over response tokens of (old logprob - new logprob)^2 / 2 since sampling, nats",
    "policy/approx_kl_k1": "mean over response tokens of old logprob - new logprob since sampling (k1), nats",
    "policy/clipped_fraction": "share of response tokens where the clipped loss is the larger one, 0 to 1",
    "policy/clipped_fraction_low": "the part of policy/clipped_fraction where the ratio fell below the trust region",
    "policy/clipped_fraction_high": "the part of policy/clipped_fraction where the ratio rose above the trust region",
    "policy/entropy": "mean entropy of the policy's next-token distribution over response tokens, nats",
    "policy/ratio_mean": "mean over response tokens of exp(new logprob - old logprob); 1 before the first step",
    "policy/ratio_var": "mean over response tokens of (ratio - 1)^2",
    "policy/ratio_max": "largest such ratio",
    "policy/grad_norm": "norm of the policy's gradient before clipping",
    "policy/lr": "learning rate of the policy in this update",
    "policy/kl_exact": "mean over response tokens of the exact KL(policy || reference), taken while learning, nats",
    "policy/kl_loss": "KL to the reference in the loss of group methods, ratio times k3, before its coefficient, nats",
    "policy/ptx_loss": "next-token cross entropy on the pretraining texts mixed in, before its coefficient, nats",
    "policy/ended_early": "1 where the update's learning ended because policy/approx_kl passed max_approx_kl, else 0",
    "value/loss": "clipped value loss, half the mean squared error over response tokens",
    "value/error": "mean squared error of the values against the returns, unclipped, over response tokens",
    "value/clipped_fraction": "share of response tokens where the clipped value loss is the larger one, 0 to 1",
    "value/mean": "mean value over response tokens, in units of the reward",
    "value/explained_variance": "1 - var(returns - values) / var(returns), against Monte-Carlo returns; 1 is perfect",
    "value/grad_norm": "norm of the critic's gradient before clipping",
    "value/lr": "learning rate of the critic in this update",
    "policy/skipped_steps": "optimizer steps of this update left out because loss or gradient norm was not finite",
    "objective/kl": "mean over responses of the sum over tokens of logprob - reference logprob (k1), nats a response",
    "objective/kl_token": "mean over response tokens of logprob - reference logprob (k1), nats a token",
    "objective/kl_k3": "mean over response tokens of exp(-d) - 1 + d, d = logprob - reference logprob, nats a token",
    "objective/kl_exact": "mean over response tokens of KL(policy || reference) of whole distributions, nats a token",
    "objective/kl_coef": "coefficient of the KL penalty that this rollout used, reward per nat",
    "objective/non_score_reward": "mean over responses of the summed KL penalty, -kl_coef * KL, in units of the reward",
    "objective/rlhf_reward": "mean over responses of the score plus the KL penalty, in units of the reward",
    "reward/score": "mean raw score of the judge over responses, in the judge's own unit",
    "reward/score_std": "standard deviation (population) of the raw scores over responses",
    "reward/dropped": "responses of this update whose score was missing or not finite: they count nowhere",
    "reward/held_out_score": "mean raw score of the held-out judge, which is never learnt from",
    "reward/score_normalized": "mean over responses of the score as it is learnt from, normalised and penalised",
    "returns/mean": "mean return (advantage + value) over response tokens",
    "returns/var": "variance (population) of the returns over response tokens",
    "advantages/mean": "mean advantage before whitening, over response tokens",
    "advantages/std": "standard deviation (population) of the advantages before whitening",
    "response/length_mean": "mean number of tokens in a response, end token included",
    "response/length_max": "largest number of tokens in a response",
    "response/eos_rate": "share of responses that ended with the end token, 0 to 1",
    "response/truncated_rate": "share of responses cut at the length limit, 0 to 1",
    "score/length_corr": "Pearson correlation of raw score and response length over responses, -1 to 1",
    "rollout/sampler_logprob_diff_mean": "mean over tokens of |sampler's logprob - training path's logprob|, nats",
    "rollout/sampler_logprob_diff_max": "largest such difference, nats",
    "rollout/groups": "groups of responses that were compared in this update, over all processes and rounds",
    "rollout/informative_groups": "share of these groups in which scores differ: the others teach nothing",
    "reward/score_sampled": "mean raw score over all responses sampled, those of groups that were left out included",
    "rollout/distinct_2": "different pairs of neighbouring tokens over pairs, of the first 65,536 pairs, 0 to 1",
    "perf/rollout_seconds": "seconds spent sampling and scoring",
    "perf/learn_seconds": "seconds spent in optimizer steps",
    "perf/tokens_per_second": "response tokens sampled and learnt from, per second of both",
    "perf/rollout_tokens_per_second": "response tokens per second of sampling and scoring",
    "perf/learn_tokens_per_second": "response tokens per second of optimizer steps, each counted once for all epochs",
    "perf/peak_memory_bytes": "most bytes so far: of tensors on CUDA, else of the main process as the system counts it",
    "train/loss": "loss the model returned, mean over the optimizer step and all processes",
    "train/lr": "learning rate of this step",
    "train/grad_norm": "norm of the gradient before clipping",
    "train/skipped_steps": "steps left out so far because loss or gradient norm was not finite",
    "train/tokens_per_second": "token ids in the batches of this step, over all processes, per second",
    "eval/loss": "the same loss on held-out data",
    "eval/bits_per_byte": "held-out cross entropy in bits, per byte of text",
    "eval/accuracy": "share of held-out pairs or labels the model gets right, 0 to 1",
    "eval/margin": "mean difference of the rewards of chosen and rejected held-out responses, nats times beta",
    "dpo/loss": "the preference loss, mean over the pairs of the step",
    "dpo/reward_chosen": "mean over pairs of beta (log policy - log reference) of the chosen response",
    "dpo/reward_rejected": "the same of the rejected response",
    "dpo/accuracy": "chance that the labels agree with the order of the rewards; equal ones count half, 0 to 1",
    "dpo/margin": "dpo/reward_chosen - dpo/reward_rejected",
    "dpo/logp_chosen": "mean log-probability of a whole chosen response under the policy, nats",
    "dpo/logp_rejected": "the same of the rejected response",
    "dpo/logratio_chosen_token": "mean over pairs of log policy - log reference of the chosen response, nats a token",
    "dpo/logratio_rejected_token": "the same of the rejected response",
    "kto/loss": "KTO's loss, mean over the votes of the step",
    "kto/accuracy": "share of votes whose response is on the right side of the baseline, 0 to 1",
    "kto/reward_up": "mean of beta (log policy - log reference) of responses voted up",
    "kto/reward_down": "the same of responses voted down",
    "kto/baseline": "z0: mean log-ratio of mismatched responses, at least 0, nats a response",
    "rejection/score": "mean raw score over all samples of the round",
    "rejection/best_score": "mean raw score of the best sample of each prompt",
    "rejection/kept": "responses learnt from in the round",
    "rejection/loss": "cross entropy of them at the last step of the round, nats a token",
}


class MetricsLog:
    """Appends a line of JSON for each step to a file, and hands the same numbers to accelerate's trackers.

    Only the main process writes. A line holds `step` and the metrics; a value that is not finite is null. Each line is
    flushed, and the file opened for it alone, so any number of readers may follow. An unfinished last line, left by a
    crash, is removed when logging to the same file goes on.

    Args:
        path: the file, appended to; its folder is made. None writes no file.
        accelerator: decides the main process, and owns the trackers (`Accelerator(log_with=...)`).
        tracked: whether they get the lines.
    """

    def __init__(
        self, path: str | Path | None, *, accelerator: Accelerator | None = None, tracked: bool = True
    ) -> None:
        self.path, self.tracked = None if path is None else Path(path), tracked
        self.accelerator = accelerator
        self.defined: dict[str, str] = {}
        if self.path is not None and self._is_main:
            if self.path.exists() and not self.path.is_file():
                raise ValueError(f"path ({self.path}) is not a file; give the path of a file to append metrics to")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _drop_unfinished_line(self.path)

    def define(self, names: Mapping[str, str]) -> None:
        """Let `log` take names beside those of GLOSSARY, with what they mean: those that a user has chosen.

        Raises:
            ValueError: if a name is in GLOSSARY.
        """
        taken = sorted(names.keys() & GLOSSARY.keys())
        if taken:
            raise ValueError(f"names ({taken}) are metrics already; training/metrics.py says of what")
        self.defined |= names

    def log(self, metrics: Mapping[str, float | Tensor], step: int) -> None:
        """Record one step; call it on every process.

        Raises:
            ValueError: if a name is not in GLOSSARY, or is "step" (the argument).
        """
        known = GLOSSARY.keys() | self.defined.keys()
        unknown = [name for name in metrics if name not in known or name == "step"]
        if unknown:
            raise ValueError(
                f"metrics has names that GLOSSARY does not define: {unknown}; add them to training/metrics.py"
            )
        values = {name: float(value) for name, value in metrics.items()}
        if self.path is not None and self._is_main:
            line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
            text = json.dumps(line, allow_nan=False) + "\n"
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
            except OSError as error:
                reason = f"{error.strerror or error}: {len(text):,} bytes of metrics were not written"
                raise OSError(error.errno, reason, str(self.path)) from error
        if self.tracked and self.accelerator is not None and self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def rewind(self, step: int) -> None:
        """Take out the lines of steps after this one, which a run that goes on from there will write again."""
        if self.path is None or not self._is_main or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not _is_after(line, step)]
        if len(kept) < len(lines):
            with replacing(self.path) as file:
                file.write("".join(kept).encode())

    @property
    def _is_main(self) -> bool:
        return self.accelerator is None or self.accelerator.is_main_process


def _is_after(line: str, step: int) -> bool:
    """Whether a line is the record of a later step; what is no record of ours is not."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] > step


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file; null becomes nan, an unfinished last line is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not a JSON object, naming its number.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no metrics file at {path}")
    found = []
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (at byte {error.start}); is it a metrics file?") from error
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); is it a metrics file?") from error
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object; is it a metrics file?")
        found.append({name: math.nan if value is None else value for name, value in record.items()})
    return found


def joined_names(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping under one name each, joined by dots: {"a": {"b": 1}} becomes {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        found |= joined_names(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


class RunningMean:
    """Weighted means of metrics over many batches; tensors are summed where they are, so adding waits for no GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, float | Tensor] = {}
        self._weights: dict[str, float | Tensor] = {}

    def add(self, metrics: Mapping[str, float | Tensor], *, weight: float | Tensor = 1.0) -> None:
        """Count each value `weight` times (say, the number of tokens it is a mean over)."""
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        for name, value in metrics.items():
            value = value.detach() if isinstance(value, Tensor) else value
            # a batch of weight 0 has no mean: whatever stands there, even nan, must not reach the sum
            share: float | Tensor
            if isinstance(weight, Tensor):
                share = torch.where(weight != 0, value * weight, 0.0)
            else:
                share = value * weight if weight else 0.0
            self._sums[name] = self._sums.get(name, 0.0) + share
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def compute(self) -> dict[str, float]:
        """The means so far, sum(weight * value) / sum(weight); a name whose weights sum to 0 is left out."""
        weights = {name: float(weight) for name, weight in self._weights.items()}
        return {name: float(self._sums[name]) / weight for name, weight in weights.items() if weight}

    def clear(self) -> None:
        """Start afresh."""
        self._sums.clear()
        self._weights.clear()


def _drop_unfinished_line(path: Path) -> None:
    """Cut a last line without its newline, if it is one of ours; else end it, so that nothing of the user's is lost."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return
    with path.open("r+b") as file:
        if content[whole:].startswith(b'{"step"'[: len(content) - whole]):
            file.truncate(whole)
        else:
            file.seek(0, 2)
            file.write(b"\n")
