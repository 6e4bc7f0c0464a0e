"""What may be added to the steps of learning: a warm-up of the critic, an early end, pretraining texts."""

import pytest
import torch

from palm_rlhf_pytorch.policy.pretraining import Pretraining
from palm_rlhf_pytorch.reward.model import RewardModel

CALL = {"max_new_tokens": 3, "use_tqdm": False, "update_timesteps": 8, "preflight": False}
TEXTS = torch.arange(200) * 7 % 13


def weights_of(hat):
    return {name: weight.detach().clone() for name, weight in hat.items()}


def moved(before, hat):
    return any(not torch.equal(weight, before[name]) for name, weight in hat.items())


def test_while_the_critic_warms_up_the_policy_stays_to_the_bit(make_trainer):
    trainer = make_trainer(critic_warmup=2, actor_wd=0.1)
    actor, critic = (weights_of(hat) for hat in (trainer.learner.actor, trainer.learner.critic))
    seen = []
    learn_from = trainer.learn_from

    def watched(*given, **named):
        metrics = learn_from(*given, **named)
        seen.append((moved(actor, trainer.learner.actor), moved(critic, trainer.learner.critic)))
        return metrics

    trainer.learn_from = watched
    history = trainer.train(24, **CALL)
    assert seen == [(False, True), (False, True), (True, True)]
    assert [line["policy/lr"] > 0 for line in history] == [False, False, True]
    assert history[2]["policy/ratio_max"] > 1


def test_an_update_ends_after_the_step_that_went_too_far(make_trainer):
    free = make_trainer(actor_lr=0.05, epochs=4, minibatch_size=4)
    (whole,) = free.train(8, **CALL)
    assert free.learner.steps == 8  # two minibatches in four epochs
    held = make_trainer(actor_lr=0.05, epochs=4, minibatch_size=4, max_approx_kl=1e-4)
    (cut,) = held.train(8, **CALL)
    assert 1 < held.learner.steps < 8  # the first step starts at a ratio of 1
    assert cut["policy/ended_early"] == 1
    assert "policy/ended_early" not in whole
    loose = make_trainer(actor_lr=0.05, epochs=4, minibatch_size=4, max_approx_kl=1e9)
    (same,) = loose.train(8, **CALL)
    assert same["policy/loss"] == whole["policy/loss"]


def test_the_end_of_an_update_is_kept_over_a_resume(make_trainer, tmp_path):
    options = {"actor_lr": 0.05, "epochs": 4, "minibatch_size": 4, "max_approx_kl": 1e-4, "save_every_steps": 1}
    through = make_trainer(run_dir=tmp_path / "through", keep_last=99, **options)
    through.train(16, **CALL)
    checkpoints = through.run.checkpoints
    for step in checkpoints.steps():
        again = make_trainer(**options)
        again.train(16, resume=checkpoints.folder / f"step-{step:08d}", **CALL)
        assert again.learner.steps == through.learner.steps
        for name, weight in through.learner.actor.items():
            assert torch.equal(weight, again.learner.actor[name]), (step, name)


def test_pretraining_adds_the_gradient_of_the_next_token_loss(make_trainer):
    """By a second route: PaLM's own loss on the same windows, through the exported weights' graph."""
    plain, mixed = (
        make_trainer(actor_lora=False, **options)
        for options in ({}, {"ptx_coef": 0.5, "ptx_length": 9, "pretraining": TEXTS})
    )
    grads = []
    for trainer in (plain, mixed):
        caught = {}

        def catch(*given, trainer=trainer, caught=caught):
            caught.update({name: weight.grad.clone() for name, weight in trainer.learner.actor.items()})
            return given[0]["policy/loss"]

        apply = trainer.learner._apply
        trainer.learner._apply = lambda *given, catch=catch, apply=apply: (catch(*given), apply(*given))
        trainer.learner._clip = lambda parameters: torch.zeros(())
        trainer.learner.epochs, trainer.learner.minibatch_size = 1, 8
        trainer.train(8, **CALL)
        grads.append(caught)
    windows = mixed.pretraining.windows(8, generator=mixed.learning_generator(0, "pretraining", 0, 0))
    palm = make_trainer(actor_lora=False).actor_critic.actor.copy
    loss = 0.5 * palm(windows, return_loss=True)
    names = dict(palm.named_parameters())
    expected = torch.autograd.grad(loss, [weight for weight in names.values() if weight.requires_grad])
    found = {name.split("copy.")[-1]: grads[1][name] - grads[0][name] for name in grads[0]}
    trained = [name for name, weight in names.items() if weight.requires_grad]
    assert set(trained) == set(found)
    for name, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6)


def test_pretraining_texts_are_part_of_what_a_run_resumes(make_trainer, tmp_path):
    options = {"ptx_coef": 0.5, "ptx_length": 9, "epochs": 1}
    through = make_trainer(run_dir=tmp_path, pretraining=TEXTS, save_every_steps=1, keep_last=99, **options)
    history = through.train(16, **CALL)
    assert history[-1]["policy/ptx_loss"] > 0
    place = through.run.checkpoints.folder / f"step-{through.run.checkpoints.steps()[0]:08d}"
    again = make_trainer(pretraining=TEXTS, save_every_steps=1, **options)
    again.train(16, resume=place, **CALL)
    for name, weight in through.learner.actor.items():
        assert torch.equal(weight, again.learner.actor[name])
    other = make_trainer(pretraining=TEXTS.flip(0), save_every_steps=1, **options)
    with pytest.raises(ValueError, match="other pretraining texts"):
        other.train(16, resume=place, **CALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ptx_coef": 0.5}, "pretraining is None"),
        ({"pretraining": TEXTS}, "ptx_coef is 0"),
        ({"pretraining": TEXTS[:5], "ptx_coef": 0.5, "ptx_length": 9}, r"at least ptx_length \(9\)"),
        ({"pretraining": TEXTS + 20, "ptx_coef": 0.5, "ptx_length": 9}, "the model has 13"),
        ({"pretraining": TEXTS, "ptx_coef": 0.5, "ptx_length": 1}, r"ptx_length \(1\)"),
        ({"pretraining": TEXTS, "ptx_coef": 0.5, "top_k": 3}, "goes without top_k"),
        ({"critic_warmup": -1}, r"critic_warmup \(-1\)"),
        ({"max_approx_kl": 0.0}, r"max_approx_kl \(0.0\)"),
    ],
)
def test_what_cannot_be_is_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_windows_come_from_the_text_and_follow_from_the_state():
    texts = Pretraining(TEXTS.numpy(), length=5, num_tokens=13)
    first, second = (texts.windows(6, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    places = TEXTS.unfold(0, 5, 1)
    assert all((places == window).all(dim=-1).any() for window in first)
    with pytest.raises(TypeError, match="integers"):
        Pretraining(TEXTS.float(), length=5, num_tokens=13)


def test_a_trainer_starts_its_critic_as_the_reward_model(make_trainer, make_palm):
    palm = make_palm()
    judge = RewardModel(palm, pool_last=True)
    judge.normalize_scores([{"seq": torch.arange(12).reshape(4, 3)}])
    trainer = make_trainer(palm, reward_model=judge, critic_from_reward_model=True)
    batch = trainer.next_prompts(3)
    rollout = trainer.rollout(batch.ids, batch.mask, max_new_tokens=4)
    before_last = rollout.sequences[0, : rollout.prompt_lengths[0] + 3].long()[None]
    expected = judge.eval()(before_last, prompt_lengths=rollout.prompt_lengths[:1])
    torch.testing.assert_close(rollout.values[0, 3], expected[0])
    with pytest.raises(ValueError, match="it takes a RewardModel"):
        make_trainer(critic_from_reward_model=True)
