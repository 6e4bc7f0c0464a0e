"""Proves what learning straight from texts takes for granted, on the user's own model and examples.

Policy and reference start as one, dropout is off, gradients reach what is trained and no more, texts end. The trainer
is left as it was. A check whose premise has failed is skipped, so that one fault shows as one failure.
"""

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from palm_rlhf_pytorch.policy.direct_data import Encoder, Examples
from palm_rlhf_pytorch.policy.direct_model import DirectPolicy
from palm_rlhf_pytorch.policy.judging import evaluating
from palm_rlhf_pytorch.policy.preflight import Check, Report
from palm_rlhf_pytorch.policy.probe import FLOAT32, HALF, Finding, Gap, gap, listed
from palm_rlhf_pytorch.products import product_dtype

MAX_EXAMPLES = 6


class Trainer(Protocol):
    """What of a trainer is looked at."""

    accelerator: Accelerator
    policy: DirectPolicy
    examples: Examples
    encoder: Encoder
    steps: int

    def reference(self) -> dict[str, Tensor]:
        """The stored log-probabilities of the reference."""
        ...

    def batch(self, examples: Examples, reference: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """What a pass takes."""
        ...

    def common_facts(self, examples: Examples, reference: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """What a step's passes share."""
        ...

    def checks(self) -> Mapping[str, Callable[[], Finding]]:
        """More checks, of the trainer's own."""
        ...


class Sample:
    """A few examples of unequal length, on the training device, and what a pass of the policy says of them."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.policy = trainer, trainer.policy
        sizes = trainer.examples.sizes()
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        count = min(MAX_EXAMPLES, len(order))
        rows = [order[place * (len(order) - 1) // max(1, count - 1)] for place in range(count)]
        reference, device = trainer.reference()["train"], trainer.accelerator.device
        facts = trainer.batch(trainer.examples, reference, rows) | trainer.common_facts(
            trainer.examples, reference, rows
        )
        self.facts = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in facts.items()}
        self.texts = {name: self.facts.pop(name) for name in ("ids", "prompt_lengths", "lengths")}
        self.reference: Tensor = self.facts["ref_logprobs"]

    def logprobs(self, *, reference: bool = False) -> Tensor:
        """Log-probabilities (b,) of the texts; in the mode that the policy is in."""
        with self.trainer.accelerator.autocast():
            return self.policy.logprobs(**self.texts, reference=reference)

    def loss(self, logprobs: Tensor) -> Tensor:
        """The loss that these would give."""
        return self.policy.objective(logprobs, self.texts["lengths"], **self.facts)[0]

    def per_token(self, first: Tensor, second: Tensor) -> Gap:
        """How far log-probabilities are apart, in nats a token."""
        lengths = self.texts["lengths"]
        return gap(first / lengths, second / lengths, torch.ones_like(lengths, dtype=torch.bool))

    def tolerance(self) -> float:
        """What two routes to one number may be apart, nats a token, by the dtype in which logits are made."""
        with self.trainer.accelerator.autocast():
            dtype = product_dtype(self.policy.palm.token_emb.weight)
        rounded = torch.get_float32_matmul_precision() != "highest"
        return HALF if rounded or dtype in (torch.bfloat16, torch.float16) else FLOAT32


def prove(trainer: Trainer) -> Report:
    """Look at a few examples, in the order of size; a fault is in the report and raises nothing."""
    started, sample = time.perf_counter(), Sample(trainer)
    steps: list[tuple[str, Callable[[], Finding], str | None]] = [
        ("weights", partial(weights, sample), None),
        ("lengths", partial(lengths, trainer), None),
        ("end token", partial(end_token, trainer), None),
        *((name, check, None) for name, check in trainer.checks().items()),
        ("by hand", partial(by_hand, sample), "weights"),
        ("reference", partial(stored_reference, sample), "by hand"),
        ("dropout", partial(dropout, sample), "weights"),
        ("policy = reference", partial(same_start, sample), "reference"),
        ("gradients", partial(gradients, sample), "weights"),
    ]
    checks: dict[str, Check] = {}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with evaluating(trainer.policy), torch.random.fork_rng(devices=devices):
        for name, check, premise in steps:
            checks[name] = Check(name, *_taken(check, premise, checks))
    return Report(list(checks.values()), time.perf_counter() - started)


def _taken(check: Callable[[], Finding], premise: str | None, checks: Mapping[str, Check]) -> Finding:
    if premise is not None and checks[premise].status in ("fail", "skip"):
        blocked = checks[premise].status == "skip"
        return Finding("skip", checks[premise].found if blocked else f"after {premise!r}")
    try:
        return check()
    except Exception as error:  # the model and the loss are the user's: an error of theirs belongs in the report
        text = textwrap.shorten(" ".join(str(error).split()), 300)
        return Finding(
            "fail", f"raised {type(error).__name__}: {text}",
            "the model or the loss raised this: call trainer.policy(**batch) yourself, on a small batch",
        )  # fmt: skip


def weights(sample: Sample) -> Finding:
    """All weights are finite; of them only the hat's are trained."""
    named = dict(sample.policy.named_parameters())
    broken = [name for name, weight in named.items() if not bool(weight.detach().isfinite().all())]
    if broken:
        return Finding(
            "fail", f"NaN or infinite in {listed(broken)}", "the checkpoint is damaged: load one from before that"
        )  # fmt: skip
    thawed = [name for name, weight in named.items() if weight.requires_grad and not name.startswith("hat.")]
    if thawed:
        return Finding(
            "fail", f"the frozen trunk requires gradients for {listed(thawed)}",
            "the trunk is the reference: call requires_grad_(False) on trainer.policy.palm; to train whole weights say"
            " lora=False, which copies them",
        )  # fmt: skip
    trained = sum(weight.numel() for weight in named.values() if weight.requires_grad)
    return Finding("ok", f"{trained:,} are trained, the trunk is frozen")


def lengths(trainer: Trainer) -> Finding:
    """Few texts had to be cut."""
    texts, cuts = trainer.examples.texts, trainer.examples.texts.cuts
    found = f"{len(texts)} texts of {min(texts.lengths)} to {max(texts.lengths)} tokens"
    if 10 * sum(cuts) <= len(texts):
        return Finding("ok", found + (f"; {cuts}" if any(cuts) else ""))
    return Finding(
        "warn", f"{found}; {cuts}",
        f"more than a tenth of the texts are longer than max_length ({trainer.encoder.max_length}): raise it, or leave"
        " such records out",
    )  # fmt: skip


def end_token(trainer: Trainer) -> Finding:
    """Every response that was not cut ends with EOS."""
    eos, texts = trainer.encoder.eos_token, trainer.examples.texts
    if eos is None:
        return Finding(
            "warn", "the tokenizer names no end token", "the policy does not learn where to stop: give eos_token"
        )  # fmt: skip
    open_ended, cut = sum(int(ids[-1]) != eos for ids in texts.ids), texts.cuts.responses
    if open_ended <= cut:
        return Finding("ok", f"id {eos} ends {len(texts) - open_ended} of {len(texts)} texts")
    return Finding(
        "fail", f"{open_ended} of {len(texts)} texts do not end with id {eos}, {cut} were cut",
        "the policy would learn not to stop: texts must keep the end token that the trainer gave them",
    )  # fmt: skip


@torch.no_grad()
def by_hand(sample: Sample) -> Finding:
    """One text: the response's tokens alone count, each by log_softmax of the logits before it, written out."""
    row = int((sample.texts["prompt_lengths"] + sample.texts["lengths"]).argmin())
    prompt, length = int(sample.texts["prompt_lengths"][row]), int(sample.texts["lengths"][row])
    ids = sample.texts["ids"][row : row + 1, : prompt + length]
    with sample.trainer.accelerator.autocast():
        table = sample.policy.palm(ids)[0].float().log_softmax(dim=-1)
    expected = sum(float(table[place - 1, ids[0, place]]) for place in range(prompt, prompt + length))
    apart = abs(float(sample.logprobs(reference=True)[row]) - expected) / length
    found = f"log_softmax(logits) by hand: {apart:.1e} nats a token apart"
    if apart <= sample.tolerance():
        return Finding("ok", found)
    return Finding(
        "fail", found,
        "prompt tokens count, response tokens do not, or a neighbouring place is read: token k is predicted by the"
        " hidden state of token k - 1",
    )  # fmt: skip


@torch.no_grad()
def stored_reference(sample: Sample) -> Finding:
    """What is stored of the reference is what the trunk says now."""
    apart = sample.per_token(sample.logprobs(reference=True), sample.reference)
    if apart.within(sample.tolerance()):
        return Finding("ok", f"stored and read again: {apart} nats a token apart")
    return Finding(
        "fail", f"stored and read again: {apart} nats a token apart",
        "the trunk or the texts have changed since: remove the stored reference, and leave trainer.policy.palm alone",
    )  # fmt: skip


@torch.no_grad()
def dropout(sample: Sample) -> Finding:
    """Nothing is random in train mode: two passes under different random states agree."""
    passes = []
    sample.policy.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        passes.append(sample.logprobs())
    sample.policy.eval()
    apart = sample.per_token(*passes)
    if apart.within(sample.tolerance() / 10):
        return Finding("ok", "two passes in train mode agree")
    return Finding(
        "fail", f"two passes in train mode differ: {apart} nats a token",
        "dropout or other noise is on: policy and reference would differ by it; set every dropout to 0",
    )  # fmt: skip


@torch.no_grad()
def same_start(sample: Sample) -> Finding:
    """Before the first step the policy is the reference, so that the loss says what it says of equals."""
    if sample.trainer.steps > 0:
        return Finding("skip", f"{sample.trainer.steps} steps were taken: it may be anything")
    logprobs = sample.logprobs()
    apart = sample.per_token(logprobs, sample.reference)
    loss, equals = float(sample.loss(logprobs)), float(sample.loss(sample.reference.clone()))
    found = f"{apart} nats a token apart; loss {loss:.6f}, of equals {equals:.6f}"
    if apart.within(sample.tolerance()):
        return Finding("ok", found)
    return Finding(
        "fail", found,
        "the policy does not start as the reference: an adapter's B must be 0 and a copy the trunk's own weights; build"
        " a fresh trainer",
    )  # fmt: skip


def gradients(sample: Sample) -> Finding:
    """The loss reaches all that is trained."""
    trained = {name: weight for name, weight in sample.policy.named_parameters() if weight.requires_grad}
    sample.policy.train()
    with torch.enable_grad():
        loss = sample.loss(sample.logprobs())
    sample.policy.eval()
    found = (
        torch.autograd.grad(loss, [*trained.values()], allow_unused=True)
        if loss.requires_grad
        else [None] * len(trained)
    )
    lost = [name for name, grad in zip(trained, found, strict=True) if grad is None]
    if lost:
        return Finding(
            "fail", f"the loss does not reach {listed(lost)}",
            "it was detached (.detach(), .data, no_grad), or the pass does not use it: its weights would never change",
        )  # fmt: skip
    broken = [n for n, grad in zip(trained, found, strict=True) if grad is not None and not bool(grad.isfinite().all())]
    if broken:
        return Finding(
            "fail", f"NaN or infinite for {listed(broken)}",
            "a product overflows in the backward pass: look for extreme weights, or leave float16",
        )  # fmt: skip
    return Finding("ok", f"reach all {len(trained)} trained tensors")
