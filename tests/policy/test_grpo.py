"""GRPOTrainer: groups, dynamic sampling, resuming; and that each of its kin learns."""

from dataclasses import replace

import pytest
import torch

from palm_rlhf_pytorch.objectives.group import DAPO, DR_GRPO, GRPO, GSPO, RLOO
from palm_rlhf_pytorch.policy.groups import group_numbers, kept_groups
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.training.checkpoint import load_checkpoint

CALL = {"max_new_tokens": 3, "use_tqdm": False, "update_timesteps": 12, "preflight": False}


@pytest.fixture
def make_grpo(make_palm, judge):
    prompts = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]

    def make(**options):
        settings = {"reward_model": judge, "actor_lr": 1e-2, "minibatch_size": 6, "group_size": 3}
        return GRPOTrainer(palm=make_palm(), prompt_token_ids=prompts, **{**settings, **options})

    return make


def test_groups_are_numbered_in_the_order_of_their_prompts():
    numbers, sizes = group_numbers(torch.tensor([7, 2, 7, 5, 2, 7]))
    assert numbers.tolist() == [0, 1, 0, 2, 1, 0]
    assert sizes.tolist() == [3, 2, 1]
    teaching = torch.tensor([False, True, True, False, True])
    assert kept_groups(numbers, teaching, 2).tolist() == [False, True, True, False, False]
    assert kept_groups(numbers, teaching, None).all()


def test_an_update_samples_whole_groups_and_has_no_critic(make_grpo):
    trainer = make_grpo()
    (metrics,) = trainer.train(12, **CALL)
    rows = trainer.experience().prompt_rows
    assert sorted(torch.unique(rows, return_counts=True)[1].tolist()) == [3, 3, 3, 3]
    assert metrics["rollout/groups"] == 4
    assert metrics["episodes"] == 12
    assert not [name for name in metrics if name.startswith(("value/", "returns/"))]
    assert trainer.actor_critic.critic is None
    assert not trainer.actor_critic.critic_parameters()


def test_the_proof_before_the_run_holds_without_a_critic(make_grpo):
    report = make_grpo().preflight(max_new_tokens=3)
    assert report.ok, report.table()


@pytest.mark.parametrize("objective", [GRPO, DR_GRPO, DAPO, RLOO, GSPO, replace(GRPO, kl_loss_coef=0.05)])
def test_each_objective_raises_the_score(make_grpo, objective):
    clip = {"eps_clip": 0.1, "eps_clip_high": 0.2} if objective is GSPO else {}
    trainer = make_grpo(objective=replace(objective, **clip), epochs=2, actor_lr=3e-2)
    history = trainer.train(24 * 12, **{**CALL, "update_timesteps": 24})
    scores = [line["reward/score"] for line in history]
    assert sum(scores[-3:]) > sum(scores[:3]) + 1.0


def test_groups_that_teach_nothing_are_sampled_again(make_grpo):
    """A judge to whom all answers to the prompts 9 and 2 6 are alike: these are left out, and others come."""

    def judge(sequences, *, prompt_mask, mask):
        score = ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float() + sequences[:, -1] / 64
        dull = (sequences[:, 0] == 9) | (sequences[:, 0] == 2)
        return torch.where(dull, 1.0, score)

    trainer = make_grpo(reward_model=judge, max_rounds=4, run_dir=None)
    kept = []
    learn_from = trainer.learner.update

    def watched(lesson, **options):
        kept.append((lesson.source.prompt_rows, lesson.counted))
        return learn_from(lesson, **options)

    trainer.learner.update = watched
    (metrics,) = trainer.train(12, **CALL)
    rows, counted = kept[0]
    assert not {1, 2} & set(rows[counted].tolist())
    assert counted.sum() >= 12  # four groups of three or more
    assert len(rows) > 12
    assert metrics["rollout/informative_groups"] < 1
    assert metrics["episodes"] == 12


def test_where_nothing_teaches_no_step_is_taken_and_the_run_goes_on(make_grpo):
    trainer = make_grpo(reward_model=lambda sequences, **masks: torch.ones(len(sequences)), max_rounds=2)
    before = {name: weight.clone() for name, weight in trainer.actor_critic.actor_parameters().items()}
    history = trainer.train(24, **CALL)
    assert [line["rollout/informative_groups"] for line in history] == [0.0, 0.0]
    assert trainer.learner.steps == 0
    for name, weight in trainer.actor_critic.actor_parameters().items():
        assert torch.equal(weight, before[name])


def test_a_stopped_run_ends_with_the_bits_of_one_that_went_through(make_grpo, tmp_path):
    """Checkpoints after scoring, which dynamic sampling does several times, and after each step."""

    def make(folder):
        settings = {"max_rounds": 3, "save_rollouts": True, "save_every_steps": 1, "minibatch_size": 3}
        return make_grpo(run_dir=tmp_path / folder, keep_last=99, **settings)

    through = make("through")
    history = through.train(24, **CALL)
    places = through.run.checkpoints.steps()
    rounds = set()
    for step in places[1:6]:
        place = through.run.checkpoints.folder / f"step-{step:08d}"
        flight = load_checkpoint(place, kind="GRPOTrainer").values["flight"]
        rounds.add(flight and flight["rounds"])
        again = make(f"again{step}")
        rest = again.train(24, resume=place, **CALL)
        for name, weight in through.actor_critic.actor_parameters().items():
            assert torch.equal(weight, again.actor_critic.actor_parameters()[name]), (step, name)
        assert without_time(rest[-1]) == without_time(history[-1])
    assert max(filter(None, rounds)) > 1  # one was taken between the rounds of an update, or after them


def without_time(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("perf/")}


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"group_size": 1}, {}, r"group_size \(1\)"),
        ({"max_rounds": 0}, {}, r"max_rounds \(0\)"),
        ({}, {"update_timesteps": 10}, r"10 in an update"),
        ({}, {"num_episodes": 25}, r"25 in an update"),
        ({"overlong_buffer": 0}, {}, r"overlong_buffer \(0\)"),
    ],
)
def test_what_cannot_be_is_refused(make_grpo, options, call, message):
    with pytest.raises(ValueError, match=message):
        make_grpo(**options).train(**{"num_episodes": 24, **CALL, **call})


def test_unknown_settings_name_what_was_meant(make_grpo):
    with pytest.raises(TypeError, match="GRPOTrainer has no argument 'groupsize'; did you mean group_size"):
        make_grpo(groupsize=4)
    with pytest.raises(TypeError, match="critic_lr"):
        make_grpo(critic_lr=1e-3)
