"""Preflight: each planted fault makes its own check fail and no other, a healthy trainer passes, nothing changes."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.policy.preflight import PreflightError, preflight
from palm_rlhf_pytorch.reward.model import RewardModel
from tests.policy.planted import FAULTS, MATRIX, judging, refusing, sum_of_ids


def sum_of_prompt_and_response(sequences, *, prompt_mask, mask):
    return (sequences * mask).sum(dim=-1).float()


def outcome(trainer, **options):
    """Name, status and remedy of the checks that are neither ok nor skipped."""
    report = preflight(trainer, **{"max_seq_len": 40, **options})
    assert report.ok == (not any(check.status == "fail" for check in report.checks))
    return [(check.name, check.status, check.remedy) for check in report.failures + report.warnings]


@pytest.fixture
def build(make_trainer) -> Callable:
    return lambda *args, **options: make_trainer(*args, **{"reward_model": sum_of_ids, **options})


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"actor_lora": False, "critic_lora": False}, {"eos_token": 11}),
        ({"actor_lora": False, "actor_last_layers": 1, "activation_checkpointing": True}, {"temperature": 0.7}),
        ({"critic_dropout": 0.2, "entropy_coef": 0.1}, {"temperature": 1.9, "eos_token": 0}),
        ({"prompt_token_ids": MATRIX[:1], "max_batch_size": 2}, {"max_new_tokens": 3}),
        ({"normalize_scores": False, "value_clip": None, "max_batch_tokens": 7}, {"eos_token": 12}),
        ({"prompt_token_ids": MATRIX, "pad_value": 0}, {"eos_token": 10, "memory": lambda: (1e9, 2e9)}),
        ({"reward_model": sum_of_prompt_and_response, "held_out_judge": sum_of_ids}, {"max_seq_len": 6}),
    ],
)
def test_healthy_trainer_passes_all(build, settings, options):
    assert outcome(build(**settings), **options) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_trained_models_pass_in_either_precision_under_a_reward_model(build, make_palm, move, dtype, mixed_precision):
    palm = make_palm().to(dtype)
    trainer = build(palm, reward_model=RewardModel(palm), accelerate_kwargs={"mixed_precision": mixed_precision})
    move(trainer.actor_critic)
    trainer.learner.steps = 3
    report = preflight(trainer, max_seq_len=40, temperature=0.7)
    assert not report.failures + report.warnings, report.table()
    (kl,) = [check for check in report.checks if check.name == "KL is 0"]
    assert kl.status == "skip" and "3 optimizer steps" in kl.found


@pytest.mark.parametrize(("plant", "name", "status", "remedy"), FAULTS)
def test_planted_fault_fails_its_own_check_and_no_other(build, monkeypatch, plant, name, status, remedy):
    trainer, options = plant(build, monkeypatch)
    found = outcome(trainer, **options)
    assert [line[:2] for line in found] == [(name, status)], found
    assert remedy in found[0][2]


def test_a_held_out_judge_is_asked_once_and_skipped_where_there_is_none(build):
    seen = []

    def watching(sequences, *, prompt_mask, mask):
        seen.append(len(sequences))
        return torch.arange(2.0, 2 + len(sequences))

    found = [preflight(build(held_out_judge=judge), max_seq_len=40).checks[-1] for judge in (None, watching)]
    assert [(check.name, check.status) for check in found] == [("held-out judge", status) for status in ("skip", "ok")]
    assert seen == [5] and found[1].found == "5 finite scores from 2 to 6"


class Drawing(nn.Module):
    """A judge that draws from all global random states, and fails in the end."""

    def __init__(self):
        super().__init__()
        self.live, self.still = nn.Linear(2, 2), nn.Linear(2, 2).eval()
        self.calls = 0

    def forward(self, sequences, **masks):
        assert not self.training and not self.live.training
        self.calls += 1
        noise = random.random() + np.random.rand() + torch.rand(len(sequences))
        if self.calls > 1:
            raise OSError("enough")
        return sum_of_ids(sequences, **masks) + noise


def state(trainer):
    """All of a trainer that training goes by, and the global random states, as plain values."""
    model, optimizer = trainer.actor_critic, trainer.learner.optimizer.state_dict()
    tensors = {**model.state_dict(), **{f"grad.{name}": p.grad for name, p in model.named_parameters()}}
    tensors |= {f"{name}.{number}": x for number, kept in optimizer["state"].items() for name, x in kept.items()}
    return [
        {name: None if tensor is None else tensor.tolist() for name, tensor in tensors.items()},
        optimizer["param_groups"],
        [part.training for module in (model, trainer.reward_model, trainer.learner.model) for part in module.modules()],
        [p.requires_grad for p in model.parameters()],
        {name: value for name, value in vars(trainer).items() if isinstance(value, int | float | str | None)},
        trainer.normalizer.state(), trainer.prompts.taken, trainer.learner.steps, torch.is_grad_enabled(),
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
    ]  # fmt: skip


def test_everything_is_left_as_it_was(build, move):
    trainer = build(reward_model=Drawing(), critic_dropout=0.3)
    move(trainer.actor_critic).actor.eval()
    trained = {**trainer.learner.actor, **trainer.learner.critic}
    for number, parameter in enumerate(trained.values()):
        parameter.grad = torch.full_like(parameter, 0.01 * number)
    trainer.learner.optimizer.step()
    for parameter in list(trained.values())[::2]:
        parameter.grad = None
    before = state(trainer)
    report = preflight(trainer, max_seq_len=40, temperature=0.7)
    assert [check.name for check in report.failures] == ["KL is 0", "judge repeats", "judge tells apart"]
    assert state(trainer) == before
    again = preflight(trainer, max_seq_len=40, temperature=0.7)
    assert again.checks[:14] == report.checks[:14]  # what does not ask the judge comes out the same to the digit


def test_table_is_narrow_and_names_what_to_do(build):
    report = preflight(build(reward_model=judging(refusing)(build, None)[0].reward_model), max_seq_len=40)
    table = report.table().splitlines()
    assert max(map(len, table)) <= 110
    assert "1 failed, 0 to look at" in table[0]
    rows = {check.name: next(line for line in table if f"  {check.name}  " in line) for check in report.checks}
    assert rows["judge's scores"].split()[0] == "fail" and rows["judge repeats"].endswith('after "judge\'s scores"')
    assert len({row.index(check.found[:9]) for check, row in zip(report.checks, rows.values(), strict=True)}) == 1
    for check in report.failures + report.warnings:
        assert check.remedy.split(":")[0][:40] in report.table()
    with pytest.raises(PreflightError, match=r"1 of 21 checks(.|\n)*no answer(.|\n)*call judge"):
        report.raise_failures()
    preflight(build(), max_seq_len=40).raise_failures()
