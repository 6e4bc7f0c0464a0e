"""PPO's settings: what is refused, what is warned of, and what the KL controller does."""

import json
import math

import pytest
import torch

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.arguments import check_rollout_arguments, check_train_arguments
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.prompts import prompts_from


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("actor_lr", -1e-4), ("critic_lr", math.nan), ("actor_wd", -0.1), ("critic_wd", math.inf), ("adam_eps", 0.0),
        ("betas", (0.9, math.nan)), ("max_norm", 0.0), ("eps_clip", 0.0), ("eps_clip", 1.0), ("dual_clip", 1.0),
        ("value_clip", 0.0), ("gamma", 1.1), ("gae_lambda", -0.1), ("kl_coef", -0.05), ("kl_horizon", 0),
        ("target_kl_nats_per_response", 0.0), ("missing_eos_penalty", -1.0), ("missing_eos_score", math.nan),
        ("entropy_coef", math.inf), ("epochs", 0), ("minibatch_size", 0), ("max_batch_size", -3),
        ("max_batch_tokens", 0), ("max_dropped", 1.5), ("max_dropped", -0.1), ("max_skipped_steps", 0),
        ("judge_timeout", 0.0), ("max_staleness", -1), ("importance_cap", 0.0), ("keep_experience", 0),
        ("save_every", 0), ("save_every_steps", 0), ("keep_last", 0), ("keep_best", "reward/scor"),
    ],
)  # fmt: skip
def test_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=rf"{name} \("):
        PPOSettings(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 2.5), ("actor_lora", "yes"), ("actor_lr", "1e-4"), ("betas", 0.9)]
)
def test_setting_of_a_wrong_type_is_refused(name, value):
    with pytest.raises(TypeError):
        PPOSettings(**{name: value})


def test_unknown_setting_is_named():
    with pytest.raises(TypeError, match="beta_s"):
        PPOSettings(beta_s=0.01)


def test_controller_cannot_start_from_nothing():
    with pytest.raises(ValueError, match="kl_coef"):
        PPOSettings(kl_coef=0.0, target_kl_nats_per_response=6.0)
    PPOSettings(kl_coef=0.0)


def test_settings_survive_json():
    settings = PPOSettings(betas=(0.8, 0.95), max_norm=None, actor_lora_alpha=4.0)
    plain = json.loads(json.dumps(settings.plain()))
    assert plain == settings.plain()
    assert PPOSettings(**plain | {"betas": tuple(plain["betas"])}) == settings


@pytest.mark.parametrize(("kl", "expected"), [(3.0, 0.197952), (6.0, 0.2), (20.0, 0.202048)])
def test_adaptive_coefficient_steers_to_its_target(kl, expected):
    settings = PPOSettings(kl_coef=0.2, target_kl_nats_per_response=6.0)
    assert settings.next_kl_coef(0.2, kl, num_episodes=512) == pytest.approx(expected, abs=1e-9)


def test_coefficient_without_a_target_stays():
    assert PPOSettings().next_kl_coef(0.2, 20.0, num_episodes=512) == 0.2


def test_dropout_of_the_actor_is_warned_of(recwarn):
    PPOSettings(critic_dropout=0.1).warn()
    assert not recwarn.list
    with pytest.warns(UserWarning, match="ratio will not start at 1"):
        PPOSettings(actor_dropout=0.1).warn()


GOOD = {
    "num_episodes": 10, "max_seq_len": 4, "max_new_tokens": None, "eos_token": None, "temperature": 1.0,
    "update_timesteps": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_episodes", 0), ("update_timesteps", 0), ("max_new_tokens", 0), ("temperature", 0.0),
        ("temperature", -1.0), ("temperature", math.nan), ("eos_token", 13), ("eos_token", -1), ("max_seq_len", 3),
    ],
)  # fmt: skip
def test_argument_of_train_out_of_range_is_named(make_palm, name, value):
    prompts = prompts_from(num_tokens=13, seed=0, prompt_token_ids=[torch.tensor([1]), torch.tensor([1, 2, 3])])
    check_train_arguments(prompts, PPOSettings(), palm=make_palm(), **GOOD)
    with pytest.raises(ValueError, match=rf"{name} \("):
        check_train_arguments(prompts, PPOSettings(), palm=make_palm(), **GOOD | {name: value})


def test_prompt_that_leaves_no_room_is_named(make_palm):
    prompts = prompts_from(num_tokens=13, seed=0, prompt_token_ids=[torch.tensor([1]), torch.tensor([1, 2, 3, 4])])
    with pytest.raises(ValueError, match="prompt 1 has 4 tokens"):
        check_train_arguments(prompts, PPOSettings(), palm=make_palm(), **GOOD)


def test_rows_beyond_the_models_reach_are_refused_before_sampling(make_palm):
    prompts = prompts_from(num_tokens=13, seed=0, prompt_token_ids=[torch.tensor([1])])
    palm = make_palm(rotary_xpos_scale_base=2)
    long = {"max_seq_len": int(palm.max_length) + 5}
    with pytest.raises(ValueError, match="max_seq_len"):
        check_train_arguments(prompts, PPOSettings(), palm=palm, **GOOD | long)
    check_train_arguments(prompts, PPOSettings(), palm=palm, **GOOD | long | {"max_new_tokens": 7})


def test_controller_whose_update_could_reach_zero_is_refused(make_palm):
    prompts = prompts_from(num_tokens=13, seed=0, prompt_token_ids=[torch.tensor([1])])
    settings = PPOSettings(target_kl_nats_per_response=6.0, kl_horizon=2)
    with pytest.raises(ValueError, match="kl_horizon"):
        check_train_arguments(prompts, settings, palm=make_palm(), **GOOD | {"update_timesteps": 10})
    check_train_arguments(prompts, settings, palm=make_palm(), **GOOD | {"update_timesteps": 9})


IDS = torch.tensor([[1, 2, 3], [4, 5, 0]])


@pytest.mark.parametrize(
    ("ids", "mask", "error"),
    [
        (IDS.float(), IDS > 0, TypeError), (IDS, IDS, TypeError), (IDS, IDS[:, :2] > 0, ValueError),
        (IDS + 10, IDS > 0, ValueError), (IDS[0], IDS[0] > 0, ValueError), (IDS, IDS == 2, ValueError),
        (IDS, IDS >= 0, None),
    ],
)  # fmt: skip
def test_prompts_of_a_rollout_are_checked(make_palm, ids, mask, error):
    sampling = {name: GOOD[name] for name in ("max_seq_len", "max_new_tokens", "eos_token", "temperature")}
    if error is None:
        check_rollout_arguments(ids, mask, palm=make_palm(), **sampling)
    else:
        with pytest.raises(error):
            check_rollout_arguments(ids, mask, palm=make_palm(), **sampling)


@pytest.mark.parametrize("enabled", [True, False])
def test_activation_checkpointing_reaches_every_model_and_not_the_one_given(make_palm, enabled):
    palm = make_palm()
    settings = PPOSettings(activation_checkpointing=enabled, actor_lora=False)
    actor_critic = ActorCritic(palm, **settings.model_arguments())
    models = [actor_critic.palm, actor_critic.actor.model(actor_critic.palm)]
    assert [model.activation_checkpointing for model in models] == [enabled, enabled]
    assert not palm.activation_checkpointing and not actor_critic.export_palm().activation_checkpointing
