"""RLHFTrainer: its three steps and their composition, what it leaves untouched, and what it refuses."""

import random
import warnings
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.training.metrics import GLOSSARY, read_metrics

IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]])
QUICK = {"max_seq_len": 9, "max_new_tokens": 4, "update_timesteps": 5, "use_tqdm": False}


def without_time(history):
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in history]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.actor_critic.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


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


def test_one_seed_gives_the_same_bits_and_another_does_not(make_trainer):
    runs = []
    for seed, global_seed in ((3, 1), (3, 2), (4, 1)):
        torch.manual_seed(global_seed)
        random.seed(global_seed)
        np.random.seed(global_seed)
        trainer = make_trainer(seed=seed)
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
    learn = trainer.learn
    trainer.learn = lambda rollout: sizes.append(len(rollout.sequences)) or learn(rollout)
    history = trainer.train(12, **QUICK)
    assert sizes == [5, 5, 2]
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
    ids, mask = trainer.next_prompts(5)
    rollout = trainer.rollout(ids, mask, max_seq_len=7)
    assert torch.equal(rollout.prompt_lengths + rollout.lengths, torch.full((5,), 7))
    rollout = trainer.rollout(ids, mask, max_seq_len=7, max_new_tokens=3)
    assert torch.equal(rollout.lengths, (7 - mask.sum(dim=-1)).clamp(max=3))


# precision and accelerate


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
    assert trainer.generate(6, IDS[0]).shape == (6,)


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


def test_metrics_reach_file_and_tracker_line_by_line(make_trainer, tmp_path):
    notebook, path = Notebook(), tmp_path / "run" / "metrics.jsonl"
    trainer = make_trainer(metrics_path=path, accelerate_kwargs={"log_with": notebook, "cpu": True}, kl_coef=0.125)
    history = trainer.train(10, **QUICK)
    history += trainer.train(5, **QUICK)
    lines = read_metrics(path)
    assert [line.pop("step") for line in lines] == [1, 2, 3]
    assert lines == history
    assert notebook.lines == list(enumerate(history, start=1))
    assert notebook.config["kl_coef"] == "0.125" and notebook.config["seed"] == 0
    assert all(line.keys() <= GLOSSARY.keys() for line in history)
    assert {name for name in GLOSSARY if not name.startswith(("train/", "eval/", "step"))} == history[0].keys()


def test_nothing_is_printed_unless_asked_for(make_trainer, capsys):
    make_trainer().train(10, **QUICK)
    assert capsys.readouterr() == ("", "")
    make_trainer().train(10, **QUICK | {"use_tqdm": True})
    printed = capsys.readouterr()
    assert printed.out == "" and "10/10" in printed.err


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
        make_trainer(reward_model=judge).train(10, **QUICK)
    assert any("update 2" in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        (torch.tensor([0.0, 1.0, float("nan"), 0.0, float("inf")]), ValueError, r"rows \[2, 4\]"),
        (torch.zeros(5, 1), ValueError, r"must be \(5,\)"),
        ([0.0] * 5, TypeError, "list"),
    ],
)
def test_scores_that_cannot_be_learnt_from_change_no_weight(make_trainer, scores, error, message):
    trainer = make_trainer(reward_model=lambda seq, **masks: scores)
    before = weights(trainer)
    with pytest.raises(error, match=message):
        trainer.train(5, **QUICK)
    assert same(before, weights(trainer)) and trainer.normalizer.mean is None


def test_rollout_without_scores_is_not_learnt_from(make_trainer):
    trainer = make_trainer()
    rollout = trainer.rollout(*trainer.next_prompts(5), max_new_tokens=2)
    with pytest.raises(ValueError, match="no scores"):
        trainer.learn(rollout)
    assert trainer.learn(rollout._replace(scores=torch.arange(5)))["reward/score"] == 2.0


# best of n, and the improved model


def test_generate_returns_prompt_and_best_response(make_trainer, judge):
    trainer = make_trainer()
    found = trainer.generate(12, IDS[0], num_samples=50, temperature=1.5)
    assert found.shape == (12,) and torch.equal(found[:3], IDS[0])
    single = [int((trainer.generate(12, IDS[0], num_samples=1, temperature=1.5)[3:] == 7).sum()) for _ in range(10)]
    assert int((found[3:] == 7).sum()) > sum(single) / 10 + 1


def test_generate_ends_with_the_eos_and_drops_padding(make_trainer):
    trainer = make_trainer(reward_model=lambda seq, *, prompt_mask, mask: -mask.sum(dim=-1).float())
    padded = torch.tensor([7, 3, 0, 1, 0, 0])
    found = trainer.generate(20, padded, num_samples=40, eos_token=7, pad_value=0)
    assert found[:4].tolist() == [7, 3, 0, 1] and found[-1] == 7 and 7 not in found[4:-1]
    assert trainer.generate(20, padded, num_samples=2)[:6].tolist() == padded.tolist()


def test_generate_is_greedy_at_temperature_zero_and_follows_a_generator(make_trainer):
    trainer = make_trainer()
    greedy = trainer.generate(9, IDS[1], num_samples=1, temperature=0.0)
    assert torch.equal(greedy[3:], trainer.export_palm().generate(9, IDS[1], temperature=0.0))
    first, second = (trainer.generate(9, IDS[1], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(trainer.generate(9, IDS[1], num_samples=1).tolist()) for _ in range(8)}) > 1


def test_looking_at_samples_does_not_change_the_training(make_trainer):
    looked, plain = make_trainer(), make_trainer()
    looked.train(5, **QUICK)
    looked.generate(6, IDS[0])
    plain.train(5, **QUICK)
    assert without_time(looked.train(5, **QUICK)) == without_time(plain.train(5, **QUICK))


@pytest.mark.parametrize("lora", [True, False])
def test_exported_palm_is_the_trained_actor(make_trainer, make_palm, lora, tmp_path):
    palm = make_palm()
    trainer = make_trainer(palm, actor_lora=lora)
    trainer.train(10, **QUICK)
    exported = trainer.export_palm()
    rollout = trainer.rollout(*trainer.next_prompts(5), max_new_tokens=4)
    logits = exported(rollout.sequences)
    found = logits.log_softmax(dim=-1)[:, :-1].gather(-1, rollout.sequences[:, 1:, None])[..., 0]
    for row, start in enumerate(rollout.prompt_lengths.tolist()):
        steps = int(rollout.lengths[row])
        expected = rollout.logprobs[row, :steps]
        torch.testing.assert_close(found[row, start - 1 : start - 1 + steps], expected, atol=1e-5, rtol=0)
    assert (logits - palm(rollout.sequences)).abs().max() > 1e-3
    assert not exported.training and exported.config == palm.config
    exported.save(tmp_path / "better.pt")
    assert torch.equal(make_palm(seed=8).load(tmp_path / "better.pt").eval()(IDS), exported(IDS))


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
        ids, mask = trainer.next_prompts(2)
        assert sorted(row[real].tolist() for row, real in zip(ids, mask, strict=True)) == [[3, 3], [5]]
        trainer.train(4, **QUICK)


def test_prompts_may_be_padded_on_the_left_by_a_mask(make_trainer):
    ids = torch.tensor([[0, 0, 4], [0, 2, 3], [8, 0, 1]])
    mask = torch.tensor([[False, False, True], [False, True, True], [True, True, True]])
    listed = make_trainer(prompt_token_ids=[torch.tensor([4]), torch.tensor([2, 3]), torch.tensor([8, 0, 1])])
    masked = make_trainer(prompt_token_ids=ids, prompt_mask=mask)
    assert without_time(masked.train(6, **QUICK)) == without_time(listed.train(6, **QUICK))


# refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompts": ["a"], "prompt_token_ids": IDS}, ValueError, "one source"),
        ({"prompt_token_ids": IDS + 10}, ValueError, "id 19"),
        ({"prompt_token_ids": IDS.float()}, TypeError, "integers"),
        ({"seed": -1}, ValueError, r"seed \(-1\)"),
        ({"seed": "zero"}, TypeError, "seed"),
        ({"kl_div_loss_weight": 0.1}, TypeError, "kl_div_loss_weight"),
        ({"eps_clip": -0.2}, ValueError, "eps_clip"),
        ({"reward_model": "judge"}, TypeError, "reward_model"),
        ({"actor_last_layers": 5}, ValueError, "last_layers"),
    ],
)
def test_trainer_that_cannot_work_is_refused(make_trainer, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer(**options)


def test_no_prompts_are_refused(make_palm, judge):
    with pytest.raises(ValueError, match="not none"):
        RLHFTrainer(palm=make_palm(), reward_model=judge)


def test_reward_model_of_another_vocabulary_is_refused(make_trainer, make_palm):
    with pytest.raises(ValueError, match="reads 11 token ids, palm writes 13"):
        make_trainer(reward_model=RewardModel(make_palm(num_tokens=11)))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_seq_len": 5}, ValueError), ({"max_new_tokens": 0}, ValueError), ({"temperature": 0.0}, ValueError),
        ({"eos_token": 13}, ValueError), ({"update_timesteps": 0}, ValueError), ({"num_episodes": -1}, ValueError),
        ({"num_episodes": 2.5}, TypeError), ({"eos_token": "end"}, TypeError), ({"learning_rate": 1}, TypeError),
    ],
)  # fmt: skip
def test_train_refuses_before_anything_is_sampled(make_trainer, options, error):
    trainer = make_trainer()
    with pytest.raises(error, match=next(iter(options))):
        trainer.train(**{"num_episodes": 5, "max_seq_len": 9, "use_tqdm": False} | options)
    assert trainer.rollouts == 0 and trainer.prompts.taken == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3, IDS[0]), {}, ValueError, r"seq_len \(3\)"),
        ((9, IDS), {}, ValueError, "one prompt"),
        ((9, IDS[0][:0]), {}, ValueError, "shape"),
        ((9, IDS[0] + 10), {}, ValueError, "id"),
        ((9, IDS[0].float()), {}, TypeError, "integers"),
        ((9, [3, 1, 4]), {}, TypeError, "prompt"),
        ((9, IDS[0]), {"num_samples": 0}, ValueError, "num_samples"),
        ((9, IDS[0]), {"temperature": -1.0}, ValueError, "temperature"),
    ],
)
def test_generate_refuses_what_it_cannot_answer(make_trainer, arguments, options, error, message):
    with pytest.raises(error, match=message):
        make_trainer().generate(*arguments, **options)


def test_dropout_of_the_actor_is_warned_of_at_construction(make_trainer):
    with pytest.warns(UserWarning, match="actor_dropout"):
        make_trainer(actor_dropout=0.1)
