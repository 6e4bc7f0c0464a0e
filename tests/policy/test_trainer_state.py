"""Saving and resuming: the same bits as a run that never stopped, and files of another run are refused."""

import hashlib

import pytest
import torch

from palm_rlhf_pytorch.training import folder
from palm_rlhf_pytorch.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

SETTINGS = {"target_kl_nats_per_response": 0.5, "kl_horizon": 50, "kl_coef": 0.2}


def step(trainer):
    rollout = trainer.rollout(*trainer.next_prompts(4), max_new_tokens=4, eos_token=7, temperature=0.7)
    return trainer.learn(trainer.score(rollout))


def state(trainer):
    optimizer = trainer.learner.optimizer
    moments = {
        (name, moment): value.clone()
        for name, parameter in (trainer.learner.actor | trainer.learner.critic).items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    counters = (trainer.seed, trainer.prompts.taken, trainer.rollouts, trainer.episodes, trainer.updates)
    rest = (counters, trainer.learner.steps, trainer.kl_coef, trainer.normalizer.state())
    rates = [group["lr"] for group in optimizer.param_groups]
    return dict(trainer.actor_critic.state_dict()) | moments, (rest, rates)


def same(first, second):
    tensors, others = zip(first, second, strict=True)
    return tensors[0].keys() == tensors[1].keys() and others[0] == others[1] and all(
        torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items()
    )  # fmt: skip


@pytest.mark.parametrize("lora", [True, False])
def test_resumed_run_is_the_run_that_never_stopped(make_trainer, tmp_path, lora):
    options = {"actor_lora": lora, "critic_lora": lora, **SETTINGS}
    path = tmp_path / "trainer"
    whole = make_trainer(seed=5, **options)
    for _ in range(2):
        step(whole)
    whole.save(path)
    resumed = make_trainer(seed=9, **options)  # the seed is the file's
    step(resumed)
    resumed.load(path)
    assert same(state(resumed), state(whole))
    for _ in range(3):
        assert step(resumed) == step(whole)
    assert same(state(resumed), state(whole))


def test_training_call_goes_on_as_well(make_trainer, tmp_path):
    options = {"max_new_tokens": 3, "update_timesteps": 4, "use_tqdm": False}
    whole, resumed = make_trainer(), make_trainer()
    whole.train(8, **options)
    whole.save(tmp_path / "trainer")
    resumed.load(tmp_path / "trainer")
    for first, second in zip(whole.train(8, **options), resumed.train(8, **options), strict=True):
        assert {n: v for n, v in first.items() if "perf" not in n} == {
            n: v for n, v in second.items() if "perf" not in n
        }
    assert same(state(resumed), state(whole))
    assert resumed.episodes == 16


def test_state_saved_before_any_step_clears_the_optimizer(make_trainer, tmp_path):
    fresh, used = make_trainer(), make_trainer()
    fresh.save(tmp_path / "trainer")
    step(used)
    used.load(tmp_path / "trainer")
    assert same(state(used), state(fresh))
    assert step(used) == step(fresh)


def test_loaded_moments_are_the_trainers_own(make_trainer, tmp_path):
    first = make_trainer()
    step(first)
    first.save(tmp_path / "trainer")
    loaded = make_trainer()
    loaded.load(tmp_path / "trainer")
    kept = state(first)
    step(loaded)
    assert same(state(first), kept)


def test_checkpoint_holds_what_is_trained_and_not_the_frozen_trunk(make_trainer, tmp_path):
    trainer = make_trainer()
    step(trainer)
    trainer.save(tmp_path / "trainer")
    checkpoint = load_checkpoint(tmp_path / "trainer", kind="RLHFTrainer")
    trained = trainer.actor_critic.actor_parameters() | trainer.actor_critic.critic_parameters()
    moments = {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq", "step") for name in trained}
    assert checkpoint.tensors["model"].keys() == trained.keys()
    assert checkpoint.tensors["optimizer"].keys() == moments
    assert checkpoint.tensors.keys() == {"model", "optimizer"} and not checkpoint.files
    assert checkpoint.values["settings"] == trainer.settings.plain()
    assert checkpoint.values["palm"]["num_tokens"] == 13


def test_digest_of_the_trunk_in_a_checkpoint_keeps_its_bits(make_trainer, tmp_path):
    trainer, expected = make_trainer(), hashlib.sha256()
    for name, weight in trainer.actor_critic.palm.named_base_parameters():
        expected.update(name.encode() + weight.detach().numpy().tobytes())
    trainer.save(tmp_path / "trainer")
    checkpoint = load_checkpoint(tmp_path / "trainer", kind="RLHFTrainer")
    assert checkpoint.values["trunk"] == expected.hexdigest()


def test_learning_rates_and_batch_size_may_differ(make_trainer, tmp_path):
    first = make_trainer()
    step(first)
    first.save(tmp_path / "trainer")
    other = make_trainer(actor_lr=1e-5, max_batch_size=2)
    other.load(tmp_path / "trainer")
    history = other.train(4, max_new_tokens=2, use_tqdm=False)
    assert history[0]["policy/lr"] == 1e-5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"palm_seed": 1}, "another palm"),
        ({"kl_coef": 0.3}, "kl_coef: file 0.05, trainer 0.3"),
        ({"epochs": 2}, "epochs"),
        ({"actor_lora_r": 4}, "differing shapes"),
        ({"actor_lora": False}, "missing keys"),
        ({"critic_last_layers": 1}, "unexpected keys"),
    ],
)
def test_file_of_another_run_is_refused_and_nothing_changes(make_trainer, make_palm, tmp_path, other, message):
    trainer = make_trainer()
    step(trainer)
    trainer.save(tmp_path / "trainer")
    different = make_trainer(make_palm(seed=other.pop("palm_seed", 0)), **other)
    step(different)
    before = state(different)
    before = {name: tensor.clone() for name, tensor in before[0].items()}, before[1]
    with pytest.raises(ValueError, match=message):
        different.load(tmp_path / "trainer")
    assert same(state(different), before)


def test_damaged_foreign_and_missing_checkpoints_are_refused_and_nothing_changes(make_trainer, make_palm, tmp_path):
    trainer = make_trainer()
    step(trainer)
    trainer.save(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    save_checkpoint(tmp_path / "other", kind="Trainer", step=3, values={}, tensors={})
    make_palm().save(tmp_path / "palm.pt")
    (tmp_path / "bare").mkdir()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "bare" / "trainer.pt")
    before = state(trainer)
    before = {name: tensor.clone() for name, tensor in before[0].items()}, before[1]
    for name, message in {
        "cut": "cut.*model.safetensors", "other": "'Trainer'.*'RLHFTrainer'", "palm.pt": "palm.pt", "bare": "manifest",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            trainer.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer.load(tmp_path / "nowhere")
    assert same(state(trainer), before)


def test_failed_save_leaves_the_checkpoint_that_was_there(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    trainer.save(tmp_path / "trainer")
    content = {file.name: file.read_bytes() for file in (tmp_path / "trainer").iterdir()}
    step(trainer)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(folder.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "trainer")
    assert {file.name: file.read_bytes() for file in (tmp_path / "trainer").iterdir()} == content
    assert [file.name for file in tmp_path.iterdir()] == ["trainer"]
