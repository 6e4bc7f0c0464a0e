"""Judges of every kind, what they may not return, normalisation, and the price of a missing end."""

import threading

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.policy.judging import check_scores, judge_sequences, judge_source
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.scores import counted_scores, learnt_scores, penalize_missing_eos
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.tensors import identity
from tests.policy.helpers import CPU, one_process

SEQUENCES = torch.tensor([[7, 7, 1, 7, 0], [7, 2, 7, 7, 7], [3, 7, 0, 0, 0]])
PROMPT_MASK = torch.tensor([[True, True, False, False, False], [True] * 2 + [False] * 3, [True] + [False] * 4])
MASK = torch.tensor([[True] * 4 + [False], [True] * 5, [True] * 2 + [False] * 3])


def scores_of(judge, batch=64, **options):
    return judge_sequences(
        judge, SEQUENCES, PROMPT_MASK, MASK, max_batch_size=batch, max_batch_tokens=9999, where="update 4", **options
    )


def rollout_with(scores, *, ended, eos_token):
    rows = len(ended)
    numbers = torch.zeros(rows, 2)
    return Rollout(
        torch.zeros(rows, 3, dtype=torch.int), torch.ones(rows, dtype=torch.long), torch.full((rows,), 2), numbers,
        numbers, numbers, numbers, numbers, torch.tensor(ended), torch.arange(rows) + 20,
        torch.zeros(rows, dtype=torch.long), 1.0, eos_token, scores,
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


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_are_not_finite_come_through_and_are_refused_by_row_where_all_must_count(bad):
    found = scores_of(lambda seq, **masks: torch.where(seq[:, 0] == 7, bad, 1.0), batch=2)
    torch.testing.assert_close(found, torch.tensor([bad, bad, 1.0]), equal_nan=True)
    with pytest.raises(ValueError, match=r"update 4.*rows \[0, 1\]"):
        check_scores(found, 3, where="update 4")


def count(scores, *, max_dropped=0.1, **options):
    return counted_scores(
        torch.tensor(scores), torch.arange(len(scores)) + 20, ranks=one_process(), max_dropped=max_dropped,
        where="update 4", **options,
    )  # fmt: skip


def test_a_few_scores_that_are_not_finite_are_left_out_with_a_warning(recwarn):
    assert count([1.0, 2.0, 3.0]).tolist() == [True] * 3 and not recwarn.list
    named = r"1 of 10 scores in update 4.*responses \[6\], to prompts \[26\].*left out"
    with pytest.warns(UserWarning, match=named):  # a tenth is not above a tenth
        counted = count([0.0] * 6 + [INF] + [1.0] * 3)
    assert counted.tolist() == [True] * 6 + [False] + [True] * 3
    assert count([0.0] * 9 + [NAN], warn=False).sum() == 9 and len(recwarn.list) == 0


@pytest.mark.parametrize(
    ("scores", "max_dropped", "named"),
    [
        ([0.0] * 8 + [NAN], 0.1, r"1 of 9 scores in update 4.*responses \[8\], to prompts \[28\].*\(10%\)"),
        ([0.0, NAN, -INF], 0.5, r"2 of 3 scores.*responses \[1, 2\], to prompts \[21, 22\]"),
        ([0.0] * 99 + [NAN], 0.0, "1 of 100"),
        ([NAN] * 30, 0.9, r"30 of 30.*\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] and 20 more"),
    ],
)
def test_too_many_scores_that_are_not_finite_are_refused(scores, max_dropped, named):
    with pytest.raises(ValueError, match=named):
        count(scores, max_dropped=max_dropped)


def test_judge_that_hangs_is_left_behind_after_its_timeout():
    release = threading.Event()

    def judge(sequences, **masks):
        release.wait(30)
        return torch.zeros(len(sequences))

    with pytest.raises(TimeoutError, match=r"judge_timeout \(0.05 seconds\)") as raised:
        scores_of(judge, 2, timeout=0.05)
    release.set()
    assert any("rows [0, 1] of update 4" in note for note in raised.value.__notes__)


def test_judge_with_a_timeout_answers_raises_and_learns_as_one_without(judge):
    assert scores_of(judge, 2, timeout=30.0).tolist() == [1.0, 3.0, 1.0]

    def strict(sequences, **masks):
        assert not torch.is_grad_enabled()
        raise KeyError("no such word")

    with pytest.raises(KeyError, match="no such word"):
        scores_of(strict, timeout=30.0)


def test_judge_of_a_source_names_responses_and_prompts():
    rollout = rollout_with(None, ended=[True] * 3, eos_token=7)
    rollout = rollout._replace(sequences=torch.tensor([[1, 2, 5], [1, 2, 6], [1, 2, 7]]).int())
    limits = {"device": CPU, "max_batch_size": 2, "max_batch_tokens": 9999, "where": "update 4"}
    scores = judge_source(lambda seq, **masks: seq[:, -1], rollout, **limits).scores
    assert scores.tolist() == [5.0, 6.0, 7.0]

    def judge(sequences, **masks):
        if 7 in sequences:
            raise OSError("no answer")
        return sequences[:, -1]

    with pytest.raises(OSError, match="no answer") as raised:
        judge_source(judge, rollout, **limits)
    assert any("responses [2] of update 4, to prompts [22]" in note for note in raised.value.__notes__)


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (2,), ()])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"(it must be|scores are) \(3,\)"):
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


def fit(normalizer, scores, counted=None):
    scores = torch.as_tensor(scores)
    counted = torch.ones(len(scores), dtype=torch.bool) if counted is None else torch.tensor(counted)
    return normalizer.fit(scores, counted, reduce=identity)


def test_normalizer_fixes_shift_and_scale_on_the_first_scores():
    normalizer = ScoreNormalizer()
    fit(normalizer, [1.0, 3.0, 5.0, 7.0])  # mean 4, deviation sqrt(5)
    torch.testing.assert_close(normalizer(torch.tensor([4.0, 9.0])), torch.tensor([0.0, 5.0**0.5]))
    fit(normalizer, [100.0, 300.0])
    torch.testing.assert_close(normalizer(torch.tensor([4.0, 9.0])), torch.tensor([0.0, 5.0**0.5]))


@pytest.mark.parametrize("constant", [2.0, 0.1, -1e6, 0.0])
def test_normalizer_waits_with_the_scale_until_scores_differ(constant):
    normalizer = ScoreNormalizer()
    fit(normalizer, [constant] * 5)
    assert normalizer.std is None
    torch.testing.assert_close(
        normalizer(torch.full((2,), constant)), torch.zeros(2), atol=abs(constant) * 1e-6, rtol=0
    )
    fit(normalizer, [constant - 3, constant + 5])  # deviation 4, mean above the first
    torch.testing.assert_close(normalizer(torch.tensor([constant, constant + 8])), torch.tensor([0.0, 2.0]))


def test_normalizer_takes_scores_of_any_size():
    for size in (1e-9, 1e9):
        normalizer = ScoreNormalizer()
        scores = torch.tensor([1.0, 3.0]) * size
        torch.testing.assert_close(fit(normalizer, scores)(scores), torch.tensor([-1.0, 1.0]))


def test_normalizer_state_comes_back():
    first, second = ScoreNormalizer(), ScoreNormalizer()
    fit(first, [1.0, 3.0, 5.0, 7.0])
    second.restore(first.state())
    assert torch.equal(first(torch.tensor([2.5])), second(torch.tensor([2.5])))


def penalized(rollout, **price):
    return penalize_missing_eos(rollout.scores, rollout.ended, rollout.eos_token, **price)


def test_missing_eos_costs_a_penalty_or_replaces_the_score():
    scores = torch.tensor([0.25, 0.5, -1.0])
    rollout = rollout_with(scores, ended=[True, False, False], eos_token=7)
    assert penalized(rollout, penalty=1.0, replacement=None).tolist() == [0.25, -0.5, -2.0]
    assert penalized(rollout, penalty=None, replacement=-3.0).tolist() == [0.25, -3.0, -3.0]
    assert penalized(rollout, penalty=None, replacement=None).tolist() == [0.25, 0.5, -1.0]


def test_missing_eos_costs_nothing_where_no_token_ends_a_response():
    scores = torch.tensor([0.25, 0.5])
    rollout = rollout_with(scores, ended=[False, False], eos_token=None)
    for penalty, replacement in ((1.0, None), (None, -3.0)):
        assert torch.equal(penalized(rollout, penalty=penalty, replacement=replacement), scores)


def learnt(rollout, counted, normalizer):
    return learnt_scores(rollout, torch.tensor(counted), normalizer, penalty=1.0, replacement=None, reduce=identity)


def test_learnt_scores_are_normalised_before_they_are_penalised():
    rollout = rollout_with(torch.tensor([10.0, 30.0, 30.0]), ended=[True, True, False], eos_token=7)
    found = learnt(rollout, [True] * 3, ScoreNormalizer())
    torch.testing.assert_close(found, torch.tensor([-(2**0.5), 0.5**0.5, 0.5**0.5 - 1]))
    assert learnt(rollout, [True] * 3, None).tolist() == [10.0, 30.0, 29.0]


def test_rows_that_do_not_count_shift_no_score_and_learn_nothing():
    scores = torch.tensor([10.0, NAN, 30.0, 1e9, 30.0])
    rollout = rollout_with(scores, ended=[True, False, True, False, False], eos_token=7)
    found = learnt(rollout, [True, False, True, False, True], ScoreNormalizer())
    torch.testing.assert_close(found, torch.tensor([-(2**0.5), 0.0, 0.5**0.5, 0.0, 0.5**0.5 - 1]))


def test_normalizer_that_no_score_counts_for_stays_as_it_was():
    normalizer = fit(ScoreNormalizer(), [5.0, NAN], [False, False])
    assert normalizer.state()["std"] is None
    torch.testing.assert_close(fit(normalizer, [1.0, 3.0])(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]))
