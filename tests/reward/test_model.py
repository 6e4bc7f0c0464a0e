"""RewardModel: what it scores, what it trains, what it leaves alone."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel

DIM = 12
VOCAB = 17


def small_palm(*, causal=False, seed=0, **changes):
    torch.manual_seed(seed)
    return PaLM(
        **({"num_tokens": VOCAB, "dim": DIM, "depth": 2, "causal": causal, "dim_head": 6, "heads": 3} | changes)
    )


def judge(*, causal=False, seed=0, stir=True, **settings):
    """A reward model whose adapter and embeddings are not zero any more."""
    model = RewardModel(small_palm(causal=causal, seed=seed), **settings).eval()
    if stir:
        with torch.no_grad():
            for parameter in model.finetune_parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def ids(batch, length, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# scores


@pytest.mark.parametrize("settings", [{}, {"num_binned_output": 5}, {"use_lora": False}, {"pool_last": True}])
def test_scores_are_one_float_a_text(settings):
    scores = judge(**settings)(ids(3, 7))
    assert scores.shape == (3,) and scores.dtype == torch.float32 and bool(scores.isfinite().all())


def test_binned_score_is_the_expectation_in_label_units():
    model = judge(num_binned_output=3, label_offset=1, stir=False)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    scores = model(ids(2, 5))
    assert torch.allclose(scores, torch.full((2,), 0.2 * 1 + 0.5 * 2 + 0.3 * 3))
    assert torch.allclose(model.bin_logits(ids(2, 5)).softmax(dim=-1), torch.tensor([0.2, 0.5, 0.3]).expand(2, 3))


@pytest.mark.parametrize("train", [False, True])
def test_binned_score_is_the_same_at_every_call(train):
    model, seq = judge(num_binned_output=5).train(train), ids(4, 6)
    assert all(torch.equal(model(seq), model(seq)) for _ in range(5))


def test_sample_draws_from_the_bins_with_the_generator():
    model = judge(num_binned_output=3, label_offset=2, stir=False)
    probabilities = torch.tensor([0.2, 0.5, 0.3])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(probabilities.log())
    seq = ids(1, 2).expand(4000, 2)
    before = torch.get_rng_state()
    first, second = (model(seq, sample=True, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(before, torch.get_rng_state())
    assert first.shape == (4000,) and first.dtype == torch.float32
    shares = torch.stack([(first == rating).float().mean() for rating in (2, 3, 4)])
    assert torch.allclose(shares, probabilities, atol=0.03)


def test_head_starts_with_the_deviation_of_the_paper():
    torch.manual_seed(0)
    model = RewardModel(small_palm(dim=120), num_binned_output=50)
    assert model.head.weight.std().item() == pytest.approx(121**-0.5, rel=0.05)
    assert model.head.weight.shape == (50, 120) and not bool(model.head.bias.any())


# masks and pooling


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("settings", [{}, {"pool_last": True}, {"pool_prompt": True}])
@pytest.mark.parametrize("left", [False, True])
def test_padding_changes_no_score(causal, settings, left):
    model, seq = judge(causal=causal, **settings), ids(2, 5)
    lengths = torch.tensor([2, 3])
    alone = model(seq, prompt_lengths=lengths)
    for padding, filler in ((20, 0), (20, 16), (3, -100)):
        sides = (padding, 0) if left else (0, padding)
        padded = F.pad(seq, sides, value=filler)
        mask = F.pad(torch.ones_like(seq, dtype=torch.bool), sides)
        scores = model(padded, mask, prompt_lengths=lengths)
        assert torch.allclose(scores, alone, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_score_does_not_depend_on_the_rest_of_the_batch(causal):
    model, seq = judge(causal=causal, num_binned_output=4), ids(3, 7)
    lengths = torch.tensor([7, 3, 5])
    mask = torch.arange(7) < lengths[:, None]
    together = model(seq, mask, prompt_lengths=torch.tensor([2, 1, 4]))
    for row, (length, prompt) in enumerate(zip([7, 3, 5], [2, 1, 4], strict=True)):
        alone = model(seq[row : row + 1, :length], prompt_lengths=torch.tensor([prompt]))
        assert torch.allclose(alone, together[row : row + 1], atol=1e-5)
    order = torch.tensor([2, 0, 1])
    shuffled = model(seq[order], mask[order], prompt_lengths=torch.tensor([4, 2, 1]))
    assert torch.allclose(shuffled, together[order], atol=1e-5)


def test_negative_ids_are_padding_for_a_trunk_that_is_not_causal():
    seq = ids(2, 5)
    padded = F.pad(seq, (0, 3), value=-1)
    model = judge()
    assert torch.allclose(model(padded), model(seq), atol=1e-5)
    with pytest.raises(ValueError, match="seq holds the id -1"):
        judge(causal=True)(padded)


def hidden_of(model, seq, prompt_mask):
    kinds = torch.where(prompt_mask[..., None], model.prompt_embed, model.response_embed)
    return model.palm.embed(seq, adapter=model.adapter, extra_embed=kinds, dropout=0.0)


def test_pooling_reads_the_response_unless_told_otherwise():
    seq, prompt_mask = ids(2, 6), torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4])
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    pooled = {
        "response": lambda hidden: torch.stack([hidden[0, 5], hidden[1, 2:5].mean(dim=0)]),
        "all": lambda hidden: torch.stack([hidden[0].mean(dim=0), hidden[1, :5].mean(dim=0)]),
        "last": lambda hidden: torch.stack([hidden[0, 5], hidden[1, 4]]),
    }
    for how, settings in {"response": {}, "all": {"pool_prompt": True}, "last": {"pool_last": True}}.items():
        model = judge(causal=True, **settings)
        expected = model.head(pooled[how](hidden_of(model, seq, prompt_mask)))[:, 0]
        assert torch.allclose(model(seq, mask, prompt_mask=prompt_mask), expected, atol=1e-5), how


@pytest.mark.parametrize("settings", [{}, {"pool_prompt": True}])
def test_prompt_lengths_and_prompt_mask_agree(settings):
    model, seq = judge(**settings), ids(3, 5)
    prompt_mask = torch.tensor([[False] * 5, [True] * 2 + [False] * 3, [True] * 4 + [False]])
    by_mask = model(seq, prompt_mask=prompt_mask)
    assert torch.allclose(by_mask, model(seq, prompt_lengths=torch.tensor([0, 2, 4])))
    assert not torch.allclose(by_mask[1:], model(seq)[1:])  # without either, all is response
    assert torch.allclose(by_mask[:1], model(seq)[:1])


# what is trained


def test_finetune_parameters_are_all_that_lora_trains():
    model = RewardModel(small_palm(), num_binned_output=3)
    listed = {id(parameter) for parameter in model.finetune_parameters()}
    wanted = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert listed == wanted and len(listed) == len(model.finetune_parameters())
    assert {id(model.prompt_embed), id(model.response_embed), id(model.head.weight), id(model.head.bias)} < listed
    model(ids(2, 5), prompt_lengths=torch.tensor([2, 3]), labels=torch.tensor([0, 2])).backward()
    assert all(parameter.grad is None for parameter in model.palm.parameters())
    assert all(parameter.grad is not None for parameter in model.finetune_parameters())


def test_finetune_parameters_hold_the_whole_trunk_without_lora():
    model = RewardModel(small_palm(), use_lora=False)
    assert model.adapter is None
    assert {id(parameter) for parameter in model.finetune_parameters()} == {id(p) for p in model.parameters()}
    model(ids(2, 5), labels=torch.tensor([0.5, -1.0])).backward()
    # without a prompt its embedding gets a zero gradient, not none: data parallel training needs one for each
    assert all(parameter.grad is not None for parameter in model.finetune_parameters())


@pytest.mark.parametrize("use_lora", [False, True])
def test_finetune_parameters_come_in_a_fixed_order(use_lora):
    model = RewardModel(small_palm(), use_lora=use_lora)
    trunk = list(model.adapter.parameters() if use_lora else model.palm.parameters())
    wanted = [*trunk, model.prompt_embed, model.response_embed, model.head.weight, model.head.bias]
    assert [id(parameter) for parameter in model.finetune_parameters()] == [id(parameter) for parameter in wanted]


@pytest.mark.parametrize("use_lora", [False, True])
def test_training_leaves_the_palm_untouched(use_lora):
    palm = small_palm(causal=True, attn_dropout=0.1, finetune_scopes=("own",)).eval()
    before, flags = bits(palm), [parameter.requires_grad for parameter in palm.parameters()]
    model = RewardModel(palm, num_binned_output=4, use_lora=use_lora, dropout=0.2).train()
    optimizer = torch.optim.SGD(model.finetune_parameters(), lr=0.5)
    trunk = bits(model.palm)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids(2, 5), prompt_lengths=torch.tensor([1, 2]), labels=torch.tensor([0, 3])).backward()
        optimizer.step()
    assert same_bits(bits(palm), before) and not palm.training and palm.attn_dropout == 0.1
    assert [parameter.requires_grad for parameter in palm.parameters()] == flags
    assert all(parameter.grad is None for parameter in palm.parameters())
    assert same_bits(bits(model.palm), trunk) == use_lora
    assert bool(model.prompt_embed.any()) and bool(model.response_embed.any())


def test_lora_shares_the_weights_of_the_palm():
    palm = small_palm()
    storages = {parameter.data_ptr() for parameter in palm.parameters()}
    assert {parameter.data_ptr() for parameter in RewardModel(palm).palm.parameters()} == storages
    assert not storages & {parameter.data_ptr() for parameter in RewardModel(palm, use_lora=False).palm.parameters()}


def test_prompt_mask_matters_after_training_with_finetune_parameters():
    model, seq = RewardModel(small_palm()), ids(2, 6)
    prompt_mask = torch.arange(6).expand(2, 6) < 3
    optimizer = torch.optim.Adam(model.finetune_parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        model(seq, prompt_mask=prompt_mask, labels=torch.tensor([1.0, -1.0])).backward()
        optimizer.step()
    pooled_alike = torch.arange(6).expand(2, 6) < 1
    with torch.no_grad():
        model.settings = RewardModel(small_palm(), pool_prompt=True).settings  # so that pooling is not what differs
        assert float((model(seq, prompt_mask=prompt_mask) - model(seq, prompt_mask=pooled_alike)).abs().min()) > 1e-4


def test_dropout_is_the_models_own_and_off_in_eval_mode():
    palm, seq = small_palm(attn_dropout=0.5, ff_dropout=0.5), ids(3, 6)
    quiet, noisy = RewardModel(palm), RewardModel(palm, dropout=0.4)
    assert torch.equal(quiet.train()(seq), quiet(seq))  # the palm's own dropout does not reach it
    assert not torch.equal(noisy.train()(seq), noisy(seq))
    assert torch.equal(noisy.eval()(seq), noisy(seq))
    assert noisy.training is False and RewardModel(palm).training is True


# copies and dtypes


def test_bfloat16_leaves_adapter_embeddings_and_head_in_float32():
    model, seq = judge(num_binned_output=5), ids(2, 6)
    full, trained = model(seq), [parameter.clone() for parameter in model.finetune_parameters()]
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in model.palm.parameters()} == {torch.bfloat16}
    assert all(torch.equal(now, then) for now, then in zip(model.finetune_parameters(), trained, strict=True))
    assert model(seq).dtype == torch.float32 and torch.allclose(model(seq), full, atol=0.2)
    half = RewardModel(small_palm().to(torch.bfloat16))
    assert {parameter.dtype for parameter in half.finetune_parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert half(seq, labels=torch.zeros(2)).dtype == torch.float32


def test_autocast_leaves_the_head_in_float32():
    model = judge(stir=False)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(0.7)  # no bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(ids(2, 5)), torch.full((2,), 0.7))


def test_casting_leaves_the_palm_as_it_was():
    palm = small_palm()
    before = bits(palm)
    RewardModel(palm).to(torch.bfloat16)
    assert same_bits(bits(palm), before)


def test_deepcopy_scores_alike_and_trains_apart():
    model, seq = judge(), ids(2, 5)
    copy = deepcopy(model)
    assert torch.equal(copy(seq), model(seq))
    with torch.no_grad():
        copy.head.bias.add_(1.0)
        copy.palm.token_emb.weight.mul_(2.0)
    assert not torch.allclose(copy(seq), model(seq))


def test_load_state_dict_gives_the_scores_and_spares_the_palm():
    palm, other, seq = small_palm(), judge(seed=5, num_binned_output=3), ids(2, 5)
    before = bits(palm)
    model = RewardModel(palm, num_binned_output=3).eval()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(seq), other(seq)) and same_bits(bits(palm), before)
    shared = RewardModel(palm)
    shared.load_state_dict(RewardModel(palm).state_dict())
    assert shared.palm.token_emb.weight.data_ptr() == palm.token_emb.weight.data_ptr()


def test_scoring_leaves_mode_and_random_state_alone():
    model = judge(num_binned_output=3).train()
    state = torch.get_rng_state()
    with torch.no_grad():
        model(ids(2, 5))
    assert model.training and torch.equal(state, torch.get_rng_state())


# normalised scores


@pytest.mark.parametrize("settings", [{}, {"num_binned_output": 5, "label_offset": 1}])
def test_normalised_scores_have_mean_0_and_deviation_1_over_the_references(settings):
    model = judge(**settings).train()
    lengths = torch.tensor([2, 0, 1])
    parts = [{"seq": ids(3, 6), "prompt_lengths": lengths}, {"seq": ids(4, 9, seed=2)}]
    raw = torch.cat([model.read(**part).scores for part in parts])
    assert torch.equal(torch.cat([model(**part) for part in parts]), raw)
    label = torch.tensor([1, 3, 2]) if settings else torch.tensor([0.5, 1.0, -1.0])
    losses = [model(parts[0]["seq"], labels=label), model(parts[0]["seq"], rejected=ids(3, 4))]
    for _ in range(2):  # the second time from normalised scores
        assert model.normalize_scores(parts) is model and model.training
        found = torch.cat([model(**part) for part in parts])
        torch.testing.assert_close(found, (raw - raw.mean()) / raw.std(correction=0), rtol=0, atol=1e-3)
    after = [model(parts[0]["seq"], labels=label), model(parts[0]["seq"], rejected=ids(3, 4))]
    assert torch.equal(torch.stack(losses), torch.stack(after))
    assert torch.equal(torch.cat([model.read(**part).scores for part in parts]), raw)


def test_scores_that_cannot_be_normalised_are_refused_and_nothing_changes():
    model = judge()
    before = bits(model)
    same = ids(1, 5).expand(4, 5)
    for references in ([], [{"seq": ids(1, 5)}], [{"seq": same}]):
        with pytest.raises(ValueError, match="at least two, and scores finite and not all alike"):
            model.normalize_scores(references)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="mean nan"):
        model.normalize_scores([{"seq": ids(4, 5)}])
    model.load_state_dict(before)
    assert same_bits(bits(model), before)


def test_drawn_ratings_are_normalised_like_scores():
    model = judge(num_binned_output=3)
    drawn = model(ids(5, 4), sample=True, generator=torch.Generator().manual_seed(0))
    model.normalize_scores([{"seq": ids(5, 4)}])
    again = model(ids(5, 4), sample=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, (drawn - model.score_mean) / model.score_std, rtol=0, atol=1e-4)


def test_expectations_over_bins_keep_their_digits_under_autocast():
    model, logits = judge(num_binned_output=5), torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model._scores(logits)
    exponentials = [math.exp(number) for number in logits[0].tolist()]
    expected = sum(place * number for place, number in enumerate(exponentials)) / sum(exponentials)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected, rel=1e-6)
