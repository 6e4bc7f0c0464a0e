"""Real pieces of each phase of an update, run on a trainer's own models and device, for their bytes and seconds.

A piece is a few decoding steps of a real batch, or one real pass. Its time is multiplied by what an update will have of
it; its tensors are counted while they live. Responses are taken to be as long as they may be. Nothing is learnt:
weights, gradients, optimizer, counters and random states stay as they are.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import mean, median
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.objectives.group import Counts
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.footprint import LiveBytes, clock
from palm_rlhf_pytorch.policy.judging import Judge, evaluating
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.prompts import Prompts
from palm_rlhf_pytorch.policy.rollout import recorded
from palm_rlhf_pytorch.policy.settings import PolicySettings
from palm_rlhf_pytorch.policy.targets import Targets
from palm_rlhf_pytorch.reward.weighted import JudgeSum
from palm_rlhf_pytorch.tensors import lengths_to_mask, split_rows
from palm_rlhf_pytorch.training.optimizer import adamw

STEPS, WARM_STEPS = 20, 4  # decoding steps of a piece, enough that weights are packed for them; those not timed
ROUNDS, ENOUGH_SECONDS = 5, 0.5  # a piece is timed so often, less often once that has taken so long
STEP_NUMBERS = 2**22  # trained numbers that the optimizer is timed on: 64 MiB of copies at most


class Phase(NamedTuple):
    """A phase of an update: the most bytes it holds at once beside the models, and its seconds in one update."""

    name: str
    bytes: int
    seconds: float


class Trainer(Protocol):
    """What of a trainer is planned with."""

    accelerator: Accelerator
    actor_critic: ActorCritic
    learner: Learner
    prompts: Prompts
    reward_model: Judge
    held_out_judge: Judge | None
    settings: PolicySettings


class Text(NamedTuple):
    """A sequence to come: its prompt's row, and how many tokens prompt and response have."""

    row: int
    prompt: int
    response: int


Texts = Sequence[Text]


class Pieces:
    """Runs a piece of each phase: once to count bytes, which warms up too, then for the time."""

    def __init__(self, trainer: Trainer, texts: Texts, upcoming: Sequence[Texts], temperature: float) -> None:
        self.trainer, self.settings, self.temperature = trainer, trainer.settings, temperature
        self.accelerator, self.device = trainer.accelerator, trainer.accelerator.device
        ranks, self.live = self.accelerator.num_processes, LiveBytes(self.device)
        self.share = -(-len(upcoming[0]) // ranks)
        self.upcoming = [update[: self.share] for update in upcoming]
        self.older = [  # updates whose responses are learnt from again in each, as far as the run has had them
            self.upcoming[max(0, number - self.settings.stale_updates) : number] for number in range(len(upcoming))
        ]
        self.lessons = [
            [text for update in (*older, fresh) for text in update]
            for older, fresh in zip(self.older, self.upcoming, strict=True)
        ]
        most = max(map(len, self.lessons))
        self.longest, self.longest_lesson = _longest(texts, self.share), _longest(texts, most)  # in any update
        self.rows = min(self.share, self.settings.max_batch_size)
        self.minibatch = min(most, max(1, self.settings.minibatch_size // ranks))
        self.generator = torch.Generator(self.device).manual_seed(0)
        # whether an optimizer step has passes that find the gradients of others
        self.accumulates = len(self._passes(self.longest_lesson[: self.minibatch], self.minibatch)) > 1

    def learning_bytes(self, texts: Texts) -> int:
        """Most bytes of tensors in one pass over these texts, forward and backward."""
        reading = self._reading(texts)
        with self.live:
            self._learn(reading)
        return self.live.most

    def phases(self) -> list[Phase]:
        """Those of an update, in their order."""
        generate = self._generate()
        observe = self._phase("observe", self._observe, self.longest, self.upcoming, at_once=self.rows)
        score = self._phase("score", self._score, self.longest, self.upcoming, at_once=self.share)
        learn = self._phase("learn", self._learn, self.longest_lesson, self.lessons, at_once=self.minibatch)
        _drop_gradients(self.trainer)
        steps = mean(-(-len(lesson) // self.minibatch) for lesson in self.lessons)
        old = [update for older in self.older for update in older]  # read anew before they are learnt from
        reread = observe.seconds * self._work(old, self.share) / self._work(self.upcoming, self.rows)
        learning = self.settings.epochs * (learn.seconds + steps * self._step_seconds())
        return [generate, observe, score, learn._replace(seconds=reread + learning)]

    def _phase(
        self, name: str, run: Callable[[dict[str, Any]], None], longest: Texts, updates: Sequence[Texts], *,
        at_once: int,
    ) -> Phase:  # fmt: skip
        """Bytes of the largest pass, and an update's seconds; at_once is how many rows are cut into passes together."""
        reading = self._reading(max(self._passes(longest, at_once), key=_padded))
        with self.live:
            for _ in range(2 if name == "learn" and self.accumulates else 1):
                run(reading)
        most = self.live.most
        del reading
        typical = max(self._passes(updates[-1], at_once), key=_padded)
        spent = self._median_seconds(partial(run, self._reading(typical)))
        return Phase(name, most, spent * self._work(updates, at_once) / len(updates) / _padded(typical))

    def _work(self, updates: Sequence[Texts], at_once: int) -> int:
        """Tokens of all passes over some updates, padding included."""
        return sum(_padded(part) for update in updates for part in self._passes(update, at_once))

    def _passes(self, texts: Texts, at_once: int) -> list[Texts]:
        """Cut texts into those of one pass over whole sequences."""
        limits = {"max_rows": self.settings.max_batch_size, "max_tokens": self.settings.max_batch_tokens}
        groups = [texts[start : start + at_once] for start in range(0, len(texts), at_once)]
        return [
            [group[row] for row in rows] for group in groups for rows in split_rows([*map(_total, group)], **limits)
        ]

    def _reading(self, texts: Texts) -> dict[str, Any]:
        """What ActorCritic reads: prompts with responses of random tokens."""
        (ids, mask), (_, prompts, responses) = self._prompts(texts), torch.tensor(texts, device=self.device).T
        sequences = self._random_ids(len(texts), max(map(_total, texts)))
        sequences[:, : ids.shape[1]] = torch.where(mask, ids, sequences[:, : ids.shape[1]])
        return {
            "sequences": sequences, "prompt_lengths": prompts, "response_length": _widths(texts)[1],
            "lengths": responses, "num_tokens": int(responses.sum()), "temperature": self.temperature,
        }  # fmt: skip

    def _prompts(self, texts: Texts) -> tuple[Tensor, Tensor]:
        ids, _ = self.trainer.prompts.select(torch.tensor([text.row for text in texts]))
        lengths = torch.tensor([text.prompt for text in texts])  # those of the prompts, or less
        width = int(lengths.max())
        return ids[:, :width].to(self.device), lengths_to_mask(lengths, width).to(self.device)

    def _random_ids(self, *shape: int) -> Tensor:
        most = self.trainer.actor_critic.palm.num_tokens
        return torch.randint(most, shape, generator=self.generator, device=self.device)

    def _observe(self, reading: dict[str, Any]) -> None:
        with self.accelerator.autocast():
            self.trainer.actor_critic.observe(**reading)

    @torch.no_grad()
    def _score(self, reading: dict[str, Any]) -> None:
        sequences, prompts, responses = (reading[name] for name in ("sequences", "prompt_lengths", "lengths"))
        prompt_mask, mask = (lengths_to_mask(n, sequences.shape[1]) for n in (prompts, prompts + responses))
        for judge in (self.trainer.reward_model, self.trainer.held_out_judge):
            if judge is not None:
                asked = judge.raw() if isinstance(judge, JudgeSum) and not judge.is_fitted else judge
                with evaluating(judge):
                    asked(sequences, prompt_mask=prompt_mask, mask=mask)

    def _learn(self, reading: dict[str, Any]) -> None:
        """Forward and backward pass by the losses that learning takes."""
        loss, model = self.trainer.learner.loss, self.trainer.learner.model.train()
        if not self.accumulates:
            _drop_gradients(self.trainer)
        with self.accelerator.autocast():
            out = model(**reading, entropy_grad=loss.entropy_grad, kl_grad=loss.kl_grad)
        mask, ones = lengths_to_mask(reading["lengths"], reading["response_length"]), torch.ones_like(out.values)
        seen = {"logprobs": out.logprobs.detach(), "ref_logprobs": out.logprobs.detach(), "values": out.values.detach()}
        rollout = recorded(reading["sequences"], reading["prompt_lengths"], reading["lengths"], temperature=1.0, **seen)
        targets = Targets(ones, ones, ones, ones)
        counts = Counts(mask.sum(), torch.tensor(len(mask), device=mask.device))
        found = loss(out, rollout, targets, mask, counts)
        self.accelerator.backward(found.policy + found.value)

    def _step_seconds(self) -> float:
        """Of clipping and AdamW's step, from copies of as many trained numbers as are allowed."""
        trained, copies, left = trained_by(self.trainer), [], STEP_NUMBERS
        for parameter in trained:
            if left > 0:
                copies.append(nn.Parameter(parameter.detach().flatten()[:left].clone()))
                copies[-1].grad = torch.ones_like(copies[-1])
                left -= copies[-1].numel()
        optimizer = adamw([{"params": copies}], lr=1e-4)

        def step() -> None:
            nn.utils.clip_grad_norm_(copies, 1.0)
            optimizer.step()

        step()
        share = sum(part.numel() for part in copies) / sum(parameter.numel() for parameter in trained)
        return self._median_seconds(step) / share

    def _generate(self) -> Phase:
        """From the first steps after real prompts, and from steps where the last ones will be."""
        largest = max(self._batches(self.longest), key=lambda texts: len(texts) * sum(_widths(texts)))
        early, late = (self._decode(largest, late=late, count=True) for late in (False, True))
        most = max(early.most + max(0, late.end - early.end), late.most)  # the first steps with room for all
        batches = [self._batches(update) for update in self.upcoming]
        timed = batches[0][0]
        rounds: list[tuple[_Decoding, _Decoding]] = []
        while len(rounds) < ROUNDS and sum(first.setup for first, _ in rounds) < ENOUGH_SECONDS:
            rounds.append((self._decode(timed, late=False), self._decode(timed, late=True)))
        setup = median(first.setup for first, _ in rounds) / sum(text.prompt for text in timed)
        step = median(first.step + last.step for first, last in rounds) / 2 / len(timed)  # grows with the context
        spent = 0.0
        for texts in (texts for update in batches for texts in update):
            spent += setup * sum(text.prompt for text in texts) + step * len(texts) * (_widths(texts)[1] - 1)
        return Phase("generate", most, spent / len(batches))

    def _batches(self, texts: Texts) -> list[Texts]:
        """Texts that are generated together."""
        return [[texts[row] for row in rows] for rows in split_rows([t.prompt for t in texts], max_rows=self.rows)]

    def _decode(self, texts: Texts, *, late: bool, count: bool = False) -> "_Decoding":
        """A few steps of a batch, the first or the last; these come after one long prompt for all rows, read once."""
        width, room = _widths(texts)
        steps = min(STEPS, room)
        warm = WARM_STEPS if steps > 2 * WARM_STEPS else 1
        prompts, mask = self._prompts(texts)
        if late:
            length = int(min(width + room, self.trainer.actor_critic.palm.max_length)) - steps
            prompts, mask = self._random_ids(1, length).expand(len(texts), -1), mask.new_ones(len(texts), length)
        live, ends, marks = self.live, [0], [clock(self.device)]

        def on_step() -> None:
            marks.append(clock(self.device) if len(marks) in (1, warm, steps) else 0.0)
            ends.append(live.now)
            if late and len(marks) == 2:
                live.most = live.now  # to read so long a prompt is no part of the run

        with live if count else nullcontext(), self.accelerator.autocast():
            self.trainer.actor_critic.generate(
                prompts, mask, max_new_tokens=steps, temperature=self.temperature, generator=self.generator,
                on_step=on_step,
            )  # fmt: skip
        return _Decoding(marks[1] - marks[0], (marks[-1] - marks[warm]) / max(1, steps - warm), live.most, ends[-1])

    def _median_seconds(self, run: Callable[[], None]) -> float:
        found: list[float] = []
        while len(found) < ROUNDS and sum(found) < ENOUGH_SECONDS:
            started = clock(self.device)
            run()
            found.append(clock(self.device) - started)
        return median(found)


class _Decoding(NamedTuple):
    """Seconds until the first token and of a later one; bytes at most and in the end."""

    setup: float
    step: float
    most: int
    end: int


@contextmanager
def left_as_found(trainer: Trainer) -> Iterator[None]:
    """Eval mode and no gradients inside; these, modes and random states are put back afterwards."""
    device, states = trainer.accelerator.device, (random.getstate(), np.random.get_state())  # a judge may draw
    gradients = [(parameter, parameter.grad) for parameter in trainer.actor_critic.parameters()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(trainer.learner.model):
            _drop_gradients(trainer)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _drop_gradients(trainer: Trainer) -> None:
    for parameter in trainer.actor_critic.parameters():
        parameter.grad = None


def trained_by(trainer: Trainer) -> list[nn.Parameter]:
    """What the optimizer holds."""
    return [*trainer.learner.actor.values(), *trainer.learner.critic.values()]


def _longest(texts: Texts, count: int) -> Texts:
    """The longest texts first, each as often as it may come among so many."""
    return sorted([*texts] * -(-count // len(texts)), key=_total, reverse=True)


def _total(text: Text) -> int:
    return text.prompt + text.response


def _padded(texts: Texts) -> int:
    return len(texts) * max(map(_total, texts))


def _widths(texts: Texts) -> tuple[int, int]:
    """The longest prompt and the longest response."""
    return max(text.prompt for text in texts), max(text.response for text in texts)
