"""The supervised loop: it learns, accumulation changes nothing, and what it borrows it gives back."""

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.training.supervised import fit

WEIGHT, BIAS = torch.tensor([[1.0, -2.0, 0.5]]), 0.25


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the process; no test sees another's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Regression(nn.Module):
    """Mean squared error of a linear layer, which a batch may ask to be broken."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.frozen = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.1, 0.2, -0.3]]))
            self.linear.bias.zero_()
            self.frozen.weight.fill_(1.0)
            self.frozen.bias.zero_()

    def forward(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        return factor * (self.linear(x).squeeze(-1) - y).square().mean()


def batch(size: int, seed: int, **others: Any) -> dict[str, Any]:
    x = torch.randn(size, 3, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x @ WEIGHT.T).squeeze(-1) + BIAS} | others


def batches(size: int = 16) -> Iterator[dict[str, Any]]:
    return (batch(size, seed) for seed in itertools.count())


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance)


def test_fit_learns_a_linear_regression() -> None:
    model = Regression()
    found = fit(model, batches(), num_steps=300, lr=0.1, warmup_steps=5, progress=False)
    torch.testing.assert_close(model.linear.weight, WEIGHT, rtol=0, atol=1e-3)
    assert model.linear.bias.item() == pytest.approx(BIAS, abs=1e-3)
    assert found["train/loss"] < 1e-5
    assert found["train/lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("accelerated", [False, True])
def test_four_quarter_batches_equal_one_batch(accelerated: bool) -> None:
    whole, parts = Regression(), Regression()
    source = [batch(20, seed) for seed in range(3)]
    quarters = [
        {name: value[start : start + 5] for name, value in item.items()} for item in source for start in range(0, 20, 5)
    ]
    first = fit(whole, source, num_steps=3, lr=0.1, progress=False)
    # accelerate divides by a number of its own, which must not count twice
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2) if accelerated else None
    second = fit(parts, quarters, num_steps=3, lr=0.1, accumulate=4, accelerator=accelerator, progress=False)
    assert_equal(weights(parts), weights(whole), tolerance=1e-6)
    assert second["train/loss"] == pytest.approx(first["train/loss"], abs=1e-6)
    assert second["train/grad_norm"] == pytest.approx(first["train/grad_norm"], abs=1e-5)


def test_gradient_norm_is_reported_before_clipping() -> None:
    model = Regression()
    item = batch(7, 0)
    model(**item).backward()
    assert model.linear.weight.grad is not None and model.linear.bias.grad is not None
    norm = math.hypot(*model.linear.weight.grad[0].tolist(), model.linear.bias.grad.item())
    for max_norm in (None, 1e-3):
        found = fit(model, [item], num_steps=1, lr=0.0, max_norm=max_norm, progress=False)
        assert found["train/grad_norm"] == pytest.approx(norm)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_that_is_not_finite_stops_before_the_weights_change(factor: float, accumulate: int) -> None:
    source = [batch(5, seed) for seed in range(2 * accumulate)]
    source[-1]["factor"] = factor
    model = Regression().eval()
    seen: list[dict[str, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(weights(module)))
    with pytest.raises(ValueError, match="loss is (nan|inf) at step 2 of 2"):
        options = {"accumulate": accumulate, "weight_decay": 0.5, "max_skipped_steps": 1}
        fit(model, source, num_steps=2, lr=0.1, progress=False, **options)
    assert_equal(weights(model), seen[-1])  # as they were when the broken batch came
    assert not torch.equal(seen[0]["linear.weight"], seen[-1]["linear.weight"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training and not model.linear.training


def test_gradient_that_is_not_finite_stops_before_the_weights_change() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * x).sum().abs().sqrt()  # 0, with an infinite slope

    model = Root()
    with pytest.raises(ValueError, match=r"gradient's norm is (nan|inf) at step 3 of 4, the 3\. step in a row"):
        fit(model, [{"x": torch.ones(3)}] * 4, num_steps=4, lr=0.1, progress=False)
    assert model.weight.tolist() == [0.0, 0.0, 0.0]


def test_steps_that_are_not_finite_are_left_out_and_counted() -> None:
    good = [batch(5, seed) for seed in range(4)]
    broken = [{**batch(5, seed), "factor": math.nan} for seed in range(4)]
    mixed = Regression()
    rate = {"lr": 0.1, "weight_decay": 0.5, "progress": False}
    seen: list[dict[str, Tensor]] = []
    mixed.register_forward_pre_hook(lambda module, args: seen.append(weights(module)))
    found = fit(mixed, [good[0], *broken[:2], good[1], *broken[2:], good[2]], num_steps=7, **rate)
    assert found["train/skipped_steps"] == 4
    for before, after in ((1, 2), (2, 3), (4, 5), (5, 6)):  # what the passes 1, 2, 4 and 5 broke
        assert_equal(seen[after], seen[before])
    assert not torch.equal(seen[3]["linear.weight"], seen[4]["linear.weight"])
    with pytest.raises(ValueError, match="loss is nan at step 4 of 5"):
        fit(Regression(), [good[0], *broken[:3], good[1]], num_steps=5, **rate)


def test_fit_leaves_random_state_modes_and_gradients_alone() -> None:
    model = Regression()
    model.frozen.eval()
    model.frozen.bias.requires_grad_(False)
    before = torch.random.get_rng_state()
    fit(model, batches(), num_steps=2, lr=0.1, progress=False, parameters=[model.linear.bias])
    assert torch.equal(before, torch.random.get_rng_state())
    assert model.training and model.linear.training and not model.frozen.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_the_given_parameters_are_trained() -> None:
    model = Regression()
    before = weights(model)
    seen = []
    model.linear.register_forward_hook(lambda module, args, output: seen.append(module.weight.requires_grad))
    fit(model, batches(), num_steps=2, lr=0.1, weight_decay=0.5, parameters=iter([model.linear.bias]), progress=False)
    after = weights(model)
    assert after["linear.bias"] != before.pop("linear.bias")
    assert_equal(after, before)
    assert seen == [False, False]


def test_progress_shows_or_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Regression(), batches(), num_steps=2, lr=0.1, progress=False)
    assert capfd.readouterr() == ("", "")
    fit(Regression(), batches(), num_steps=2, lr=0.1, description="pretrain")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "pretrain: 100%" in shown.err and "2/2" in shown.err and "loss=" in shown.err


def test_batches_that_run_out_are_named() -> None:
    model = Regression()
    with pytest.raises(ValueError, match="ran out at batch 1 of 1 in step 2 of 3"):
        fit(model, [batch(4, 0)], num_steps=3, lr=0.1, progress=False)
    before = weights(model)
    with pytest.raises(ValueError, match="ran out at batch 2 of 3 in step 1 of 1"):
        fit(model, [batch(4, 0)], num_steps=1, lr=0.1, accumulate=3, progress=False)
    assert_equal(weights(model), before)


def test_evaluation_runs_in_eval_mode_every_so_many_steps(tmp_path: Path) -> None:
    model = Regression()
    calls: list[tuple[bool, bool]] = []

    def evaluate() -> dict[str, float]:
        calls.append((model.linear.training, torch.is_grad_enabled()))
        return {"eval/loss": float(len(calls))}

    log = MetricsLog(tmp_path / "m.jsonl")
    found = fit(model, batches(), num_steps=5, lr=0.1, evaluate=evaluate, eval_every=2, metrics=log, progress=False)
    lines = read_metrics(tmp_path / "m.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line.get("eval/loss") for line in lines] == [None, 1.0, None, 2.0, 3.0]
    assert calls == [(False, False)] * 3
    assert model.linear.training
    assert found["eval/loss"] == 3.0
    assert {"train/loss", "train/lr", "train/grad_norm"} <= lines[0].keys()
    assert "train/tokens_per_second" not in lines[0]


class Language(nn.Module):
    """A unigram model: takes ids (b, n) and returns a loss only when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(5))

    def forward(self, seq: Tensor, return_loss: bool = False) -> Tensor:
        logprobs = self.logits.log_softmax(-1)[seq]
        return -logprobs.mean() if return_loss else logprobs


def test_token_ids_are_counted_and_plain_arguments_passed_on() -> None:
    item = {"seq": torch.tensor([[1, 2, 3], [4, 4, 4]]), "return_loss": True}
    found = fit(Language(), [item], num_steps=1, lr=0.1, progress=False)
    assert found["train/loss"] == pytest.approx(math.log(5))
    assert found["train/tokens_per_second"] > 0


def test_what_is_no_batch_or_no_loss_is_named() -> None:
    seq = torch.tensor([[1, 2, 3], [4, 4, 4]])
    with pytest.raises(ValueError, match=r"shape \(2, 3\) at step 1 of 1.*return_loss"):
        fit(Language(), [{"seq": seq}], num_steps=1, lr=0.1, progress=False)
    with pytest.raises(TypeError, match="batches gave a Tensor"):
        fit(Language(), [seq], num_steps=1, lr=0.1, progress=False)
    model = Regression()
    with pytest.raises(ValueError, match="depends on no trained parameter"):
        fit(model, batches(), num_steps=1, lr=0.1, parameters=model.frozen.parameters(), progress=False)
    with pytest.raises(ValueError, match="1 of the 2 given parameters are not in the model"):
        fit(model, batches(), num_steps=1, lr=0.1, parameters=[model.linear.bias, nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="nothing to train"):
        fit(model.requires_grad_(False), batches(), num_steps=1, lr=0.1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_steps": 0}, r"num_steps \(0\)"),
        ({"accumulate": 0}, r"accumulate \(0\)"),
        ({"eval_every": 0}, r"eval_every \(0\)"),
        ({"max_norm": 0.0}, r"max_norm \(0.0\)"),
        ({"lr": -0.5}, r"lr \(-0.5\)"),
        ({"weight_decay": -0.5}, r"weight_decay \(-0.5\)"),
        ({"warmup_steps": 4}, r"warmup_steps \(4\)"),
    ],
)
def test_number_out_of_range_is_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit(Regression(), batches(), **({"num_steps": 3, "lr": 0.1, "progress": False} | change))


def test_number_of_the_wrong_type_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        fit(Regression(), batches(), num_steps="3", lr=0.1, progress=False)  # type: ignore[arg-type]


def test_accelerated_run_equals_the_plain_one_and_leaves_no_trace() -> None:
    plain, model = Regression(), Regression()
    attributes = set(model.__dict__)
    accelerator = Accelerator(cpu=True)
    for _ in range(2):
        expected = fit(plain, batches(), num_steps=3, lr=0.1, progress=False)
        found = fit(model, batches(), num_steps=3, lr=0.1, accelerator=accelerator, progress=False)
        assert found["train/loss"] == expected["train/loss"]
    assert_equal(weights(model), weights(plain))
    assert set(model.__dict__) == attributes
    assert accelerator._models == [] and accelerator._optimizers == []
    assert "Accelerated" not in repr(copy.deepcopy(model))


def test_model_prepared_by_the_caller_stays_prepared() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Regression())
    fit(model, batches(), num_steps=1, lr=0.1, accelerator=accelerator, progress=False)
    assert accelerator._models == [model]
    assert model._is_accelerate_prepared


def test_mixed_precision_holds_in_every_call_and_ends_with_it() -> None:
    model = Regression()
    dtypes: list[torch.dtype] = []
    model.linear.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    for _ in range(2):
        fit(model, batches(), num_steps=1, lr=0.1, accelerator=accelerator, progress=False)
    model(**batch(3, 0))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32]


def two_ranks(folder: str) -> None:
    """Each rank brings half of every batch; the last one of rank 1 is broken in the second run."""
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    half = slice(accelerator.process_index * 10, accelerator.process_index * 10 + 10)
    source = [{name: value[half] for name, value in batch(20, seed).items()} for seed in range(4)]
    model = Regression()
    trained = [model.linear.weight, model.linear.bias]
    metrics = MetricsLog(Path(folder) / "m.jsonl", accelerator=accelerator)
    arguments: dict[str, Any] = {"lr": 0.1, "accelerator": accelerator, "metrics": metrics, "parameters": trained}
    fit(model, source, num_steps=2, accumulate=2, progress=False, **arguments)
    torch.save(model.state_dict(), f"{folder}/{accelerator.process_index}.pt")
    before = weights(model)
    source[0]["factor"] = math.nan if accelerator.process_index == 1 else 1.0
    with pytest.raises(ValueError, match="loss is nan at step 1 of 2"):
        fit(model, source, num_steps=2, progress=False, max_skipped_steps=1, **arguments)
    assert_equal(weights(model), before)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    debug_launcher(two_ranks, args=(str(tmp_path),), num_processes=2)
    model = Regression()
    source = [batch(20, seed) for seed in range(4)]
    found = fit(model, source, num_steps=2, lr=0.1, accumulate=2, progress=False)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal(states[0], states[1])  # ranks agree to the bit
    assert_equal(states[0], weights(model), tolerance=1e-6)
    lines = read_metrics(tmp_path / "m.jsonl")
    assert len(lines) == 2
    assert lines[-1]["train/loss"] == pytest.approx(found["train/loss"], abs=1e-6)
