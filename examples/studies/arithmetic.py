"""A small model learns to add: from texts in which every other sum is wrong, then by GRPO from a judge that can check.

    python examples/studies/arithmetic.py [--quick] [--seed 0] [--out adder.pt]

A byte-level PaLM reads lines like "12+7=19", half of whose answers have slipped by one or by ten: it then writes right
and wrong answers as often as it has read them. GRPO takes eight answers to each sum, and a judge that works the sum out
says which of them are right; nobody tells the model what it should have said. A tenth of all sums, neither in the texts
nor among the prompts, are kept to measure on. About three minutes on two cores; with --quick a few seconds, which show
that it runs, not how well.
"""

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.reward.functions import each, text_judge
from palm_rlhf_pytorch.reward.verifiable import works_out
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text import ByteTokenizer
from palm_rlhf_pytorch.training import fit

TOKENIZER = ByteTokenizer()
LINE_END = ord("\n")  # ends an answer
MAX_ANSWER = 4  # bytes: two digits, the line's end, and one to go wrong with
Sum = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """How much is read and learnt from."""

    highest: int = 49  # of the numbers added
    num_steps: int = 2000
    num_updates: int = 300
    update: int = 256  # answers


QUICK = Sizes(highest=9, num_steps=40, num_updates=3, update=64)


def split_sums(highest: int, seed: int) -> tuple[list[Sum], list[Sum]]:
    """Nine tenths of all sums to learn from, and the rest."""
    numbers = range(highest + 1)
    sums = [(first, second) for first in numbers for second in numbers]
    random.Random(seed).shuffle(sums)
    return sums[len(sums) // 10 :], sums[: len(sums) // 10]


def line_batches(sums: list[Sum], num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of 64 lines, half of whose answers are wrong."""
    chance = random.Random(seed)
    for _ in range(num_steps):
        lines = []
        for first, second in chance.choices(sums, k=64):
            slip = chance.choice((-10, -1, 1, 10)) if chance.random() < 0.5 else 0
            lines.append(TOKENIZER.encode(f"{first}+{second}={abs(first + second + slip)}\n"))
        seq, mask = pad_ragged(lines)
        yield {"seq": seq, "mask": mask, "return_loss": True}


def pretrain(sums: list[Sum], sizes: Sizes, seed: int) -> PaLM:
    """A language model of such lines."""
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=64, depth=3, heads=4, dim_head=16)
    steps = sizes.num_steps
    fit(
        palm, line_batches(sums, steps, seed), num_steps=steps, lr=4e-3, warmup_steps=steps // 20, weight_decay=0.01,
        description="read",
    )  # fmt: skip
    return palm.eval()


def improve(palm: PaLM, sums: list[Sum], sizes: Sizes, seed: int) -> PaLM:
    """The same model after GRPO; the judge reads the sum in the prompt and the number in the answer."""
    trainer = GRPOTrainer(
        palm=palm, reward_model=text_judge(each(works_out()), TOKENIZER), prompts=[prompt_of(pair) for pair in sums],
        tokenizer=TOKENIZER, actor_lora=False, actor_lr=1e-3, minibatch_size=64, max_batch_size=256, seed=seed,
        accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    trainer.train(
        sizes.num_updates * sizes.update, max_new_tokens=MAX_ANSWER, eos_token=LINE_END, update_timesteps=sizes.update
    )
    return trainer.export_palm()


def prompt_of(pair: Sum) -> str:
    """What is asked."""
    return f"{pair[0]}+{pair[1]}="


def answers(palm: PaLM, sums: list[Sum], *, temperature: float) -> list[str]:
    """An answer to each sum, with its line's end where it came to it."""
    prompts, mask = pad_ragged([TOKENIZER.encode(prompt_of(pair)) for pair in sums])
    found = generate_responses(
        palm, prompts, mask, max_new_tokens=MAX_ANSWER, eos_token=LINE_END, temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    rows: Iterator[tuple[Tensor, Tensor]] = zip(found.tokens, found.mask, strict=True)
    return [TOKENIZER.decode(tokens[real]) for tokens, real in rows]


def accuracy(palm: PaLM, sums: list[Sum], *, temperature: float, draws: int = 4) -> float:
    """Share of the answers that are the sum, and nothing else."""
    asked = sums * draws
    found = answers(palm, asked, temperature=temperature)
    return sum(told == f"{sum(pair)}\n" for pair, told in zip(asked, found, strict=True)) / len(asked)


def main(arguments: list[str] | None = None) -> None:
    """Read, measure, learn, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the improved model goes")
    args = parser.parse_args(arguments)
    started, sizes = time.perf_counter(), QUICK if args.quick else Sizes()
    learn, test = split_sums(sizes.highest, args.seed)
    print(f"{len(learn)} sums to learn from, {len(test)} others to measure on", flush=True)
    palm = pretrain(learn, sizes, args.seed)
    improved = improve(palm, learn, sizes, args.seed)
    print(f"{'right answers to other sums':32} {'before':>8} {'after':>8}")
    for name, temperature in (("sampled, as the model is", 1.0), ("its likeliest answer", 0.0)):
        before, after = (accuracy(model, test, temperature=temperature) for model in (palm, improved))
        print(f"{name:32} {before:8.3f} {after:8.3f}")
    for pair, *told in zip(
        test[:8], *(answers(model, test[:8], temperature=1.0) for model in (palm, improved)), strict=True
    ):
        print(f"{prompt_of(pair):>8} {told[0].strip():>6} {told[1].strip():>6}")
    if args.out:
        improved.save(args.out)
        print(f"saved {args.out}")
    print(f"{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()
