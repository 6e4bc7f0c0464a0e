"""The plan: counts by hand, a run that goes on as if nothing had been planned; times only of a clock made by hand."""

import hashlib
import random
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy import pieces
from palm_rlhf_pytorch.policy.footprint import LiveBytes
from palm_rlhf_pytorch.policy.pieces import Phase
from palm_rlhf_pytorch.policy.plan import Plan, memory_to_learn, plan
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer

# conftest's palm: embedding, two layers (norm, 3 queries, key, value and 2 x 24 in, 18 + 24 out), norm
WEIGHTS = 13 * 12 + 2 * (12 + 12 * (18 + 6 + 6 + 48) + (18 + 24) * 12) + 12
PER_RANK = 2 * ((12 + 18) + (12 + 6) + (12 + 6) + (18 + 12))  # of an adapter: q, k, v and o in two layers
HEAD = 12 + 1


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    monkeypatch.setattr(pieces, "ROUNDS", 1)


def equal_prompts(number: int, length: int) -> Tensor:
    return torch.randint(13, (number, length), generator=torch.Generator().manual_seed(2))


def by_name(found: Plan) -> dict[str, Phase]:
    return {phase.name: phase for phase in found.phases}


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"actor_lora_r": 2, "critic_lora_r": 3}, (2 + 3) * PER_RANK + HEAD),
        ({"actor_lora": False, "critic_lora_r": 3}, WEIGHTS + 3 * PER_RANK + HEAD),
        ({"actor_lora": False, "critic_lora": False}, 2 * WEIGHTS + HEAD),
    ],
)
def test_models_are_weights_once_and_two_moments_a_trained_number(make_trainer, options, trained):
    phases = by_name(plan(make_trainer(**options), 5, max_new_tokens=2))
    assert phases["models"] == ("models", 4 * (WEIGHTS + trained) + 8 * trained, 0.0)
    assert phases["learn"].bytes > 4 * trained  # gradients and more


@pytest.mark.parametrize(
    ("lengths", "responses"), [({"max_new_tokens": 4}, 5 * 4), ({"max_seq_len": 8}, 3 + 7 + 6 + 5 + 4)]
)
def test_updates_and_experience_on_disk(make_trainer, lengths, responses):
    found = plan(make_trainer(), 12, update_timesteps=5, **lengths)
    assert found.updates == 3  # of 5, 5 and 2 responses
    # a token, a record, the file's header, the scores' header and checksum, a score
    assert found.disk_bytes == 4 * (5 + 1 + 2 + 3 + 4) + 24 * responses + 52 * 5 + 32 + 24 + 4 * 5
    assert found.seconds == pytest.approx(found.seconds_per_update * 12 / 5)


def test_times_are_those_of_the_pieces_by_the_passes_there_will_be(make_trainer, monkeypatch):
    ticks = count()
    monkeypatch.setattr(pieces, "clock", lambda device: float(next(ticks)))  # whatever is timed takes a second
    trainer = make_trainer(
        prompt_token_ids=equal_prompts(5, 2), max_batch_size=3, minibatch_size=4, max_batch_tokens=12, epochs=2
    )
    found = plan(trainer, 12, update_timesteps=5, max_new_tokens=3)
    seconds = {phase.name: phase.seconds for phase in found.phases}
    # rows of 5 tokens, two at most in a pass: generated as 3 + 2, read as 2 + 1, 2; scored and learnt as 2 + 2 + 1
    assert seconds["observe"] == seconds["score"] == pytest.approx(5 / 2)
    assert seconds["learn"] == pytest.approx(2 * (5 / 2 + 2))  # two epochs of these and of two optimizer steps
    # a second for the prompts of 3 rows, then a second for their 2 other tokens
    assert seconds["generate"] == pytest.approx(5 / 3 + 5 / 3)
    assert found.seconds_per_update == pytest.approx(5 + 9 + 10 / 3)


def test_experience_on_disk_is_what_an_update_leaves_there(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path, keep_experience=2)
    expected = plan(trainer, 10, update_timesteps=5, max_new_tokens=3).disk_bytes
    trainer.train(10, update_timesteps=5, max_new_tokens=3, preflight=False, use_tqdm=False)
    for update in (0, 1):
        files = [*(tmp_path / "experience").glob(f"update-{update:08d}.*")]
        assert len(files) == 2 and sum(file.stat().st_size for file in files) == expected


def test_old_responses_are_read_anew_and_learnt_from_again(make_trainer, monkeypatch):
    ticks = count()
    monkeypatch.setattr(pieces, "clock", lambda device: float(next(ticks)))
    trainer = make_trainer(
        prompt_token_ids=equal_prompts(5, 2), max_batch_size=3, minibatch_size=4, max_batch_tokens=12, epochs=2,
        max_staleness=2,
    )  # fmt: skip
    seconds = {phase.name: phase.seconds for phase in plan(trainer, 20, update_timesteps=5, max_new_tokens=3).phases}
    assert seconds["observe"] == seconds["score"] == pytest.approx(5 / 2)
    # four updates learn from 5, 10, 15 and 15 rows, two a pass, in 2, 3, 4 and 4 steps; 25 rows in all are old ones
    assert seconds["learn"] == pytest.approx(25 / 4 / 2 + 2 * (45 / 4 / 2 + 13 / 4))


def test_a_minibatch_of_old_and_new_responses_holds_as_much_as_one_of_so_many_new(make_trainer):
    options = {"prompt_token_ids": equal_prompts(15, 2), "minibatch_size": 15, "max_batch_tokens": 99}
    held = [
        by_name(plan(make_trainer(**options, max_staleness=staleness), 15, update_timesteps=size, max_new_tokens=3))
        for staleness, size in ((2, 5), (0, 15), (0, 5))
    ]
    mixed, new, few = (phases["learn"].bytes for phases in held)
    assert mixed == new > 2 * few
    assert held[0]["generate"].bytes == held[2]["generate"].bytes < held[1]["generate"].bytes


class Slow(torch.nn.Module):
    """A judge that takes its time, of a clock made by hand."""

    def __init__(self, seconds: float, now: list[float]) -> None:
        super().__init__()
        self.seconds, self.now, self.table = seconds, now, torch.nn.Parameter(torch.zeros(7, 11))

    def forward(self, sequences: Tensor, **masks: Tensor) -> Tensor:
        self.now[0] += self.seconds
        return sequences.sum(dim=-1).float()


def test_a_held_out_judge_costs_its_calls_and_its_weights(make_trainer, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pieces, "clock", lambda device: now[0])
    options = {"prompt_token_ids": equal_prompts(5, 2), "max_batch_tokens": 12, "reward_model": Slow(1.0, now)}
    alone, both = (
        by_name(plan(make_trainer(**options, held_out_judge=other), 5, max_new_tokens=3))
        for other in (None, Slow(3.0, now))
    )
    # five rows, two a call
    assert (alone["score"].seconds, both["score"].seconds) == pytest.approx((5 / 2, (1 + 3) * 5 / 2))
    assert both["models"].bytes - alone["models"].bytes == 4 * 7 * 11


def noisy_judge(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
    return torch.rand(len(sequences)) + random.random() + np.random.rand() + (mask & ~prompt_mask).sum(dim=-1)


def digest(trainer: RLHFTrainer) -> str:
    """Of everything that a run could notice."""
    seen = hashlib.sha256()
    optimizer = trainer.learner.optimizer
    for name, parameter in trainer.actor_critic.named_parameters():
        state = optimizer.state.get(parameter, {})
        for tensor in (parameter, parameter.grad, *(state[key] for key in sorted(state))):
            seen.update(f"{name} {None if tensor is None else tensor.tolist()}".encode())
    counters = [trainer.prompts.taken, trainer.rollouts, trainer.episodes, trainer.updates, trainer.learner.steps]
    rates = [group["lr"] for group in optimizer.param_groups]
    modes = [part.training for part in trainer.actor_critic.modules()]
    words, place = np.random.get_state()[1:3]
    randoms = (random.getstate(), words.tolist(), place, torch.get_rng_state().tolist())
    seen.update(repr((counters, rates, modes, randoms, trainer.normalizer.state())).encode())
    return seen.hexdigest()


@pytest.mark.filterwarnings("ignore:actor_dropout")
def test_a_plan_leaves_everything_as_it_was(make_trainer):
    judges = {"reward_model": noisy_judge, "held_out_judge": noisy_judge}
    options = judges | {"max_staleness": 1, "actor_dropout": 0.2, "critic_dropout": 0.1, "entropy_coef": 0.01}
    trainer = make_trainer(**options, max_batch_tokens=12, dual_clip=3.0)
    trainer.train(5, max_new_tokens=3, use_tqdm=False)
    trainer.actor_critic.value_head.weight.grad = torch.ones(1, 12)  # someone's own, to be found again
    trainer.actor_critic.actor.eval()
    before = digest(trainer)
    plan(trainer, 7, max_new_tokens=4)
    assert digest(trainer) == before


def test_bytes_grow_with_the_response_and_shrink_with_checkpointing(make_trainer, make_palm):
    def held(new_tokens: int, **options: object) -> dict[str, int]:
        trainer = make_trainer(make_palm(depth=3), **options)
        return {phase.name: phase.bytes for phase in plan(trainer, 5, max_new_tokens=new_tokens).phases}

    short, long, recomputed = held(17), held(33), held(33, activation_checkpointing=True)
    assert short["models"] == long["models"] == recomputed["models"]
    assert all(short[name] < long[name] for name in ("generate", "observe", "learn"))
    assert recomputed["learn"] < long["learn"]


def test_cache_of_generation_is_counted_at_its_full_length(make_trainer):
    """30 more tokens a row are so many keys and values more in each layer, though few steps are taken."""
    trainer = make_trainer(prompt_token_ids=equal_prompts(3, 7))
    more, less = (by_name(plan(trainer, 3, max_new_tokens=new))["generate"].bytes for new in (330, 300))
    cache = 3 * 30 * 2 * (6 + 6) * 4
    assert cache <= more - less < 1.5 * cache  # rotations of the new positions are the rest


def test_time_and_updates_grow_with_the_episodes(make_trainer, monkeypatch):
    ticks = count()
    monkeypatch.setattr(pieces, "clock", lambda device: float(next(ticks)))
    trainer = make_trainer()
    few, more, many = (plan(trainer, number, max_new_tokens=3, update_timesteps=5) for number in (5, 7, 12))
    assert few.updates < more.updates < many.updates
    assert few.seconds < more.seconds < many.seconds


def test_live_bytes_are_counted_while_tensors_live():
    with LiveBytes(torch.device("cpu")) as live:
        first = torch.zeros(100)
        views = first.view(10, 10).t()[2:]
        first += 1
        assert live.now == 400
        del first
        assert live.now == 400  # the view holds it
        second = torch.ones(7, dtype=torch.float64, requires_grad=True)
        kept = second.exp()  # the graph keeps the result
        total = kept.sum()
        del kept, views
        assert live.now == 56 + 56 + 8
        del total
        assert live.now == 56
    assert live.most == 400 + 56 + 56 + 8


def test_table_is_readable():
    phases = [Phase("models", 2_560_000_000, 0.0), Phase("generate", 999, 1.234), Phase("learn", 31_000_000, 300.0)]
    found = Plan(
        phases, updates=1_563, seconds_per_update=301.2, seconds=470_000.0, peak_bytes=4_100_000_000,
        device_bytes=3_000_000_000, disk_bytes=28_672,
    )  # fmt: skip
    assert found.table().splitlines() == [
        "phase         memory   time an update",
        "models       2.56 GB",
        "generate       999 B           1.23 s",
        "learn          31 MB            5 min",
        "peak memory: 4.1 GB of 3 GB: it does not fit; lower max_batch_tokens, max_batch_size or max_seq_len",
        "time: 130.6 h, 1,563 x 5 min",
        "experience on disk: 28.7 kB an update",
    ]
    assert "fit" not in found._replace(device_bytes=5_000_000_000).table()
    assert "peak memory: 4.1 GB\n" in found._replace(device_bytes=0).table()


def test_what_train_refuses_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_seq_len"):
        plan(make_trainer(), 5, max_seq_len=5)


def test_memory_to_learn_grows_with_the_pass_by_what_a_token_holds(make_trainer):
    trainer = make_trainer(prompt_token_ids=equal_prompts(3, 5), max_batch_tokens=10**6, minibatch_size=7)
    found = {length: memory_to_learn(trainer, max_seq_len=length) for length in (200, 400, 800)}
    needed = {length: figures[0] for length, figures in found.items()}
    assert needed[200] < needed[400] < needed[800]
    # seven rows; each token holds at least the inputs of two layers for each of actor and critic, 12 float32 each
    assert needed[800] - needed[400] > 7 * 400 * 2 * 2 * 12 * 4
    assert all(available > 0 for _, available in found.values())
    bounded = make_trainer(prompt_token_ids=equal_prompts(3, 5), max_batch_tokens=400, minibatch_size=7)
    assert memory_to_learn(bounded, max_seq_len=400)[0] < needed[400]
