"""The best of n responses to many prompts, against what best of n is known to do to a distribution."""

import math
from functools import partial

import pytest
import torch

from palm_rlhf_pytorch.palm.generation import Generation, generate_responses
from palm_rlhf_pytorch.policy.best_of_n import best_of_n, best_of_n_kl_bound
from palm_rlhf_pytorch.tensors import pad_ragged

WORTH = torch.tensor([3.0, 11.0, 6.0, 1.0, 9.0, 0.0, 12.0, 4.0, 8.0, 2.0, 10.0, 5.0, 7.0])  # of each id: none alike


def worth_of_last(sequences, *, prompt_mask, mask):
    last = mask.sum(dim=-1, keepdim=True) - 1
    return WORTH[sequences.gather(1, last)[:, 0]]


def test_best_of_n_draws_from_the_distribution_it_is_known_to_make(make_palm):
    palm, prompt, n, count = make_palm().eval(), torch.tensor([3, 1, 4]), 3, 2000
    prompts = prompt.expand(count, -1)
    found = best_of_n(
        partial(generate_responses, palm), worth_of_last, prompts, torch.ones_like(prompts, dtype=torch.bool),
        num_samples=n, max_batch_size=1500, max_new_tokens=1, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    start = palm(prompt[None])[0, -1].softmax(dim=-1).detach()
    order = WORTH.argsort()
    below = start[order].cumsum(0)
    best = torch.empty_like(start)
    best[order] = below**n - torch.cat((torch.zeros(1), below[:-1])) ** n  # P(all n at most this) - P(all below)
    drawn = torch.bincount(found.sequences[:, 3], minlength=13) / count
    assert (drawn - best).abs().max() < 0.04 < (start - best).abs().max()
    kl = float((best * (best / start).log()).sum())
    assert 0 < kl <= found.kl_bound == best_of_n_kl_bound(n)
    assert torch.equal(found.scores, WORTH[found.sequences[:, 3]]) and torch.equal(
        found.scores, found.all_scores.amax(1)
    )


@pytest.mark.parametrize("n", [1, 2, 7])
def test_kl_bound_is_met_where_all_responses_are_rare(n):
    # of k equal responses the best of n has probabilities (i / k)^n - ((i - 1) / k)^n
    places = torch.arange(200_001, dtype=torch.float64) / 200_000
    best = (places**n).diff()
    kl = float(best @ (best * 200_000).log())
    assert best_of_n_kl_bound(n) == pytest.approx(kl, abs=1e-4) and kl <= best_of_n_kl_bound(n) + 1e-12


@pytest.mark.parametrize("max_batch_size", [1, 2, 4, 64])
def test_each_prompt_keeps_its_own_best_however_responses_are_batched(max_batch_size):
    prompts, mask = pad_ragged([torch.tensor(ids) for ids in ([3, 1, 4, 1], [9], [2, 6])], left=True)
    drawn = {(3, 1, 4, 1): [5, 8, 5], (9,): [0, 11, 6], (2, 6): [3, 3, 12]}
    asked = {prompt: 0 for prompt in drawn}

    def generate(ids, mask, *, eos_token):
        tokens, kept = [], []
        for row, real in zip(ids, mask, strict=True):
            prompt = tuple(row[real].tolist())
            token = drawn[prompt][asked[prompt]]
            asked[prompt] += 1
            tokens.append([token, eos_token])
            kept.append([True, token % 2 == 0])
        ended = torch.tensor(kept)[:, 1]
        return Generation(torch.tensor(tokens), torch.tensor(kept), torch.zeros(len(kept), 2), ended)

    def judge(sequences, *, prompt_mask, mask):
        score = WORTH[(sequences * (mask & ~prompt_mask & (sequences != 10))).sum(dim=-1)]
        return score.masked_fill(score == 12, float("nan"))  # of id 6 it cannot say

    found = best_of_n(generate, judge, prompts, mask, num_samples=3, max_batch_size=max_batch_size, eos_token=10)
    assert [row[kept].tolist() for row, kept in zip(found.sequences, found.mask, strict=True)] == [
        [3, 1, 4, 1, 8, 10], [9, 11], [2, 6, 12, 10]
    ]  # fmt: skip
    assert found.prompt_mask.sum(dim=-1).tolist() == [4, 1, 2] and found.lengths.tolist() == [2, 1, 2]
    assert found.ended.tolist() == [True, False, True] and found.scores.tolist() == [8.0, 5.0, 7.0]
    assert found.all_scores[0].tolist() == [0.0, 8.0, 0.0] and math.isnan(found.all_scores[1, 2])


def test_best_of_n_refuses_what_has_no_best(make_palm):
    generate, ids = partial(generate_responses, make_palm(), max_new_tokens=2), torch.tensor([[3, 1], [4, 5]])
    whole = torch.ones_like(ids, dtype=torch.bool)

    def no_score(sequences, **masks):
        return torch.where(sequences[:, 0] == 4, float("nan"), 1.0)

    with pytest.raises(ValueError, match="none of the 2 responses to prompt 1 has a finite score"):
        best_of_n(generate, no_score, ids, whole, num_samples=2)
    with pytest.raises(ValueError, match=r"num_samples \(0\)"):
        best_of_n(generate, worth_of_last, ids, whole, num_samples=0)
    with pytest.raises(ValueError, match="padding|real token"):
        best_of_n(generate, worth_of_last, ids, whole & torch.tensor([[True], [False]]), num_samples=2)
    with pytest.raises(ValueError, match=r"num_samples \(0\)"):
        best_of_n_kl_bound(0)
