"""A byte-level PaLM learns to judge sentiment: five bins, read as two classes (SST-2) and as ratings (VADER's).

    PALM_DATA_DIR=folder python examples/studies/judge_of_sentiment.py [--seeds 0 1 2] [--out judge]

The folder holds sst2_train.csv and sst2_dev.csv (columns sentence, label), vader_movie_ratings.jsonl (text, mean: a
person's ratings from -4 to 4, averaged) and wikitext2_valid.txt. A trunk is pretrained once as a language model on the
training texts; each seed then trains a judge on the labels of the one and the means of the other. Both data sets are
of film reviews: of every text that shares a sentence, or half of its runs of four words, with a held-out one, the
held-out one alone is kept. The dev set is read last, and chooses nothing.
"""

import argparse
import csv
import json
import math
import os
import random
import re
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.reward.figures import spearman, wilson
from palm_rlhf_pytorch.text import ByteTokenizer, TokenStream
from palm_rlhf_pytorch.training import fit

SPREAD = 1.8  # what a label stands for on VADER's scale: -1.8 or 1.8
TOKENIZER = ByteTokenizer()
WIKI = {
    " @-@ ": "-", " @,@ ": ",", " @.@ ": ".", " <unk> ": " ", " ,": ",", " .": ".", " 's": "'s", "( ": "(", " )": ")",
}  # fmt: skip


def plain(text):
    """Lower case, single blanks."""
    return " ".join(text.lower().split())


def key(text):
    """Letters and digits alone: how a text is recognised."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def words(text):
    """Its words, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower().replace("'", ""))


def runs(text):
    """Its runs of four words."""
    found = words(text)
    return {tuple(found[start : start + 4]) for start in range(max(1, len(found) - 3))}


def sentences(text):
    """The text, and each of its sentences of five words or more; VADER writes a dash as two blanks."""
    parts = re.split(r"[.!?]+\s+|\s\s+", text)
    return {key(text)} | {key(part) for part in parts if len(words(part)) >= 5}


def leaks(held):
    """A function that says whether a text shares too much with one of the held texts."""
    known, sets, places = set().union(*map(sentences, held)), [runs(text) for text in held], defaultdict(set)
    for place, found in enumerate(sets):
        for run in found:
            places[run].add(place)

    def check(text):
        own = runs(text)
        shared = Counter(place for run in own for place in places.get(run, ()))
        return bool(sentences(text) & known) or any(
            count / min(len(own), len(sets[place])) >= 0.5 for place, count in shared.items()
        )

    return check


def load(folder):
    """Rows {text, label or None, mean or None} to train on, a held-out tenth, and the dev set; no sentence in two."""
    sst = {}
    for name in ("train", "dev"):
        with open(folder / f"sst2_{name}.csv", encoding="utf-8") as file:
            sst[name] = list(csv.DictReader(file))
    with open(folder / "vader_movie_ratings.jsonl", encoding="utf-8") as file:
        rated = [json.loads(line) for line in file]
    in_dev = leaks([row["sentence"] for row in sst["dev"]])
    rows = {
        key(row["sentence"]): {"text": plain(row["sentence"]), "label": int(row["label"]), "mean": None}
        for row in sst["train"]
        if not in_dev(row["sentence"])
    }
    left = [row for row in rated if not in_dev(row["text"])]
    for row in left:
        rows.setdefault(key(row["text"]), {"text": plain(row["text"]), "label": None})["mean"] = row["mean"]
    ordered = sorted(rows.values(), key=lambda row: row["text"])
    random.Random(0).shuffle(ordered)
    held, train = ordered[: len(ordered) // 10], ordered[len(ordered) // 10 :]
    in_held = leaks([row["text"] for row in held])
    train = [row for row in train if not in_held(row["text"])]
    print(f"{len(rated) - len(left)} of {len(rated)} VADER texts left out for the dev set")
    print(f"{len(train)} texts to learn from, {len(held)} held out")
    return train, held, sst["dev"]


class Language(nn.Module):
    """A PaLM as `fit` calls it."""

    def __init__(self, palm):
        super().__init__()
        self.palm = palm

    def forward(self, seq: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.palm(seq, return_loss=True)


def pretrain(train, folder, *, num_steps):
    """The trunk, from the training texts twice and Wikipedia once."""
    wiki = (folder / "wikitext2_valid.txt").read_text(encoding="utf-8").lower()
    for old, new in WIKI.items():
        wiki = wiki.replace(old, new)
    texts = [row["text"] for row in train] * 2
    texts += [" ".join(line.split()) for line in wiki.split("\n") if len(line) > 80]
    random.Random(0).shuffle(texts)
    stream = TokenStream(TOKENIZER.encode("\n".join([*texts, ""])), length=128, batch_size=16, seed=0)
    torch.manual_seed(0)
    palm = PaLM(num_tokens=TOKENIZER.num_tokens, dim=128, depth=3, heads=4, dim_head=32, ff_mult=2)
    fit(
        Language(palm), stream, num_steps=num_steps, lr=3e-3, weight_decay=0.1, warmup_steps=num_steps // 20,
        description="pretrain",
    )  # fmt: skip
    return palm


def batches(rows, *, seed, size=16, word_drop=0.15):
    """Rows of like length together; words left out at random; means rounded at random, so that bins average to them."""
    rng = random.Random(seed)
    while True:
        rng.shuffle(rows := rows[:])
        pools = [sorted(rows[at : at + 512], key=lambda row: len(row["text"])) for at in range(0, len(rows), 512)]
        parts = [pool[at : at + size] for pool in pools for at in range(0, len(pool), size)]
        rng.shuffle(parts)
        for part in parts:
            kept = [
                " ".join(word for word in row["text"].split(" ") if rng.random() >= word_drop) or row["text"]
                for row in part
            ]
            means = [(2 * row["label"] - 1) * SPREAD if row["mean"] is None else row["mean"] for row in part]
            labels = [math.floor(min(5.0, max(1.0, mean / 2 + 3)) + rng.random()) for mean in means]
            seq, mask = TOKENIZER.batch(kept)
            yield {"seq": seq, "mask": mask, "labels": torch.tensor(labels)}


@torch.no_grad()
def scores(judge, texts):
    """Expected ratings, 1 to 5."""
    return torch.cat([judge.eval()(*TOKENIZER.batch(texts[at : at + 32])) for at in range(0, len(texts), 32)])


def report(name, held_scores, dev_scores, held, dev):
    """Rank correlation on the held-out tenth; its labels choose the threshold of the two classes on dev."""
    rated = [
        (score, row["mean"]) for score, row in zip(held_scores.tolist(), held, strict=True) if row["mean"] is not None
    ]
    labelled = [
        (score, row["label"] == 1)
        for score, row in zip(held_scores.tolist(), held, strict=True)
        if row["label"] is not None
    ]
    split = max((score for score, _ in labelled), key=lambda at: sum((score > at) == up for score, up in labelled))
    right = sum((score > split) == (row["label"] == "1") for score, row in zip(dev_scores.tolist(), dev, strict=True))
    low, high = wilson(right, len(dev))
    correlation = spearman(*np.array(rated).T)
    print(
        f"{name}: accuracy on dev {right / len(dev):.3f} ({low:.3f} to {high:.3f}), rank correlation with the mean"
        f" rating {correlation:.3f} over {len(rated)} held-out texts; {time.process_time():.0f} s of one core so far"
    )


def main():
    """Pretrain, train a judge for each seed, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("judge"), help="files get this name and the seed's number")
    parser.add_argument("--pretraining-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    if "PALM_DATA_DIR" not in os.environ:
        parser.error("PALM_DATA_DIR must name the folder of the data: see the head of this file")
    folder = Path(os.environ["PALM_DATA_DIR"])
    train, held, dev = load(folder)
    trunk = args.out.with_name(f"{args.out.name}_trunk.pt")
    if not trunk.exists():
        pretrain(train, folder, num_steps=args.pretraining_steps).save(trunk)
    found = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        judge = RewardModel(PaLM.from_checkpoint(trunk), num_binned_output=5, label_offset=1, use_lora=False)
        fit(
            judge, batches(train, seed=seed), num_steps=args.steps, lr=1e-3, weight_decay=0.1,
            warmup_steps=args.steps // 24, description=f"judge {seed}",
        )  # fmt: skip
        judge.save(args.out.with_name(f"{args.out.name}_{seed}.pt"))
        found.append(
            (scores(judge, [row["text"] for row in held]), scores(judge, [plain(row["sentence"]) for row in dev]))
        )
        report(f"seed {seed}", *found[-1], held, dev)
    report(f"mean of {len(found)}", *(torch.stack(part).mean(0) for part in zip(*found, strict=True)), held, dev)


if __name__ == "__main__":
    main()
