"""RewardModel: labels, pairs, what it learns from them, and the inputs it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel

VOCAB = 11


def small_palm(*, causal=False):
    torch.manual_seed(0)
    return PaLM(num_tokens=VOCAB, dim=12, depth=2, causal=causal, dim_head=6, heads=3)


def judge(*, causal=False, **settings):
    model = RewardModel(small_palm(causal=causal), **settings).eval()
    with torch.no_grad():
        for parameter in model.finetune_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def fixed_judge(*, head, **settings):
    """A model whose head ignores the text."""
    model = RewardModel(small_palm(), **settings)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor(head))
    return model


def ids(batch, length, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


# losses


def test_binned_loss_is_the_cross_entropy_of_the_label():
    model = fixed_judge(head=[math.log(0.2), math.log(0.5), math.log(0.3)], num_binned_output=3, label_offset=1)
    loss = model(ids(2, 4), labels=torch.tensor([1, 3]))
    assert loss.shape == () and loss.item() == pytest.approx(-(math.log(0.2) + math.log(0.3)) / 2, rel=1e-5)


def test_scalar_loss_is_the_mean_squared_error():
    loss = fixed_judge(head=[0.5])(ids(3, 4), labels=torch.tensor([0.5, 1.5, -1.5]))
    assert loss.item() == pytest.approx((0 + 1 + 4) / 3, rel=1e-6)


def test_pair_loss_is_bradley_terry_of_the_two_scores():
    model = judge(causal=True)
    chosen, rejected = ids(3, 7), ids(3, 5, seed=2)
    mask = torch.arange(7) < torch.tensor([7, 5, 6])[:, None]
    rejected_mask = torch.arange(5) < torch.tensor([5, 4, 5])[:, None]
    lengths = torch.tensor([2, 1, 3])
    better = model(chosen, mask, prompt_lengths=lengths)
    worse = model(rejected, rejected_mask, prompt_lengths=lengths)
    for margin in (None, 0.5, torch.tensor([0.0, 1.0, 2.0])):
        gap = better - worse - (0.0 if margin is None else margin)
        expected = torch.log1p(torch.exp(-gap)).mean()
        loss = model(
            chosen, mask, rejected=rejected, rejected_mask=rejected_mask, prompt_lengths=lengths, margin=margin
        )
        assert torch.allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize(("margin", "expected"), [(None, 0.6931471806), (1.0, 1.3132616875)])
def test_pair_loss_of_equal_scores_has_the_gold_value(margin, expected):
    loss = fixed_judge(head=[0.7])(ids(2, 4), rejected=ids(2, 6, seed=2), margin=margin)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_pair_of_unequal_lengths_needs_no_masks():
    model, chosen, rejected = judge(causal=False), ids(2, 7), ids(2, 5, seed=2)
    expected = torch.log1p(torch.exp(model(rejected) - model(chosen))).mean()
    assert torch.allclose(model(chosen, rejected=rejected), expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_rejected_prompt_defaults_to_that_of_the_chosen_text(causal):
    model, chosen, rejected = judge(causal=causal), ids(2, 6), ids(2, 4, seed=2)
    lengths = torch.tensor([2, 3])
    asked = model(chosen, rejected=rejected, prompt_lengths=lengths, rejected_prompt_lengths=lengths)
    by_mask = model(chosen, rejected=rejected, prompt_mask=torch.arange(6) < lengths[:, None])
    other_mask = torch.arange(4) < lengths[:, None]
    masks = model(chosen, rejected=rejected, prompt_lengths=lengths, rejected_prompt_mask=other_mask)
    for loss in (model(chosen, rejected=rejected, prompt_lengths=lengths), by_mask, masks):
        assert torch.allclose(loss, asked, atol=1e-6)
    assert not torch.allclose(model(chosen, rejected=rejected), asked, atol=1e-4)


def test_default_prompt_of_the_rejected_text_survives_padding_on_the_left():
    model, chosen, rejected = judge(causal=True), ids(2, 6), ids(2, 4, seed=2)
    plain = model(chosen, rejected=rejected, prompt_lengths=torch.tensor([2, 3]))
    mask = F.pad(torch.ones(2, 6, dtype=torch.bool), (3, 0))
    prompt_mask = F.pad(torch.arange(6) < torch.tensor([2, 3])[:, None], (3, 0))
    padded = model(F.pad(chosen, (3, 0)), mask, rejected=rejected, prompt_mask=prompt_mask)
    assert torch.allclose(padded, plain, atol=1e-5)


# learning


def counted(batch, *, generator, width=10, prompt=3):
    """Texts, and how many of a response's tokens are token 4."""
    seq = torch.randint(0, VOCAB, (batch, width), generator=generator)
    rate = torch.rand(batch, 1, generator=generator) * 0.6
    seq = torch.where(torch.rand(batch, width, generator=generator) < rate, 4, seq)
    return seq, (seq[:, prompt:] == 4).sum(dim=1)


@pytest.mark.parametrize("use_lora", [True, False])
def test_pairs_teach_a_preference_that_holds_on_unseen_texts(use_lora):
    generator = torch.Generator().manual_seed(2)
    palm = small_palm(causal=True)
    torch.manual_seed(6)  # a head that knows nothing of the preference yet
    model = RewardModel(palm, use_lora=use_lora).train()
    lengths = torch.full((64,), 3)

    def pairs():
        (first, count), (second, other) = counted(64, generator=generator), counted(64, generator=generator)
        swap = (other > count)[:, None]
        return torch.where(swap, second, first), torch.where(swap, first, second), count != other

    def accuracy():
        with torch.no_grad():
            better, worse, unequal = pairs()
            gaps = model(better, prompt_lengths=lengths) - model(worse, prompt_lengths=lengths)
            return float((gaps[unequal] > 0).float().mean())

    before = accuracy()
    optimizer = torch.optim.AdamW(model.finetune_parameters(), lr=1e-2)
    for _ in range(40):
        better, worse, _ = pairs()
        optimizer.zero_grad()
        model(better, rejected=worse, prompt_lengths=lengths).backward()
        optimizer.step()
    after = accuracy()
    assert before < 0.6 and after > 0.85


def test_binned_labels_are_learnt_in_their_own_unit():
    generator = torch.Generator().manual_seed(3)
    model = RewardModel(small_palm(), num_binned_output=4, label_offset=1).train()
    lengths = torch.full((48,), 3)

    def batch():
        seq, count = counted(48, generator=generator)
        return seq, 1 + count.clamp(max=3)

    def error():
        seq, ratings = batch()
        with torch.no_grad():
            return float((model(seq, prompt_lengths=lengths) - ratings).abs().mean())

    before = error()
    optimizer = torch.optim.AdamW(model.finetune_parameters(), lr=1e-2)
    for _ in range(60):
        seq, ratings = batch()
        optimizer.zero_grad()
        model(seq, prompt_lengths=lengths, labels=ratings).backward()
        optimizer.step()
    after = error()
    assert after < 0.6 and after < 0.6 * before


# bad input

SEQ = ids(3, 5)
REAL = torch.ones(3, 5, dtype=torch.bool)
THREE = torch.zeros(3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_binned_output": 1}, r"num_binned_output \(1\)"),
        ({"num_binned_output": -2}, r"num_binned_output \(-2\)"),
        ({"label_offset": 1}, r"label_offset \(1\)"),
        ({"lora_r": 0}, r"lora_r \(0\)"),
        ({"lora_alpha": 0.0}, r"lora_alpha \(0.0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"dropout": -0.1}, r"dropout \(-0.1\)"),
        ({"pool_prompt": True, "pool_last": True}, "pool_prompt and pool_last"),
    ],
)
def test_constructor_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardModel(small_palm(), **settings)


def test_constructor_refuses_wrong_types():
    with pytest.raises(TypeError, match="palm"):
        RewardModel(torch.nn.Linear(2, 3))
    with pytest.raises(TypeError, match="num_binned_output"):
        RewardModel(small_palm(), num_binned_output=2.5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq": SEQ.float()}, TypeError, "seq holds torch.float32"),
        ({"seq": SEQ[0]}, ValueError, r"seq has shape \(5,\)"),
        ({"seq": SEQ[:, :0]}, ValueError, r"seq has shape \(3, 0\)"),
        ({"seq": SEQ + VOCAB}, ValueError, "seq holds the id"),
        ({"seq": SEQ.tolist()}, TypeError, "seq"),
        ({"mask": REAL.long()}, TypeError, "mask is torch.int64"),
        ({"mask": REAL[:2]}, ValueError, r"mask \(2, 5\) must have the shape of seq \(3, 5\)"),
        ({"mask": REAL & torch.tensor([True, False, False])[:, None]}, ValueError, "rows 1, 2 of seq without any"),
        ({"prompt_mask": REAL.long()}, TypeError, "prompt_mask is torch.int64"),
        ({"prompt_mask": REAL[:, 1:]}, ValueError, r"prompt_mask \(3, 4\)"),
        ({"prompt_mask": REAL, "prompt_lengths": THREE.long()}, ValueError, "prompt_mask and prompt_lengths"),
        ({"prompt_mask": REAL}, ValueError, "rows 0, 1, 2 of seq without any response token"),
        ({"prompt_lengths": THREE}, TypeError, "prompt_lengths are torch.float32"),
        ({"prompt_lengths": torch.tensor([1, 2])}, ValueError, r"prompt_lengths \(2,\)"),
        ({"prompt_lengths": torch.tensor([1, 6, -1])}, ValueError, r"prompt_lengths \(\[6, -1\] in rows 1, 2\)"),
        ({"prompt_lengths": torch.tensor([1, 5, 2])}, ValueError, "row 1 of seq without any response token"),
        ({"rejected": SEQ, "labels": THREE}, ValueError, "labels and rejected"),
        ({"rejected": SEQ[0]}, ValueError, r"rejected \(5,\) and seq \(3, 5\)"),
        ({"rejected": SEQ[:2], "prompt_lengths": THREE.long()}, ValueError, r"rejected \(2, 5\) and seq \(3, 5\)"),
        ({"rejected": SEQ.float()}, TypeError, "rejected holds torch.float32"),
        ({"rejected": SEQ, "rejected_mask": REAL[:2]}, ValueError, r"rejected_mask \(2, 5\)"),
        (
            {"rejected": SEQ[:, :2], "prompt_lengths": torch.tensor([1, 2, 0])},
            ValueError,
            "row 1 of rejected without any response token",
        ),
        ({"rejected": SEQ, "margin": math.nan}, ValueError, "margin"),
        ({"rejected": SEQ, "margin": torch.zeros(3, 1)}, ValueError, r"margin \(3, 1\)"),
        ({"margin": 1.0, "rejected_mask": REAL}, ValueError, "rejected_mask, margin without rejected"),
        ({"sample": True}, ValueError, "sample=True"),
    ],
)
def test_call_refuses_input_that_does_not_fit(arguments, error, message):
    with pytest.raises(error, match=message):
        judge(causal=True)(**({"seq": SEQ} | arguments))


def test_pair_refuses_a_prompt_that_is_not_the_beginning():
    scattered = torch.tensor([[True, False, True, False, False]]).expand(3, 5)
    with pytest.raises(ValueError, match="rows 0, 1, 2 is not the beginning"):
        judge()(SEQ, rejected=SEQ, prompt_mask=scattered)


@pytest.mark.parametrize(
    ("bins", "labels", "error", "message"),
    [
        (5, torch.tensor([[1], [2], [3]]), ValueError, r"labels have shape \(3, 1\)"),
        (5, torch.tensor([1, 2]), ValueError, r"labels have shape \(2,\)"),
        (5, torch.tensor(3), ValueError, r"labels have shape \(\)"),
        (5, torch.tensor([1.0, 2.0, 3.0]), TypeError, "labels are torch.float32: bins take integers"),
        (5, torch.tensor([1, 0, 6]), ValueError, r"labels \(\[0, 6\] in rows 1, 2\) must be from 1 to 5"),
        (0, torch.zeros(3, 1), ValueError, r"labels have shape \(3, 1\)"),
        (0, torch.tensor([1, 2, 3]), TypeError, "labels are torch.int64: a scalar head takes floats"),
        (0, torch.tensor([1.0, math.nan, math.inf]), ValueError, r"labels \(\[nan, inf\] in rows 1, 2\)"),
    ],
)
def test_labels_that_do_not_fit_are_refused(bins, labels, error, message):
    model = judge(num_binned_output=bins, label_offset=1 if bins else 0)
    with pytest.raises(error, match=message):
        model(SEQ, labels=labels)


def test_many_bad_rows_are_counted_not_listed():
    with pytest.raises(ValueError, match=r"rows 0, 1, 2, 3, 4, \.\.\. \(7 in all\)"):
        judge(num_binned_output=2)(ids(7, 3), labels=torch.full((7,), 9))


def test_bin_logits_and_samples_need_bins():
    with pytest.raises(ValueError, match="bin_logits"):
        judge().bin_logits(SEQ)
    with pytest.raises(ValueError, match="sample=True"):
        judge(num_binned_output=3)(SEQ, labels=torch.tensor([0, 1, 2]), sample=True)
