"""What a run keeps an eye on: samples for people to read, and the watch that ends it and goes back."""

import json

import pytest
import torch

from palm_rlhf_pytorch.policy.watch import WatchSettings
from palm_rlhf_pytorch.training.metrics import read_metrics

CALL = {"max_new_tokens": 3, "use_tqdm": False, "update_timesteps": 8, "preflight": False}


def test_the_best_and_worst_responses_of_each_update_are_written(make_trainer, judge, tmp_path):
    held_out = lambda sequences, **masks: -judge(sequences, **masks)  # noqa: E731
    trainer = make_trainer(run_dir=tmp_path, held_out_judge=held_out, keep_samples=2)
    trainer.train(16, **CALL)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        (step, kind) for step in (1, 2) for kind in ("best", "best", "worst", "worst")
    ]
    for step in (1, 2):
        scores = [line["score"] for line in lines if line["step"] == step]
        assert scores[0] >= scores[1] >= scores[3] >= scores[2]
    for line in lines:
        assert line["score"] == line["response"].count(7) == -line["held_out_score"]
        assert len(line["response"]) == line["length"] == 3
    quiet = make_trainer(run_dir=tmp_path / "quiet", keep_samples=0)
    quiet.train(8, **CALL)
    assert not (tmp_path / "quiet" / "samples.jsonl").exists()


def test_samples_of_updates_that_are_made_again_are_not_told_twice(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path)
    trainer.train(16, **CALL)
    text = (tmp_path / "samples.jsonl").read_text()
    first = tmp_path / "checkpoints" / "step-00000001"
    again = make_trainer(run_dir=tmp_path)
    again.train(16, resume=first, **CALL)
    assert (tmp_path / "samples.jsonl").read_text() == text


class Fooled:
    """A held-out judge that likes the policy less and less from its n-th update on."""

    def __init__(self, turns):
        self.turns, self.calls = turns, 0

    def __call__(self, sequences, **masks):
        self.calls += 1
        value = self.calls if self.calls <= self.turns else 2 * self.turns - 3 * (self.calls - self.turns)
        return torch.full((len(sequences),), float(value))


class Climbing:
    """A judge whose scores only rise."""

    def __init__(self):
        self.calls = 0

    def __call__(self, sequences, *, prompt_mask, mask):
        self.calls += 1
        return self.calls + 0.1 * ((sequences == 7) & mask).sum(dim=-1)


def test_a_run_that_fools_its_judge_ends_and_goes_back(make_trainer, tmp_path):
    def make(folder, **options):
        return make_trainer(
            reward_model=Climbing(), held_out_judge=Fooled(12), run_dir=tmp_path / folder, normalize_scores=False,
            value_clip=None, **options,
        )  # fmt: skip

    watch = WatchSettings(patience=2, window=3, noise=1.0)
    trainer, after = make("run", watch=watch), {}
    learn_from = trainer.learn_from

    def watched(*given, **named):
        metrics = learn_from(*given, **named)
        after[trainer.updates] = {name: weight.detach().clone() for name, weight in trainer.learner.actor.items()}
        return metrics

    trainer.learn_from = watched
    history = trainer.train(40 * 8, **CALL)
    assert trainer.stopped == "watch"
    assert 14 <= len(history) < 40
    assert 9 <= trainer.updates <= 13  # of the policy that scored highest, or its neighbours
    assert all(torch.equal(weight, after[trainer.updates][name]) for name, weight in trainer.learner.actor.items())
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == len(history)  # what happened stays told
    again = make("run", watch=watch)
    again.load(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    for name, weight in again.actor_critic.actor_parameters().items():
        assert torch.equal(weight, trainer.actor_critic.actor_parameters()[name])


def test_a_watch_needs_a_folder(make_trainer):
    with pytest.raises(ValueError, match="give the trainer a run_dir"):
        make_trainer(watch=WatchSettings())


def test_the_best_policy_outlasts_a_resume_and_the_checkpoints_inside_updates(make_trainer, tmp_path):
    judges = {"reward_model": Climbing(), "held_out_judge": Fooled(4), "normalize_scores": False, "value_clip": None}
    watch = WatchSettings(patience=3, window=1, noise=0.0)

    def make(**options):
        return make_trainer(run_dir=tmp_path, watch=watch, **judges, **options)

    first = make()
    first.train(5 * 8, **CALL)
    assert first.stopped is None
    trainer = make(save_every_steps=4, save_rollouts=True)
    trainer.train(40 * 8, resume="auto", **CALL)
    assert trainer.stopped == "watch"
    assert trainer.updates == 4  # the fifth held-out score is the highest, of a policy of four updates


def test_where_no_checkpoint_was_kept_the_watch_ends_the_run_as_it_is(make_trainer, tmp_path, capsys):
    trainer = make_trainer(
        reward_model=Climbing(), held_out_judge=Fooled(2), run_dir=tmp_path, normalize_scores=False, value_clip=None,
        save_every=100, watch=WatchSettings(patience=1, window=1, noise=0.0),
    )  # fmt: skip
    history = trainer.train(40 * 8, **{**CALL, "use_tqdm": True})
    assert trainer.stopped == "watch"
    assert trainer.updates == len(history) < 40
    assert "lower save_every" in capsys.readouterr().err
