"""Judges of every kind, what they may not return, normalisation, and the price of a missing end."""

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.scores import (
    ScoreNormalizer,
    best_response,
    judge_sequences,
    learnt_scores,
    penalize_missing_eos,
)
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import identity

SEQUENCES = torch.tensor([[7, 7, 1, 7, 0], [7, 2, 7, 7, 7], [3, 7, 0, 0, 0]])
PROMPT_MASK = torch.tensor([[True, True, False, False, False], [True] * 2 + [False] * 3, [True] + [False] * 4])
MASK = torch.tensor([[True] * 4 + [False], [True] * 5, [True] * 2 + [False] * 3])


def scores_of(judge, batch=64):
    return judge_sequences(
        judge, SEQUENCES, PROMPT_MASK, MASK, max_batch_size=batch, max_batch_tokens=9999, where="update 4"
    )


def rollout_with(scores, *, ended, eos_token):
    rows = len(ended)
    numbers = torch.zeros(rows, 2)
    return Rollout(
        torch.zeros(rows, 3, dtype=torch.int), torch.ones(rows, dtype=torch.long), torch.full((rows,), 2), numbers,
        numbers, numbers, numbers, numbers, torch.tensor(ended), 1.0, eos_token, scores,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_function_judges_responses_in_batches(judge, batch):
    assert scores_of(judge, batch).tolist() == [1.0, 3.0, 1.0]


def test_reward_model_judges_by_its_masks(make_palm):
    reward_model = RewardModel(make_palm(seed=5), num_binned_output=4)
    nn.init.normal_(reward_model.prompt_embed)
    expected = reward_model(SEQUENCES, MASK, prompt_mask=PROMPT_MASK)
    torch.testing.assert_close(scores_of(reward_model, 2), expected, atol=1e-5, rtol=0)


def test_judge_reads_no_more_tokens_at_once_than_allowed():
    seen = []

    def judge(sequences, **masks):
        seen.append(tuple(sequences.shape))
        return sequences[:, 0].float()

    scores = judge_sequences(judge, SEQUENCES, PROMPT_MASK, MASK, max_batch_size=8, max_batch_tokens=11, where="here")
    assert scores.tolist() == [7.0, 7.0, 3.0] and seen == [(2, 5), (1, 2)]


def test_judge_sees_rows_of_similar_length_without_padding_they_do_not_need():
    seen = []

    def judge(sequences, *, prompt_mask, mask):
        assert sequences.dtype == torch.long and prompt_mask.dtype == mask.dtype == torch.bool
        seen.append((sequences.tolist(), prompt_mask.sum(-1).tolist(), mask.sum(-1).tolist()))
        return sequences[:, 0] + 10.0 * mask.sum(-1)

    limits = {"max_batch_size": 2, "max_batch_tokens": 9999, "where": "here"}
    order = [2, 0, 1]  # of 2, 4 and 5 tokens
    scores = judge_sequences(judge, SEQUENCES[order].int(), PROMPT_MASK[order], MASK[order], **limits)
    assert scores.tolist() == [23.0, 47.0, 57.0]
    assert seen == [([[7, 7, 1, 7, 0], [7, 2, 7, 7, 7]], [2, 2], [4, 5]), ([[3, 7]], [1], [2])]


def test_judge_whose_one_batch_takes_all_sees_rows_in_their_order():
    scores = judge_sequences(
        lambda sequences, **masks: torch.arange(3.0), SEQUENCES, PROMPT_MASK, MASK, max_batch_size=3,
        max_batch_tokens=15, where="here",
    )  # fmt: skip
    assert scores.tolist() == [0.0, 1.0, 2.0]


class Noisy(nn.Module):
    """A judge that says how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.inner = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.seen = []

    def forward(self, sequences, *, prompt_mask, mask):
        score = self.inner(mask.float()).sum(dim=-1) * self.weight
        self.seen.append((self.training, self.inner.training, score.requires_grad))
        return score


def test_module_judges_in_eval_mode_without_gradient_and_gets_its_modes_back():
    judge = Noisy().train()
    judge.frozen.eval()
    assert scores_of(judge, 2).tolist() == [4.0, 5.0, 2.0]
    assert judge.seen == [(False, False, False)] * 2
    assert judge.training and judge.inner.training and not judge.frozen.training


def test_integer_and_half_scores_become_float32():
    for dtype in (torch.long, torch.bfloat16, torch.float64, torch.bool):
        assert scores_of(lambda seq, *, prompt_mask, mask, to=dtype: mask[:, 2].to(to)).tolist() == [1.0, 1.0, 0.0]
    assert scores_of(lambda seq, **masks: torch.ones(3)).dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_name_their_rows(bad):
    def judge(sequences, *, prompt_mask, mask):
        return torch.where(sequences[:, 0] == 7, bad, 1.0)

    with pytest.raises(ValueError, match=r"update 4.*rows \[0, 1\]"):
        scores_of(judge)
    with pytest.raises(ValueError, match=r"rows \[1\]"):  # numbered over the whole rollout
        judge_sequences(
            lambda seq, **masks: torch.full((len(seq),), bad if seq[0, 1] == 2 else 1.0), SEQUENCES, PROMPT_MASK, MASK,
            max_batch_size=1, max_batch_tokens=9999, where="update 4",
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2,), ()])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"it must be \(3,\)"):
        scores_of(lambda seq, **masks: torch.zeros(shape))


@pytest.mark.parametrize("scores", [[1.0, 2.0, 3.0], None, 1.0, torch.zeros(3, dtype=torch.complex64)])
def test_scores_that_are_no_tensor_of_numbers_are_refused(scores):
    with pytest.raises(TypeError, match="update 4"):
        scores_of(lambda seq, **masks: scores)


def test_error_of_a_judge_keeps_its_type_and_says_where():
    class OfflineError(RuntimeError):
        pass

    def judge(sequences, **masks):
        if len(sequences) < 2:
            raise OfflineError("no answer")
        return torch.zeros(len(sequences))

    with pytest.raises(OfflineError, match="no answer") as raised:
        scores_of(judge, 2)
    assert any("rows [2] of update 4" in note for note in raised.value.__notes__)


def test_best_response_is_cut_at_its_end(judge):
    tokens = torch.tensor([[7, 1, 1], [7, 7, 7], [7, 7, 5]])
    mask = torch.tensor([[True] * 3, [True, False, False], [True] * 3])
    out = [Generation(tokens, mask, torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool))]
    for batch in (1, 8):
        best = best_response(judge, torch.tensor([7, 4]), out, max_batch_size=batch, max_batch_tokens=9999)
        assert best.tolist() == [7, 4, 7, 7, 5]
    shortest = best_response(
        lambda seq, *, prompt_mask, mask: -mask.sum(dim=-1).float(),
        torch.tensor([7, 4]),
        out,
        max_batch_size=8,
        max_batch_tokens=9,
    )
    assert shortest.tolist() == [7, 4, 7]


def test_normalizer_fixes_shift_and_scale_on_the_first_scores():
    normalizer = ScoreNormalizer()
    normalizer.fit(torch.tensor([1.0, 3.0, 5.0, 7.0]), reduce=identity)  # mean 4, deviation sqrt(5)
    torch.testing.assert_close(normalizer(torch.tensor([4.0, 9.0])), torch.tensor([0.0, 5.0**0.5]))
    normalizer.fit(torch.tensor([100.0, 300.0]), reduce=identity)
    torch.testing.assert_close(normalizer(torch.tensor([4.0, 9.0])), torch.tensor([0.0, 5.0**0.5]))


@pytest.mark.parametrize("constant", [2.0, 0.1, -1e6, 0.0])
def test_normalizer_waits_with_the_scale_until_scores_differ(constant):
    normalizer = ScoreNormalizer()
    normalizer.fit(torch.full((5,), constant), reduce=identity)
    assert normalizer.std is None
    torch.testing.assert_close(
        normalizer(torch.full((2,), constant)), torch.zeros(2), atol=abs(constant) * 1e-6, rtol=0
    )
    normalizer.fit(torch.tensor([constant - 3, constant + 5]), reduce=identity)  # deviation 4, mean above the first
    torch.testing.assert_close(normalizer(torch.tensor([constant, constant + 8])), torch.tensor([0.0, 2.0]))


def test_normalizer_takes_scores_of_any_size():
    for size in (1e-9, 1e9):
        normalizer = ScoreNormalizer()
        scores = torch.tensor([1.0, 3.0]) * size
        torch.testing.assert_close(normalizer.fit(scores, reduce=identity)(scores), torch.tensor([-1.0, 1.0]))


def test_normalizer_state_comes_back():
    first, second = ScoreNormalizer(), ScoreNormalizer()
    first.fit(torch.tensor([1.0, 3.0, 5.0, 7.0]), reduce=identity)
    second.restore(first.state())
    assert torch.equal(first(torch.tensor([2.5])), second(torch.tensor([2.5])))


def test_missing_eos_costs_a_penalty_or_replaces_the_score():
    scores = torch.tensor([0.25, 0.5, -1.0])
    rollout = rollout_with(scores, ended=[True, False, False], eos_token=7)
    assert penalize_missing_eos(scores, rollout, penalty=1.0, replacement=None).tolist() == [0.25, -0.5, -2.0]
    assert penalize_missing_eos(scores, rollout, penalty=None, replacement=-3.0).tolist() == [0.25, -3.0, -3.0]
    assert penalize_missing_eos(scores, rollout, penalty=None, replacement=None).tolist() == [0.25, 0.5, -1.0]


def test_missing_eos_costs_nothing_where_no_token_ends_a_response():
    scores = torch.tensor([0.25, 0.5])
    rollout = rollout_with(scores, ended=[False, False], eos_token=None)
    for penalty, replacement in ((1.0, None), (None, -3.0)):
        assert torch.equal(penalize_missing_eos(scores, rollout, penalty=penalty, replacement=replacement), scores)


def test_learnt_scores_are_normalised_before_they_are_penalised():
    rollout = rollout_with(torch.tensor([10.0, 30.0, 30.0]), ended=[True, True, False], eos_token=7)
    found = learnt_scores(rollout, ScoreNormalizer(), penalty=1.0, replacement=None, reduce=identity)
    torch.testing.assert_close(found, torch.tensor([-(2**0.5), 0.5**0.5, 0.5**0.5 - 1]))
    found = learnt_scores(rollout, None, penalty=1.0, replacement=None, reduce=identity)
    assert found.tolist() == [10.0, 30.0, 29.0]


@pytest.mark.parametrize("scores", [None, torch.tensor([1.0, float("nan"), 2.0]), torch.zeros(3, 1)])
def test_scores_that_cannot_be_learnt_from_leave_the_normalizer_as_it_was(scores):
    normalizer = ScoreNormalizer()
    with pytest.raises(ValueError, match="score"):
        rollout = rollout_with(scores, ended=[True, True, True], eos_token=7)
        learnt_scores(rollout, normalizer, penalty=None, replacement=None, reduce=identity)
    assert normalizer.state() == {"mean": None, "std": None}
