"""Sums that can be checked: a byte-level PaLM that adds badly learns to add better, from nothing but right and wrong.

    python examples/arithmetic.py            a few minutes
    python examples/arithmetic.py --quick    seconds: shows that it runs, not how well

It reads lines like "12+7=19", a third of which are wrong, and then learns by GRPO from the judge of
`reward/verifiable.py`, which works out the sum. Accuracy is on sums that it never saw.
"""

import argparse
import random

import torch

from palm_rlhf_pytorch import GRPOTrainer, PaLM
from palm_rlhf_pytorch.reward import each, text_judge
from palm_rlhf_pytorch.reward.verifiable import works_out
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text import ByteTokenizer
from palm_rlhf_pytorch.training import fit

TOKENIZER = ByteTokenizer()
END = ord("\n")
LARGEST, HELD_OUT, WRONG = 20, 100, 1 / 2
OPTIONS = {"max_new_tokens": 4, "eos_token": END}


def lines(sums, chance, *, count):
    """Batches of lines to read; of some the number is off by one or by ten."""
    for _ in range(count):
        rows = []
        for first, second in chance.choices(sums, k=64):
            told = first + second
            if chance.random() < WRONG:
                told = max(0, told + chance.choice((-10, -1, 1, 10)))
            rows.append(TOKENIZER.encode(f"{first}+{second}={told}\n"))
        seq, mask = pad_ragged(rows)
        yield {"seq": seq, "mask": mask, "return_loss": True}


@torch.no_grad()
def accuracy(palm, sums):
    """Share of the sums that the model gets right, one answer drawn to each."""
    prompts, mask = pad_ragged([TOKENIZER.encode(f"{first}+{second}=") for first, second in sums])
    generator = torch.Generator().manual_seed(0)
    drawn = palm.generate(
        prompts.shape[1] + 4, prompts, prompt_mask=mask, max_new_tokens=4, eos_token=END, pad_value=0,
        use_tqdm=False, generator=generator,
    )  # fmt: skip
    told = [TOKENIZER.decode([number for number in row if number]) for row in drawn.tolist()]
    return sum(text == f"{first + second}\n" for text, (first, second) in zip(told, sums, strict=True)) / len(sums)


def main():
    """Pretrain, learn from right and wrong, say how many sums come out right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of each, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    num_steps, num_updates = (5, 2) if args.quick else (500, 100)
    chance = random.Random(args.seed)
    sums = [(first, second) for first in range(LARGEST) for second in range(LARGEST)]
    chance.shuffle(sums)
    held_out, sums = sums[:HELD_OUT], sums[HELD_OUT:]
    torch.manual_seed(args.seed)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=64, depth=3, heads=4, dim_head=16, flash_attn=True)
    fit(palm, lines(sums, chance, count=num_steps), num_steps=num_steps, lr=4e-3, warmup_steps=num_steps // 20)
    palm.eval()
    before = accuracy(palm, held_out)
    print(f"right before: {before:.3f} of {HELD_OUT} sums that were never seen")
    trainer = GRPOTrainer(
        palm=palm,
        reward_model=text_judge(each(works_out()), TOKENIZER),
        prompts=[f"{first}+{second}=" for first, second in sums],
        tokenizer=TOKENIZER,
        actor_lora=False,
        actor_lr=6e-4,
        minibatch_size=64,
        max_batch_size=256,
        seed=args.seed,
    )
    history = trainer.train(num_updates * 256, update_timesteps=256, **OPTIONS)
    scores = [line["reward/score"] for line in history]
    print("right while learning:", " ".join(f"{score:.2f}" for score in scores[:: max(1, len(scores) // 10)]))
    print(f"right after:  {accuracy(trainer.export_palm(), held_out):.3f} (before: {before:.3f})")


if __name__ == "__main__":
    main()
