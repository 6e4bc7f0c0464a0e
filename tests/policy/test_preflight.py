"""Preflight: each planted fault makes its own check fail and no other, a healthy trainer passes, nothing changes."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.lora import LayerAdapter
from palm_rlhf_pytorch.palm import block, responses
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.policy import actor_critic as hats
from palm_rlhf_pytorch.policy import targets
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.preflight import PreflightError, preflight
from palm_rlhf_pytorch.reward.model import RewardModel

NUM_TOKENS = 13
MATRIX = torch.tensor([[3, 1, 4, 1, 5, 0], [9, 2, 0, 0, 0, 0], [2, 6, 5, 0, 0, 0], [7, 1, 8, 2, 8, 1]])


def sum_of_ids(sequences, *, prompt_mask, mask):
    """A judge whose scores differ between responses."""
    return (sequences * (mask & ~prompt_mask)).sum(dim=-1).float()


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
    report = preflight(trainer, max_seq_len=40, temperature=0.7, palm=palm)
    assert not report.failures + report.warnings, report.table()
    (kl,) = [check for check in report.checks if check.name == "KL is 0"]
    assert kl.status == "skip" and "3 optimizer steps" in kl.found


# each plants one fault in a trainer, or in what it is asked for: (build, monkeypatch) -> trainer, options


def no_room(build, patch):
    return build(), {"max_seq_len": 4}


def end_token_pads(build, patch):
    return build(prompt_token_ids=MATRIX, pad_value=0), {"eos_token": 0}


def end_token_of_the_tokenizer_pads(build, patch):
    class Letters:
        pad_token_id = 10

        def __call__(self, text):
            return [ord(letter) - ord("a") for letter in text]

    return build(prompts=["abc", "d", "eb"], tokenizer=Letters()), {"eos_token": 10}


def end_token_outside_the_vocabulary(build, patch):
    return build(), {"eos_token": NUM_TOKENS}


def prompts_that_have_ended(build, patch):
    return build(prompt_token_ids=[torch.tensor(ids) for ids in ([3, 9], [9], [2, 5])]), {"eos_token": 9}


def too_little_memory(build, patch):
    return build(), {"memory": lambda: (2e9, 1e9)}


def hardly_enough_memory(build, patch):
    return build(), {"memory": lambda: (1.9e9, 2e9)}


def a_weight_that_is_not_a_number(build, patch):
    trainer = build()
    trainer.actor_critic.palm.layers[1].in_proj.weight.data[2, 3] = torch.nan
    return trainer, {}


def a_thawed_trunk(build, patch):
    trainer = build()
    trainer.actor_critic.palm.layers[0].out_proj.weight.requires_grad_(True)
    return trainer, {}


def a_trunk_written_to(build, patch):
    trainer = build()
    given = trainer.actor_critic.palm.share(trainable=lambda name: name == "norm.weight")
    given.norm.weight.data[0] += 1e-3
    return trainer, {"palm": given}


def an_optimizer_that_lacks_a_parameter(build, patch):
    trainer = build()
    trainer.learner.optimizer.param_groups[0]["params"].pop()
    return trainer, {}


def a_frozen_parameter_in_the_optimizer(build, patch):
    trainer = build(actor_lora=False)
    next(iter(trainer.learner.actor.values())).requires_grad_(False)
    return trainer, {}


def parameters_listed_before_they_were_replaced(build, patch):
    trainer = build()
    trainer.learner.actor = {name: nn.Parameter(p.detach().clone()) for name, p in trainer.learner.actor.items()}
    return trainer, {}


def always_dropping(hat):
    def plant(build, patch):
        trainer = build()
        found = getattr(trainer.actor_critic, hat)
        patch.setattr(
            found, "embed", lambda trunk, ids: found.model(trunk).embed(ids, adapter=found.adapter, dropout=0.3)
        )
        return trainer, {}

    return plant


def dropout_while_learning(build, patch):
    with pytest.warns(UserWarning, match="actor_dropout"):
        return build(actor_dropout=0.2), {}


def values_that_overflow(build, patch):
    trainer = build()
    trainer.actor_critic.value_head.weight.data.fill_(3e38)
    return trainer, {}


def no_temperature_while_learning(build, patch):
    for name in ("chosen_logprobs", "compared_logprobs"):
        real = getattr(hats, name)
        patch.setattr(hats, name, lambda *args, real=real, **options: real(*args, **{**options, "temperature": 1.0}))
    return build(), {"temperature": 0.7}


def places_off_by_one(build, patch):
    real = hats._places

    def shifted(sequences, prompt_lengths, *rest):
        at = real(sequences, prompt_lengths, *rest)
        return at._replace(sources=(at.sources + 1).clamp(max=sequences.numel() - 1))

    patch.setattr(hats, "_places", shifted)
    return build(), {}


def attention_that_sees_padding(build, patch):
    real = block.attend
    patch.setattr(block, "attend", lambda *args, **options: real(*args, **{**options, "causal": False, "mask": None}))
    return build(), {}


def a_critic_that_sees_padding(build, patch):
    trainer = build()
    found = trainer.actor_critic.critic
    real = found.embed
    patch.setattr(found, "embed", lambda trunk, ids: real(trunk, ids) + 0.01 * ids.shape[1])
    return trainer, {}


def no_temperature_while_sampling(build, patch):
    real = responses.sample_tokens
    patch.setattr(responses, "sample_tokens", lambda *args, **options: real(*args, **{**options, "temperature": 1.0}))
    return build(), {"temperature": 0.7}


def a_sampler_that_leaves_the_adapter_out(build, patch):
    trainer = build()
    for name, parameter in trainer.actor_critic.actor.named_parameters():
        parameter.data += 0.1 * name.endswith(".B")
    trainer.learner.steps = 1
    found = trainer.actor_critic
    patch.setattr(found, "generate", lambda *args, **options: generate_responses(found.palm, *args, **options))
    return trainer, {}


def other_numbers_recorded(build, patch):
    real = hats.compared_logprobs

    def other(*args, **options):
        found = real(*args, **options)
        return found._replace(logprobs=found.logprobs + 2e-4)

    patch.setattr(hats, "compared_logprobs", other)
    return build(), {}


def a_layer_that_heeds_train_mode(build, patch):
    trainer = build()
    found = trainer.actor_critic.actor
    real = found.embed
    patch.setattr(found, "embed", lambda trunk, ids: real(trunk, ids) * (1.02 if found.training else 1.0))
    return trainer, {}


def an_adapter_that_is_not_new(build, patch):
    trainer = build()
    trainer.actor_critic.actor.adapter.layers["1"].v.B.data.fill_(0.01)
    return trainer, {}


def a_score_one_token_early(build, patch):
    real = targets.shaped_rewards

    def early(scores, logprobs, ref_logprobs, mask, **options):
        inner = mask & mask.roll(-1, dims=1)
        inner[:, -1] = False
        return real(scores, logprobs, ref_logprobs, inner, **options)

    patch.setattr(targets, "shaped_rewards", early)
    return build(), {}


def a_score_on_every_token(build, patch):
    real = targets.shaped_rewards

    def everywhere(scores, logprobs, ref_logprobs, mask, **options):
        found = real(scores, logprobs, ref_logprobs, mask, **options)
        return found._replace(rewards=found.rewards + scores[:, None] * mask)

    patch.setattr(targets, "shaped_rewards", everywhere)
    return build(), {}


def a_detached_adapter(build, patch):
    real = LayerAdapter.side_by_side

    def detached(self):
        down_in, up_in, down_out, up_out = real(self)
        return down_in, up_in.detach(), down_out, up_out

    patch.setattr(LayerAdapter, "side_by_side", detached)
    return build(), {}


def values_read_from_the_actor(build, patch):
    real = ActorCritic._values

    def both(self, sequences, at):
        return real(self, sequences, at) + at.put(at.before(self.actor.embed(self.palm, sequences))[:, 0].float())

    patch.setattr(ActorCritic, "_values", both)
    return build(), {}


def a_factor_of_zero(build, patch):
    trainer = build()
    trainer.actor_critic.actor.adapter.layers["0"].o.scale = 0.0
    return trainer, {}


def judging(found):
    def plant(build, patch):
        return build(reward_model=lambda ids, **masks: found(ids, sum_of_ids(ids, **masks))), {}

    return plant


def refusing(ids, scores):
    raise OSError("no answer")


@pytest.mark.parametrize(
    ("plant", "name", "status", "remedy"),
    [
        (end_token_pads, "end token", "fail", "prompt_mask or prompt_lengths"),
        (end_token_of_the_tokenizer_pads, "end token", "warn", "told by lengths"),
        (end_token_outside_the_vocabulary, "end token", "fail", "tokenizer's own end token"),
        (prompts_that_have_ended, "end token", "warn", "without its end token"),
        (no_room, "prompts fit", "fail", "counts the prompt"),
        (lambda build, patch: (build(), {"max_new_tokens": 38}), "prompts fit", "warn", "raise max_seq_len"),
        (too_little_memory, "memory", "fail", "max_batch_tokens"),
        (hardly_enough_memory, "memory", "warn", "max_batch_tokens"),
        (a_weight_that_is_not_a_number, "weights", "fail", "diverged"),
        (a_thawed_trunk, "weights", "fail", "requires_grad_(False)"),
        (a_trunk_written_to, "weights", "fail", "shared weights"),
        (an_optimizer_that_lacks_a_parameter, "optimizer", "fail", "never change"),
        (a_frozen_parameter_in_the_optimizer, "optimizer", "fail", "frozen or replaced"),
        (parameters_listed_before_they_were_replaced, "optimizer", "fail", "list them again"),
        (lambda build, patch: (build(), {"temperature": 0.0}), "sampling", "fail", "setting"),
        (always_dropping("actor"), "dropout", "fail", "eval mode"),
        (always_dropping("critic"), "dropout", "fail", "eval mode"),
        (dropout_while_learning, "dropout", "warn", "actor_dropout=0"),
        (values_that_overflow, "values", "fail", "value_head"),
        (no_temperature_while_learning, "temperature", "fail", "temperature of sampling (0.7)"),
        (places_off_by_one, "temperature", "fail", "neighbouring place"),
        (attention_that_sees_padding, "padding", "fail", "actor sees padding"),
        (a_critic_that_sees_padding, "padding", "fail", "critic sees padding"),
        (no_temperature_while_sampling, "sampler = learner", "fail", "temperature (0.7)"),
        (a_sampler_that_leaves_the_adapter_out, "sampler = learner", "fail", "weights"),
        (other_numbers_recorded, "ratio is 1", "fail", "recording"),
        (a_layer_that_heeds_train_mode, "ratio is 1", "fail", "train mode"),
        (an_adapter_that_is_not_new, "KL is 0", "fail", "B must be 0"),
        (a_score_one_token_early, "score placement", "fail", "shifted"),
        (a_score_on_every_token, "score placement", "fail", "last token"),
        (a_detached_adapter, "gradients", "fail", "detached"),
        (values_read_from_the_actor, "gradients", "fail", "share"),
        (a_factor_of_zero, "gradients", "warn", "factor of 0"),
        (judging(lambda ids, scores: scores / (scores - scores[1])), "judge's scores", "fail", "divides by 0"),
        (judging(lambda ids, scores: scores[:, None]), "judge's scores", "fail", "(b, 1)"),
        (judging(lambda ids, scores: scores.tolist()), "judge's scores", "fail", "list"),
        (judging(refusing), "judge's scores", "fail", "call judge"),
        (judging(lambda ids, scores: scores + torch.rand(len(ids))), "judge repeats", "warn", "random"),
        (judging(lambda ids, scores: 0 * scores + 7), "judge tells apart", "warn", "constant"),
        (judging(lambda ids, scores: scores / ids.shape[1]), "judge and padding", "warn", "`mask`"),
        (judging(lambda ids, scores: 1e6 + 0.02 * scores), "normalisation", "warn", "in common"),
    ],
)
def test_planted_fault_fails_its_own_check_and_no_other(build, monkeypatch, plant, name, status, remedy):
    trainer, options = plant(build, monkeypatch)
    found = outcome(trainer, **options)
    assert [line[:2] for line in found] == [(name, status)], found
    assert remedy in found[0][2]


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
    assert [check.name for check in report.failures] == ["KL is 0", "judge repeats"]
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
    with pytest.raises(PreflightError, match=r"1 of 20 checks(.|\n)*no answer(.|\n)*call judge"):
        report.raise_failures()
    preflight(build(), max_seq_len=40).raise_failures()
