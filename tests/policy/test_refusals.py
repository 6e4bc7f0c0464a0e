"""What a trainer refuses before work is lost, and what it must not be moved by."""

import pytest
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward.model import RewardModel

IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eos_token": 77}, r"eos_token \(77\)"),
        ({"eos_token": -1}, r"eos_token \(-1\)"),
        ({"temperature": -0.5}, r"temperature \(-0.5\)"),
        ({"num_samples": 0}, r"num_samples \(0\)"),
        ({"seq_len": 40_000}, r"seq_len \(40000"),
    ],
)
def test_generate_refuses_before_it_samples(make_trainer, arguments, message):
    trainer = make_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.generate(arguments.pop("seq_len", 9), torch.tensor([3, 1]), **arguments)
    assert trainer.answers == 0


def test_generate_takes_samples_in_batches_of_max_batch_size(make_trainer, monkeypatch):
    trainer = make_trainer(max_batch_size=2)
    sample, rows = trainer.actor_critic.generate, []
    monkeypatch.setattr(
        trainer.actor_critic,
        "generate",
        lambda prompts, *args, **kw: rows.append(len(prompts)) or sample(prompts, *args, **kw),
    )
    assert len(trainer.generate(7, torch.tensor([3, 1]), num_samples=5)) == 7
    assert rows == [2, 2, 1]


@pytest.mark.parametrize("count", [0, -3])
def test_next_prompts_refuses_counts_below_one(make_trainer, count):
    with pytest.raises(ValueError, match=rf"count \({count}\)"):
        make_trainer().next_prompts(count)


def test_load_refuses_a_palm_that_computes_something_else_with_equal_weights(make_trainer, make_palm, tmp_path):
    make_trainer(make_palm()).save(tmp_path / "trainer.pt")
    other = make_trainer(make_palm(rotary_xpos_scale_base=2))
    with pytest.raises(ValueError, match="rotary_xpos_scale_base: file 512, palm 2"):
        other.load(tmp_path / "trainer.pt")


def test_loading_into_the_palm_later_leaves_the_trainer_as_it_was(make_trainer, make_palm, tmp_path):
    palm = make_palm()
    trainer = make_trainer(palm)
    before = [parameter.clone() for parameter in trainer.actor_critic.palm.parameters()]
    make_palm(seed=4).save(tmp_path / "other.pt")
    palm.load(tmp_path / "other.pt")
    assert not torch.equal(palm.token_emb.weight, before[0])
    for kept, parameter in zip(before, trainer.actor_critic.palm.parameters(), strict=True):
        assert torch.equal(kept, parameter)


def test_ids_under_a_false_mask_may_be_anything(make_trainer):
    trainer = make_trainer()
    mask = torch.tensor([[False, True, True], [True, True, True]])
    hidden, shown = torch.tensor([[-1, 4, 2], [5, 6, 7]]), torch.tensor([[3, 4, 2], [5, 6, 7]])
    found = trainer.rollout(hidden, mask, max_seq_len=6)
    trainer.rollouts = 0
    assert torch.equal(found.sequences, trainer.rollout(shown, mask, max_seq_len=6).sequences)


def test_a_double_palm_trains(make_trainer, make_palm):
    metrics = make_trainer(make_palm().double()).train(4, max_seq_len=8, update_timesteps=4, use_tqdm=False)
    assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-6)


def test_tokenizer_beside_ids_is_refused(make_trainer):
    with pytest.raises(ValueError, match="leave the tokenizer out"):
        make_trainer(tokenizer=lambda text: [1, 2])


def test_pad_value_beside_a_list_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"pad_value \(0\)"):
        make_trainer(pad_value=0)


def test_value_clip_for_raw_scores_warns(make_trainer):
    with pytest.warns(UserWarning, match=r"value_clip \(0.2\)"):
        make_trainer(normalize_scores=False)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("actor_lora_r", 0),
        ("critic_lora_r", -2),
        ("actor_last_layers", 5),
        ("critic_last_layers", 0),
        ("critic_dropout", 1.0),
    ],
)
def test_settings_of_a_hat_are_refused_by_their_own_name(make_trainer, setting, value):
    with pytest.raises(ValueError, match=rf"{setting} \({value}\)"):
        make_trainer(**{setting: value})


def test_masked_ids_reach_neither_forward_nor_generate(make_palm):
    palm: PaLM = make_palm().eval()
    mask = torch.tensor([[False, True, True, True]])
    hidden, shown = torch.tensor([[-7, 4, 2, 6]]), torch.tensor([[0, 4, 2, 6]])
    assert torch.equal(palm(hidden, mask=mask), palm(shown, mask=mask))
    drawn = [palm.generate(7, ids, prompt_mask=mask, temperature=0.0).tolist() for ids in (hidden, shown)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [("beta_s", "did you mean entropy_coef"), ("actr_lr", "did you mean actor_lr"), ("zzz", "settings.py lists all")],
)
def test_unknown_settings_are_refused_with_what_they_may_have_meant(make_trainer, name, hint):
    with pytest.raises(TypeError, match=f"RLHFTrainer has no argument '{name}'; .*{hint}"):
        make_trainer(**{name: 0.1})


def test_a_palm_is_no_judge(make_trainer, make_palm):
    with pytest.raises(TypeError, match=r"RewardModel\(palm\)"):
        make_trainer(reward_model=make_palm())


def test_a_missing_tracker_names_its_extra(make_trainer, monkeypatch):
    monkeypatch.setattr("palm_rlhf_pytorch.training.trackers.get_available_trackers", list)
    with pytest.raises(ImportError, match=r'pip install "palm-rlhf-pytorch\[wandb\]"'):
        make_trainer(accelerate_kwargs={"log_with": "wandb"})


def test_lists_of_numbers_are_refused_by_their_row(make_trainer):
    with pytest.raises(TypeError, match="prompt 0 is a list: it must be a tensor of token ids"):
        make_trainer(prompt_token_ids=[[1, 2], [3]])


def test_load_gives_the_trainer_back(make_trainer, tmp_path):
    make_trainer().save(tmp_path / "trainer.pt")
    trainer = make_trainer()
    assert trainer.load(tmp_path / "trainer.pt") is trainer


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
