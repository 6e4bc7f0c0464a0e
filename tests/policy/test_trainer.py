"""RLHFTrainer: its steps and their composition, what it leaves untouched, its judges and its prompts."""

import random
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch.policy.preflight import PreflightError
from palm_rlhf_pytorch.reward.model import RewardModel
from tests.policy.helpers import same, weights, without_time

IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]])
QUICK = {"max_seq_len": 9, "max_new_tokens": 4, "update_timesteps": 5, "use_tqdm": False}


# training


def test_policy_learns_what_the_judge_counts(make_trainer, make_palm, judge):
    palm = make_palm()
    trainer = make_trainer(palm, minibatch_size=32, actor_lr=2e-2)
    history = trainer.train(64 * 16, **QUICK | {"update_timesteps": 64})
    assert history[0]["reward/score"] < 1.0
    assert history[-1]["reward/score"] > 2.5  # of 4
    assert history[-1]["objective/kl"] > 0.5
    before, after = (model.generate(7, IDS, temperature=0.0) for model in (palm, trainer.export_palm()))
    assert (before == 7).float().mean() < 0.3 < 0.9 < (after == 7).float().mean()


@pytest.mark.parametrize(
    "options", [{"actor_lora": False}, {"critic_lora": False}, {"actor_last_layers": 1}, {"max_norm": None}]
)
def test_every_kind_of_hat_trains(make_trainer, options):
    trainer = make_trainer(**options)
    before = weights(trainer)
    history = trainer.train(5, **QUICK, eos_token=7)
    after = weights(trainer)
    trained = trainer.actor_critic.actor_parameters() | trainer.actor_critic.critic_parameters()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained.keys()
    assert all(np.isfinite(value) for value in history[0].values())


def test_training_leaves_the_palm_and_the_base_weights_as_they_were(make_trainer, make_palm):
    palm = make_palm(finetune_scopes=("mine",), ff_dropout=0.1).train()
    palm.layers[0].norm.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
    flags = [parameter.requires_grad for parameter in palm.parameters()]
    trainer = make_trainer(palm, actor_wd=0.1, critic_wd=0.1)
    trainer.train(10, **QUICK)
    assert same(before, dict(palm.state_dict()))
    assert [parameter.requires_grad for parameter in palm.parameters()] == flags
    assert palm.training and all(parameter.grad is None for parameter in palm.parameters())
    base = dict(trainer.actor_critic.palm.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    assert [name for name, _ in palm.named_parameters()] == list(before)


def test_second_trainer_on_a_palm_starts_afresh(make_trainer, make_palm):
    palm = make_palm()
    first = make_trainer(palm)
    history = first.train(10, **QUICK)
    again = make_trainer(palm)
    assert without_time(again.train(10, **QUICK)) == without_time(history)
    assert same(weights(first), weights(again))


@pytest.mark.filterwarnings("ignore:actor_dropout:UserWarning")
@pytest.mark.parametrize("dropout", [{}, {"actor_dropout": 0.2, "critic_dropout": 0.1}])
def test_one_seed_gives_the_same_bits_and_another_does_not(make_trainer, dropout):
    runs = []
    for seed, global_seed in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        np.random.seed(global_seed)
        trainer = make_trainer(seed=seed, **dropout)
        runs.append((without_time(trainer.train(12, **QUICK, eos_token=7)), weights(trainer)))
    assert runs[0][0] == runs[1][0] and same(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_global_random_states_are_left_alone(make_trainer, make_palm):
    palm = make_palm()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(palm, actor_dropout=0.1, actor_lora=False)
    trainer.train(10, **QUICK)
    trainer.generate(6, IDS[0])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]


def test_what_is_left_of_the_episodes_is_learnt_too(make_trainer):
    trainer = make_trainer()
    sizes = []
    learn = trainer.learn_from
    trainer.learn_from = lambda source, **how: sizes.append((len(source), how["num_fresh"])) or learn(source, **how)
    history = trainer.train(12, **QUICK)
    assert sizes == [(5, 5), (5, 5), (2, 2)]
    assert [line["episodes"] for line in history] == [5, 10, 12]


def test_fewer_episodes_than_an_update_takes_are_learnt(make_trainer):
    trainer = make_trainer()
    before = weights(trainer)
    assert len(trainer.train(3, **QUICK)) == 1
    assert not same(before, weights(trainer))


def test_learning_rates_fall_to_zero_and_rise_again_with_the_next_call(make_trainer):
    trainer = make_trainer(actor_lr=1e-3, critic_lr=4e-3)
    for _ in range(2):
        history = trainer.train(20, **QUICK)
        assert [line["policy/lr"] for line in history] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        assert [line["value/lr"] for line in history] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])


def test_train_is_the_composition_of_its_public_steps(make_trainer):
    whole, steps = make_trainer(), make_trainer()
    history = whole.train(5, **QUICK, eos_token=7, temperature=0.7)
    rollout = steps.rollout(*steps.next_prompts(5), max_seq_len=9, max_new_tokens=4, eos_token=7, temperature=0.7)
    metrics = steps.learn(steps.score(rollout))
    assert metrics == without_time(history)[0]
    assert same(weights(whole), weights(steps))


def test_each_prompt_is_learnt_from_before_any_comes_again(make_trainer):
    trainer = make_trainer(prompt_token_ids=torch.arange(10)[:, None])
    first, second = (trainer.next_prompts(10)[0][:, 0].tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


@pytest.mark.filterwarnings("ignore:value_clip:UserWarning")
def test_constant_score_teaches_nothing(make_trainer):
    """Unnormalised, a constant score with EOS and a zero critic teaches length."""
    trainer = make_trainer(reward_model=lambda seq, **masks: torch.full((len(seq),), 2.0), missing_eos_penalty=None)
    start = weights(trainer)
    history = trainer.train(10, **QUICK, eos_token=7)
    actor = trainer.actor_critic.actor_parameters()
    assert history[0]["reward/score"] == 2.0 and history[0]["reward/score_normalized"] == 0.0
    assert all(torch.equal(weights(trainer)[name], start[name]) for name in actor)
    raw = make_trainer(
        reward_model=lambda seq, **masks: torch.full((len(seq),), 2.0), missing_eos_penalty=None, normalize_scores=False
    )
    raw.train(10, **QUICK, eos_token=7)
    assert any(not torch.equal(weights(raw)[name], start[name]) for name in actor)


def test_missing_eos_is_priced_only_where_a_token_ends_responses(make_trainer):
    def zero(seq, **masks):
        return torch.zeros(len(seq))

    without = make_trainer(reward_model=zero).train(5, **QUICK)[0]
    assert without["reward/score_normalized"] == 0.0 and without["response/eos_rate"] == 0.0
    subtracted = make_trainer(reward_model=zero).train(5, **QUICK, eos_token=7)[0]
    assert 0 < subtracted["response/truncated_rate"] <= 1
    assert subtracted["reward/score_normalized"] == pytest.approx(-subtracted["response/truncated_rate"])
    replaced = make_trainer(reward_model=zero, missing_eos_score=-3.0).train(5, **QUICK, eos_token=7)[0]
    assert replaced["reward/score_normalized"] == pytest.approx(-3 * replaced["response/truncated_rate"])


def test_adaptive_coefficient_acts_after_each_rollout_on_that_rollouts_kl(make_trainer):
    trainer = make_trainer(kl_coef=0.2, target_kl_nats_per_response=0.01, kl_horizon=50)
    history = trainer.train(20, **QUICK)
    coefs = [line["objective/kl_coef"] for line in history]
    assert coefs[:2] == pytest.approx([0.2, 0.2 * (1 - 0.2 * 5 / 50)])  # the first rollout's KL is 0
    for before, after, line in zip(coefs[1:], [*coefs[2:], trainer.kl_coef], history[1:], strict=True):
        error = min(max(line["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 5 / 50))
    assert make_trainer(kl_coef=0.2).train(10, **QUICK)[1]["objective/kl_coef"] == 0.2


def test_prompts_that_hold_the_eos_are_answered_in_full(make_trainer):
    ids = torch.tensor([[7, 7, 7], [7, 2, 7]])
    trainer = make_trainer(prompt_token_ids=ids)
    rollout = trainer.rollout(*trainer.next_prompts(40), max_new_tokens=6, eos_token=7)
    assert rollout.lengths.min() == 1 and rollout.lengths.max() == 6
    assert (rollout.sequences[:, :3] == 7).sum(dim=-1).min() == 2  # the prompts stand as they were
    assert rollout.response_mask[:, 0].all()


def test_row_budgets_follow_from_each_prompts_length(make_trainer):
    trainer = make_trainer()
    ids, mask, _ = trainer.next_prompts(5)
    rollout = trainer.rollout(ids, mask, max_seq_len=7)
    assert torch.equal(rollout.prompt_lengths + rollout.lengths, torch.full((5,), 7))
    rollout = trainer.rollout(ids, mask, max_seq_len=7, max_new_tokens=3)
    assert torch.equal(rollout.lengths, (7 - mask.sum(dim=-1)).clamp(max=3))


# judges


def test_reward_model_judges_without_gradient_and_keeps_its_mode(make_trainer, make_palm):
    reward_model = RewardModel(make_palm(seed=3, causal=False), num_binned_output=4, dropout=0.2).train()
    before = {name: tensor.clone() for name, tensor in reward_model.state_dict().items()}
    trainer = make_trainer(reward_model=reward_model)
    rollout = trainer.score(trainer.rollout(*trainer.next_prompts(5), max_new_tokens=4, eos_token=7))
    assert rollout.scores.shape == (5,) and not rollout.scores.requires_grad
    assert 0 <= rollout.scores.min() and rollout.scores.max() <= 3
    expected = reward_model.eval()(rollout.sequences, rollout.mask, prompt_mask=rollout.prompt_mask)
    torch.testing.assert_close(rollout.scores, expected.detach(), atol=1e-5, rtol=0)
    reward_model.train()
    trainer.train(5, **QUICK)
    assert reward_model.training and same(before, dict(reward_model.state_dict()))
    assert all(parameter.grad is None for parameter in reward_model.parameters())


def test_module_and_reward_model_of_the_same_palm_judge(make_trainer, make_palm):
    palm = make_palm()

    class Length(torch.nn.Module):
        def forward(self, sequences, *, prompt_mask, mask):
            assert torch.is_grad_enabled() is False and self.training is False
            return (mask & ~prompt_mask).sum(dim=-1)

    make_trainer(palm, reward_model=Length()).train(5, **QUICK, eos_token=7)
    make_trainer(palm, reward_model=RewardModel(palm)).train(5, **QUICK, eos_token=7)


def test_error_of_a_judge_passes_through_with_its_update(make_trainer):
    calls = []

    def judge(sequences, **masks):
        calls.append(len(sequences))
        if len(calls) == 2:
            raise KeyError("no such word")
        return torch.zeros(len(sequences))

    with pytest.raises(KeyError, match="no such word") as raised:
        make_trainer(reward_model=judge).train(10, **QUICK, preflight=False)
    assert any("update 2, to prompts [" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.tensor([0.0, 1.0, float("nan"), 0.0, float("inf")]), ValueError, r"2 of 5.*responses \[2, 4\]"),
        (torch.zeros(5, 1), ValueError, r"scores are \(5,\)"),
        ([0.0] * 5, TypeError, "list"),
    ],
)
def test_scores_that_cannot_be_learnt_from_change_no_weight(make_trainer, scores, error, message):
    trainer = make_trainer(reward_model=lambda seq, **masks: scores)
    before = weights(trainer)
    with pytest.raises(error, match=message):
        trainer.train(5, **QUICK, preflight=False)
    assert same(before, weights(trainer)) and trainer.normalizer.mean is None
    with pytest.raises(PreflightError, match="judge's scores"):  # which says so before anything is sampled
        make_trainer(reward_model=trainer.reward_model).train(5, **QUICK)


def test_rollout_without_scores_is_not_learnt_from(make_trainer):
    trainer = make_trainer()
    rollout = trainer.rollout(*trainer.next_prompts(5), max_new_tokens=2)
    with pytest.raises(ValueError, match="no scores"):
        trainer.learn(rollout)
    assert trainer.learn(rollout._replace(scores=torch.arange(5)))["reward/score"] == 2.0


# sources of prompts


class Words:
    """A tokenizer of words by their lengths, as Hugging Face's: called with text, it returns a mapping."""

    def __call__(self, text) -> Mapping[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()], "attention_mask": [1] * len(text.split())}


def test_prompts_come_as_text_or_from_a_file(make_trainer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one two\n\nthree\n\n", encoding="utf-8")
    for source in ({"prompts": ["one two", "three"]}, {"prompts_path": path}):
        trainer = make_trainer(tokenizer=Words(), **source)
        ids, mask, _ = trainer.next_prompts(2)
        assert sorted(row[real].tolist() for row, real in zip(ids, mask, strict=True)) == [[3, 3], [5]]
        trainer.train(4, **QUICK)


def test_prompts_may_be_padded_on_the_left_by_a_mask(make_trainer):
    ids = torch.tensor([[0, 0, 4], [0, 2, 3], [8, 0, 1]])
    mask = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])
    listed = make_trainer(prompt_token_ids=[torch.tensor([4]), torch.tensor([2, 3]), torch.tensor([8, 0, 1])])
    masked = make_trainer(prompt_token_ids=ids, prompt_mask=mask)
    assert without_time(masked.train(6, **QUICK)) == without_time(listed.train(6, **QUICK))
