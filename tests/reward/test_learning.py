"""A reward model learns from labels: the loss of a mixed batch, the best weights, the same bits when gone on with."""

import math
import os
import random
import signal

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState

from palm_rlhf_pytorch.objectives.preference import choice_loss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.labels import Course, encode_labels, label_batch, text_batches
from palm_rlhf_pytorch.reward.learning import LabelledLoss, evaluate, train_reward_model
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from palm_rlhf_pytorch.training.ranks import Ranks

EOS = 257
LIMITS = {"max_tokens": 150, "max_labels": 5}


def judge(**settings):
    torch.manual_seed(0)
    model = RewardModel(PaLM(num_tokens=259, dim=8, depth=1, heads=2, dim_head=4), **settings).eval()
    with torch.no_grad():
        for parameter in model.finetune_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def labels(count, *, seed=0, kinds=4):
    """Texts are the better the more of them is "a"."""
    chance = random.Random(seed)

    def text(quality):
        return Text("p" * chance.randint(0, 5), "a" * (quality + 1) + "".join(chance.choices("xyz", k=5 - quality)))

    def label(number):
        first, second, third = chance.sample(range(5), 3)
        common = {"weight": chance.choice([0.5, 1.0, 2.0])}
        match number % kinds:
            case 0:
                best, worst = max(first, second), min(first, second)
                return Pair(chosen=text(best), rejected=text(worst), margin=chance.choice([None, 0.3]), **common)
            case 1:
                qualities = (first, second, third)[: chance.randint(2, 3)]
                return Ranking(texts=tuple(map(text, qualities)), ranks=tuple(4 - q for q in qualities), **common)
            case 2:
                return Vote(text=text(first), up=first > 2, **common)
        return Rating(text=text(first), value=first, **common)

    return [label(number) for number in range(count)]


def encoded(some):
    return encode_labels(some, ByteTokenizer(), max_length=100, eos_token=EOS)


def train(model, some, **options):
    options = {"max_tokens_per_batch": 150, "max_labels_per_batch": 5, "lr": 0.02, "progress": False} | options
    return train_reward_model(model, some, ByteTokenizer(), eos_token=EOS, **options)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first, second):
    assert all(torch.equal(first[name], second[name]) for name in second) and first.keys() == second.keys()


@pytest.mark.parametrize("settings", [{"num_binned_output": 5}, {}])
@pytest.mark.parametrize("rankings", [None, choice_loss])
def test_batches_of_an_epoch_average_to_the_weighted_mean_of_single_labels(settings, rankings):
    found, options = encoded(labels(23)), {"centering": 0.1} | ({"rankings": rankings} if rankings else {})
    course = Course(found, epochs=1, seed=1, accumulate=1, ranks=Ranks(None), **LIMITS)
    assert len({len(batch) for batch in course.own}) > 1
    model = LabelledLoss(judge(**settings), mean_weight=course.mean_weight, **options)
    losses = [model(**batch).item() for batch in course.batches()]
    alone = LabelledLoss(model.reward_model, **options)
    weights = torch.tensor([label.weight for label in found.labels])
    single = torch.stack([alone(**label_batch(found, [number])).detach() for number in range(23)])
    expected = float(single.sum() / weights.sum())  # each is its loss times its weight
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=1e-5)
    whole = evaluate(alone, found, ranks=Ranks(None), **LIMITS)
    assert whole["eval/loss"] == pytest.approx(expected, rel=1e-5)


def test_losses_are_of_raw_scores_and_votes_are_counted_from_the_middle_of_the_scale():
    model = judge(num_binned_output=5, label_offset=1)
    found = encoded(
        [Vote(text=Text("p", "ab"), up=True), Pair(chosen=Text("", "c"), rejected=Text("", "de"), margin=1)]
    )
    (_, batch), *_ = text_batches(found.flat, max_tokens=1000)
    vote, chosen, rejected = model.read(**batch).scores.tolist()
    model.score_mean.fill_(3.0)
    model.score_std.fill_(7.0)

    def nll(log_odds):
        return math.log1p(math.exp(-log_odds))

    loss = LabelledLoss(model)(**label_batch(found, [0, 1]))
    assert loss.item() == pytest.approx(nll(vote - 3) + nll(chosen - rejected - 1), rel=1e-5)


@pytest.mark.parametrize("settings", [{"num_binned_output": 5}, {}])
def test_training_on_a_mix_learns_and_normalises(settings):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=16, depth=1, heads=2, dim_head=4)
    model, before, others = RewardModel(palm, use_lora=False, **settings), bits(palm), labels(40, seed=1)
    start = evaluate(LabelledLoss(model), encoded(others), ranks=Ranks(None), **LIMITS)
    found = train(model, labels(120), held_out=others, epochs=3, evals_per_epoch=1)
    assert found.metrics["eval/loss"] < 0.6 * start["eval/loss"]
    assert found.metrics["eval/accuracy"] > max(0.75, start["eval/accuracy"])
    assert_same(bits(palm), before)
    (rows, batch), *_ = text_batches(found.train.flat, max_tokens=10**6)
    scores = model.eval()(**batch)
    assert len(rows) > 120
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def overfitting(*, trunk=1.0, **options):
    """Held-out labels say the opposite, so that the first evaluation is the best."""
    opposite = [Pair(chosen=pair.rejected, rejected=pair.chosen) for pair in labels(6, seed=1, kinds=1)]
    some = labels(40, kinds=1)
    arguments = {"held_out": opposite, "epochs": 5, "patience": 3, "evals_per_epoch": 2} | options
    model = judge(dropout=0.1)
    with torch.no_grad():
        model.palm.token_emb.weight.mul_(trunk)
    torch.manual_seed(3)
    return model, train(model, some, **arguments), opposite


def test_a_run_ends_when_held_out_loss_stays_worse_and_keeps_the_best_weights(tmp_path):
    model, found, opposite = overfitting(metrics=MetricsLog(tmp_path / "metrics.jsonl"))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    losses = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    every = min(losses)
    assert found.best_step == min(losses, key=lambda step: losses[step])
    assert max(losses) == lines[-1]["step"] == found.best_step + 3 * every < found.num_steps
    judged = evaluate(LabelledLoss(model.eval()), encoded(opposite), ranks=Ranks(None), **LIMITS)
    assert judged["eval/loss"] == pytest.approx(losses[found.best_step], rel=1e-6)
    assert found.metrics["eval/loss"] == losses[found.best_step]


@pytest.mark.parametrize("signal_at", ["best", "after", "last"])
def test_a_run_told_to_stop_goes_on_to_the_same_bits(tmp_path, signal_at):
    expected, alone, _ = overfitting()
    last = alone.best_step + 3 * (alone.num_steps // 10)  # the run has ten evaluations, and waits for three
    steps = {"best": alone.best_step, "after": alone.best_step + 1, "last": last}
    calls = iter(range(1, 1000))

    def told(*_):
        if next(calls) == steps[signal_at]:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: told() if isinstance(module, LabelledLoss) else None
    )
    try:
        _, stopped, _ = overfitting(run_dir=tmp_path / "run")
    finally:
        hook.remove()
    assert stopped.stopped == "SIGTERM"
    model, found, _ = overfitting(run_dir=tmp_path / "run", resume=True)
    assert found.stopped is None and found.best_step == alone.best_step
    assert found.metrics["eval/loss"] == alone.metrics["eval/loss"]
    assert_same(bits(model), bits(expected))
    for other in ({"centering": 0.5}, {"trunk": 1.1}, {"rankings": choice_loss}):
        with pytest.raises(ValueError, match="other data"):
            overfitting(run_dir=tmp_path / "run", resume=True, **other)


def shared_run(path):
    """In a process of two: the weights that come out, and the held-out loss."""
    torch.set_num_threads(1)
    model = judge()
    found = train(model, labels(30), held_out=labels(9, seed=1), accelerator=Accelerator(cpu=True), epochs=2)
    torch.save((bits(model), found.metrics["eval/loss"]), f"{path}/{Accelerator().process_index}.pt")


def test_two_processes_do_what_one_does_with_two_batches_a_step(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    debug_launcher(shared_run, args=(str(tmp_path),), num_processes=2)
    (first, loss), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first, second)
    model = judge()
    found = train(model, labels(30), held_out=labels(9, seed=1), accumulate=2, epochs=2)
    assert loss == other == pytest.approx(found.metrics["eval/loss"], rel=1e-4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=2e-4)


def test_what_cannot_go_well_is_refused_before_any_step():
    model = judge()
    before = bits(model)
    with pytest.raises(ValueError, match="nothing to learn from"):
        train(model, [])
    with pytest.raises(ValueError, match=r"epochs \(0\)"):
        train(model, labels(4), epochs=0)
    with pytest.raises(ValueError, match="run_dir"):
        train(model, labels(4), resume=True)
    with pytest.raises(ValueError, match="3 bins take whole numbers from 0 to 2"):
        train(judge(num_binned_output=3), labels(8))
    assert_same(bits(model), before)
