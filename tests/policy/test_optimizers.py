"""Trainers whose optimizer is the user's: learnt with, kept, gone on with, and asked of every trainer."""

import os
import signal

import pytest
import torch
from torch.optim import SGD

from palm_rlhf_pytorch.policy.dpo import DPOTrainer
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.kto import KTOTrainer
from palm_rlhf_pytorch.policy.rejection import RejectionTrainer
from palm_rlhf_pytorch.reward.learning import train_reward_model
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.records import Pair, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.optimizers import muon

CALL = {"max_seq_len": 9, "update_timesteps": 10, "use_tqdm": False, "preflight": False}
BYTES = ByteTokenizer()


def trained(trainer):
    weights = trainer.learner.actor | trainer.learner.critic
    return {name: weight.detach().clone() for name, weight in weights.items()}


def test_a_stopped_run_with_muon_goes_on_to_the_same_bits(make_trainer, tmp_path):
    whole = make_trainer(optimizer=muon)
    whole.train(30, **CALL)
    stopped = make_trainer(optimizer=muon, run_dir=tmp_path, save_every_steps=1)
    step = stopped.learner._step

    def told(lesson, rows, progress):
        step(lesson, rows, progress)
        if stopped.updates == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped.learner._step = told
    stopped.train(30, **CALL)
    assert stopped.updates == 1
    again = make_trainer(optimizer=muon, run_dir=tmp_path, save_every_steps=1)
    again.train(30, resume="auto", **CALL)
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(again).items())
    with pytest.raises(ValueError, match=r"optimizer Together\(Muon, AdamW\), not AdamW"):
        make_trainer(run_dir=tmp_path, save_every_steps=1).train(30, resume="auto", **CALL)


def test_policy_stays_while_the_critic_warms_up_under_muon(make_trainer):
    trainer = make_trainer(optimizer=muon, critic_warmup=1, actor_wd=0.1)
    before = trained(trainer)
    history = trainer.train(10, **CALL)
    after = trained(trainer)
    assert all(torch.equal(before[name], after[name]) for name in trainer.learner.actor)
    assert not all(torch.equal(before[name], after[name]) for name in trainer.learner.critic)
    assert history[0]["policy/lr"] == 0 and history[0]["value/lr"] > 0


def test_groups_of_policy_and_critic_must_stay_apart(make_trainer):
    def mixed(groups):
        return SGD([part for group in groups for part in group["params"]], lr=0.1)

    with pytest.raises(ValueError, match="mixes the policy's parameters with the critic's"):
        make_trainer(optimizer=mixed)


def test_every_other_trainer_steps_with_the_optimizer_given(make_palm):
    asked = []

    def factory(groups):
        asked.append(len(groups))
        return SGD(groups, lr=0.1)

    palm = make_palm(num_tokens=BYTES.num_tokens)
    texts = Text("ab", "cd"), Text("ab", "efg")
    pairs = [Pair(chosen=chosen, rejected=rejected) for chosen, rejected in (texts, texts[::-1])]
    votes = [Vote(text=texts[0], up=True), Vote(text=Text("xyz", "w"), up=False)]
    quiet = {"use_tqdm": False, "preflight": False}
    runs = [
        lambda: DPOTrainer(palm=palm, pairs=pairs, tokenizer=BYTES, optimizer=factory).train(num_steps=1, **quiet),
        lambda: KTOTrainer(palm=palm, votes=votes, tokenizer=BYTES, optimizer=factory).train(num_steps=1, **quiet),
        lambda: GRPOTrainer(
            palm=palm, reward_model=lambda sequences, *, prompt_mask, mask: sequences[:, -1].float(),
            prompt_token_ids=[torch.tensor([5, 6])], group_size=2, minibatch_size=2, optimizer=factory,
        ).train(2, max_seq_len=4, update_timesteps=2, **quiet),
        lambda: RejectionTrainer(
            palm=palm, reward_model=lambda sequences, *, prompt_mask, mask: sequences[:, -1].float(),
            prompt_token_ids=[torch.tensor([5, 6]), torch.tensor([7])], num_samples=2, optimizer=factory,
        ).train(num_rounds=1, prompts_per_round=2, max_new_tokens=3, use_tqdm=False),
        lambda: train_reward_model(
            RewardModel(palm), pairs, BYTES, eos_token=None, optimizer=factory, progress=False, normalize=False
        ),
    ]  # fmt: skip
    for number, run in enumerate(runs, start=1):
        run()
        assert len(asked) == number
