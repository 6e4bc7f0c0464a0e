"""RLHFTrainer in lower precision, with accelerate's options, trackers and files; and what it prints."""

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from palm_rlhf_pytorch.training.metrics import GLOSSARY, read_metrics
from tests.policy.helpers import weights, without_time

PROMPT = torch.tensor([3, 1, 4])
QUICK = {"max_seq_len": 9, "max_new_tokens": 4, "update_timesteps": 5, "use_tqdm": False}

# metrics of other trainers, and of what a run of PPO does only where it is told to
OF_OTHERS = (
    "train/", "eval/", "step", "dpo/", "kto/", "rejection/", "policy/kl_exact", "policy/kl_loss", "policy/ptx_loss",
    "policy/ended_early", "rollout/groups", "rollout/informative_groups", "reward/score_sampled",
)  # fmt: skip


def test_accumulation_steps_of_accelerate_change_nothing(make_trainer):
    plain = make_trainer(max_batch_size=2)
    history = plain.train(10, **QUICK)
    accumulated = make_trainer(max_batch_size=2, accelerate_kwargs={"gradient_accumulation_steps": 4, "cpu": True})
    other = accumulated.train(10, **QUICK)
    for first, second in zip(without_time(history), without_time(other), strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(accumulated)[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_bfloat16_autocast_starts_near_ratio_one(make_trainer, make_palm, flash_attn):
    trainer = make_trainer(
        make_palm(flash_attn=flash_attn), accelerate_kwargs={"mixed_precision": "bf16", "cpu": True}, epochs=1,
        minibatch_size=64, max_batch_size=3,
    )  # fmt: skip
    history = trainer.train(24, **QUICK | {"update_timesteps": 12}, temperature=0.7)
    for line in history:
        assert line["policy/ratio_max"] == pytest.approx(1.0, abs=2e-2)
        assert line["policy/ratio_mean"] == pytest.approx(1.0, abs=2e-2)
        assert line["rollout/sampler_logprob_diff_max"] < 0.1
    assert history[0]["objective/kl"] == 0.0
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}
    assert trainer.generate(6, PROMPT).shape == (6,)


def test_bfloat16_palm_trains_with_float32_adapters(make_trainer, make_palm):
    palm = make_palm().bfloat16()
    trainer = make_trainer(palm)
    start = weights(trainer)
    history = trainer.train(10, **QUICK)
    assert history[0]["objective/kl"] == 0.0 and all(np.isfinite(value) for value in history[-1].values())
    trained = trainer.actor_critic.actor_parameters() | trainer.actor_critic.critic_parameters()
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all(not torch.equal(parameter, start[name]) for name, parameter in trained.items())
    states = trainer.learner.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert trainer.export_palm().token_emb.weight.dtype == torch.bfloat16


class Notebook(GeneralTracker):
    """A tracker that, like some real ones, takes plain values only."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.config, self.lines = {}, []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        assert all(isinstance(value, int | float | str | bool) for value in values.values())
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.lines.append((step, values))


def test_metrics_reach_file_and_tracker_line_by_line(make_trainer, judge, tmp_path):
    notebook, path = Notebook(), tmp_path / "run" / "metrics.jsonl"
    trainer = make_trainer(
        metrics_path=path, accelerate_kwargs={"log_with": notebook, "cpu": True}, kl_coef=0.125, held_out_judge=judge
    )
    history = trainer.train(10, **QUICK)
    history += trainer.train(5, **QUICK)
    lines = read_metrics(path)
    assert [line.pop("step") for line in lines] == [1, 2, 3]
    assert lines == history
    assert notebook.lines == list(enumerate(history, start=1))
    assert notebook.config["kl_coef"] == 0.125 and notebook.config["seed"] == 0
    assert all(line.keys() <= GLOSSARY.keys() for line in history)
    assert {name for name in GLOSSARY if not name.startswith(OF_OTHERS)} == history[0].keys()


def test_nothing_is_printed_unless_asked_for(make_trainer, capsys):
    make_trainer().train(10, **QUICK)
    assert capsys.readouterr() == ("", "")
    make_trainer().train(10, **QUICK | {"use_tqdm": True})
    printed = capsys.readouterr()
    assert printed.out == "" and "10/10" in printed.err
