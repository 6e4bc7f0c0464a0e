"""Group methods: numbers worked by hand, and a loop over tokens as the second route."""

from dataclasses import replace

import pytest
import torch

from palm_rlhf_pytorch.objectives.group import (
    DR_GRPO,
    GRPO,
    GSPO,
    RLOO,
    Counts,
    GroupObjective,
    centered_advantages,
    constant_average,
    group_loss,
    informative_groups,
    leave_one_out_advantages,
    normalized_advantages,
    overlong_penalty,
    sequence_average,
    sequence_mean,
    sequence_sum,
)

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0])
ONE_GROUP, ALL = torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("advantages", "size"),
    [
        (normalized_advantages, 0.5 / ((1 / 3) ** 0.5 + 1e-4)),  # std of (1, 0, 0, 1) with Bessel's correction
        (centered_advantages, 0.5),
        (leave_one_out_advantages, 2 / 3),
    ],
)
def test_advantages_of_two_right_and_two_wrong(advantages, size):
    expected = size * torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(advantages(REWARDS, ONE_GROUP, ALL), expected)
    # ragged groups in any order, and a third whose members are all alike
    rewards = torch.tensor([5.0, 1.0, 0.1, 0.0, 7.0, 0.0, 0.1, 1.0, 0.1])
    groups = torch.tensor([1, 0, 2, 0, 1, 0, 2, 0, 2])
    found = advantages(rewards, groups, torch.ones(9, dtype=torch.bool))
    torch.testing.assert_close(found[groups == 0], expected)
    assert found[groups == 2].tolist() == [0.0, 0.0, 0.0]
    assert found[0] == -found[4] != 0


@pytest.mark.parametrize("advantages", [normalized_advantages, centered_advantages, leave_one_out_advantages])
def test_a_response_that_does_not_count_takes_no_part(advantages):
    rewards, groups = torch.tensor([1.0, 99.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 1])
    counted = torch.tensor([True, False, True, True])
    found = advantages(rewards.masked_fill(~counted, torch.nan), groups, counted)
    assert found[1] == found[3] == 0  # one does not count, one is alone in its group
    torch.testing.assert_close(found[[0, 2]], advantages(torch.tensor([1.0, 0.0]), groups[:2], counted[[0, 2]]))


def test_advantages_are_refused_where_they_mean_nothing():
    with pytest.raises(ValueError, match="finite"):
        centered_advantages(torch.tensor([1.0, torch.nan]), ONE_GROUP[:2], ALL[:2])
    with pytest.raises(TypeError, match="bool"):
        centered_advantages(REWARDS, ONE_GROUP, ALL.long())
    with pytest.raises(ValueError, match="shape"):
        centered_advantages(REWARDS, ONE_GROUP[:3], ALL)


def test_informative_groups_are_those_that_differ_among_what_counts():
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 5.0])
    counted = torch.tensor([True, True, True, True, True, False])
    assert informative_groups(rewards, groups, counted).tolist() == [False, True, False]


def test_overlong_penalty_of_the_paper():
    lengths = torch.tensor([16_384, 18_432, 20_480, 20_481])
    found = overlong_penalty(lengths, max_length=20_480, buffer=4_096)
    assert found.tolist() == [0.0, -0.5, -1.0, -1.0]
    for buffer in (0, 20_481):
        with pytest.raises(ValueError, match=rf"buffer \({buffer}\)"):
            overlong_penalty(lengths, max_length=20_480, buffer=buffer)


LENGTHS = [3, 1, 2]
MAX_LENGTH = 5
COUNTS = Counts(torch.tensor(11.0), torch.tensor(4.0))  # of a step that has more than this microbatch


def some_batch():
    generator = torch.Generator().manual_seed(3)
    new, old, ref = (-1 + 0.4 * torch.randn(3, 3, generator=generator) for _ in range(3))
    mask = torch.arange(3) < torch.tensor(LENGTHS)[:, None]
    return new.requires_grad_(), old, ref, torch.tensor([1.5, -0.5, 0.7]), mask


def by_hand(objective, new, old, ref, advantages):
    """The loss, response by response and token by token."""
    total = 0.0
    for row, length in enumerate(LENGTHS):
        ratios = (new[row, :length] - old[row, :length]).exp()
        kls = (ref[row, :length] - new[row, :length]).exp() - 1 - (ref[row, :length] - new[row, :length])
        if objective.level is sequence_mean:
            surrogates, weights = ratios.log().mean().exp()[None], [1 / 4]
        elif objective.level is sequence_sum:
            surrogates, weights = ratios.prod()[None], [1 / 4]
        else:
            surrogates = ratios
            weights = {"token_average": 1 / 11, "sequence_average": 1 / 4 / length, "constant_average": 1 / 4 / 5}
            weights = [weights[objective.average.__name__]] * length
        for ratio, weight in zip(surrogates, weights, strict=True):
            near = ratio.clamp(1 - objective.eps_clip, 1 + objective.eps_clip_high)
            total = total - weight * torch.minimum(ratio * advantages[row], near * advantages[row])
        each = {"sequence_average": 1 / 4 / length, "constant_average": 1 / 4 / 5}.get(
            objective.average.__name__, 1 / 11
        )
        total = total + objective.kl_loss_coef * each * (ratios * kls).sum()
    return total


@pytest.mark.parametrize(
    "objective",
    [GRPO, DR_GRPO, RLOO, replace(GSPO, eps_clip=0.1, eps_clip_high=0.2), replace(GRPO, average=sequence_average)],
    ids=["grpo", "dr_grpo", "rloo", "gspo", "paper"],
)
@pytest.mark.parametrize("kl_loss_coef", [0.0, 0.3])
def test_loss_and_gradient_are_those_of_a_loop_over_tokens(objective, kl_loss_coef):
    objective = replace(objective, kl_loss_coef=kl_loss_coef)
    new, old, ref, advantages, mask = some_batch()
    found = group_loss(new, old, ref, advantages, mask, objective=objective, counts=COUNTS, max_length=MAX_LENGTH)
    expected = by_hand(objective, new, old, ref, advantages)
    torch.testing.assert_close(found.loss, expected)
    (gradient,) = torch.autograd.grad(found.loss, new)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, new)[0])
    assert not gradient[~mask].any()
    # what stands outside the mask does not matter
    noise = torch.where(mask, 0.0, torch.nan)
    parts = (new + noise, old + noise, ref + noise)
    again = group_loss(*parts, advantages, mask, objective=objective, counts=COUNTS, max_length=MAX_LENGTH)
    assert again.loss == found.loss


def test_the_loss_adds_up_over_microbatches():
    new, old, ref, advantages, mask = some_batch()
    options = {"objective": GSPO, "counts": COUNTS, "max_length": MAX_LENGTH}
    whole = group_loss(new, old, ref, advantages, mask, **options).loss
    parts = [
        group_loss(new[rows], old[rows], ref[rows], advantages[rows], mask[rows], **options).loss
        for rows in ([0], [1, 2])
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_kl_in_the_loss_has_the_gradient_of_the_kl():
    """Over all tokens of a distribution, each weighted by how often the old policy draws it."""
    logits, old_logits, ref_logits = (
        torch.tensor(x).double() for x in ([1.0, 0.3, -2], [0.5, 0.1, -1], [0.0, 1, -0.5])
    )
    logits.requires_grad_()
    new, old, ref = (x.log_softmax(-1) for x in (logits, old_logits, ref_logits))
    drawn = old.exp()
    objective = GroupObjective(kl_loss_coef=1.0)
    total = torch.zeros(())
    for token in range(3):
        one = [x[token].reshape(1, 1) for x in (new, old, ref)]
        ones = torch.ones(1, 1, dtype=torch.bool)
        counts = Counts(torch.ones(()), torch.ones(()))
        found = group_loss(*one, torch.zeros(1), ones, objective=objective, counts=counts, max_length=1)
        total = total + drawn[token] * found.kl
    exact = (new.exp() * (new - ref)).sum()
    for loss, name in ((total, "estimated"), (exact, "exact")):
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        if name == "estimated":
            estimated = gradient
    torch.testing.assert_close(total, exact)
    torch.testing.assert_close(estimated, gradient)


def test_parts_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="sequence_average"):
        replace(GSPO, average=constant_average)
    with pytest.raises(ValueError, match=r"kl_coef \(-1"):
        replace(GRPO, kl_coef=-1.0)


@pytest.mark.parametrize("objective", [GRPO, RLOO, GSPO], ids=["grpo", "rloo", "gspo"])
def test_how_far_the_policy_moved_is_told_per_token_whatever_is_clipped(objective):
    """Log-ratios .1, -.2, .3 of one response and -.1 of another: their negative mean, and half their mean square."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    moved, old = torch.tensor([[0.1, -0.2, 0.3], [-0.1, 9.0, 9.0]]), torch.full((2, 3), -2.0)
    found = group_loss(
        old + moved, old, old, torch.tensor([1.0, -1.0]), mask, objective=objective,
        counts=Counts(torch.tensor(4.0), torch.tensor(2.0)), max_length=3,
    ).policy  # fmt: skip
    assert float(found.approx_kl_k1) == pytest.approx(-0.1 / 4, rel=1e-5)
    assert float(found.approx_kl_k2) == pytest.approx((0.01 + 0.04 + 0.09 + 0.01) / 8, rel=1e-5)
    k3 = (0.0051709, 0.0187308, 0.0498588, 0.0048374)  # exp(d) - 1 - d
    assert float(found.approx_kl) == pytest.approx(sum(k3) / 4, rel=1e-4)
