"""Tasks that each online method has to get better at: sorting, steering sentiment, adding; `python -m tests.learning`.

    sort        a new model; the response must be the prompt's ids in order; score: share of places that are right
    sentiment   a model of a toy language writes on; score: a reward model of 400 votes, measured by another one
    arithmetic  a model of sums that has read wrong ones too; score: 1 for the right sum, else 0; measured on sums of
                which no response was learnt from

A run's score and KL are measured on responses of the model before and after training, drawn at temperature 1 with one
random state, by code of this file.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.group import DAPO, DR_GRPO, GRPO, GSPO, RLOO
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward.functions import Judge, ids_judge
from palm_rlhf_pytorch.reward.learning import train_reward_model
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text.records import Text, Vote
from palm_rlhf_pytorch.training.supervised import fit
from tests.learning.direct import Outcome

KL_COEF = 0.02
METHODS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "PPO": (RLHFTrainer, {"kl_coef": KL_COEF, "critic_lora": False, "epochs": 1, "missing_eos_penalty": None}),
    "GRPO": (GRPOTrainer, {"objective": GRPO}),
    "Dr. GRPO": (GRPOTrainer, {"objective": DR_GRPO}),
    "DAPO": (GRPOTrainer, {"objective": DAPO, "max_rounds": 3}),
    "RLOO": (GRPOTrainer, {"objective": replace(RLOO, kl_coef=KL_COEF), "group_size": 4}),
    "GSPO": (GRPOTrainer, {"objective": GSPO}),
}


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        palm: where the policy starts, and its reference.
        prompts: to learn from.
        test_prompts: to measure on.
        judge: what is learnt from.
        measure: what the score in the table is of.
        max_new_tokens: of a response.
        eos_token: what ends it.
        lr: learning rate of all weights.
        num_updates: how long the script learns.
    """

    palm: PaLM
    prompts: list[Tensor]
    test_prompts: list[Tensor]
    judge: Judge
    measure: Judge
    max_new_tokens: int
    eos_token: int | None
    lr: float
    num_updates: int


def run(name: str, method: str, seed: int, *, num_updates: int | None = None, batch: int = 128) -> Outcome:
    """Train one method on one task; scores and KL before and after."""
    task = TASKS[name](seed)
    before = measured(task, task.palm, seed)
    num_tokens = 0

    def judge(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        nonlocal num_tokens
        num_tokens += int(mask.sum())
        return task.judge(sequences, prompt_mask=prompt_mask, mask=mask)

    trainer, settings = METHODS[method]
    if trainer is RLHFTrainer:
        settings = settings | {"critic_lr": task.lr}
    made = trainer(
        palm=task.palm, reward_model=judge, prompt_token_ids=task.prompts, actor_lora=False, actor_lr=task.lr,
        minibatch_size=batch // 4, max_batch_size=batch, seed=seed, accelerate_kwargs={"cpu": True}, **settings,
    )  # fmt: skip
    made.train(
        (num_updates or task.num_updates) * batch, max_new_tokens=task.max_new_tokens, eos_token=task.eos_token,
        update_timesteps=batch, preflight=False, use_tqdm=False,
    )  # fmt: skip
    after = measured(task, made.export_palm(), seed)
    return Outcome(f"{name}: {method}", seed, before[0], after[0], after[1], None, None, num_tokens)


@torch.no_grad()
def measured(task: Task, palm: PaLM, seed: int, *, num_samples: int = 256) -> tuple[float, float]:
    """Mean score of responses to the test prompts, and their KL to the task's model, nats a response."""
    rows = [task.test_prompts[row % len(task.test_prompts)] for row in range(num_samples)]
    prompts, prompt_mask = pad_ragged(rows)
    drawn = generate_responses(
        palm, prompts, prompt_mask, max_new_tokens=task.max_new_tokens, eos_token=task.eos_token,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    texts = [torch.cat((row, ids[kept])) for row, ids, kept in zip(rows, drawn.tokens, drawn.mask, strict=True)]
    sequences, mask = pad_ragged(texts)
    prompt_mask = torch.arange(sequences.shape[1]) < torch.tensor([[len(row)] for row in rows])
    score = task.measure(sequences, prompt_mask=prompt_mask, mask=mask).double().mean()
    logits = (model(sequences, mask=mask)[:, :-1].double() for model in (palm, task.palm))
    policy, reference = (each.log_softmax(dim=-1) for each in logits)
    kl = (policy.exp() * (policy - reference)).sum(dim=-1) * (mask & ~prompt_mask)[:, 1:]
    return float(score), float(kl.sum(dim=-1).mean())


def new_palm(num_tokens: int, seed: int, *, dim: int = 32, depth: int = 2) -> PaLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PaLM(num_tokens=num_tokens, dim=dim, depth=depth, dim_head=dim // 2, heads=2)


def pretrained(palm: PaLM, texts: list[Tensor], *, num_steps: int, lr: float = 1e-2, batch: int = 64) -> PaLM:
    """The model after next-token steps on texts, each of which is read once; they are cut into batches in order."""
    batches = (pad_ragged(texts[start : start + batch]) for start in range(0, num_steps * batch, batch))
    fit(
        palm, ({"seq": seq, "mask": mask, "return_loss": True} for seq, mask in batches),
        num_steps=num_steps, lr=lr, warmup_steps=num_steps // 10, progress=False,
    )  # fmt: skip
    return palm.eval()


# sort

NUM_DIGITS, LENGTH = 5, 3


@cache
def sorting(seed: int) -> Task:
    """All rows of three ids, a new model."""
    prompts = [torch.tensor(ids) for ids in product(range(NUM_DIGITS), repeat=LENGTH)]
    judge = ids_judge(
        lambda prompts, responses: [
            float((prompt.sort().values == response).float().mean())
            for prompt, response in zip(prompts, responses, strict=True)
        ]
    )
    return Task(new_palm(NUM_DIGITS, seed), prompts, prompts, judge, judge, LENGTH, None, lr=6e-3, num_updates=60)


# sentiment

GOOD, BAD = "good great lovely funny warm".split(), "bad awful dull weak clumsy".split()
WORDS = [".", "the", "film", "plot", "cast", "end", "is", "was", "and", "very", "quite", *GOOD, *BAD]
IDS = {word: number for number, word in enumerate(WORDS)}


def words(text: str) -> list[int]:
    """A tokenizer of words."""
    return [IDS[word] for word in text.split()]


def sentence(chance: random.Random) -> str:
    clauses = [
        [
            "the", chance.choice(["film", "plot", "cast", "end"]), chance.choice(["is", "was"]),
            *chance.choice([[], ["very"], ["quite"]]), chance.choice(GOOD + BAD),
        ]
        for _ in range(chance.choice([1, 2, 2]))
    ]  # fmt: skip
    return " and ".join(" ".join(clause) for clause in clauses)


def liking(text: str) -> int:
    """Good words less bad ones."""
    return sum((word in GOOD) - (word in BAD) for word in text.split())


@cache
def sentiment(seed: int) -> Task:
    """Go on after "the film": a reward model of 400 votes says how much it is liked, another one measures."""
    chance = random.Random(seed)
    texts = [torch.tensor([*words(sentence(chance)), IDS["."]]) for _ in range(80 * 64)]
    palm = pretrained(new_palm(len(WORDS), seed), texts, num_steps=80)
    judge, measure = (reward_model(palm, chance, seed=2 * seed + number) for number in range(2))
    prompts = [torch.tensor(words(f"the {noun}")) for noun in ("film", "plot", "cast", "end")]
    return Task(palm, prompts, prompts, judge, measure, 12, IDS["."], lr=1e-3, num_updates=20)


def reward_model(palm: PaLM, chance: random.Random, *, seed: int) -> RewardModel:
    votes = []
    while len(votes) < 400:
        text = sentence(chance)
        if (liked := liking(text)) != 0:
            *prompt, rest = text.split(maxsplit=2)
            votes.append(Vote(text=Text(" ".join(prompt), rest), up=liked > 0))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = RewardModel(palm, use_lora=False)
        train_reward_model(model, votes, words, eos_token=IDS["."], epochs=3, lr=3e-3, progress=False, seed=seed)
    return model.eval()


# arithmetic

PLUS, EQUALS, END = 10, 11, 12


def digits_of(number: int) -> list[int]:
    return [int(letter) for letter in str(number)]


def said(ids: list[int]) -> int | None:
    """The number that a response says, if it is nothing but a number and its end."""
    *digits, last = ids or [0]
    if last != END or not 1 <= len(digits) <= 3 or max(digits) > 9:
        return None
    return int("".join(map(str, digits)))


@cache
def arithmetic(seed: int) -> Task:
    """Sums of two digits, by a model that has read right ones, and then a third as many, half of them wrong."""
    chance = random.Random(seed)
    pairs = list(product(range(10), repeat=2))
    prompts = {pair: torch.tensor([pair[0], PLUS, pair[1], EQUALS]) for pair in chance.sample(pairs, len(pairs))}
    texts = []
    for number in range(200 * 64):
        first, second = chance.choice(pairs)
        wrong = number >= 150 * 64 and chance.random() < 0.5
        told = chance.randint(0, 18) if wrong else first + second
        texts.append(torch.cat((prompts[first, second], torch.tensor([*digits_of(told), END]))))
    palm = pretrained(new_palm(13, seed), texts, num_steps=200)

    def right(prompts: list[Tensor], responses: list[Tensor]) -> list[float]:
        sums = [int(prompt[0] + prompt[2]) for prompt in prompts]
        return [float(said(response.tolist()) == told) for told, response in zip(sums, responses, strict=True)]

    judge, listed = ids_judge(right), list(prompts.values())
    return Task(palm, listed[20:], listed[:20], judge, judge, 3, END, lr=2e-3, num_updates=40)


TASKS: dict[str, Callable[[int], Task]] = {"sort": sorting, "sentiment": sentiment, "arithmetic": arithmetic}
