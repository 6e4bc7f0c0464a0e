"""The names and paths that users of the README write."""

import importlib
import inspect
import subprocess
import sys

import pytest

import palm_rlhf_pytorch
from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings


@pytest.mark.parametrize("name", ["PaLM", "RewardModel", "ActorCritic", "RLHFTrainer"])
def test_top_level_holds_the_names_people_know(name):
    assert name in palm_rlhf_pytorch.__all__
    assert inspect.isclass(getattr(palm_rlhf_pytorch, name))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("palm", "PaLM"),
        ("reward", "RewardModel"),
        ("attention", "attend"),
        ("lora", "LoRA"),
        ("ppo", "ActorCritic"),
        ("ppo", "RLHFTrainer"),
    ],
)
def test_module_paths_people_know_are_importable(module, name):
    assert hasattr(importlib.import_module(f"palm_rlhf_pytorch.{module}"), name)


def test_ppo_address_and_top_level_are_the_same_classes():
    ppo = importlib.import_module("palm_rlhf_pytorch.ppo")
    assert ppo.RLHFTrainer is palm_rlhf_pytorch.RLHFTrainer
    assert ppo.ActorCritic is palm_rlhf_pytorch.ActorCritic


def parameters(function):
    return set(inspect.signature(function).parameters)


def test_constructors_and_methods_take_the_keywords_people_write():
    assert {
        "num_tokens", "dim", "depth", "causal", "dim_head", "heads", "ff_mult", "flash_attn",
        "cross_entropy_ignore_index", "qk_rmsnorm", "lora_r", "finetune_scopes",
    } <= parameters(PaLM.__init__)  # fmt: skip
    assert {
        "seq_len",
        "prompt",
        "temperature",
        "eos_token",
        "pad_value",
        "use_tqdm",
        "top_k",
        "top_p",
        "generator",
    } <= (parameters(PaLM.generate))
    assert {"palm", "num_binned_output"} <= parameters(RewardModel.__init__)
    assert {"seq", "mask", "prompt_mask", "prompt_lengths", "labels"} <= parameters(RewardModel.forward)
    assert {
        "palm", "reward_model", "prompt_token_ids", "prompts", "prompts_path", "tokenizer", "pad_value", "seed",
        "accelerate_kwargs",
    } <= parameters(RLHFTrainer.__init__)  # fmt: skip
    assert {
        "actor_lr", "critic_lr", "actor_wd", "critic_wd", "betas", "actor_lora", "critic_lora", "actor_lora_r",
        "critic_lora_r", "actor_dropout", "critic_dropout", "max_norm", "eps_clip", "value_clip", "minibatch_size",
        "epochs", "kl_coef", "entropy_coef",
    } <= parameters(PPOSettings)  # fmt: skip
    assert {"num_episodes", "max_seq_len", "eos_token", "temperature", "update_timesteps"} <= parameters(
        RLHFTrainer.train
    )
    assert {"seq_len", "prompt", "num_samples", "temperature", "eos_token", "pad_value", "use_tqdm"} <= (
        parameters(RLHFTrainer.generate)
    )


def test_every_name_of_all_has_a_docstring():
    for name in palm_rlhf_pytorch.__all__:
        assert inspect.getdoc(getattr(palm_rlhf_pytorch, name))


def test_import_leaves_no_global_state_behind():
    probe = """
import random, warnings
import numpy, torch, accelerate
torch.manual_seed(3); random.seed(3); numpy.random.seed(3)
def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
        torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype(),
        torch.is_grad_enabled(), list(warnings.filters),
    )
before = state()
import palm_rlhf_pytorch, palm_rlhf_pytorch.cli.main
assert state() == before
"""
    subprocess.run([sys.executable, "-W", "error", "-c", probe], check=True, timeout=120)


def test_the_front_door_opens_each_name_and_room_when_it_is_asked_for():
    program = (
        "import sys, palm_rlhf_pytorch as package\n"
        "assert 'torch' not in sys.modules\n"
        "package.PaLM\n"
        "assert 'palm_rlhf_pytorch.policy.ppo' not in sys.modules\n"
        "assert all(isinstance(getattr(package, name), type) for name in package.__all__)\n"
        "assert package.text.ByteTokenizer and set(package.__all__) <= set(dir(package))\n"
        "assert not hasattr(package, 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
