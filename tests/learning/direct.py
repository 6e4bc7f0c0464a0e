"""What learns straight from texts, on a bandit whose best policy is known: `python -m tests.learning.direct`.

Two prompts, six responses of one token, a small PaLM. With soft labels on all pairs DPO's optimum is reference *
exp(score / beta); so is robust DPO's where the labels were flipped at its rate. IPO's is the same where the labels are
1/2 + score differences, for it solves beta D = p - 1/2. Hinge, SimPO, KTO and rejection sampling have no such optimum
here: their score must rise. Prints a table of five seeds; leaves no file.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.direct import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    length_normalised_dpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.dpo import DPOTrainer
from palm_rlhf_pytorch.policy.kto import KTOTrainer
from palm_rlhf_pytorch.policy.rejection import RejectionTrainer
from palm_rlhf_pytorch.text.records import Pair, Text, Vote

NUM_ACTIONS, CONTEXTS, BETA, FLIPS = 6, torch.tensor([[0], [1]]), 1.0, 0.2


class Outcome(NamedTuple):
    """Of one run: mean score and distance to the optimum (total variation) before and after, KL to the reference."""

    name: str
    seed: int
    score_before: float
    score_after: float
    kl: float
    distance_before: float | None
    distance_after: float | None
    num_tokens: int

    @property
    def learnt(self) -> bool:
        """Whether it beat its own start."""
        closer = self.distance_after is None or (self.distance_before or 0) > self.distance_after
        return self.score_after > self.score_before and closer


class Bandit:
    """A small PaLM, a score for each response to each prompt (mean 0, deviation 1), and the optimum."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.palm = PaLM(num_tokens=NUM_ACTIONS, dim=16, depth=1, dim_head=8, heads=2)
            torch.nn.init.normal_(self.palm.token_emb.weight, std=0.3)
            table = torch.randn(len(CONTEXTS), NUM_ACTIONS)
        self.scores = (table - table.mean(dim=-1, keepdim=True)) / table.std(dim=-1, correction=0, keepdim=True)
        self.reference = self.distribution(self.palm)

    def distribution(self, palm: PaLM) -> Tensor:
        return palm(CONTEXTS)[:, -1].detach().double().softmax(dim=-1)

    def optimum(self, scores: Tensor) -> Tensor:
        """Reference * exp(scores), normalised."""
        return (self.reference.log() + scores).softmax(dim=-1)

    def pairs(self, label_of: Callable[[float], float]) -> list[Pair]:
        """All pairs of responses to each prompt, labelled by the difference of their scores."""
        return [
            Pair(
                chosen=Text(str(context), str(a)), rejected=Text(str(context), str(b)),
                preference=label_of(float(self.scores[context, a] - self.scores[context, b])),
            )
            for context in range(len(CONTEXTS))
            for a, b in combinations(range(NUM_ACTIONS), 2)
        ]  # fmt: skip

    def votes(self) -> list[Vote]:
        """A vote for each response: up for the upper half."""
        return [
            Vote(text=Text(str(context), str(action)), up=bool(score > self.scores[context].median()))
            for context in range(len(CONTEXTS))
            for action, score in enumerate(self.scores[context])
        ]

    def judge(self, sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        return self.scores[sequences[:, 0], sequences[:, 1]]

    def outcome(self, name: str, seed: int, palm: PaLM, *, optimum: Tensor | None, num_tokens: int) -> Outcome:
        policy, reference, scores = self.distribution(palm), self.reference, self.scores.double()
        return Outcome(
            name, seed,
            score_before=float((reference * scores).sum(dim=-1).mean()),
            score_after=float((policy * scores).sum(dim=-1).mean()),
            kl=float((policy * (policy / reference).log()).sum(dim=-1).mean()),
            distance_before=None if optimum is None else total_variation(reference, optimum),
            distance_after=None if optimum is None else total_variation(policy, optimum),
            num_tokens=num_tokens,
        )  # fmt: skip


def total_variation(policy: Tensor, optimum: Tensor) -> float:
    return float((policy - optimum).abs().sum(dim=-1).mean()) / 2


def digits(text: str) -> list[int]:
    """A tokenizer of digits, without special tokens."""
    return [int(letter) for letter in text]


def sigmoid(difference: float) -> float:
    return float(torch.tensor(difference, dtype=torch.float64).sigmoid())


def flipped(difference: float) -> float:
    return (1 - FLIPS) * sigmoid(difference) + FLIPS * (1 - sigmoid(difference))


LINEAR = 0.1  # label for a score difference of 1; six scores of deviation 1 are at most 3.5 apart
PAIR_LOSSES = {
    "dpo": (partial(dpo_loss, beta=BETA), sigmoid, 1 / BETA),
    "robust": (partial(robust_dpo_loss, beta=BETA, flip_rate=FLIPS), flipped, 1 / BETA),
    "ipo": (partial(ipo_loss, beta=0.2), lambda difference: 0.5 + LINEAR * difference, LINEAR / 0.2),
    "length-normalised": (partial(length_normalised_dpo_loss, beta=BETA), sigmoid, 1 / BETA),
    "hinge": (partial(hinge_loss, beta=BETA), sigmoid, None),
    "simpo": (partial(simpo_loss, beta=BETA, gamma=0.5), sigmoid, None),
}
OTHERS = ("kto", "rejection")


def run(name: str, seed: int, *, num_steps: int = 300) -> Outcome:
    """One algorithm on one bandit, whole copies of the weights being trained."""
    bandit = Bandit(seed)
    common = {"palm": bandit.palm, "lora": False, "lr": 1e-2, "seed": seed, "accelerate_kwargs": {"cpu": True}}
    quiet = {"use_tqdm": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tokenizer has no end token
        if name in PAIR_LOSSES:
            loss, label_of, scale = PAIR_LOSSES[name]
            pairs = bandit.pairs(label_of)
            trainer = DPOTrainer(pairs=pairs, tokenizer=digits, loss=loss, minibatch_size=len(pairs), **common)
            trainer.train(num_steps=num_steps, **quiet)
            optimum = None if scale is None else bandit.optimum(bandit.scores.double() * scale)
            palm, num_tokens = trainer.export_palm(), num_steps * 4 * len(pairs)
        elif name == "kto":
            votes, optimum = bandit.votes(), None
            trainer = KTOTrainer(votes=votes, tokenizer=digits, minibatch_size=len(votes), **common)
            trainer.train(num_steps=num_steps, **quiet)
            palm, num_tokens = trainer.export_palm(), num_steps * 4 * len(votes)
        else:
            rounds, prompts, samples = max(1, num_steps // 30), 64, 4
            sampler = RejectionTrainer(
                reward_model=bandit.judge, prompt_token_ids=CONTEXTS, num_samples=samples, minibatch_size=32, **common
            )
            sampler.train(rounds, prompts_per_round=prompts, max_new_tokens=1, **quiet)
            palm, optimum, num_tokens = sampler.export_palm(), None, rounds * prompts * samples * 2
    return bandit.outcome(name, seed, palm, optimum=optimum, num_tokens=num_tokens)


def table(outcomes: list[Outcome]) -> str:
    """Markdown, a line for each run."""
    lines = [
        "| algorithm | seed | score before | after | KL, nats | distance before | after | tokens | learnt |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        distances = [
            "-" if value is None else f"{value:.4f}" for value in (outcome.distance_before, outcome.distance_after)
        ]
        lines.append(
            f"| {outcome.name} | {outcome.seed} | {outcome.score_before:.3f} | {outcome.score_after:.3f} |"
            f" {outcome.kl:.3f} | {' | '.join(distances)} | {outcome.num_tokens:,} |"
            f" {'yes' if outcome.learnt else 'NO'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    names = (*PAIR_LOSSES, *OTHERS)
    outcomes = [run(name, seed, num_steps=args.steps) for name in names for seed in range(args.seeds)]
    print(table(outcomes))
    return 0 if all(outcome.learnt for outcome in outcomes) else 1


if __name__ == "__main__":
    raise SystemExit(main())
