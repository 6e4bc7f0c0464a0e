"""Groups of responses: which belong together, what leaves them out, and what a trainer asks of them."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from palm_rlhf_pytorch.objectives.group import DR_GRPO, GRPO, normalized_advantages
from palm_rlhf_pytorch.policy.groups import group_numbers
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.reward.weighted import JudgeSum

CALL = {"max_new_tokens": 3, "use_tqdm": False, "update_timesteps": 12, "preflight": False}
PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]


@pytest.fixture
def make_grpo(make_palm, judge):
    def make(**options):
        settings = {"reward_model": judge, "actor_lr": 1e-2, "minibatch_size": 6, "group_size": 3}
        return GRPOTrainer(palm=make_palm(), **{"prompt_token_ids": PROMPTS, **settings, **options})

    return make


def lessons(trainer):
    """What the trainer learns from, as it goes."""
    found, update = [], trainer.learner.update

    def watched(lesson, **options):
        found.append(lesson)
        return update(lesson, **options)

    trainer.learner.update = watched
    return found


def distinct(sequences, **masks):
    """A judge that gives no two responses one score."""
    return torch.arange(float(len(sequences)))


def test_a_prompt_that_comes_again_is_answered_by_another_group():
    rows = torch.tensor([4, 4, 1, 4, 4, 1, 4, 9, 1])
    numbers, sizes = group_numbers(rows, size=2)
    assert numbers.tolist() == [0, 0, 1, 2, 2, 1, 2, 3, 1]  # what is left over joins the last
    assert sizes.tolist() == [2, 3, 3, 1]


def test_dynamic_sampling_of_a_single_prompt_ends_when_its_groups_teach(make_grpo):
    trainer = make_grpo(prompt_token_ids=PROMPTS[:1], reward_model=distinct, max_rounds=6)
    (metrics,) = trainer.train(12, **CALL)
    assert metrics["rollout/groups"] == 4
    assert len(trainer.experience()) == 12  # one round was enough


def test_sampling_goes_on_while_what_is_left_out_leaves_too_few_groups(make_grpo):
    """All responses run into their limit: whatever the judge says of them, none is learnt from."""
    trainer = make_grpo(reward_model=distinct, drop_truncated=True, max_rounds=3)
    (metrics,) = trainer.train(6, eos_token=12, **{**CALL, "max_new_tokens": 1, "update_timesteps": 6})
    rows = trainer.experience()
    assert not rows.ended.any()  # the premise
    assert len(rows) == 18 and metrics["rollout/informative_groups"] == 0


def test_where_no_response_counts_there_is_no_score_of_zero(make_grpo):
    trainer = make_grpo(reward_model=lambda sequences, **masks: torch.full((len(sequences),), 2.0), max_rounds=2)
    (metrics,) = trainer.train(12, **CALL)
    for name in ("reward/score", "objective/kl", "response/length_mean", "advantages/mean"):
        assert metrics[name] != metrics[name], name
    assert metrics["reward/score_sampled"] == 2.0


def test_a_response_that_fills_its_own_limit_is_overlong(make_grpo):
    """Prompts of 1 to 5 tokens leave 5 to 1 of 6: each response that fills what is left loses a point."""
    trainer = make_grpo(reward_model=lambda sequences, **masks: sequences[:, -1] * 0.0, overlong_buffer=2)
    found = lessons(trainer)
    trainer.train(15, max_seq_len=6, use_tqdm=False, preflight=False, update_timesteps=15)
    assert found[0].scores.tolist() == [-1.0] * 15
    with pytest.raises(ValueError, match=r"overlong_buffer \(2\) .* \(1\)"):
        trainer.train(15, **{**CALL, "max_new_tokens": 1, "update_timesteps": 15})


def test_learning_by_hand_knows_its_groups_and_their_longest_response(make_grpo):
    trainer = make_grpo(objective=DR_GRPO, reward_model=distinct)
    batch = trainer.next_prompts(6)
    rollout = trainer.score(trainer.rollout(batch.ids, batch.mask, batch.rows, max_new_tokens=4))
    trainer.learn(rollout)
    assert trainer.learner.loss.max_length == 4
    nameless = rollout._replace(prompt_rows=torch.full_like(rollout.prompt_rows, -1))
    with pytest.raises(ValueError, match="prompt_rows holds -1"):
        trainer.learn(nameless)


def test_an_objective_of_parts_of_ones_own_is_saved(make_grpo, tmp_path):
    finer = replace(GRPO, advantages=partial(normalized_advantages, eps=1e-6))
    make_grpo(objective=finer, run_dir=tmp_path).train(12, **CALL)
    with pytest.raises(ValueError, match="other settings .*objective"):
        make_grpo(objective=GRPO).load(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize("changed", [{"eps_clip": -0.1}, {"eps_clip_high": float("nan")}, {"kl_coef": float("inf")}])
def test_an_objective_that_cannot_be_is_refused_before_any_work(changed):
    name, value = next(iter(changed.items()))
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        replace(GRPO, **changed)


def test_what_belongs_to_the_objective_is_told_so(make_grpo):
    with pytest.raises(TypeError, match=r"kl_coef.*replace\(GRPO, kl_coef=...\)"):
        make_grpo(kl_coef=0.1)


def test_the_plan_knows_whole_groups_and_a_sum_of_judges(make_grpo, judge):
    trainer = make_grpo(reward_model=JudgeSum({"sevens": judge, "distinct": distinct}))
    plan = trainer.plan(24, max_new_tokens=3, update_timesteps=12)
    assert plan.updates == 2
    with pytest.raises(ValueError, match="group_size"):
        trainer.plan(25, max_new_tokens=3, update_timesteps=12)


def test_the_held_out_judge_reads_each_response_once(make_grpo):
    read = []

    def held_out(sequences, **masks):
        read.append(len(sequences))
        return sequences[:, -1].float()

    trainer = make_grpo(
        reward_model=lambda sequences, **masks: torch.ones(len(sequences)), held_out_judge=held_out, max_rounds=4
    )
    trainer.train(12, **CALL)
    assert sum(read) == 48


def test_an_update_that_begins_anew_leaves_no_round_of_the_one_before(make_grpo):
    calls = []

    def fails_late(sequences, **masks):
        calls.append(len(sequences))
        if len(calls) == 3:
            raise OSError("the judge's server is gone")
        return torch.ones(len(sequences)) if len(calls) < 3 else distinct(sequences)

    trainer = make_grpo(reward_model=fails_late, max_rounds=5)
    with pytest.raises(OSError, match="server"):
        trainer.train(12, **CALL)
    trainer.train(12, **CALL)
    assert len(trainer.experience()) == 12
