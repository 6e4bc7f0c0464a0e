"""Runs in the interpreter that has palm-rlhf-pytorch 0.8.0: reads requests as JSON lines, answers with times.

Only that package's public API is used, and nothing of this repository. Its prints go to the error stream.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer


def memory(field: str) -> float:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024.0 * int(line.split()[1])


BASELINE = memory("VmRSS")


@cache
def build(num_tokens: int, dim: int, depth: int) -> PaLM:
    torch.manual_seed(0)
    return PaLM(num_tokens=num_tokens, dim=dim, depth=depth)


def generate(*, shape: list[int], length: int, new_tokens: int) -> dict[str, float]:
    """One sampled continuation, without the top-k that is its default: the peers sample from all tokens."""
    palm = build(*shape)
    prompt = torch.randint(0, palm.num_tokens, (1, length))
    started = time.perf_counter()
    palm.generate(length + new_tokens, prompt=prompt, filter_logits_fn=None)
    return {"seconds": time.perf_counter() - started}


@cache
def optimizer_of(palm: PaLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(palm.parameters(), lr=1e-4, fused=True)


def train(*, shape: list[int], length: int) -> dict[str, float]:
    """One step of pretraining, float32, batch 1; it brings no optimizer function, so torch's fused AdamW."""
    palm = build(*shape).train()
    optimizer = optimizer_of(palm)
    tokens = torch.randint(0, palm.num_tokens, (1, length))
    started = time.perf_counter()
    palm(tokens, return_loss=True).backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"seconds": time.perf_counter() - started}


class TimedTrainer(RLHFTrainer):
    """Its trainer, with a clock around `learn`, at each of some numbers of epochs on the same memories."""

    def learn(self, memories: Any) -> None:
        """Each learning starts from where the last one ended; the work is the same."""
        for epochs in self.epoch_choices:
            self.epochs = epochs
            started = time.perf_counter()
            super().learn(memories)
            self.times[f"learn {epochs}"] = time.perf_counter() - started
        stored = sum(part.numel() * part.element_size() for memory in memories for part in memory)
        self.times["stored bytes"] = float(stored)


@cache
def trainer_of(num_tokens: int, dim: int, depth: int, prompts: int, prompt_length: int) -> TimedTrainer:
    palm = PaLM(num_tokens=num_tokens, dim=dim, depth=depth)
    ids = torch.randint(1, num_tokens, (prompts, prompt_length))  # 0 is its padding
    trainer = TimedTrainer(palm=palm, reward_model=RewardModel(palm), prompt_token_ids=ids, minibatch_size=16)
    return trainer


def ppo(*, shape: list[int], prompts: int, prompt_length: int, new_tokens: int, epochs: list[int]) -> dict[str, float]:
    """One iteration, in the phases that can be told apart: rollout (generate, score, log-probabilities) and learn."""
    trainer = trainer_of(*shape, prompts, prompt_length)
    trainer.epoch_choices, trainer.times = epochs, {}
    started = time.perf_counter()
    trainer.train(
        num_episodes=1, max_timesteps=prompts, update_timesteps=prompts, max_seq_len=prompt_length + new_tokens
    )
    whole = time.perf_counter() - started
    learnt = sum(value for name, value in trainer.times.items() if name.startswith("learn"))
    models = [*trainer.actor_critic.parameters(), *trainer.reward_model.parameters()]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in models}
    return {"rollout": whole - learnt, "model bytes": float(sum(storages.values())), **trainer.times}


def peak() -> dict[str, float]:
    """Memory at most, beyond what the imports took."""
    return {"bytes": memory("VmHWM") - BASELINE}


REQUESTS: dict[str, Callable[..., dict[str, float]]] = {"generate": generate, "train": train, "ppo": ppo, "peak": peak}


def main() -> None:
    """Answer until the input ends; what the package prints must not mix with the answers."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        arguments = json.loads(line)
        print(json.dumps(REQUESTS[arguments.pop("request")](**arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
