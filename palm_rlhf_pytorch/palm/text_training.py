"""What pretraining and fine-tuning share: the loss of a batch of text, bits per byte, samples, and the loop.

The loop is training/supervised.py's. Knows batches of text, not where they come from.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.packing import count_targets
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer, Tokenizer
from palm_rlhf_pytorch.training.best import Best
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import Saves
from palm_rlhf_pytorch.training.supervised import fit

Batch = Mapping[str, Any]


class TextLoss(nn.Module):
    """A PaLM that returns the loss of a batch of text, as `fit` asks for it.

    Args:
        palm: what is trained.
        scope: name of the scope whose adapter is added; None for none.
    """

    def __init__(self, palm: PaLM, *, scope: str | None = None) -> None:
        super().__init__()
        self.palm, self.scope = palm, scope

    def forward(
        self, seq: Tensor, mask: Tensor | None = None, begins: Tensor | None = None, targets: Tensor | None = None,
        weight: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy (nats) of the targets, times weight; the model's cross_entropy_ignore_index is not heeded.

        Args:
            seq: ids, (b, n).
            mask: True on real tokens, (b, n); None where all are.
            begins: True on the first token of each document, (b, n); None where each row is one.
            targets: True on tokens to be predicted, (b, n); None for all.
            weight: factor of the loss.
        """
        documents = None if begins is None else begins.cumsum(dim=-1)
        if targets is None and self.palm.ignores_targets:  # the published PaLMs' is their tokenizer's EOS
            targets = torch.ones_like(seq, dtype=torch.bool)
        loss: Tensor = self.palm(
            seq, return_loss=True, mask=mask, documents=documents, loss_mask=targets, finetune_scope=self.scope
        )
        return loss * weight


@dataclass(frozen=True)
class HeldOutText:
    """Text to judge a model by.

    Attributes:
        batches: of text, without weights.
        num_bytes: UTF-8 bytes of the tokens they predict, see `text_bytes`.
    """

    batches: Sequence[Batch]
    num_bytes: int

    @torch.no_grad()
    def evaluate(self, model: TextLoss, *, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Nats a token, `eval/loss`, and `eval/bits_per_byte`; each process takes its share of the batches.

        The model's mode is left as it was. A loss that is not a number makes both nan.
        """
        ranks, device = Ranks(accelerator), model.palm.device
        sums = torch.zeros(2, dtype=torch.float64)
        was_training = model.training
        model.eval()
        try:
            with nullcontext() if accelerator is None else accelerator.autocast():
                for batch in self.batches[ranks.rank :: ranks.count]:
                    count = _num_targets(batch)
                    placed = {name: value.to(device) for name, value in batch.items()}
                    sums += torch.tensor([float(model(**placed)) * count, count], dtype=torch.float64)
        finally:
            model.train(was_training)
        nats, count = ranks.sum(sums).tolist()
        return {"eval/loss": nats / count, "eval/bits_per_byte": nats / math.log(2) / self.num_bytes}


def text_bytes(tokenizer: Tokenizer, ids: Tensor) -> int:
    """UTF-8 bytes that ids (n,) stand for; special tokens stand for none.

    With other tokenizers than bytes, a character that the ends of the ids cut counts as the three bytes of U+FFFD.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return int((ids < tokenizer.bos_token).sum())
    return len(tokenizer.decode(ids).encode())


@dataclass(frozen=True)
class Samples:
    """What a model in training says to the same prompts, from the same seed: read over the steps, what it has learnt.

    Attributes:
        prompts: ids (n,) each.
        tokenizer: of the model.
        max_new_tokens: of a sample at most.
        end_token: id that ends a sample; None for none.
        stops: text that ends a sample, as a chat's next turn does.
        path: a file of JSON lines, {"step", "prompt", "sample"}, appended to; None writes none.
        tell: called as tell(step, prompt, sample).
        seed: of the draws.
    """

    prompts: Sequence[Tensor]
    tokenizer: Tokenizer
    max_new_tokens: int = 100
    end_token: int | None = None
    stops: tuple[str, ...] = ()
    path: Path | None = None
    tell: Callable[[int, str, str], object] | None = None
    seed: int = 0

    def take(self, palm: PaLM, step: int, *, scope: str | None = None) -> None:
        """Sample, write, tell; lines of this step and later ones, of a run that was resumed, make way."""
        rows = []
        for prompt in self.prompts:
            generator = torch.Generator(palm.device).manual_seed(self.seed)
            new = palm.generate(
                len(prompt) + self.max_new_tokens, prompt.to(palm.device), eos_token=self.end_token,
                generator=generator, finetune_scope=scope,
            ).tolist()  # fmt: skip
            new = new[: new.index(self.end_token)] if self.end_token in new else new
            text = self.tokenizer.decode(new)
            text = text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]
            rows.append({"step": step, "prompt": self.tokenizer.decode(prompt), "sample": text})
        if self.path is not None:
            MetricsLog(self.path).rewind(step - 1)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
        for row in rows:
            if self.tell is not None:
                self.tell(step, str(row["prompt"]), str(row["sample"]))


@dataclass(frozen=True, kw_only=True)
class TextLoop:
    """How a model learns from text, whatever the text.

    Attributes:
        lr: peak learning rate.
        weight_decay: of matrices only; 0.1 as in GPT-3.
        warmup_steps: steps until the peak; None for a tenth of them, 100 at most.
        max_norm: gradients are scaled down to this norm; None leaves them.
        accumulate: batches of an optimizer step, in each process.
        optimizer: makes an optimizer of parameter groups, see `fit`; None for AdamW.
        eval_every: steps between two evaluations; None for ten in all, but at least 50 steps apart.
        patience: the run ends after so many evaluations without a new best one, and the best weights are kept; None
            goes through all steps and keeps the last.
        samples: what to ask the model after each evaluation.
        run_dir: folder for checkpoints; None keeps none.
        resume: go on with the run in run_dir, if it holds one: the same arguments lead to the same weights.
        save_every: steps between two checkpoints; with patience each evaluation makes one instead.
        metrics: gets `train/...` of each step, and `eval/loss`, `eval/bits_per_byte`.
        accelerator: of a run of several processes, or of another precision.
        progress: show a bar on stderr.
        description: its label.
    """

    lr: float
    weight_decay: float = 0.1
    warmup_steps: int | None = None
    max_norm: float | None = 1.0
    accumulate: int = 1
    optimizer: OptimizerFactory | None = None
    eval_every: int | None = None
    patience: int | None = None
    samples: Samples | None = None
    run_dir: str | Path | None = None
    resume: bool = False
    save_every: int = 100
    metrics: MetricsLog | None = None
    accelerator: Accelerator | None = None
    progress: bool = True
    description: str = "train"

    def run(
        self, model: TextLoss, batches: Iterable[Batch], *, num_steps: int, data: str, held_out: HeldOutText | None,
        parameters: Sequence[nn.Parameter],
    ) -> "TextTraining":  # fmt: skip
        """Train the parameters on batches, num_steps * accumulate of them.

        Raises:
            ValueError: if a number is out of range, patience is asked for without held-out text, or `fit` refuses.
        """
        self._check(held_out)
        eval_every = max(50, num_steps // 10) if self.eval_every is None else self.eval_every
        warmup = min(100, num_steps // 10) if self.warmup_steps is None else self.warmup_steps
        saves = self._saves(eval_every, data)
        best = None
        if self.patience is not None:
            kept = None if saves is None else saves.checkpoints
            best = Best(model, parameters, patience=self.patience * eval_every, checkpoints=kept)

        def stop(step: int, found: Mapping[str, float]) -> bool:
            if self.samples is not None and Ranks(self.accelerator).rank == 0:
                self.samples.take(model.palm, step, scope=model.scope)
            return best is not None and best(step, found)

        found = fit(
            model, batches, num_steps=num_steps, lr=self.lr, weight_decay=self.weight_decay, warmup_steps=warmup,
            max_norm=self.max_norm, accumulate=self.accumulate, accelerator=self.accelerator, eval_every=eval_every,
            evaluate=None if held_out is None else lambda: held_out.evaluate(model, accelerator=self.accelerator),
            stop=stop, metrics=self.metrics, progress=self.progress, description=self.description,
            parameters=parameters, saves=saves, optimizer=self.optimizer,
        )  # fmt: skip
        stopped = None if saves is None else saves.stopped
        if best is not None and stopped is None:
            best.restore()
            return TextTraining(num_steps, best.step, found | best.metrics, stopped)
        return TextTraining(num_steps, num_steps, found, stopped)

    def _check(self, held_out: HeldOutText | None) -> None:
        for name in ("patience", "eval_every", "save_every"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} ({count}) must be at least 1")
        if self.patience is not None and held_out is None:
            raise ValueError(f"patience ({self.patience}) counts evaluations: hold text out, or leave it None")
        if self.resume and self.run_dir is None:
            raise ValueError("resume=True goes on with the run of a folder: give run_dir")

    def _saves(self, eval_every: int, data: str) -> Saves | None:
        if self.run_dir is None:
            return None
        best = None if self.patience is None else "eval/loss"
        kept = Checkpoints(self.run_dir, keep_last=1, keep_best=best, maximize=False, accelerator=self.accelerator)
        every = self.save_every if self.patience is None else eval_every
        return Saves(kept, every=every, resume=self.resume, data=data)


@dataclass(frozen=True)
class TextTraining:
    """What came of a run.

    Attributes:
        num_steps: optimizer steps planned.
        best_step: the one whose weights the model has.
        metrics: of the last step done, and `eval/...` of the weights the model has.
        stopped: the signal that ended the run early, if one did; resume it: the model is not finished.
    """

    num_steps: int
    best_step: int
    metrics: dict[str, float]
    stopped: str | None


def _num_targets(batch: Batch) -> int:
    if "targets" in batch:
        return int(count_targets(batch))
    begun = batch["begins"][:, 1:].sum() if "begins" in batch else 0
    return int(batch["seq"][:, 1:].numel() - begun)
