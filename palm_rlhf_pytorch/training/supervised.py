"""The one loop for a model that returns its loss: pretraining, fine-tuning, reward models.

AdamW, warm-up and cosine, clipping, accumulation, evaluation, a progress bar. Knows nothing of what the batches mean,
and draws no random number: the order of the data is the caller's.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from palm_rlhf_pytorch.training.metrics import MetricsLog
from palm_rlhf_pytorch.training.optimizer import parameter_groups, scale_learning_rates, warmup_cosine
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory, new_optimizer
from palm_rlhf_pytorch.training.saves import Keeper, Saves, Skips
from palm_rlhf_pytorch.training.trackers import Trackers
from palm_rlhf_pytorch.typecheck import typecheck


@typecheck
def fit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_steps: int,
    lr: float,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    max_norm: float | None = 1.0,
    accumulate: int = 1,
    max_skipped_steps: int = 3,
    accelerator: Accelerator | None = None,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    eval_every: int | None = None,
    stop: Callable[[int, Mapping[str, float]], bool] | None = None,
    metrics: MetricsLog | None = None,
    progress: bool = True,
    description: str = "train",
    parameters: Iterable[nn.Parameter] | None = None,
    saves: Saves | None = None,
    optimizer: OptimizerFactory | None = None,
) -> dict[str, float]:
    """Train on `loss = model(**batch)`, the learning rate warming up, then falling to 10 % along a cosine.

    A step takes `accumulate` batches and averages their losses, so four quarter batches (of equal size) do what the
    whole one does. In several processes each brings as many batches of its own, and gradients are averaged. Parameters
    that are not trained get no gradient; requires_grad, train and eval modes are as before afterwards.

    Args:
        model: called as `model(**batch)`, must give a scalar loss.
        batches: mappings of keyword arguments; tensors in them are moved to the model's device. At least num_steps *
            accumulate are needed: it is gone through once.
        num_steps: number of optimizer steps.
        lr: learning rate at the peak.
        weight_decay: of matrices only.
        warmup_steps: steps until the peak.
        max_norm: gradients are scaled down to this norm; None leaves them, 1.0 is common.
        accumulate: batches an optimizer step.
        max_skipped_steps: a step whose loss or gradient norm is not finite is left out, the weights as they were, bit
            for bit; so many in a row end the call.
        accelerator: places the model and the batches, averages over processes, chooses precision; None: stay put. Its
            trackers run as long as the call, unless they were started before: see `training.trackers`.
        evaluate: called in eval mode without gradients, on every process; gives `eval/...` metrics.
        eval_every: evaluate every so many steps; the last step always does.
        stop: called as stop(step, metrics) after each evaluation, whether to end the call there; in several processes
            the answer must be the same. A call that resumes from an evaluated step asks it about that one first.
        metrics: gets every step's `train/...` metrics.
        progress: show a bar on stderr (main process only).
        description: its label.
        parameters: what to train; None: all that require a gradient.
        optimizer: makes one of parameter groups, each with its lr and weight_decay: `muon`, or
            `lambda groups: SGD(groups, momentum=0.9)`; None is AdamW, fused.
        saves: where checkpoints go, and whether to go on from the newest: then `batches` must give what they gave
            before, and those that were learnt from are passed over. With it, SIGTERM and Ctrl-C end the call after the
            step in hand, saved.

    Returns:
        The metrics of the last step and the last evaluation.

    Raises:
        ValueError: if a number is out of range, the batches run out, the model gives no scalar loss, or too many steps
            in a row are not finite. The weights are then those of the last good step, bit for bit. Also if there is a
            checkpoint to go on from that does not fit the model, the arguments or the data; nothing is changed then.
    """
    _check_counts(
        num_steps=num_steps, accumulate=accumulate, max_skipped_steps=max_skipped_steps, eval_every=eval_every
    )
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm ({max_norm}) must be positive; None leaves gradients as they are")
    if accelerator is not None:
        model.to(accelerator.device)
    source = iter(batches)
    latest: dict[str, float] = {}
    plan: dict[str, Any] = {"num_steps": num_steps, "accumulate": accumulate, "lr": lr, "warmup_steps": warmup_steps}
    plan |= {"weight_decay": weight_decay, "max_norm": max_norm}
    trackers = Trackers(accelerator, folder=None if metrics is None or metrics.path is None else metrics.path.parent)
    with (
        trackers.running(plan),
        _training(model, parameters) as trained,
        _prepared(model, trained, lr, weight_decay, accelerator, optimizer) as (run, stepper),
        Keeper(saves, model, trained, stepper, accelerator, plan) as keeper,
        tqdm(total=num_steps, desc=description, unit="step", disable=not (progress and _is_main(accelerator))) as bar,
    ):
        done = keeper.resumed(source, metrics)
        latest |= keeper.metrics
        bar.update(done)
        ended = stop is not None and _to_evaluate(done, num_steps, eval_every) and stop(done, keeper.metrics)
        for step in range(done + 1, 0 if ended else num_steps + 1):
            started, place = time.perf_counter(), f"step {step} of {num_steps}"
            factor = warmup_cosine(step, num_steps, warmup_steps=warmup_steps)
            scale_learning_rates(stepper, factor)
            loss, num_tokens = _add_gradients(run, source, accumulate, accelerator, place)
            grad_norm = _clip(trained, max_norm, accelerator)
            _step(stepper, keeper.skips, loss, grad_norm, accelerator, place, max_skipped_steps)
            line = {"train/loss": loss, "train/lr": lr * factor, "train/grad_norm": grad_norm}
            line["train/skipped_steps"] = float(keeper.skips.total)
            if num_tokens:
                line["train/tokens_per_second"] = num_tokens / (time.perf_counter() - started)
            if evaluate is not None and _to_evaluate(step, num_steps, eval_every):
                line |= _evaluated(model, evaluate)
            if metrics is not None:
                metrics.log(line, step)
            latest |= line
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            ended = stop is not None and _to_evaluate(step, num_steps, eval_every) and stop(step, line)
            if keeper.ended(step, line) or ended:
                break
    return latest


def _add_gradients(
    run: nn.Module, source: Iterator[Any], accumulate: int, accelerator: Accelerator | None, place: str
) -> tuple[float, int]:
    """Backward through the mean loss of the next batches; that mean and the token ids, over all processes."""
    device = next(run.parameters()).device
    total = torch.zeros((), device=device)
    num_tokens = 0
    for part in range(accumulate):
        batch = _next_batch(source, device, f"batch {part + 1} of {accumulate} in {place}")
        num_tokens += _count_tokens(batch)
        last = part == accumulate - 1
        with nullcontext() if accelerator is None or last else accelerator.no_sync(run):
            loss = run(**batch)
            _check_loss(loss, place)
            share = loss / accumulate
            if accelerator is None:
                share.backward()
            else:  # accelerate divides by its own number of accumulation steps
                accelerator.backward(share * accelerator.gradient_accumulation_steps)
        total += share.detach()
    if accelerator is not None:  # one process's nan becomes everyone's, so all of them stop
        total = accelerator.reduce(total, reduction="mean")
        num_tokens *= accelerator.num_processes
    return float(total), num_tokens


def _clip(trained: list[nn.Parameter], max_norm: float | None, accelerator: Accelerator | None) -> float:
    """Scale the gradients down to max_norm; their norm before that."""
    limit = math.inf if max_norm is None else max_norm
    clip = nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
    return float(clip(trained, limit))


def _step(
    optimizer: Optimizer,
    skips: Skips,
    loss: float,
    grad_norm: float,
    accelerator: Accelerator | None,
    place: str,
    max_skipped_steps: int,
) -> None:
    """Take the step if its numbers are finite; else leave the weights as they are, and count it."""
    scaled = accelerator is not None and accelerator.scaler is not None  # float16: the scaler skips such steps itself
    figures = {"loss": loss} if scaled else {"loss": loss, "gradient's norm": grad_norm}
    broken = next((name for name, value in figures.items() if not math.isfinite(value)), None)
    if scaled or broken is None:
        optimizer.step()
    optimizer.zero_grad()
    skips.in_a_row = 0 if broken is None else skips.in_a_row + 1
    skips.total += broken is not None
    if broken is not None and skips.in_a_row >= max_skipped_steps:
        raise ValueError(
            f"the {broken} is {figures[broken]} at {place}, the {skips.in_a_row}. step in a row that is not finite; the"
            " weights are those of the last good step: lower lr, or look at the batches"
        )


def _to_evaluate(step: int, num_steps: int, eval_every: int | None) -> bool:
    return step == num_steps or (eval_every is not None and step > 0 and step % eval_every == 0)


def _evaluated(model: nn.Module, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        found = {name: float(value) for name, value in evaluate().items()}
    model.train()
    return found


# batches


def _next_batch(source: Iterator[Any], device: torch.device, place: str) -> dict[str, Any]:
    try:
        batch = next(source)
    except StopIteration:
        raise ValueError(
            f"batches ran out at {place}; give an iterable that goes on (itertools.cycle), or a smaller num_steps"
        ) from None
    if not isinstance(batch, Mapping):
        raise TypeError(f"batches gave a {type(batch).__name__}, expected a dict of the model's keyword arguments")
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _count_tokens(batch: Mapping[str, Any]) -> int:
    """Integer tensors of two dimensions or more are token ids, (b, n); labels have one, masks are bool."""
    return sum(
        value.numel()
        for value in batch.values()
        if isinstance(value, Tensor) and value.ndim >= 2 and value.dtype in (torch.int32, torch.int64)
    )


def _check_loss(loss: object, place: str) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"the model returned a {type(loss).__name__} at {place}, expected a scalar loss")
    if loss.ndim != 0:
        raise ValueError(
            f"the model returned shape {tuple(loss.shape)} at {place}, expected a scalar loss; does the "
            "batch ask for one (labels, return_loss)?"
        )
    if not loss.requires_grad:
        raise ValueError(f"the loss at {place} depends on no trained parameter; look at `parameters`, or unfreeze some")


# what a run borrows, and gives back as it was


@contextmanager
def _training(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> Iterator[list[nn.Parameter]]:
    """Train mode, and gradients for the given parameters alone."""
    owned = list(model.parameters())
    trained = [parameter for parameter in owned if parameter.requires_grad] if parameters is None else list(parameters)
    chosen = {id(parameter) for parameter in trained}
    if not trained:
        raise ValueError("there is nothing to train: no parameter is given, or none requires a gradient")
    strange = len(chosen - {id(parameter) for parameter in owned})
    if strange:
        raise ValueError(f"{strange} of the {len(chosen)} given parameters are not in the model; take them from it")
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in owned]
    try:
        for parameter in owned:
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None
        model.train()
        yield trained
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for module, mode in modes:
            module.training = mode


@contextmanager
def _prepared(
    model: nn.Module,
    trained: list[nn.Parameter],
    lr: float,
    weight_decay: float,
    accelerator: Accelerator | None,
    factory: OptimizerFactory | None,
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """The model to call and its optimizer; accelerate's wrapping is undone in the end, so that fit can run again."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = ((names[id(parameter)], parameter) for parameter in trained)
    optimizer: Any = new_optimizer(factory, parameter_groups(named, lr=lr, weight_decay=weight_decay), lr=lr)
    if accelerator is None:
        yield model, optimizer
        return
    marks = ("forward", "_original_forward", "_is_accelerate_prepared")  # what prepare leaves on the module itself
    before = {name: model.__dict__[name] for name in marks if name in model.__dict__}
    run, optimizer = accelerator.prepare(model, optimizer)
    try:
        yield run, optimizer
    finally:
        for held, item in ((accelerator._models, run), (accelerator._optimizers, optimizer)):
            if not (item is run and before.get("_is_accelerate_prepared")):
                held[:] = [other for other in held if other is not item]
        for name in marks:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


def _is_main(accelerator: Accelerator | None) -> bool:
    return accelerator is None or accelerator.is_main_process


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} ({count}) must be at least 1")
