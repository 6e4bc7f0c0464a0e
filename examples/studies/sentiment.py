"""Steering sentiment: a byte-level model of film reviews learns to write kind ones, by a judge trained on SST-2.

    PALM_DATA_DIR=folder python examples/studies/judge_of_sentiment.py --seeds 0 1 --out judge
    PALM_DATA_DIR=folder python examples/studies/sentiment.py --judges judge    (--quick: seconds: that it runs)

The first command makes the files: judge_trunk.pt, the model that is improved, and judge_0.pt and judge_1.pt. The second
judge is never learnt from: its score says whether the reviews are kinder, or the first judge is fooled.
"""

import argparse
import csv
import os
import random
from pathlib import Path

import torch

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from palm_rlhf_pytorch.text import ByteTokenizer

TOKENIZER = ByteTokenizer()
CALL = {"max_new_tokens": 48, "eos_token": ord("\n")}  # reviews end with their line


def prompts_of(folder, chance, *, count):
    """The first three words of reviews."""
    with open(folder / "sst2_train.csv", encoding="utf-8") as file:
        texts = [" ".join(row["sentence"].lower().split()) for row in csv.DictReader(file)]
    begun = sorted({" ".join(text.split()[:3]) + " " for text in texts if len(text.split()) > 6})
    return chance.sample(begun, count)


def written(palm, prompts):
    """A continuation of each prompt."""
    generator = torch.Generator().manual_seed(0)
    for prompt in prompts:
        ids = TOKENIZER.encode(prompt)
        new = palm.generate(len(ids) + 48, ids, eos_token=ord("\n"), pad_value=ord("\n"), generator=generator)
        yield prompt + TOKENIZER.decode(new.tolist()).strip()


def main():
    """Improve, and show reviews and both judges' scores before and after."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--judges", type=Path, default=Path("judge"), help="files of judge_of_sentiment.py begin so")
    parser.add_argument("--quick", action="store_true", help="two updates")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if "PALM_DATA_DIR" not in os.environ:
        parser.error("PALM_DATA_DIR must name the folder that holds sst2_train.csv")
    files = [args.judges.with_name(f"{args.judges.name}_{name}.pt") for name in ("trunk", 0, 1)]
    for file in files:
        if not file.exists():
            parser.error(
                f"{file} is missing: run examples/studies/judge_of_sentiment.py --seeds 0 1 --out {args.judges} first"
            )
    palm, (judge, held_out) = PaLM.from_checkpoint(files[0]), map(RewardModel.from_checkpoint, files[1:])
    prompts = prompts_of(Path(os.environ["PALM_DATA_DIR"]), random.Random(args.seed), count=512)
    trainer = RLHFTrainer(
        palm=palm,
        reward_model=judge.eval(),
        held_out_judge=held_out.eval(),
        prompts=prompts,
        tokenizer=TOKENIZER,
        actor_lr=5e-4,
        critic_lr=1e-3,
        kl_coef=0.05,
        minibatch_size=32,
        seed=args.seed,
    )
    history = trainer.train((2 if args.quick else 30) * 64, **CALL)
    first, last = history[0], history[-1]
    for label, name in (("judge", "reward/score"), ("held-out judge", "reward/held_out_score")):
        print(f"{label}: {first[name]:.2f} -> {last[name]:.2f}, on a scale of 1 to 5")
    print(f"KL: {last['objective/kl']:.1f} nats a review")
    for title, model in (("before", palm), ("after", trainer.export_palm())):
        print(f"\n{title}:", *written(model, prompts[:6]), sep="\n  ")


if __name__ == "__main__":
    main()
