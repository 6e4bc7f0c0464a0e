"""Judges within a run: several in one, logged by name, and rewards per token."""

import math

import pytest
import torch

from palm_rlhf_pytorch.policy.judging import judge_sequences, judge_source
from palm_rlhf_pytorch.policy.targets import make_targets
from palm_rlhf_pytorch.reward.caching import CachedJudge
from palm_rlhf_pytorch.reward.weighted import JudgeSum
from tests.policy.helpers import CPU

CALL = {"max_new_tokens": 3, "use_tqdm": False, "update_timesteps": 8, "preflight": False}
LIMITS = {"max_batch_size": 3, "max_batch_tokens": 30, "where": "a test"}


def is_seven(sequences, *, prompt_mask, mask):
    """Rewards per token: 1 for each 7, 0 for the others, (b, t)."""
    lengths = (mask & ~prompt_mask).sum(dim=-1)
    starts = prompt_mask.sum(dim=-1)
    places = starts[:, None] + torch.arange(int(lengths.max()))
    within = torch.arange(int(lengths.max())) < lengths[:, None]
    return (sequences.gather(1, places.clamp(max=sequences.shape[1] - 1)) == 7) & within


def sevens(sequences, **masks):
    return is_seven(sequences, **masks).float()


def nines(sequences, *, prompt_mask, mask):
    return ((sequences == 9) & mask & ~prompt_mask).sum(dim=-1).float()


def test_rewards_per_token_are_stored_beside_their_sums(make_trainer, judge):
    trainer = make_trainer(reward_model=sevens)
    (metrics,) = trainer.train(8, **CALL)
    found = trainer.experience()
    part = found.select(torch.arange(8))
    for row in range(8):
        start, length = int(part.prompt_lengths[row]), int(part.lengths[row])
        own = (part.sequences[row, start : start + length] == 7).float()
        assert part.rewards[row, :length].tolist() == own.tolist()
        assert part.scores[row] == own.sum()
    assert metrics["reward/score"] == part.scores.mean()
    assert torch.equal(
        found.select(torch.tensor([5, 2])).rewards[0, : part.lengths[5]], part.rewards[5, : part.lengths[5]]
    )


def test_rewards_stand_where_the_judge_put_them_and_the_last_token_has_the_rest(make_trainer):
    trainer = make_trainer(reward_model=sevens)
    batch = trainer.next_prompts(5)
    rollout = trainer.score(trainer.rollout(batch.ids, batch.mask, max_new_tokens=3))
    scores = (rollout.scores - 0.25) / 2  # as normalised by mean 1/4 and deviation 2
    made = make_targets(rollout, scores, kl_coef=0.0, gamma=1.0, gae_lambda=0.95, reward_scale=0.5)
    expected = rollout.rewards / 2
    for row, length in enumerate(rollout.lengths.tolist()):
        expected[row, length - 1] -= 0.125
    torch.testing.assert_close(made.rewards, expected)


def test_learning_from_rewards_differs_from_learning_from_their_sum_and_resumes(make_trainer, judge, tmp_path):
    def make(folder, **options):
        options = {"reward_model": sevens, "gae_lambda": 0.5, "gamma": 0.5, **options}
        return make_trainer(run_dir=tmp_path / folder, save_every_steps=1, keep_last=99, max_staleness=1, **options)

    through, summed = make("through"), make("summed", reward_model=judge)
    history, other = through.train(16, **CALL), summed.train(16, **CALL)
    assert history[0]["reward/score"] == other[0]["reward/score"]
    assert history[0]["policy/loss"] != other[0]["policy/loss"]
    for step in (1, 3):
        again = make(f"again{step}")
        again.train(16, resume=through.run.checkpoints.folder / f"step-{step:08d}", **CALL)
        for name, weight in through.learner.actor.items():
            assert torch.equal(weight, again.learner.actor[name]), (step, name)


def test_several_judges_are_scaled_once_and_logged_by_name(make_trainer, judge, tmp_path):
    def make(folder):
        both = JudgeSum({"sevens": judge, "nines": nines}, weights={"nines": -0.5})
        return make_trainer(reward_model=both, run_dir=tmp_path / folder, save_every_steps=1, keep_last=99)

    through = make("through")
    history = through.train(24, **CALL)
    part = through.experience().select(torch.arange(8))
    response = torch.arange(part.sequences.shape[1]) >= part.prompt_lengths[:, None]
    for name, token in (("sevens", 7), ("nines", 9)):
        counts = ((part.sequences == token) & response & part.mask).sum(dim=-1).float()
        assert history[-1][f"reward/{name}"] == pytest.approx(float(counts.mean()))
    scales = through.reward_model.state()
    own = [(line["reward/sevens"], line["reward/nines"]) for line in history]
    for line, (seven, nine) in zip(history, own, strict=True):
        parts = [(seven, scales["sevens"], 1.0), (nine, scales["nines"], -0.5)]
        total = sum(weight * (value - scale["mean"]) / scale["std"] for value, scale, weight in parts)
        assert line["reward/score"] == pytest.approx(total, abs=1e-5)
    again = make("again")
    again.train(24, resume=through.run.checkpoints.folder / "step-00000004", **CALL)
    assert again.reward_model.state() == scales
    for name, weight in through.learner.actor.items():
        assert torch.equal(weight, again.learner.actor[name])
    other = make_trainer(reward_model=judge)
    with pytest.raises(ValueError, match="judges normalised as"):
        other.train(24, resume=through.run.checkpoints.folder / "step-00000004", **CALL)


def test_preflight_asks_judges_whose_scales_are_not_fixed_and_those_behind_a_cache(make_trainer, judge):
    calls = []

    def noisy(sequences, **masks):
        calls.append(len(sequences))
        return judge(sequences, **masks) + torch.rand(len(sequences))

    report = make_trainer(reward_model=JudgeSum({"sevens": judge, "nines": nines})).preflight(max_new_tokens=9)
    assert report.ok, report.table()
    report = make_trainer(reward_model=CachedJudge(noisy)).preflight(max_new_tokens=9)
    assert "judge repeats" in [check.name for check in report.warnings]


def test_a_response_without_a_reward_for_each_token_counts_nowhere(make_trainer):
    def missing(sequences, **masks):
        rewards = sevens(sequences, **masks)
        rewards[sequences[:, 0] == 9, 0] = math.nan
        return rewards

    trainer = make_trainer(reward_model=missing, max_dropped=0.9)
    with pytest.warns(UserWarning, match="left out"):
        (metrics,) = trainer.train(10, **{**CALL, "update_timesteps": 10})
    assert metrics["reward/dropped"] == 2
    assert math.isfinite(metrics["policy/loss"])


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (lambda sequences, **masks: torch.zeros(len(sequences), 1), r"it must be \(\d, 3\)"),
        (lambda sequences, **masks: torch.zeros(len(sequences) + 1, 3), "it must be"),
    ],
)
def test_rewards_of_another_shape_are_refused(make_trainer, judge, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(reward_model=judge).train(8, **CALL)


def test_a_judge_may_not_change_its_mind(make_trainer):
    trainer = make_trainer()
    batch = trainer.next_prompts(5)
    rollout = trainer.rollout(batch.ids, batch.mask, max_new_tokens=3)

    def moody(sequences, **masks):
        return sevens(sequences, **masks) if len(sequences) == 3 else torch.zeros(len(sequences))

    with pytest.raises(ValueError, match="for some responses and rewards"):
        judge_source(moody, rollout, device=CPU, **LIMITS)
    found = judge_sequences(sevens, rollout.sequences, rollout.prompt_mask, rollout.mask, **LIMITS)
    assert torch.equal(found, sevens(rollout.sequences, prompt_mask=rollout.prompt_mask, mask=rollout.mask).sum(dim=-1))
