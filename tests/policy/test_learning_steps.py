"""Steps of an update that are left out because a number is not finite, and updates that stop after any step."""

import json

import pytest
import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.learning import Learner, Progress
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import Prompting, collect_rollout
from palm_rlhf_pytorch.policy.targets import make_targets
from palm_rlhf_pytorch.tensors import pad_ragged
from tests.policy.helpers import CPU, GivenLesson, seeded_by

PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9], [3, 2], [3, 8, 4], [6])]


@pytest.fixture
def make_update(make_palm, move):
    """A learner in minibatches of two, four an epoch, and a lesson of eight rows to it."""

    def make(dropout=0.0, **options):
        actor_critic = move(ActorCritic(make_palm(), actor_dropout=dropout, critic_dropout=dropout))
        settings = PPOSettings(actor_lr=1e-2, critic_lr=1e-2, minibatch_size=2, **{"epochs": 2, **options})
        learner = Learner(
            actor_critic,
            Accelerator(cpu=True),
            loss=PPOLoss(**settings.loss_arguments()),
            **settings.learner_arguments(),
        )
        prompts, mask = pad_ragged(PROMPTS)
        prompting = Prompting(prompts, mask, torch.arange(8) + 30, torch.arange(8) % 5 + 1, 1.0, 7)
        generator = torch.Generator().manual_seed(0)
        rollout = collect_rollout(
            actor_critic, prompting, generator=lambda _: generator, version=0, max_batch_size=8, max_batch_tokens=9999
        )
        scores = torch.randn(8, generator=generator)
        return learner, GivenLesson(rollout, make_targets(rollout, scores, kl_coef=0.05, gamma=1.0, gae_lambda=0.95))

    return make


def everything(learner):
    """Weights and the optimizer's state, as bits."""
    trained = learner.actor | learner.critic
    moments = {
        (name, moment): value.clone()
        for name, parameter in trained.items()
        for moment, value in learner.optimizer.state.get(parameter, {}).items()
    }
    return {name: parameter.detach().clone() for name, parameter in trained.items()} | moments


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def spoil(learner, pattern):
    """Gradients of one parameter become nan in the steps where the pattern says so; the losses stay finite."""
    steps = iter(pattern)
    parameter = next(iter(learner.critic.values()))
    parameter.register_hook(lambda gradient: gradient * float("nan") if next(steps, ".") == "x" else gradient)


def test_step_whose_loss_is_not_finite_changes_no_bit_and_is_counted(make_update):
    learner, lesson = make_update()
    lesson.targets.returns[5] = float("inf")
    seen, moved = [everything(learner)], []

    def look(progress):
        seen.append(everything(learner))
        moved.append(not equal(seen[-1], seen[-2]))
        assert all(bool(tensor.isfinite().all()) for tensor in seen[-1].values())
        assert all(parameter.grad is None for parameter in (learner.actor | learner.critic).values())

    metrics = learner.update(lesson, random=seeded_by(0), on_step=look)
    assert len(moved) == 8 and moved.count(False) == 2  # the row comes once an epoch
    assert moved[:4].count(False) == 1
    assert metrics["policy/skipped_steps"] == 2 and learner.steps == 6
    assert all(value == value and abs(value) < 1e6 for value in metrics.values())


def test_step_whose_gradient_is_not_finite_leaves_the_figures_of_the_others(make_update):
    learner, lesson = make_update(epochs=1)
    spoil(learner, "..x.")
    losses = []
    metrics = learner.update(
        lesson, random=seeded_by(0), on_step=lambda p: losses.append(float(p.totals["value/loss"]))
    )
    assert losses[2] == losses[1] and metrics["policy/skipped_steps"] == 1
    assert metrics["value/loss"] == pytest.approx(losses[3] / 3)


def test_third_such_step_in_a_row_stops_with_its_place_and_prompts(make_update):
    learner, lesson = make_update()
    order = torch.randperm(8, generator=seeded_by(0)("order", 0)).tolist()
    spoil(learner, ".xxx")
    kept, progress = [], Progress()
    with pytest.raises(FloatingPointError) as raised:
        learner.update(
            lesson, random=seeded_by(0), progress=progress, on_step=lambda _: kept.append(everything(learner))
        )
    message = str(raised.value)
    assert "value/grad_norm nan" in message and "epoch 1, minibatch 4" in message
    assert f"to prompts {sorted(30 + row for row in order[6:])}" in message
    assert equal(everything(learner), kept[0]) and progress.skipped == 3 and progress.steps == 1


def test_two_such_steps_and_a_good_one_begin_the_count_anew(make_update):
    learner, lesson = make_update()
    spoil(learner, "xx.xx.xx")
    metrics = learner.update(lesson, random=seeded_by(0))
    assert metrics["policy/skipped_steps"] == 6 and learner.steps == 2
    spoil(learner, "x")
    with pytest.raises(FloatingPointError, match="epoch 1, minibatch 1"):  # in a row over two updates
        learner.update(lesson, random=seeded_by(1))


def test_setting_says_how_many_in_a_row_are_too_many(make_update):
    learner, lesson = make_update(max_skipped_steps=1)
    spoil(learner, "x")
    with pytest.raises(FloatingPointError, match="minibatch 1"):
        learner.update(lesson, random=seeded_by(0))


class Enough(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("stop_after", [1, 4, 6, 8])
def test_update_that_stopped_after_a_step_goes_on_to_the_same_bits(make_update, stop_after):
    whole, lesson = make_update(dropout=0.2)
    expected = whole.update(lesson, random=seeded_by(0))

    learner, lesson = make_update(dropout=0.2)
    kept = []

    def stop(progress):
        if progress.steps == stop_after:
            kept.append(json.dumps(progress.state()))
            raise Enough

    with pytest.raises(Enough):
        learner.update(lesson, random=seeded_by(0), on_step=stop)
    torch.manual_seed(99)
    progress = Progress.restored(json.loads(kept[0]), device=CPU)
    assert progress.steps == stop_after
    assert learner.update(lesson, random=seeded_by(0), progress=progress) == expected
    assert equal(everything(learner), everything(whole))
