"""What tokens are taught: by hand, in parts as at once, and nothing from rows that do not count."""

import math

import pytest
import torch

from palm_rlhf_pytorch.policy.diagnostics import survey
from palm_rlhf_pytorch.policy.rollout import Rollout, Rows, row_batches
from palm_rlhf_pytorch.policy.targets import Lesson, make_targets
from palm_rlhf_pytorch.tensors import masked_moments, masked_whiten
from tests.policy.helpers import CPU, every_row, one_process, same, weights

SHAPING = {"kl_coef": 0.05, "gamma": 0.9, "gae_lambda": 0.95}


def hand_made_rollout(logprobs, ref_logprobs, values, mask, *, behaviour=None, versions=None):
    rows, steps = mask.shape
    return Rollout(
        torch.zeros(rows, steps + 1, dtype=torch.int), torch.ones(rows, dtype=torch.long), mask.sum(-1), logprobs,
        ref_logprobs, values, logprobs if behaviour is None else behaviour, torch.zeros_like(logprobs),
        torch.ones(rows, dtype=torch.bool), torch.arange(rows) * 3 + 40,
        torch.zeros(rows, dtype=torch.long) if versions is None else torch.tensor(versions), 1.0, None,
    )  # fmt: skip


def random_rollout(lengths, *, seed=0):
    """Random numbers, zero beyond each row's end."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    numbers = torch.randn(3, *mask.shape, generator=generator).masked_fill(~mask, 0.0)
    return hand_made_rollout(*numbers, mask), torch.randn(len(lengths), generator=generator)


def lesson_of(rollout, scores, *, counted=None, shaping=SHAPING, **options):
    counted = torch.ones(len(scores), dtype=torch.bool) if counted is None else torch.tensor(counted)
    return Lesson(rollout, scores, counted, **shaping, **options)


def test_targets_are_those_worked_by_hand_before_and_after_whitening():
    mask = torch.tensor([[True, True, True, False]])
    rollout = hand_made_rollout(
        torch.tensor([[-1.0, -0.5, -2.0, 9.0]], dtype=torch.float64),
        torch.tensor([[-1.2, -0.4, -1.5, 1.0]], dtype=torch.float64),
        torch.tensor([[0.3, 0.4, 0.6, 5.0]], dtype=torch.float64), mask,
    )  # fmt: skip
    shaping = {"kl_coef": 0.05, "gamma": 1.0, "gae_lambda": 0.95}
    lesson = lesson_of(rollout, torch.tensor([1.0], dtype=torch.float64), shaping=shaping)
    padded = Rows(torch.tensor([0]), total=5, steps=4, num_tokens=3, since=0)
    raw = lesson.read(padded)[1]
    lesson.whitening = masked_moments(raw.advantages, mask)
    whitened = lesson.read(padded)[1]
    expected = {
        "rewards": [-0.01, 0.005, 1.025, 0.0],
        "kl": [0.2, -0.1, -0.5, 0.0],
        "returns": [0.9683125, 1.00875, 1.025, 0.0],
        "advantages": [0.974924383, 0.399747162, -1.374671545, 0.0],
    }
    for name, numbers in expected.items():
        found = getattr(whitened, name)[0].double()
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), atol=1e-7, rtol=0)
    before = torch.tensor([[0.6683125, 0.60875, 0.425, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(raw.advantages, before, atol=1e-7, rtol=0)


def test_targets_carry_no_gradient_and_feel_the_kl_token_by_token():
    mask = torch.ones(2, 3, dtype=torch.bool)
    logprobs = torch.full((2, 3), -1.0, requires_grad=True)
    ref_logprobs = torch.full((2, 3), -1.0)
    shifted = ref_logprobs.clone()
    shifted[0, 1] = -3.0
    values = torch.zeros(2, 3, requires_grad=True)
    plain, priced = (
        make_targets(
            hand_made_rollout(logprobs, ref, values, mask), torch.tensor([1.0, 0.0]), kl_coef=0.5, gamma=1.0,
            gae_lambda=1.0,
        )
        for ref in (ref_logprobs, shifted)
    )  # fmt: skip
    assert not any(tensor.requires_grad for tensor in priced)
    assert priced.rewards[0, 1] == -1.0
    assert priced.returns.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    assert plain.returns.tolist() == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("max_tokens", [1, 9, 9999])
def test_whitening_is_that_of_all_rows_at_once_whatever_parts_are_read(max_tokens):
    rollout, scores = random_rollout([5, 1, 3, 7, 2])
    expected = make_targets(rollout, scores, **SHAPING)
    whitened = masked_whiten(expected.advantages, rollout.response_mask)
    lesson = lesson_of(rollout, scores)
    lesson.whitening = survey(lesson, scores, ranks=one_process(), max_tokens=max_tokens).advantages
    read = 0
    for rows in row_batches(lesson.spans, [3, 0, 4, 2, 1], device=CPU, max_tokens=max_tokens):
        part, targets = lesson.read(rows)
        assert torch.equal(part.values, rollout.values[rows.numbers, : rows.steps])
        torch.testing.assert_close(targets.advantages, whitened[rows.numbers, : rows.steps], atol=1e-6, rtol=1e-6)
        assert not targets.advantages[~part.response_mask].any()
        for name in ("rewards", "kl", "returns"):
            assert torch.equal(getattr(targets, name), getattr(expected, name)[rows.numbers, : rows.steps]), name
        read += len(rows.numbers)
    assert read == 5


def test_older_rows_are_weighted_by_how_much_likelier_they_have_become_up_to_the_cap():
    now = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -2.0, -0.5], [-3.0, -1.0, 0.0]])
    ratios = torch.tensor([[0.5, 1.25, 1.9], [3.0, 1.0, 0.25], [4.0, 0.75, 9.0]])
    mask = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    rollout = hand_made_rollout(now, now, torch.zeros(3, 3), mask, behaviour=now - ratios.log(), versions=[4, 6, 5])
    lesson = lesson_of(rollout, torch.tensor([1.0, -1.0, 2.0]), version=6, importance_cap=2.0)
    plain = make_targets(rollout, lesson.scores, **SHAPING).advantages
    lesson.whitening = masked_moments(plain, mask)
    expected = torch.tensor([[0.5, 1.25, 1.9], [1.0, 1.0, 1.0], [2.0, 0.75, 0.0]])  # the second row is of version 6
    found = lesson.read(every_row(rollout))[1]
    torch.testing.assert_close(found.advantages, masked_whiten(plain, mask) * expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lesson.importance(rollout)[0], expected[0])


def test_parts_hold_each_row_that_counts_once():
    rollout, scores = random_rollout([2, 4, 1, 3])
    lesson = lesson_of(rollout, scores, counted=[True, False, True, True])
    assert sorted(row for rows, *_ in lesson.parts(5) for row in rows.numbers.tolist()) == [0, 2, 3]
    assert list(lesson_of(rollout, scores, counted=[False] * 4).parts(5)) == []


def test_rows_are_named_by_their_prompts():
    rollout, scores = random_rollout([1] * 12)
    lesson = lesson_of(rollout, scores)
    assert lesson.named([5, 0]) == "responses [0, 5] (to prompts [40, 55])"
    assert "[0, 1, 2, 3, 4, 5, 6, 7] and 4 more" in lesson.named(list(range(12)))
    assert lesson.named([]) == "no row of this process"


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("limits", [{}, {"max_batch_size": 3, "max_batch_tokens": 25}])
def test_response_without_a_finite_score_counts_nowhere(make_trainer, limits, bad):
    """Weights, optimizer and figures are those of the rollout without it."""
    found = []
    for dropped in (True, False):
        trainer = make_trainer(epochs=2, **limits)
        rollout = trainer.rollout(*trainer.next_prompts(11), max_new_tokens=6, eos_token=7)
        scores = trainer.score(rollout).scores
        longest = int((rollout.prompt_lengths + rollout.lengths).argmax())
        others = torch.arange(11) != longest
        if dropped:
            rollout = rollout._replace(scores=scores.masked_fill(~others, bad))
        else:
            rollout = rollout._replace(scores=scores).select(others)
        metrics = trainer.learn(rollout)
        assert metrics.pop("reward/dropped") == float(dropped) and metrics.pop("episodes") == 10 + dropped
        moments = [state["exp_avg"].clone() for state in trainer.learner.optimizer.state.values()]
        found.append((metrics, weights(trainer), moments, trainer.normalizer.state()))
    assert found[0][0] == found[1][0] and same(found[0][1], found[1][1]) and found[0][3] == found[1][3]
    assert all(torch.equal(first, second) for first, second in zip(found[0][2], found[1][2], strict=True))
