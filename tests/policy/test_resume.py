"""Going on with a run: nothing is taken over that does not fit, and nothing is lost that should stay."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from palm_rlhf_pytorch.policy.experience import Experience
from palm_rlhf_pytorch.policy.rollout_file import RolloutFile
from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint

QUIET = {"use_tqdm": False, "preflight": False}
CALL = {"max_seq_len": 9, "update_timesteps": 10, **QUIET}


def stop(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_in_learning(make_trainer, folder, num_episodes=30, **options):
    """A run that got SIGTERM in the first minibatch of its second update, saved."""
    trainer = make_trainer(run_dir=folder, save_every_steps=1, **options)
    step = trainer.learner._step

    def told(lesson, rows, progress):
        step(lesson, rows, progress)
        if trainer.updates == 1:
            stop()

    trainer.learner._step = told
    trainer.train(num_episodes, **CALL)
    assert trainer.stopped == "SIGTERM" and trainer.updates == 1
    return trainer


def everything(trainer):
    """What a restore may change, comparable."""
    trained = trainer.learner.actor | trainer.learner.critic
    weights = {name: weight.detach().clone() for name, weight in trained.items()}
    files = {path.name: path.read_bytes() for path in trainer.run.experience_folder.iterdir()}
    counts = (trainer.updates, trainer.episodes, trainer.rollouts, trainer.kl_coef, trainer.prompts.taken, trainer.call)
    return weights, files, counts, trainer.normalizer.state(), torch.get_rng_state().tolist()


def equal(first, second):
    same = all(torch.equal(value, second[0][name]) for name, value in first[0].items())
    return same and first[1:] == second[1:]


def forge(path, target, change):
    """A checkpoint with other values, its checksums right."""
    found = load_checkpoint(path, kind="RLHFTrainer")
    values, tensors = json.loads(json.dumps(found.values)), found.tensors
    files = change(values, tensors, dict(found.files))
    files = found.files if files is None else files
    save_checkpoint(target, kind=found.kind, step=found.step, values=values, tensors=tensors, files=files)


def put(*place, to):
    def change(values, tensors, files):
        for name in place[:-1]:
            values = values[name]
        values[place[-1]] = to

    return change


def ids_beyond_the_vocabulary(values, tensors, files):
    name = next(name for name in files if name.endswith(".rollouts"))
    part = Experience([RolloutFile(files[name])]).select(torch.arange(10))
    changed = RolloutFile(files[name].parent.parent / f"{name}")
    changed.append(part._replace(sequences=part.sequences + 10**6))
    return files | {name: changed.path}


def weights_that_are_not_numbers(values, tensors, files):
    next(iter(tensors["model"].values())).fill_(float("nan"))


def moments_that_are_missing(values, tensors, files):
    tensors["optimizer"].popitem()


@pytest.mark.parametrize(
    "change",
    [
        put("learning_rates", to=[0.1]),
        put("learning_rates", 0, to="fast"),
        lambda values, tensors, files: values["counters"].pop("updates") and None,
        put("counters", "updates", to=-1),
        put("kl_coef", to=-1.0),
        put("random", to=[]),
        put("random", 0, "torch", to="zz"),
        put("normalizer", to={"mean": "a", "std": "b"}),
        put("doctor", to={}),
        put("call", "mood", to="good"),
        put("flight", "progress", "epoch", to=-5),
        put("flight", "progress", "mood", to=1),
        put("prompts", to="0" * 64),
        put("precision", to="bf16"),
        put("settings", "kl_coef", to=0.7),
        lambda values, tensors, files: {},
        ids_beyond_the_vocabulary,
        weights_that_are_not_numbers,
        moments_that_are_missing,
    ],
)
def test_a_checkpoint_that_no_trainer_wrote_is_refused_before_anything_changes(make_trainer, tmp_path, change):
    source = stopped_in_learning(make_trainer, tmp_path / "run", epochs=2).run.checkpoints
    forge(source.folder / f"step-{source.steps()[-1]:08d}", tmp_path / "forged", change)
    trainer = make_trainer(run_dir=tmp_path / "other", save_every_steps=1, epochs=2)
    trainer.train(10, **CALL)
    before = everything(trainer)
    with pytest.raises(ValueError, match="forged"):
        trainer.load(tmp_path / "forged")
    assert equal(everything(trainer), before)


def test_responses_that_are_kept_stay_when_a_complete_run_is_resumed(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path, keep_experience=3)
    trainer.train(40, **CALL)
    (trainer.run.experience_folder / "notes.rank-0.txt").write_text("mine")
    before = len(trainer.experience())
    again = make_trainer(run_dir=tmp_path, keep_experience=3)
    assert again.train(40, resume="auto", **CALL) == [] and len(again.experience()) == before == 30
    again.train(50, resume="auto", **CALL)
    assert (again.run.experience_folder / "notes.rank-0.txt").read_text() == "mine"
    assert again.experience().versions.unique().tolist() == [2, 3, 4]


def test_a_run_ends_alike_wherever_the_program_goes_meanwhile(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(run_dir="runs/first")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trainer.train(20, **CALL)
    assert len((tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stop_at_the_end_of_an_update_returns_its_metrics_and_saves_once(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path)
    log = trainer.metrics.log
    trainer.metrics.log = lambda metrics, step: (log(metrics, step), stop() if step == 2 else None)
    assert len(trainer.train(50, **CALL)) == 2 and trainer.stopped == "SIGTERM"
    steps = Checkpoints(tmp_path / "checkpoints").steps()
    updates = [
        load_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", kind="RLHFTrainer").values for step in steps
    ]
    assert [values["counters"]["updates"] for values in updates] == [1, 2]


def test_a_longer_run_finishes_a_short_last_update_as_it_was_begun(make_trainer, tmp_path):
    stopped_in_learning(make_trainer, tmp_path, num_episodes=14, minibatch_size=2)
    again = make_trainer(run_dir=tmp_path, save_every_steps=1, minibatch_size=2)
    history = again.train(40, resume="auto", **CALL)
    assert [line["episodes"] for line in history] == [14, 24, 34, 40]
    rates = [line["policy/lr"] / again.settings.actor_lr for line in history]
    assert rates == pytest.approx([1 - 1 / 5, 1 - 2 / 5, 1 - 3 / 5, 1 - 4 / 5])


def test_prompts_are_answered_once_where_a_batch_has_another_size_after_the_resume(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(run_dir=tmp_path, max_batch_size=4)
    append = RolloutFile.append
    with monkeypatch.context() as patch:
        patch.setattr(RolloutFile, "append", lambda file, rollout: (append(file, rollout), stop()))
        trainer.train(10, **CALL)
    assert trainer.updates == 0 and len(trainer.flight.file) == 4
    again = make_trainer(run_dir=tmp_path, max_batch_size=3)
    again.train(10, resume="auto", **CALL)
    assert sorted(again.experience().prompt_rows.tolist()) == sorted(2 * [0, 1, 2, 3, 4])


def test_metrics_of_a_run_that_died_before_its_first_checkpoint_are_written_anew(make_trainer, tmp_path):
    make_trainer(run_dir=tmp_path, save_every=100).train(20, **CALL)
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    make_trainer(run_dir=tmp_path).train(30, **CALL)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_metrics_are_of_what_the_update_sampled_and_not_of_what_it_learns_again(make_trainer):
    calls = iter([0.0, 100.0])

    def rising(sequences, *, prompt_mask, mask):
        level = next(calls)
        return level + (sequences * mask).sum(dim=-1).float() / 100

    options = {"reward_model": rising, "max_staleness": 1, "normalize_scores": False, "value_clip": None}
    history = make_trainer(**options).train(20, **CALL)
    assert history[0]["reward/score"] < 10 and history[1]["reward/score"] > 90
    assert history[1]["reward/score_std"] < 10


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_is_refused(make_trainer, tmp_path, seed):
    make_trainer(run_dir=tmp_path).train(10, **CALL)
    with pytest.raises(ValueError, match=rf"seed \({seed}\) is not the run's, 0"):
        make_trainer(run_dir=tmp_path, seed=seed).train(20, resume="auto", **CALL)


def test_a_full_disk_under_the_metrics_names_the_file(make_trainer, tmp_path, monkeypatch):
    trainer, opened = make_trainer(metrics_path=tmp_path / "metrics.jsonl"), Path.open

    def full(path, mode="r", **options):
        if mode == "a":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=r"No space left.*bytes of metrics were not written.*metrics.jsonl"):
        trainer.train(10, **CALL)
