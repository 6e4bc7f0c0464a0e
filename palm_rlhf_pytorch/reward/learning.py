"""A reward model learns from labels: any mix of pairs, rankings, ratings and votes, in one run.

    labels -> token batches -> one pass over a batch's texts -> the loss of each kind of label -> their weighted mean

Stiennon et al., "Learning to Summarize from Human Feedback", https://arxiv.org/abs/2009.01325, section 3.4.
The loop is training/supervised.py's. Knows no policy.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.objectives.preference import (
    LabelLoss,
    bins_loss,
    bradley_terry_loss,
    ranking_loss,
    scalar_loss,
    vote_loss,
)
from palm_rlhf_pytorch.palm.inputs import check_length
from palm_rlhf_pytorch.reward.labels import (
    Course,
    EncodedLabels,
    LabelRows,
    NumberRows,
    check_ratings,
    encode_labels,
    label_batch,
    plan_batches,
    text_batches,
)
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.texts import Reading
from palm_rlhf_pytorch.text.datasets import Labels
from palm_rlhf_pytorch.text.records import Label
from palm_rlhf_pytorch.training.best import Best
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.saves import Saves
from palm_rlhf_pytorch.training.supervised import fit
from palm_rlhf_pytorch.typecheck import typecheck

MAX_REFERENCES = 512  # texts that scores are normalised on; Ziegler et al. take 256
FEW_STEPS = 20  # fewer teach next to nothing


@dataclass(frozen=True)
class RewardTraining:
    """What came of a run.

    Attributes:
        num_steps: optimizer steps planned.
        best_step: the one whose weights the model has; num_steps where nothing was held out.
        metrics: of the last step done, and `eval/...` of the best.
        train: the labels learnt from, and what was cut off their texts.
        held_out: the labels held out, likewise.
        stopped: the signal that ended the run early, if one did; resume it: the model is not finished.
    """

    num_steps: int
    best_step: int
    metrics: dict[str, float]
    train: EncodedLabels
    held_out: EncodedLabels | None
    stopped: str | None


@typecheck
def train_reward_model(
    reward_model: RewardModel,
    labels: Sequence[Label] | Labels,
    tokenizer: object,
    *,
    eos_token: int | None,
    held_out: Sequence[Label] | Labels = (),
    epochs: int = 1,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    max_length: int = 1024,
    max_tokens_per_batch: int = 8192,
    max_labels_per_batch: int = 32,
    accumulate: int = 1,
    centering: float = 0.0,
    rankings: Callable[..., LabelLoss] = ranking_loss,
    evals_per_epoch: int = 4,
    patience: int = 4,
    normalize: bool = True,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    metrics: MetricsLog | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = True,
    description: str = "reward model",
    optimizer: OptimizerFactory | None = None,
) -> RewardTraining:
    """Train a reward model on labels, keep the weights that did best on those held out, and normalise its scores.

    A label counts as much as its weight, whatever the batch it is in: a batch's loss is the weighted sum over its
    labels, divided by the mean weight of a batch. Pairs, rankings and votes are learnt from as log-odds of the scores,
    ratings by the model's head: cross entropy of bins, squared error of a scalar.

    Args:
        reward_model: trained in place, where it is; its PaLM is left as it was.
        labels: what to learn from, at least one of a weight above 0; `read_labels` makes them of rows and files.
        tokenizer: gives the ids of a text, as `encode_with` takes it.
        eos_token: id that ends a response, as where the policy writes it; None for none.
        held_out: what to judge by; share no prompt with `labels`. Without any, all epochs are gone through.
        epochs: passes over the labels; 1 is usual, reward models overfit soon.
        lr: peak learning rate; 1e-4 in TRL. A byte-level model of dim 128 wants 1e-3.
        weight_decay: of matrices only.
        max_length: tokens of a text; longer ones lose the beginning of their prompt.
        max_tokens_per_batch: texts times the longest of them, padding included.
        max_labels_per_batch: labels of a batch.
        accumulate: batches an optimizer step, in each process.
        centering: weight of the pull of pairs' scores to mean 0; 0.01 is usual where it is wanted.
        rankings: loss of rankings: `ranking_loss`, or `choice_loss` where only the best was chosen.
        evals_per_epoch: evaluations on `held_out`, and checkpoints, in each epoch.
        patience: the run ends after so many evaluations without a new best one.
        normalize: give the scores mean 0 and deviation 1 over the texts learnt from, 512 of them at most.
        seed: of the order of the batches. Dropout draws from torch's global random state.
        run_dir: folder for checkpoints; None keeps none.
        resume: go on with the run in run_dir, if it holds one: the same arguments lead to the same weights.
        metrics: gets `train/...` of each step, and `eval/loss`, `eval/accuracy`.
        accelerator: of a run of several processes, each of which takes its share of the batches. Where they do not come
            out even, the first ones are learnt from once more.
        progress: show a bar on stderr.
        description: its label.
        optimizer: makes one of parameter groups; None is AdamW.

    Raises:
        ValueError: if an argument is out of range, labels do not fit the head, or `fit` refuses or ends; if scores come
            out all alike, so that they cannot be normalised. The weights are then those of the last good step.
    """
    labels, held_out = (given.records if isinstance(given, Labels) else given for given in (labels, held_out))
    for name, count in (("epochs", epochs), ("evals_per_epoch", evals_per_epoch), ("patience", patience)):
        if count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
    if resume and run_dir is None:
        raise ValueError("resume=True goes on with the run of a folder: give run_dir")
    train, judged = _encoded(reward_model, labels, held_out, tokenizer, max_length=max_length, eos_token=eos_token)
    ranks, limits = Ranks(accelerator), {"max_tokens": max_tokens_per_batch, "max_labels": max_labels_per_batch}
    course = Course(train, epochs=epochs, seed=seed, accumulate=accumulate, ranks=ranks, **limits)
    model = LabelledLoss(reward_model, mean_weight=course.mean_weight, centering=centering, rankings=rankings)
    if course.num_steps < FEW_STEPS:
        warnings.warn(f"{course.num_steps} steps teach little: lower max_tokens_per_batch", stacklevel=4)
    every = max(1, course.num_steps // (epochs * evals_per_epoch))
    saves = None
    if run_dir is not None:
        kept = Checkpoints(run_dir, keep_last=1, keep_best="eval/loss", maximize=False, accelerator=accelerator)
        saves = Saves(kept, every=every, resume=resume, data=_told(model, course, judged))
    trained = reward_model.finetune_parameters()
    best = Best(model, trained, patience=patience * every, checkpoints=None if saves is None else saves.checkpoints)
    found = fit(
        model, course.batches(), num_steps=course.num_steps, lr=lr, weight_decay=weight_decay,
        warmup_steps=course.num_steps // 10, accumulate=accumulate, accelerator=accelerator, metrics=metrics,
        evaluate=None if judged is None else lambda: evaluate(model, judged, ranks=ranks, **limits),
        eval_every=every, stop=None if judged is None else best, progress=progress, description=description,
        parameters=trained, saves=saves, optimizer=optimizer,
    )  # fmt: skip
    if saves is not None and saves.stopped is not None:
        return RewardTraining(course.num_steps, best.step, found, train, judged, saves.stopped)
    if judged is not None:
        best.restore()
    if normalize:
        normalize_on(reward_model, train, max_tokens=max_tokens_per_batch)
    last = course.num_steps if judged is None else best.step
    return RewardTraining(course.num_steps, last, found | best.metrics, train, judged, None)


def _encoded(
    reward_model: RewardModel, labels: Sequence[Label], held_out: Sequence[Label], tokenizer: object, **limits: Any
) -> tuple[EncodedLabels, EncodedLabels | None]:
    """Labels to learn from and held-out ones, if there are any, refused where they do not fit the model."""
    settings, longest = reward_model.settings, limits["max_length"]
    check_length(longest, reward_model.palm.max_length, name="max_length")
    check_ratings([*labels, *held_out], num_bins=settings.num_binned_output, lowest=settings.label_offset)
    train = encode_labels(labels, tokenizer, **limits)
    return train, encode_labels(held_out, tokenizer, **limits) if held_out else None


def _told(model: "LabelledLoss", course: Course, held_out: EncodedLabels | None) -> str:
    """What decides the weights of a run, beside `fit`'s own arguments and its checkpoints."""
    reward_model, rankings = model.reward_model, getattr(model.rankings, "__name__", type(model.rankings).__name__)
    labels = repr((course.own, course.encoded.digest, None if held_out is None else held_out.digest))
    # checkpoints hold the adapter alone, which is worth nothing on another trunk
    weights = reward_model.palm.parameters() if reward_model.settings.use_lora else ()
    trunk = tensors_digest((("", weight) for weight in weights), told=repr(reward_model.palm.config))
    digests = f"labels {hashlib.sha256(labels.encode()).hexdigest()[:16]}, trunk {trunk[:16]}"
    return f"{digests}, centering {model.centering}, {rankings}, {reward_model.settings}"


class LabelledLoss(nn.Module):
    """A reward model that returns the loss of a batch of labels, as `fit` asks for it.

    Args:
        reward_model: what is trained.
        mean_weight: weight of a batch's labels, averaged over batches; sums over a batch are divided by it.
        centering: as in `bradley_terry_loss`.
        rankings: loss of rankings.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        *,
        mean_weight: float = 1.0,
        centering: float = 0.0,
        rankings: Callable[..., LabelLoss] = ranking_loss,
    ) -> None:
        super().__init__()
        self.reward_model = reward_model
        self.mean_weight, self.centering, self.rankings = mean_weight, centering, rankings

    def forward(self, seq: Tensor, mask: Tensor, prompt_lengths: Tensor, labels: LabelRows) -> Tensor:
        """Weighted sum of the labels' losses, divided by the mean weight of a batch."""
        parts = self.parts(seq, mask, prompt_lengths, labels)
        return torch.stack([part.loss * part.weight for part in parts]).sum() / self.mean_weight

    def parts(self, seq: Tensor, mask: Tensor, prompt_lengths: Tensor, labels: LabelRows) -> list["Part"]:
        """Each kind of label by itself."""
        reading = self.reward_model.read(seq, mask, prompt_lengths=prompt_lengths)
        scores, labels = reading.scores, labels.to(seq.device)
        settings, found = self.reward_model.settings, []
        if (pairs := labels.pairs) is not None:
            first, second = scores[pairs.chosen], scores[pairs.rejected]
            told = {"margin": pairs.margin, "label": pairs.preference, "weight": pairs.weight}
            pair = bradley_terry_loss(first, second, centering=self.centering, **told)
            found.append(Part(pair.loss, pair.accuracy, pairs.weight.sum()))
        if (ranked := labels.rankings) is not None:
            ranking = self.rankings(scores[ranked.rows], ranked.ranks, mask=ranked.mask, weight=ranked.weight)
            found.append(Part(*ranking, ranked.weight.sum()))
        if labels.ratings is not None:
            found.append(_rating_part(reading, labels.ratings, lowest=settings.label_offset))
        if (votes := labels.votes) is not None:
            middle = settings.label_offset + max(settings.num_binned_output - 1, 0) / 2
            vote = vote_loss(scores[votes.rows], votes.values > 0, middle=middle, weight=votes.weight)
            found.append(Part(*vote, votes.weight.sum()))
        return found


class Part(NamedTuple):
    """Of one kind of label in a batch: mean loss, accuracy where there is such a thing, and weight in all."""

    loss: Tensor
    accuracy: Tensor | None
    weight: Tensor


def _rating_part(reading: Reading, ratings: NumberRows, *, lowest: int) -> Part:
    weight = ratings.weight.sum()
    if reading.logits is None:
        return Part(scalar_loss(reading.scores[ratings.rows], ratings.values, weight=ratings.weight).loss, None, weight)
    found = bins_loss(reading.logits[ratings.rows], ratings.values.long() - lowest, weight=ratings.weight)
    return Part(*found, weight)


@torch.no_grad()
def evaluate(
    model: LabelledLoss, encoded: EncodedLabels, *, max_tokens: int, max_labels: int, ranks: Ranks
) -> dict[str, float]:
    """Weighted means over labels, over all processes: `eval/loss`, and `eval/accuracy` if they can be right or wrong.

    Each process takes its share of the batches.
    """
    batches = plan_batches(encoded, max_tokens=max_tokens, max_labels=max_labels)[ranks.rank :: ranks.count]
    device = model.reward_model.head.weight.device
    sums = torch.zeros(4, dtype=torch.float64)  # loss and its weight, accuracy and its weight
    for numbers in batches:
        batch = label_batch(encoded, numbers)
        for part in model.parts(**{name: value.to(device) for name, value in batch.items()}):
            weight, judged = float(part.weight), part.accuracy is not None
            right = float(part.accuracy) * weight if part.accuracy is not None else 0.0
            sums += torch.tensor([float(part.loss) * weight, weight, right, weight * judged], dtype=torch.float64)
    loss, weight, right, judged = ranks.sum(sums).tolist()
    return {"eval/loss": loss / weight} | ({"eval/accuracy": right / judged} if judged else {})


def normalize_on(reward_model: RewardModel, encoded: EncodedLabels, *, max_tokens: int) -> None:
    """Normalise scores on the texts of labels, on some of them at even distances where they are many.

    Raises:
        ValueError: if their scores are all alike.
    """
    texts = encoded.flat
    texts = texts[:: -(-len(texts) // MAX_REFERENCES)]
    batches = text_batches(texts, max_tokens=max_tokens, device=reward_model.head.weight.device)
    reward_model.normalize_scores(batch for _, batch in batches)
