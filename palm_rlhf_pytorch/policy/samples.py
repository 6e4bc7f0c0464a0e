"""The best and the worst responses of each update, in a file for people to read: how a judge is fooled is seen there.

    run_dir/samples.jsonl, a line a response: {"step": 12, "kind": "best", "prompt": ..., "response": ..., "score": ...}

Knows no trainer: what is picked, and when it is written, is the caller's to say.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.policy.rollout import Rollout, row_batches
from palm_rlhf_pytorch.policy.targets import Source
from palm_rlhf_pytorch.text.tokenizer import Decoder
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.trackers import Trackers

Sample = dict[str, Any]
COLUMNS = ("kind", "prompt", "response", "score", "held_out_score", "kl", "length")  # of a tracker's table


def extremes(
    source: Source, scores: Tensor, k: int, *, tokenizer: Decoder | None, held_out_scores: Tensor | None = None
) -> list[Sample]:
    """The k responses with the highest scores, best first, then the k with the lowest, worst first.

    No response is in both; where there are fewer than 2k, the best take the odd one. Of equal scores the earlier row
    comes first. Only the rows that are told of are read.

    Args:
        source: rollouts in memory or on disk, (n,) rows.
        scores: the judge's raw scores, (n,); rows that are not finite are left out.
        k: how many of each kind.
        tokenizer: anything with `decode(ids)`; None writes ids.
        held_out_scores: those of a judge that is not learnt from, (n,), or None.

    Returns:
        For each response `kind` ("best" or "worst"), `prompt`, `response`, `score`, `held_out_score` (None without a
        finite one), `kl` (the sum over the response of logprob - reference logprob, nats), `length` in tokens,
        `ended` and `prompt_row`; JSON-able.

    Raises:
        ValueError: if scores are not one for each row, or k is negative.
    """
    spans = source.spans()
    for name, given in (("scores", scores), ("held_out_scores", held_out_scores)):
        if given is not None and given.shape != (len(spans),):
            raise ValueError(f"{name} {tuple(given.shape)} must be one for each of the {len(spans)} responses")
    best, worst = picked(scores.tolist(), k)
    if not best:
        return []
    part = source.select(next(row_batches(spans, best + worst, device=torch.device("cpu"))))
    held_out = [math.nan] * len(spans) if held_out_scores is None else held_out_scores.tolist()
    return [
        _told(part, place, tokenizer)
        | {
            "kind": "best" if place < len(best) else "worst",
            "score": float(scores[row]),
            "held_out_score": held_out[row] if math.isfinite(held_out[row]) else None,
        }
        for place, row in enumerate(best + worst)
    ]


def extremes_of(samples: Sequence[Sample], k: int) -> list[Sample]:
    """The same out of samples that were picked on several processes, say `chain(*ranks.gather_values(samples))`."""
    best, worst = picked([sample["score"] for sample in samples], k)
    return [samples[at] | {"kind": "best"} for at in best] + [samples[at] | {"kind": "worst"} for at in worst]


class SampleLog:
    """Appends samples to a file as `MetricsLog` does metrics: by the main process alone, a step's lines in one go.

    An unfinished last line, left by a crash, is removed when logging to the same file goes on.

    Args:
        path: the file; None writes none.
        accelerator: decides the main process.
        trackers: of the run: those that can show one get a table (wandb and ClearML a table of their own, TensorBoard
            text, others none), of prompt, response, score and KL.
        table_every: steps from one table to the next; the first step has one.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        accelerator: Accelerator | None = None,
        trackers: Trackers | None = None,
        table_every: int = 1,
    ) -> None:
        self.trackers, self.table_every = trackers, table_every
        self._lines = MetricsLog(path, accelerator=accelerator)  # which mends and rewinds files of such lines
        self._main = accelerator is None or accelerator.is_main_process

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._lines.path

    def log(self, samples: Sequence[Sample], step: int) -> None:
        """Add the samples of one step.

        Raises:
            OSError: if the disk refuses, naming path and bytes.
        """
        if self.trackers is not None and samples and (step - 1) % self.table_every == 0:
            rows = [[sample.get(name) for name in COLUMNS] for sample in samples]
            self.trackers.log_table("samples", COLUMNS, rows, step=step)
        if self.path is None or not self._main or not samples:
            return
        text = "".join(json.dumps({"step": step} | dict(sample), allow_nan=False) + "\n" for sample in samples)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            reason = f"{error.strerror or error}: {len(text):,} bytes of samples were not written"
            raise OSError(error.errno, reason, str(self.path)) from error

    def log_extremes(
        self, source: Source, k: int, *, step: int, ranks: Ranks, tokenizer: object, held_out_scores: Tensor | None
    ) -> None:
        """Add the k best and the k worst scored responses of all processes, each of which must call it.

        Args:
            source: this process's.
            k: 0 for none.
            step: updates done.
            ranks: all processes.
            tokenizer: see `extremes`; ids are written where it cannot decode.
            held_out_scores: see `extremes`.
        """
        tracked = self.trackers is not None and self.trackers.wanted
        if not k or (self.path is None and not tracked) or source.scores is None:
            return
        decoder: Any = tokenizer if hasattr(tokenizer, "decode") else None
        with ranks.together():
            own = extremes(source, source.scores, k, tokenizer=decoder, held_out_scores=held_out_scores)
        samples = [sample for found in ranks.gather_values(own) for sample in found]
        with ranks.together():
            self.log(extremes_of(samples, k), step)

    def rewind(self, step: int) -> None:
        """Take out the lines of steps after this one, which a run that goes on from there will write again."""
        self._lines.rewind(step)


def read_samples(path: str | Path) -> list[Sample]:
    """The lines of a file of samples; an unfinished last line is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not a JSON object, naming its number.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            sample = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}); is it a file of samples?") from error
        if not isinstance(sample, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object; is it a file of samples?")
        found.append(sample)
    return found


def picked(scores: Sequence[float], k: int) -> tuple[list[int], list[int]]:
    """Places of the k best and the k worst finite scores, none of them twice; the best take the odd one."""
    if k < 0:
        raise ValueError(f"k ({k}) must be 0 or more")
    finite = [place for place, score in enumerate(scores) if math.isfinite(score)]
    best = sorted(finite, key=lambda place: -scores[place])[: min(k, -(-len(finite) // 2))]
    taken = set(best)
    rest = [place for place in finite if place not in taken]
    return best, sorted(rest, key=lambda place: scores[place])[:k]


def _told(part: Rollout, place: int, tokenizer: Decoder | None) -> Sample:
    """What is to be known of a row beside its scores."""
    start, length = int(part.prompt_lengths[place]), int(part.lengths[place])
    ids = part.sequences[place, : start + length].tolist()
    kl = float((part.logprobs - part.ref_logprobs)[place, :length].double().sum())
    return {
        "prompt": ids[:start] if tokenizer is None else tokenizer.decode(ids[:start]),
        "response": ids[start:] if tokenizer is None else tokenizer.decode(ids[start:]),
        "kl": kl if math.isfinite(kl) else None,
        "length": length,
        "ended": bool(part.ended[place]),
        "prompt_row": int(part.prompt_rows[place]),
    }
