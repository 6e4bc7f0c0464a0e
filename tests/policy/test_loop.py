"""Runs that stop, fail and go on: with the bits of a run that was left alone, and without sampling anything twice."""

import os
import re
import signal
import threading

import pytest
import torch

from palm_rlhf_pytorch.training.metrics import read_metrics
from tests.policy.helpers import same, weights, without_time

CALL = {"max_seq_len": 9, "max_new_tokens": 4, "eos_token": 7, "update_timesteps": 6, "use_tqdm": False}
EPISODES = 18  # three updates


def train(trainer, num_episodes=EPISODES, **options):
    return trainer.train(num_episodes, **{**CALL, "preflight": False, **options})


def figures(folder):
    return without_time(read_metrics(folder / "metrics.jsonl"))


def moments(trainer):
    trained = (trainer.learner.actor | trainer.learner.critic).items()
    states = {name: trainer.learner.optimizer.state[parameter] for name, parameter in trained}
    return {f"{name}.{moment}": value for name, state in states.items() for moment, value in state.items()}


def counting(trainer, calls):
    """Note each batch of responses that is sampled."""
    generate = trainer.actor_critic.generate
    trainer.actor_critic.generate = lambda *args, **options: calls.append(len(args[0])) or generate(*args, **options)
    return trainer


class Judge:
    """How many ids of the response are 7; in some of its calls it does something else first, or instead."""

    def __init__(self, act=lambda: None, *, at=-1):
        self.act, self.at, self.calls = act, at, 0

    def __call__(self, sequences, *, prompt_mask, mask):
        self.calls += 1
        found = self.act() if self.calls == self.at else None
        return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float() if found is None else found


# stopped by a signal


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def terminate_while_sampling(trainer, *, update, batch):
    generator = trainer.generator

    def watched(purpose, *counts, **options):
        if purpose == "sample" and counts == (update, batch):
            terminate()
        return generator(purpose, *counts, **options)

    trainer.generator = watched


def terminate_while_learning(trainer, *, step):
    seen = []
    hook = trainer.learner.optimizer.optimizer.register_step_pre_hook
    hook(lambda *_: (seen.append(1), terminate() if len(seen) == step else None) and None)


DROPOUT = {"actor_dropout": 0.1, "critic_dropout": 0.2}
STATEFUL = {
    **DROPOUT, "epochs": 2, "max_batch_size": 2, "max_staleness": 1, "target_kl_nats_per_response": 0.5,
    "kl_horizon": 100,
}  # fmt: skip


class Noisy(Judge):
    """Draws from torch's global random state, which a run must keep too."""

    def __call__(self, sequences, **masks):
        return super().__call__(sequences, **masks) + torch.rand(len(sequences))


@pytest.mark.filterwarnings("ignore:actor_dropout:UserWarning")
def test_run_stopped_in_each_of_its_phases_ends_with_the_bits_of_one_that_was_not(make_trainer, tmp_path):
    torch.manual_seed(5)
    whole = make_trainer(reward_model=Noisy(), run_dir=tmp_path / "whole", **STATEFUL)
    train(whole)
    assert whole.stopped is None and whole.updates == 3

    torch.manual_seed(5)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    updates, folder = [], tmp_path / "stopped"
    for phase in ("sampling", "judging", "learning", "none"):
        judge = Noisy(terminate, at=5 if phase == "judging" else -1)  # two calls of an update's three to follow
        trainer = make_trainer(reward_model=judge, run_dir=folder, **STATEFUL)
        if phase == "sampling":
            terminate_while_sampling(trainer, update=0, batch=1)
        if phase == "learning":
            terminate_while_learning(trainer, step=4)
        history = train(trainer, resume="auto")
        updates.append((len(history), trainer.updates, trainer.stopped))
        torch.manual_seed(99)
    assert updates == [(0, 0, "SIGTERM"), (1, 1, "SIGTERM"), (0, 1, "SIGTERM"), (2, 3, None)]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert figures(folder) == figures(tmp_path / "whole")
    assert same(weights(trainer), weights(whole)) and same(moments(trainer), moments(whole))


def test_signals_end_a_run_without_a_folder_at_once(make_trainer):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        trainer = make_trainer(reward_model=Judge(terminate, at=1))
        assert len(train(trainer, 6)) == 1 and trainer.stopped is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [1]


# judges that fail


def unreachable():
    raise OSError("no answer")


RELEASE = threading.Event()


def hang():
    RELEASE.wait(20)


def mostly_nan():
    return torch.tensor([0.0, float("nan"), 1.0, 2.0, 3.0, 4.0])  # one in six is above a tenth


@pytest.mark.parametrize(
    ("act", "error", "told"),
    [
        (unreachable, OSError, r"update 2, to prompts \[\d"),
        (hang, TimeoutError, r"update 2, to prompts \[\d"),
        (mostly_nan, ValueError, r"1 of 6 scores in update 2 .*responses \[1\], to prompts \[\d\]"),
    ],
)
@pytest.mark.parametrize("same_trainer", [True, False])
def test_run_whose_judge_failed_goes_on_without_sampling_again(make_trainer, tmp_path, act, error, told, same_trainer):
    RELEASE.clear()
    options = {"judge_timeout": 0.2} if act is hang else {}
    whole = make_trainer(reward_model=Judge(), run_dir=tmp_path / "whole")
    train(whole)
    sampled = []
    trainer = make_trainer(reward_model=Judge(act, at=2), run_dir=tmp_path / "failed", **options)
    with pytest.raises(error) as raised:
        train(counting(trainer, sampled))
    RELEASE.set()
    message = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert re.search(told, message), message
    assert sampled == [6, 6] and trainer.updates == 1 and trainer.normalizer.state()["std"] is not None

    if not same_trainer:
        trainer = counting(make_trainer(reward_model=Judge(), run_dir=tmp_path / "failed"), sampled)
    history = train(trainer, resume="auto")
    assert sampled == [6, 6, 6] and len(history) == 2
    assert same(weights(trainer), weights(whole)) and same(moments(trainer), moments(whole))
    assert figures(tmp_path / "failed") == figures(tmp_path / "whole")


def test_judge_of_a_run_without_a_folder_may_fail_and_the_next_call_answers_its_prompts_anew(make_trainer):
    trainer = make_trainer(reward_model=Judge(unreachable, at=2))
    with pytest.raises(OSError, match="no answer"):
        train(trainer)
    assert trainer.updates == 1 and trainer.prompts.taken == 12
    history = train(trainer, 12)
    assert trainer.prompts.taken == 18 and [line["episodes"] for line in history] == [12, 18]


def test_a_few_responses_without_a_score_are_told_of_and_the_run_goes_on(make_trainer):
    def nan_first(sequences, **masks):
        return torch.arange(float(len(sequences))).masked_fill(torch.arange(len(sequences)) == 3, float("nan"))

    trainer = make_trainer(reward_model=nan_first)
    with pytest.warns(UserWarning, match=r"1 of 10 scores in update 1 .*responses \[3\], to prompts \[\d\]"):
        (line,) = train(trainer, 10, update_timesteps=10)
    assert line["reward/dropped"] == 1 and line["episodes"] == 10
    assert line["reward/score"] == pytest.approx((sum(range(10)) - 3) / 9)


# beginning and going on


def test_run_is_not_begun_over_another_nor_resumed_as_another(make_trainer, tmp_path):
    folder = tmp_path / "run"
    first = make_trainer(run_dir=folder)
    train(first, 6)
    train(first, 6)  # the same trainer goes on with another call
    assert first.updates == 2

    trainer = make_trainer(run_dir=folder)
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"run_dir .*holds a run already: resume='auto'"):
        train(trainer)
    for other, named in {
        "temperature": "temperature: checkpoint 1.0, train 0.7", "update_timesteps": "update_timesteps: checkpoint 6",
        "eos_token": "eos_token: checkpoint 7, train None", "max_new_tokens": "max_new_tokens: checkpoint 4, train 3",
    }.items():  # fmt: skip
        value = {"temperature": 0.7, "update_timesteps": 5, "eos_token": None, "max_new_tokens": 3}[other]
        with pytest.raises(ValueError, match=named):
            train(trainer, resume="auto", **{other: value})
    with pytest.raises(ValueError, match="kl_coef: file 0.05, trainer 0.3"):
        train(make_trainer(run_dir=folder, kl_coef=0.3), resume="auto")
    assert same(weights(trainer), before) and trainer.updates == 0 and not trainer.rollouts
    with pytest.raises(ValueError, match="run_dir"):
        train(make_trainer(), resume="auto")

    history = train(trainer, 12, resume="auto")  # longer than the call that ended: an update is left
    assert len(history) == 1 and trainer.updates == 3
    assert train(trainer, 12, resume="auto") == []
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3]


def test_run_that_goes_on_from_an_earlier_checkpoint_writes_its_later_lines_again(make_trainer, tmp_path):
    folder = tmp_path / "run"
    whole = make_trainer(run_dir=folder, keep_last=9)
    train(whole)
    lines = figures(folder)
    earlier = sorted((folder / "checkpoints").iterdir())[0]
    again = make_trainer(run_dir=folder, keep_last=9)
    with pytest.warns(UserWarning, match="went further"):
        history = train(again, resume=earlier)
    assert len(history) == 2 and figures(folder) == lines and same(weights(again), weights(whole))


@pytest.mark.parametrize("settings", [{"save_every": 2}, {"save_every_steps": 1, "save_rollouts": True, "epochs": 1}])
def test_checkpoint_of_any_place_in_a_run_leads_to_the_same_end(make_trainer, tmp_path, settings):
    settings = {**settings, "keep_last": 99}
    whole = make_trainer(run_dir=tmp_path / "whole", **settings)
    train(whole, 12)
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) == (1 if "save_every" in settings else 2 * (1 + 2 + 1))  # scored, two steps, done
    for number, checkpoint in enumerate(checkpoints[:5]):
        trainer = make_trainer(run_dir=tmp_path / f"{number}", **settings)
        train(trainer, 12, resume=checkpoint)
        assert same(weights(trainer), weights(whole)) and same(moments(trainer), moments(whole)), checkpoint.name
        assert trainer.episodes == 12 and trainer.prompts.taken == 12


# older responses, and a second judge


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_responses_of_the_update_before_are_learnt_from_again(make_trainer, rate):
    trainer = make_trainer(max_staleness=1, actor_lr=rate, epochs=1)
    lessons, update = [], trainer.learner.update

    def seen(lesson, **options):
        rows = torch.arange(len(lesson.spans))
        rollout = lesson.source.select(rows)
        lessons.append((rollout, lesson.importance(rollout)))
        return update(lesson, **options)

    trainer.learner.update = seen
    history = train(trainer)
    versions = [rollout.versions.tolist() for rollout, _ in lessons]
    assert versions == [[0] * 6, [0] * 6 + [1] * 6, [1] * 6 + [2] * 6]
    for (before, _), (rollout, importance) in zip(lessons, lessons[1:], strict=False):
        fresh, again = before.select(before.versions == before.versions.max()), rollout.select(torch.arange(6))
        assert torch.equal(again.sequences, fresh.sequences) and torch.equal(again.prompt_rows, fresh.prompt_rows)
        assert torch.equal(again.scores, fresh.scores) and torch.equal(again.sampler_logprobs, fresh.logprobs)
        assert torch.equal(importance[6:], torch.ones_like(importance[6:]))
        moved = (importance[:6] - 1)[rollout.response_mask[:6]].abs().max()
        assert moved < 1e-5 if rate == 0 else moved > 1e-3
        assert importance.max() <= 2
    assert [line["episodes"] for line in history] == [6, 12, 18]  # each is counted when it is new


def test_held_out_judge_is_logged_and_never_learnt_from(make_trainer):
    given = []

    def held_out(sequences, *, prompt_mask, mask):
        scores = (mask & ~prompt_mask).sum(dim=-1).float()
        given.append(scores.masked_fill(torch.arange(len(scores)) == 1, float("nan")))
        return given[-1]

    alone, watched = make_trainer(), make_trainer(held_out_judge=held_out)
    plain, history = without_time(train(alone)), without_time(train(watched))
    means = [float(scores[scores == scores].mean()) for scores in given]
    assert [line.pop("reward/held_out_score") for line in history] == pytest.approx(means) and len(set(means)) > 1
    assert history == plain and same(weights(alone), weights(watched))
