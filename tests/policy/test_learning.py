"""PPO's update: targets by hand, one gradient whatever the microbatches, clipping, entropy, and what is left alone."""

import math

import pytest
import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.diagnostics import survey
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import Prompting, Rollout, collect_rollout
from palm_rlhf_pytorch.policy.targets import Lesson, Targets
from palm_rlhf_pytorch.tensors import pad_ragged
from tests.policy.helpers import GivenLesson, every_row, one_process, seeded_by

PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9], [3, 2], [3, 8, 4], [6])]


def make_learner(actor_critic, **options):
    settings = PPOSettings(**{"actor_lr": 1e-2, "critic_lr": 1e-2, "minibatch_size": 8, "epochs": 1, **options})
    return Learner(
        actor_critic, Accelerator(cpu=True), loss=PPOLoss(**settings.loss_arguments()), **settings.learner_arguments()
    )


def experience(actor_critic, *, budget=5, seed=0):
    """A rollout of ragged prompts and responses, and targets that differ from token to token."""
    prompts, mask = pad_ragged(PROMPTS)
    generator = torch.Generator().manual_seed(seed)
    prompting = Prompting(prompts, mask, torch.arange(8), torch.arange(8) % budget + 1, 1.0, 7)
    rollout = collect_rollout(
        actor_critic, prompting, generator=lambda _: generator, version=0, max_batch_size=8, max_batch_tokens=9999
    )
    return rollout, whitened_targets(rollout, torch.randn(8, generator=generator))


def whitened_targets(rollout, scores):
    counted = torch.ones_like(rollout.ended)
    lesson = Lesson(rollout, scores, counted, kl_coef=0.05, gamma=1.0, gae_lambda=0.95)
    lesson.whitening = survey(lesson, scores, ranks=one_process(), max_tokens=9999).advantages
    return lesson.read(every_row(rollout))[1]


def update(learner, rollout, targets, seed=0):
    return learner.update(GivenLesson(rollout, targets), random=seeded_by(seed))


def weights(actor_critic):
    trained = actor_critic.actor_parameters() | actor_critic.critic_parameters()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def test_whitening_is_over_the_rollout_so_that_a_minibatch_of_one_still_learns(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    counted = targets.advantages[rollout.response_mask]
    assert abs(float(counted.mean())) < 1e-5 and float(counted.std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    single = [row for row in range(8) if rollout.lengths[row] == 1]
    assert single and all(targets.advantages[row].abs().max() > 0.01 for row in single)
    before = weights(actor_critic)
    metrics = update(make_learner(actor_critic, minibatch_size=1), rollout, targets)
    assert metrics["policy/grad_norm"] > 0.01
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(actor_critic).items())


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("limits", [{"max_batch_size": 1}, {"max_batch_size": 3}, {"max_batch_tokens": 17}])
def test_microbatches_change_nothing(make_palm, move, lora, limits):
    """Eight of one row, or parts of three or of 17 tokens, give the step that one batch of eight gives."""
    results = []
    for size in ({}, limits):
        actor_critic = move(ActorCritic(make_palm(), actor_lora=lora, critic_lora=lora))
        rollout, targets = experience(actor_critic)
        learner = make_learner(actor_critic, **size, epochs=2, entropy_coef=0.1, dual_clip=3.0, max_norm=0.1)
        results.append((update(learner, rollout, targets), weights(actor_critic)))
    (metrics, whole), (other_metrics, parts) = results
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=0)  # steps are of size .01
    for name, value in metrics.items():
        assert other_metrics[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_only_response_tokens_are_read_out_and_their_graph_holds_no_vocabulary(make_palm, move):
    """Widths of what autograd keeps: with 997 ids, nothing but the embedding itself is as wide, and no token twice."""
    actor_critic = move(ActorCritic(make_palm(num_tokens=997)))
    rollout, targets = experience(actor_critic)
    kept, tokens = [], int(rollout.lengths.sum())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        update(make_learner(actor_critic), rollout, targets)
    assert tokens < rollout.response_mask.numel() and (tokens, 12) in kept
    assert not [shape for shape in kept if 997 in shape and shape != (997, 12)]


def test_entropy_that_is_only_looked_at_is_the_same_figure_and_has_no_gradient(make_palm, move, monkeypatch):
    asked, figures = [], []
    forward = ActorCritic.forward

    def seen(self, *arguments, entropy_grad, **options):
        asked.append(entropy_grad)
        out = forward(self, *arguments, entropy_grad=entropy_grad, **options)
        assert out.logprobs.requires_grad and out.entropy.requires_grad == entropy_grad
        return out

    monkeypatch.setattr(ActorCritic, "forward", seen)
    for coef in (0.0, 1e-3):
        actor_critic = move(ActorCritic(make_palm()))
        rollout, targets = experience(actor_critic)
        figures.append(update(make_learner(actor_critic, entropy_coef=coef), rollout, targets)["policy/entropy"])
    assert asked == [False, True] and figures[0] == pytest.approx(figures[1], abs=1e-6) and figures[0] > 0.5


def test_lengths_are_asked_for_once_an_update(make_palm, move, monkeypatch):
    """Asking a device makes the host wait for all that the device has still to do."""
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    asked = []
    spans, item = Rollout.spans, torch.Tensor.tolist
    monkeypatch.setattr(Rollout, "spans", lambda self: asked.append("spans") or spans(self))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asked.append(tuple(self.shape)) or item(self))
    update(make_learner(actor_critic, max_batch_size=2, epochs=3, minibatch_size=4), rollout, targets)
    # the spans, the order of each epoch (which is the host's own), and the figures of the whole update
    assert asked[:-1] == ["spans", (2, 8)] + [(8,)] * 3 and len(asked[-1]) == 1


@pytest.mark.parametrize("lora", [True, False])
def test_eight_times_one_and_two_times_four_give_the_same_gradient(make_palm, move, lora, monkeypatch):
    gradients = []
    for size in (1, 4, 8):
        actor_critic = move(ActorCritic(make_palm(), actor_lora=lora, critic_lora=lora))
        rollout, targets = experience(actor_critic)
        learner = make_learner(actor_critic, max_batch_size=size, max_norm=None)
        trained = actor_critic.actor_parameters() | actor_critic.critic_parameters()
        monkeypatch.setattr(
            learner.optimizer, "step", lambda kept=trained: gradients.append([p.grad.clone() for p in kept.values()])
        )
        update(learner, rollout, targets)
    for other in gradients[:2]:
        for found, expected in zip(other, gradients[2], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_padding_and_its_targets_reach_no_weight(make_palm, move):
    results = []
    for noise in (0.0, 100.0):
        actor_critic = move(ActorCritic(make_palm()))
        rollout, targets = experience(actor_critic)
        outside = ~rollout.response_mask
        assert outside.any()
        poisoned = [tensor + noise * outside for tensor in targets]
        rollout = rollout._replace(
            sequences=torch.where(rollout.mask, rollout.sequences, int(noise > 0)),
            logprobs=rollout.logprobs + noise * outside, values=rollout.values - noise * outside,
        )  # fmt: skip
        results.append((update(make_learner(actor_critic), rollout, Targets(*poisoned)), weights(actor_critic)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(tensor, results[1][1][name]) for name, tensor in results[0][1].items())


def test_first_step_starts_at_ratio_one_and_changes_the_weights(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    before = weights(actor_critic)
    metrics = update(make_learner(actor_critic), rollout, targets)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["policy/approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/clipped_fraction"] == 0.0
    assert metrics["policy/loss"] == pytest.approx(0.0, abs=1e-4)  # minus the mean of whitened advantages
    changed = {name for name, tensor in weights(actor_critic).items() if not torch.equal(tensor, before[name])}
    assert changed == before.keys()


def test_metrics_are_means_over_tokens_and_optimizer_steps(make_palm, move):
    """With learning rates of 0 every step sees the same weights, so each figure can be had from one pass."""
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    learner = make_learner(actor_critic, actor_lr=0.0, critic_lr=0.0, minibatch_size=8, max_batch_size=3, epochs=3)
    metrics = update(learner, rollout, targets)
    mask = rollout.response_mask
    with torch.no_grad():
        out = actor_critic(rollout.sequences, rollout.prompt_lengths, mask.shape[1])
    error = (out.values - targets.returns)[mask].square().mean()
    assert metrics["policy/entropy"] == pytest.approx(float(out.entropy[mask].mean()), abs=1e-5)
    assert metrics["value/error"] == pytest.approx(float(error), rel=1e-4)
    assert metrics["value/loss"] == pytest.approx(float(error) / 2, rel=1e-4)
    assert metrics["policy/lr"] == metrics["value/lr"] == 0.0
    assert learner.steps == 3


def test_ratio_max_is_the_largest_of_all_steps(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    shifted = rollout.logprobs.clone()
    shifted[3, 0] -= math.log(5.0)  # one token whose probability has grown five-fold
    learner = make_learner(actor_critic, actor_lr=0.0, minibatch_size=2, max_batch_size=1, epochs=2)
    metrics = update(learner, rollout._replace(logprobs=shifted), targets)
    assert metrics["policy/ratio_max"] == pytest.approx(5.0, rel=1e-3)
    assert 1.0 < metrics["policy/ratio_mean"] < 2.0


def test_order_of_rows_follows_the_generator(make_palm, move):
    results = []
    for seed in (0, 0, 1):
        actor_critic = move(ActorCritic(make_palm()))
        rollout, targets = experience(actor_critic)
        update(make_learner(actor_critic, minibatch_size=2), rollout, targets, seed)
        results.append(weights(actor_critic))
    name = next(iter(results[0]))
    assert torch.equal(results[0][name], results[1][name])
    assert not torch.equal(results[0][name], results[2][name])


@pytest.mark.parametrize("max_norm", [1e-3, None])
def test_gradients_of_actor_and_critic_are_clipped_apart(make_palm, move, max_norm):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    learner = make_learner(actor_critic, max_norm=max_norm)
    seen = []

    def look(*_):
        for parameters in (learner.actor, learner.critic):
            seen.append(float(torch.stack([p.grad.norm() for p in parameters.values()]).norm()))

    learner.optimizer.optimizer.register_step_pre_hook(look)
    metrics = update(learner, rollout, targets)
    found = [metrics["policy/grad_norm"], metrics["value/grad_norm"]]
    assert min(found) > 1e-2 and found[0] != found[1]
    expected = found if max_norm is None else [max_norm, max_norm]
    assert seen == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("hat", ["actor", "critic"])
def test_learning_rates_of_actor_and_critic_are_their_own(make_palm, move, hat):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    before = weights(actor_critic)
    metrics = update(make_learner(actor_critic, **{f"{hat}_lr": 0.0}), rollout, targets)
    still = getattr(actor_critic, f"{hat}_parameters")()
    for name, tensor in weights(actor_critic).items():
        assert torch.equal(tensor, before[name]) == (name in still)
    lrs = {"actor": metrics["policy/lr"], "critic": metrics["value/lr"]}
    assert lrs.pop(hat) == 0.0 and list(lrs.values()) == [1e-2]


def test_entropy_bonus_raises_entropy(make_palm, move):
    entropies = []
    for coef in (0.0, 1.0, -1.0):
        actor_critic = move(ActorCritic(make_palm()))
        rollout, targets = experience(actor_critic)
        metrics = update(make_learner(actor_critic, entropy_coef=coef, epochs=10), rollout, targets)
        out = actor_critic(rollout.sequences, rollout.prompt_lengths, rollout.response_mask.shape[1])
        entropies.append(float(out.entropy.detach()[rollout.response_mask].mean()))
        assert metrics["policy/entropy"] > 0
    none, bonus, malus = entropies
    assert bonus > none + 0.1 and malus < none - 0.1


def test_values_reach_returns_of_any_size(make_palm):
    actor_critic = ActorCritic(make_palm())
    rollout, targets = experience(actor_critic)
    far = targets._replace(returns=torch.where(rollout.response_mask, -40.0, 0.0))
    learner = make_learner(actor_critic, critic_lr=1.0, value_clip=None, epochs=60)
    update(learner, rollout, far)
    out = actor_critic(rollout.sequences, rollout.prompt_lengths, rollout.response_mask.shape[1])
    assert out.values[rollout.response_mask].mean() < -30


def test_frozen_weights_keep_their_bits_and_collect_no_gradient(make_palm):
    palm = make_palm()
    before = {name: p.detach().clone() for name, p in palm.named_parameters()}
    actor_critic = ActorCritic(palm, critic_lora=False, critic_last_layers=1)
    rollout, targets = experience(actor_critic)
    update(make_learner(actor_critic, epochs=3, actor_wd=0.1, critic_wd=0.1), rollout, targets)
    for name, parameter in actor_critic.palm.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    assert all(torch.equal(p, before[name]) for name, p in palm.named_parameters())
    assert all(p.grad is None for p in actor_critic.parameters())


def test_gradient_that_is_not_finite_changes_no_weight(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    before = weights(actor_critic)
    learner = make_learner(actor_critic)
    broken = targets._replace(returns=targets.returns + float("inf"))
    metrics = update(learner, rollout, broken)
    assert metrics["policy/skipped_steps"] == 1 and "policy/loss" not in metrics
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(actor_critic).items())
    assert not learner.optimizer.state and learner.steps == 0
    update(learner, rollout, targets)  # and nothing of it is left behind
    assert all(bool(tensor.isfinite().all()) for tensor in weights(actor_critic).values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(actor_critic).items())


def test_dropout_while_learning_follows_the_generator_and_leaves_global_state(make_palm, move):
    results = []
    for global_seed in (1, 2):
        actor_critic = move(ActorCritic(make_palm(), actor_dropout=0.3, critic_dropout=0.3))
        rollout, targets = experience(actor_critic)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        metrics = update(make_learner(actor_critic), rollout, targets)
        assert torch.equal(torch.get_rng_state(), state)
        assert metrics["policy/ratio_max"] > 1.001
        results.append(weights(actor_critic))
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_another_trainers_accumulation_does_not_swallow_the_step(make_palm, move):
    """Accelerate keeps "gradients are in step" for the whole process; a loop left half-way says no."""
    actor_critic = move(ActorCritic(make_palm()))
    rollout, targets = experience(actor_critic)
    learner = make_learner(actor_critic)
    learner.accelerator.sync_gradients = False
    before = weights(actor_critic)
    update(learner, rollout, targets)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(actor_critic).items())
