"""Rollouts: one record a token, aligned and masked, whose ratio is 1 before the first optimizer step."""

import pytest
import torch

from palm_rlhf_pytorch.logprobs import logprobs_of
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.rollout import Prompting, Rollout, collect_rollout, row_batches
from palm_rlhf_pytorch.tensors import pad_ragged

EOS = 7
PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9], [3, 2], [3, 8, 4], [6])]


def sample(actor_critic, prompts, mask, budgets, *, temperature=1.0, eos_token=EOS, batch=64, tokens=9999, seed=0):
    """A rollout whose batches draw one after the other from one random state."""
    generator = torch.Generator().manual_seed(seed)
    prompting = Prompting(prompts, mask, torch.arange(len(prompts)), budgets, temperature, eos_token)
    return collect_rollout(
        actor_critic, prompting, generator=lambda number: generator, version=3, max_batch_size=batch,
        max_batch_tokens=tokens,
    )  # fmt: skip


def collect(actor_critic, *, rows=8, left=False, budget=6, **options):
    prompts, mask = pad_ragged(PROMPTS[:rows], left=left)
    budgets = budget if isinstance(budget, torch.Tensor) else torch.full((rows,), budget)
    return sample(actor_critic, prompts, mask, budgets, **options)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_ratio_is_one_before_the_first_step(make_palm, move, lora, left, rows, temperature, flash_attn):
    palm = make_palm(attn_dropout=0.3, ff_dropout=0.3, flash_attn=flash_attn)
    actor_critic = move(ActorCritic(palm, actor_lora=lora, critic_lora=lora)).train()
    rollout = collect(actor_critic, rows=rows, left=left, temperature=temperature)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.05
    assert (rollout.logprobs - rollout.sampler_logprobs).abs().max() < 1e-4  # cached, one token a step
    for part in (rollout, rollout.select(torch.arange(rows).flip(0)), rollout.select(torch.tensor([rows - 1]))):
        steps = part.response_mask.shape[1]
        out = actor_critic(part.sequences, part.prompt_lengths, steps, temperature=temperature)
        ratio = ((out.logprobs - part.logprobs) * part.response_mask).exp()
        assert (ratio - 1).abs().max() < 1e-4
        assert ((out.values - part.values) * part.response_mask).abs().max() < 1e-4


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_to_the_reference_is_exactly_zero_before_training(make_palm, lora, temperature):
    rollout = collect(ActorCritic(make_palm(), actor_lora=lora, critic_lora=lora), temperature=temperature)
    assert torch.equal(rollout.logprobs, rollout.ref_logprobs)


def test_every_number_belongs_to_its_token(make_palm, move):
    palm = make_palm()
    actor_critic = move(ActorCritic(palm))
    better = actor_critic.export_palm()
    rollout = collect(actor_critic, temperature=0.7)
    for row, prompt in enumerate(PROMPTS):
        length = int(rollout.lengths[row])
        whole = rollout.sequences[row, : len(prompt) + length]
        assert torch.equal(whole[: len(prompt)], prompt)
        for model, found in ((better, rollout.logprobs), (palm, rollout.ref_logprobs)):
            logits = model(whole[None])[0, len(prompt) - 1 : -1]
            expected = logprobs_of(logits, whole[len(prompt) :], temperature=0.7)
            torch.testing.assert_close(found[row, :length], expected, atol=1e-4, rtol=0)
            assert not found[row, length:].any()


def test_masks_tell_prompt_from_response_from_padding(make_palm):
    rollout = collect(ActorCritic(make_palm()))
    assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in PROMPTS]
    assert torch.equal(rollout.prompt_mask.sum(-1), rollout.prompt_lengths)
    assert torch.equal((rollout.mask & ~rollout.prompt_mask).sum(-1), rollout.lengths)
    assert int(rollout.mask.sum(-1).max()) == rollout.sequences.shape[1]
    assert int(rollout.lengths.max()) == rollout.response_mask.shape[1]
    assert not rollout.sequences[~rollout.mask].any()
    assert not rollout.response_mask.int().diff(dim=-1).gt(0).any()  # True places come first


def test_response_stops_at_its_own_eos_never_at_the_prompts(make_palm):
    palm = make_palm()
    prompts = [torch.tensor([EOS, EOS, 3]), torch.tensor([EOS])]
    ids, mask = pad_ragged(prompts)
    rollouts = [
        sample(ActorCritic(palm), ids, mask, torch.tensor([9, 9]), temperature=1.5, batch=2, seed=seed)
        for seed in range(30)
    ]
    lengths = torch.cat([rollout.lengths for rollout in rollouts])
    assert lengths.max() == 9 and lengths.min() < 9
    for rollout in rollouts:
        for row, prompt in enumerate(prompts):
            response = rollout.sequences[row, len(prompt) :][: int(rollout.lengths[row])].tolist()
            assert EOS not in response[:-1]
            assert (response[-1] == EOS) == bool(rollout.ended[row])
            assert bool(rollout.ended[row]) or len(response) == 9


def test_each_row_keeps_its_own_budget(make_palm):
    budget = torch.tensor([1, 6, 5, 4, 3, 5, 2, 6])
    rollout = collect(ActorCritic(make_palm()), budget=budget, eos_token=None)
    assert torch.equal(rollout.lengths, budget)
    assert not rollout.ended.any()


@pytest.mark.parametrize("left", [True, False])
def test_wider_padding_changes_nothing(make_palm, move, left):
    actor_critic = move(ActorCritic(make_palm()))
    narrow, mask = pad_ragged(PROMPTS, left=left)
    pad = (4, 0) if left else (0, 4)
    wide, wide_mask = (torch.nn.functional.pad(tensor, pad) for tensor in (narrow, mask))
    rollouts = [
        sample(actor_critic, ids, real, torch.full((8,), 5), batch=8)
        for ids, real in ((narrow, mask), (wide, wide_mask))
    ]
    for first, second in zip(rollouts[0][:8], rollouts[1][:8], strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_sampled_tokens_follow_the_distribution_that_is_stored(make_palm):
    palm = make_palm(num_tokens=5, depth=1)
    ids = torch.full((4000, 1), 2)
    rollout = sample(
        ActorCritic(palm), ids, torch.ones_like(ids, dtype=torch.bool), torch.ones(4000).long(), temperature=0.7,
        eos_token=None, batch=4000,
    )  # fmt: skip
    counts = torch.bincount(rollout.sequences[:, 1], minlength=5) / 4000
    expected = (palm(torch.tensor([[2]]))[0, 0] / 0.7).softmax(dim=-1)
    assert (counts - expected).abs().max() < 0.03  # deviation of a share is at most .008
    stored = torch.zeros(5).scatter(0, rollout.sequences[:, 1], rollout.logprobs[:, 0].exp())
    torch.testing.assert_close(stored, expected.detach(), atol=1e-5, rtol=0)


def test_rollout_keeps_a_number_a_token_and_nothing_of_the_vocabularys_size(make_palm):
    rollout = collect(ActorCritic(make_palm(num_tokens=997)), eos_token=None)
    held = sum(value.nbytes for value in rollout if isinstance(value, torch.Tensor))
    rows, tokens, steps = 8, rollout.sequences.shape[1], 6
    assert tokens == 11 and rollout.sequences.untyped_storage().nbytes() == 4 * rows * tokens
    assert held == 4 * rows * tokens + 20 * rows * steps + (4 * 8 + 1) * rows  # 24 a response token


def test_responses_are_sampled_in_batches_over_a_cache(make_palm, monkeypatch):
    passes = []
    embed = PaLM.embed
    monkeypatch.setattr(
        PaLM, "embed", lambda self, seq, **kw: passes.append(tuple(seq.shape)) or embed(self, seq, **kw)
    )
    collect(ActorCritic(make_palm()), eos_token=None, batch=3)
    # prompts of 5, 4, 3, then of 3, 2, 2, then of 1, 1: each once, then actor, critic and reference over all tokens
    expected = [(3, 5), *[(3, 11)] * 3, (3, 3), *[(3, 9)] * 3, *[(2, 7)] * 3]
    assert [shape for shape in passes if shape[1] > 1] == expected


def test_sequences_are_read_in_passes_of_few_tokens_with_the_same_result(make_palm, move, monkeypatch):
    actor_critic = move(ActorCritic(make_palm()))
    whole = collect(actor_critic)
    passes = []
    embed = PaLM.embed

    def counted(self, seq, **options):
        passes.append((options.get("cache"), seq.numel()))
        return embed(self, seq, **options)

    monkeypatch.setattr(PaLM, "embed", counted)
    split = collect(actor_critic, tokens=20)
    assert max(size for cache, size in passes if cache is None) <= 20
    for first, second in zip(whole[:8], split[:8], strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_batches_of_unequal_length_are_joined(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout = collect(actor_critic, budget=torch.tensor([1, 2, 3, 4, 5, 6, 2, 3]), eos_token=None, batch=3)
    assert rollout.lengths.tolist() == [1, 2, 3, 4, 5, 6, 2, 3]
    assert rollout.sequences.shape == (8, 9) and rollout.logprobs.shape == (8, 6)
    out = actor_critic(rollout.sequences, rollout.prompt_lengths, 6)
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.logprobs, out.logprobs * mask, atol=1e-5, rtol=0)
    torch.testing.assert_close(rollout.values, out.values * mask, atol=1e-5, rtol=0)
    reference = actor_critic.observe(rollout.sequences, rollout.prompt_lengths, 6).ref_logprobs
    torch.testing.assert_close(rollout.ref_logprobs, reference * mask, atol=1e-5, rtol=0)


def test_exact_kl_is_that_of_the_whole_distributions(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    rollout = collect(actor_critic, temperature=0.7)
    improved = actor_critic.export_palm()
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        places = slice(int(start) - 1, int(start + length) - 1)  # what predicts each response token
        own, ref = (
            (model(rollout.sequences[row : row + 1])[0, places].double() / 0.7).softmax(dim=-1)
            for model in (improved, actor_critic.palm)
        )
        expected = (own * (own.log() - ref.log())).sum(dim=-1).float()
        torch.testing.assert_close(rollout.kl_exact[row, :length], expected, atol=1e-5, rtol=1e-4)
        assert not rollout.kl_exact[row, length:].any()
    assert rollout.kl_exact.max() > 1e-3


def test_exact_kl_is_zero_before_training(make_palm):
    assert not collect(ActorCritic(make_palm())).kl_exact.any()


def test_selected_rows_are_trimmed_to_the_longest_of_them():
    rollout = Rollout(
        sequences=torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]),
        prompt_lengths=torch.tensor([2, 1]),
        lengths=torch.tensor([3, 2]),
        logprobs=torch.tensor([[1.0, 2, 3], [4, 5, 0]]),
        ref_logprobs=torch.tensor([[1.5, 2, 3], [4, 5, 0]]),
        values=torch.tensor([[10.0, 20, 30], [40, 50, 0]]),
        sampler_logprobs=torch.tensor([[1.0, 2, 3], [4, 5, 0]]),
        kl_exact=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0]]),
        ended=torch.tensor([False, True]),
        prompt_rows=torch.tensor([6, 2]),
        versions=torch.tensor([3, 5]),
        temperature=0.7,
        eos_token=8,
        scores=torch.tensor([0.5, -0.5]),
    )
    for rows in (torch.tensor([1]), rollout.ended):  # by number, or by a mask
        part = rollout.select(rows)
        assert part.sequences.tolist() == [[6, 7, 8]]
        assert part.values.tolist() == [[40, 50]] and part.response_mask.tolist() == [[True, True]]
        assert part.scores.tolist() == [-0.5] and part.ended.tolist() == [True]
        assert part.prompt_rows.tolist() == [2] and part.versions.tolist() == [5]
        assert part.temperature == 0.7 and part.eos_token == 8
    with pytest.raises(ValueError, match="selects no row"):
        rollout.select(torch.tensor([False, False]))


def test_rows_come_back_in_the_order_asked_whatever_batches_they_were_sampled_in(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    budget = torch.tensor([4, 6, 1, 3, 5, 2, 6, 4])
    for tokens in (9999, 19):
        rollout = collect(actor_critic, budget=budget, eos_token=None, batch=3, tokens=tokens)
        assert rollout.prompt_lengths.tolist() == [len(prompt) for prompt in PROMPTS]
        assert torch.equal(rollout.lengths, budget)
        assert rollout.prompt_rows.tolist() == list(range(8)) and rollout.versions.tolist() == [3] * 8
        for row, prompt in enumerate(PROMPTS):
            whole = rollout.sequences[row, : len(prompt) + int(budget[row])].long()
            assert whole[: len(prompt)].tolist() == prompt.tolist()
            logits = actor_critic.export_palm()(whole[None])[0, len(prompt) - 1 : -1]
            expected = logprobs_of(logits, whole[len(prompt) :])
            for found in (rollout.logprobs, rollout.sampler_logprobs):
                torch.testing.assert_close(found[row, : int(budget[row])], expected, atol=1e-4, rtol=0)
            assert not rollout.sequences[row, len(whole) :].any() and not rollout.values[row, int(budget[row]) :].any()


def test_row_batches_know_what_is_in_them():
    spans = [(2, 1), (1, 4), (5, 5), (1, 1), (3, 2)]  # 3, 5, 10, 2 and 5 tokens
    parts = list(row_batches(spans, [4, 2, 0, 1], device=torch.device("cpu"), max_tokens=11))
    assert [part.numbers.tolist() for part in parts] == [[2], [4, 1], [0]]
    assert [part[1:] for part in parts] == [(10, 5, 5, 0), (5, 4, 6, 0), (3, 1, 1, 0)]
    (whole,) = row_batches(spans, [4, 2, 0], device=torch.device("cpu"))
    assert whole.numbers.tolist() == [4, 2, 0] and whole[1:] == (10, 5, 8, 0)
    (one,) = row_batches([(6, 1), (4, 2)], [0], device=torch.device("cpu"))
    assert one.since == 3  # by the shortest prompt of all, whichever rows are chosen


def test_mode_comes_back_even_after_an_error(make_palm):
    actor_critic = ActorCritic(make_palm())
    collect(actor_critic.train())
    assert actor_critic.training and actor_critic.critic.training
    with pytest.raises(ValueError, match="max_new_tokens"):
        collect(actor_critic, budget=0)
    assert actor_critic.training
    collect(actor_critic.eval())
    assert not actor_critic.training


def test_no_gradient_is_kept(make_palm):
    rollout = collect(ActorCritic(make_palm()))
    assert not any(value.requires_grad for value in rollout if isinstance(value, torch.Tensor))
