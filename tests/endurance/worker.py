"""The run that is ended: small, with every part that has a state; and what it left, as digests."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.training.checkpoint import load_checkpoint
from palm_rlhf_pytorch.training.manifest import read_manifest

PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]
SETTINGS = {
    "actor_lr": 1e-2, "actor_dropout": 0.1, "minibatch_size": 4, "epochs": 2, "max_batch_size": 4,
    "max_batch_tokens": 40, "save_every_steps": 1, "save_rollouts": True, "keep_last": 3,
}  # fmt: skip
PPO = {
    "critic_lr": 1e-2, "critic_dropout": 0.1, "target_kl_nats_per_response": 0.5, "kl_horizon": 100,
    "max_staleness": 1,
}  # fmt: skip
GROUPS = {"group_size": 5, "max_rounds": 4}
CALL = {"max_seq_len": 12, "eos_token": 2, "update_timesteps": 10, "use_tqdm": False}


def noisy_judge(sequences, *, prompt_mask, mask):
    """How many of the response's ids are 7, and noise from torch's global random state, which a run must keep too."""
    return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float() + torch.rand(len(sequences))


def count_threes(sequences, *, prompt_mask, mask):
    """A second judge, which draws too."""
    return ((sequences == 3) & mask & ~prompt_mask).sum(dim=-1).float() + torch.rand(len(sequences))


def picky_judge(sequences, *, prompt_mask, mask):
    """A judge to whom most responses are alike, so that groups are sampled again; it draws too."""
    sevens = ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1)
    return ((sevens > 1) | (torch.rand(len(sequences)) < 0.05)).float()


def make_trainer(folder, *, grouped=False):
    """The run's trainer, by PPO or by GRPO with dynamic sampling."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    palm = PaLM(num_tokens=13, dim=12, depth=2, dim_head=6, heads=3, ff_mult=2)
    kind, judge, own = (GRPOTrainer, picky_judge, GROUPS) if grouped else (RLHFTrainer, noisy_judge, PPO)
    return kind(
        palm=palm, reward_model=judge, held_out_judge=count_threes, prompt_token_ids=PROMPTS, run_dir=folder,
        accelerate_kwargs={"cpu": True}, **SETTINGS, **own,
    )  # fmt: skip


def run(folder, *, num_episodes=40, end_at=None, signal=None, grouped=False):
    """Train, or go on with it, to the end.

    Args:
        folder: of the run.
        num_episodes: of all.
        end_at: number of the checkpoint after which this process gets `signal`, counted over the run.
        signal: SIGKILL, SIGTERM or SIGINT.
        grouped: see `make_trainer`.
    """
    torch.set_num_threads(1)
    trainer = make_trainer(folder, grouped=grouped)
    if end_at is not None:
        save = trainer.run.checkpoints.save

        def save_and_end(step, **state):
            written = save(step, **state)
            if step == end_at:
                os.kill(os.getpid(), signal)
            return written

        trainer.run.checkpoints.save = save_and_end
    trainer.train(num_episodes, resume="auto", **CALL)
    if trainer.stopped is None and trainer.accelerator.is_main_process:
        (Path(folder) / "done").touch()
    return trainer


def digest(folder):
    """SHA-256 of what a finished run left: weights, optimizer, plain values, and metrics without times."""
    newest = max((Path(folder) / "checkpoints").glob("step-*"))
    checkpoint = load_checkpoint(newest, kind=read_manifest(newest).kind)
    found = {}
    for group, tensors in checkpoint.tensors.items():
        value = hashlib.sha256()
        for name in sorted(tensors):
            value.update(name.encode() + tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[group] = value.hexdigest()
    values = {name: value for name, value in checkpoint.values.items() if name != "counters"}
    counters = {name: value for name, value in checkpoint.values["counters"].items() if name != "saves"}
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    metrics = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    for name, value in (("values", [values, counters]), ("metrics", metrics)):
        found[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    return found
