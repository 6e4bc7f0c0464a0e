"""PaLM: its loss at the start, invariances, both attention paths, dropout, precision, range, and refused input."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf_pytorch.palm import PaLM

SMALL = {"num_tokens": 37, "dim": 24, "depth": 2, "dim_head": 8, "heads": 3}


# the start of training


@pytest.mark.parametrize(
    ("num_tokens", "dim", "depth"),
    [(2, 8, 1), (5, 64, 2), (259, 8, 2), (259, 64, 2), (1000, 128, 2), (259, 256, 12), (300, 1024, 1), (3, 512, 1)],
)
def test_loss_starts_at_the_log_of_the_vocabulary(num_tokens, dim, depth):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=num_tokens, dim=dim, depth=depth, dim_head=16, heads=2)
    with torch.no_grad():
        loss = palm(torch.randint(0, num_tokens, (4, 65)), return_loss=True)
    assert float(loss) == pytest.approx(math.log(num_tokens), abs=0.1)


def test_loss_is_the_mean_cross_entropy_of_the_next_token(make_palm, ragged):
    palm = make_palm()
    ids, mask = ragged(7, 4, left=True)
    with torch.no_grad():
        logprobs = palm(ids, mask=mask).log_softmax(dim=-1)
        loss = palm(ids, return_loss=True, mask=mask)
    targets = [(0, i) for i in range(1, 7)] + [(1, i) for i in range(4, 7)]  # row 1 begins at place 3
    expected = -sum(float(logprobs[row, i - 1, ids[row, i]]) for row, i in targets) / len(targets)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_loss_counts_token_zero_unless_told_otherwise(make_palm):
    zeros = torch.zeros(2, 9, dtype=torch.long)
    assert bool(make_palm()(zeros, return_loss=True) > 0)
    ids = torch.tensor([[3, 0, 4, 0, 0]])
    palm = make_palm(cross_entropy_ignore_index=0)
    logprobs = palm(ids).log_softmax(dim=-1)
    assert float(palm(ids, return_loss=True)) == pytest.approx(-float(logprobs[0, 1, 4]), abs=1e-5)
    assert float(palm(zeros, return_loss=True)) == 0.0
    chosen = torch.tensor([[False, True, True, False, False]])  # says itself what counts
    expected = -float(logprobs[0, 0, 0] + logprobs[0, 1, 4]) / 2
    assert float(palm(ids, return_loss=True, loss_mask=chosen)) == pytest.approx(expected, abs=1e-5)


def test_training_learns_token_zero():
    torch.manual_seed(0)
    palm = PaLM(**(SMALL | {"num_tokens": 5}))
    seq = torch.where(torch.rand(8, 16) < 0.75, 0, torch.randint(1, 5, (8, 16)))
    for _ in range(20):
        gradients = torch.autograd.grad(palm(seq, return_loss=True), palm.palm_parameters())
        with torch.no_grad():
            torch._foreach_add_(palm.palm_parameters(), gradients, alpha=-0.5)
    assert palm(seq).softmax(dim=-1)[..., 0].mean() > 0.5


# invariances


@pytest.mark.parametrize("fused", [False, True])
def test_logits_do_not_depend_on_later_tokens(make_palm, fused):
    palm = make_palm(fused=fused)
    ids = torch.randint(0, 37, (2, 9))
    changed = ids.clone()
    changed[:, 5:] = torch.randint(0, 37, (2, 4))
    torch.testing.assert_close(palm(ids)[:, :5], palm(changed)[:, :5], atol=1e-5, rtol=0)
    assert (palm(ids)[:, 5:] - palm(changed)[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("left", [True, False])
def test_padding_and_batch_composition_change_nothing(make_palm, ragged, causal, fused, left):
    palm = make_palm(fused=fused, causal=causal)
    for extra in (0, 3):
        ids, mask = ragged(6, 2, 5, left=left, extra=extra)
        together = palm(ids, mask=mask)
        for row in range(3):
            alone = palm(ids[row][mask[row]][None])[0]
            torch.testing.assert_close(together[row][mask[row]], alone, atol=1e-4, rtol=0)
    assert together.isfinite().all()


def test_what_stands_in_the_padding_changes_nothing(make_palm, ragged):
    palm = make_palm()
    ids, mask = ragged(6, 2, 5)
    other = torch.where(mask, ids, 36 - ids)
    assert torch.equal(palm(ids, mask=mask)[mask], palm(other, mask=mask)[mask])
    assert torch.equal(palm(ids, return_loss=True, mask=mask), palm(other, return_loss=True, mask=mask))


def test_permuted_rows_give_permuted_logits(make_palm, ragged):
    palm = make_palm()
    ids, mask = ragged(6, 2, 5, 6)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        palm(ids, mask=mask)[order][mask[order]], palm(ids[order], mask=mask[order])[mask[order]], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("settings", [{}, {"qk_rmsnorm": True}, {"causal": False}, {"rotary_xpos_scale_base": None}])
def test_fused_attention_equals_plain(make_palm, ragged, settings):
    plain, fused = make_palm(fused=False, **settings), make_palm(**settings)
    fused.load_state_dict(plain.state_dict())
    with torch.no_grad():  # of deviation 1, so that 1e-5 is a bound on rounding alone
        for palm in (plain, fused):
            palm.token_emb.weight.mul_(0.2)
    ids, mask = ragged(9, 4, 6)
    torch.testing.assert_close(plain(ids), fused(ids), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain(ids, mask=mask)[mask], fused(ids, mask=mask)[mask], atol=1e-5, rtol=0)


def test_fused_and_plain_attention_have_the_same_gradients(make_palm, ragged):
    ids, mask = ragged(9, 4, 6)
    gradients = []
    for fused in (False, True):
        palm = make_palm(fused=fused)
        palm(ids, return_loss=True, mask=mask).backward()
        gradients.append([parameter.grad for parameter in palm.palm_parameters()])
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fused, atol=1e-4, rtol=1e-3)


def test_distance_alone_matters_to_attention(make_palm):
    """Rotary positions are relative: the same tokens further on, after padding, give the same logits."""
    palm = make_palm(depth=1)
    ids = torch.randint(0, 37, (1, 5))
    hidden = palm.embed(ids)
    cache = palm.new_cache(1, 105)
    palm.embed(torch.zeros(1, 100, dtype=torch.long), cache=cache)
    cache.mask[:, :100] = False
    cache.ragged = True
    torch.testing.assert_close(palm.embed(ids, cache=cache), hidden, atol=1e-4, rtol=0)


# not causal


def test_encoder_sees_later_tokens(make_palm):
    palm = make_palm(causal=False)
    ids = torch.randint(0, 37, (1, 7))
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 37
    assert (palm(ids)[0, 0] - palm(changed)[0, 0]).abs().max() > 0.01


@pytest.mark.parametrize("left", [True, False])
def test_encoder_takes_negative_ids_for_padding(make_palm, ragged, left):
    palm = make_palm(causal=False)
    ids, mask = ragged(6, 2, 5, left=left)
    negative = ids.masked_fill(~mask, -1)
    by_mask = palm(ids, mask=mask)
    torch.testing.assert_close(palm(negative)[mask], by_mask[mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(palm(negative, mask=mask)[mask], by_mask[mask], atol=1e-6, rtol=0)


def test_encoder_has_no_xpos_decay(make_palm):
    ids = torch.randint(0, 37, (1, 9))
    assert torch.equal(make_palm(causal=False, rotary_xpos_scale_base=2)(ids), make_palm(causal=False)(ids))
    assert not torch.allclose(make_palm(rotary_xpos_scale_base=2)(ids), make_palm()(ids), atol=1e-3)


def test_encoder_refuses_what_only_a_causal_model_can_do(make_palm):
    palm = make_palm(causal=False)
    ids = torch.randint(0, 37, (1, 9))
    with pytest.raises(ValueError, match="return_loss.*causal=True"):
        palm(ids, return_loss=True)
    with pytest.raises(ValueError, match="generate.*causal=True"):
        palm.generate(12, ids)
    with pytest.raises(ValueError, match="causal=True"):
        palm.new_cache(1, 9)


# query and key normalisation, dropout


def test_qk_rmsnorm_applies_its_scale(make_palm):
    ids = torch.randint(0, 37, (1, 30))
    one, eight, again = (make_palm(qk_rmsnorm=True, qk_scale=scale)(ids) for scale in (1.0, 8.0, 8.0))
    assert (one - eight).abs().max() > 0.1
    assert torch.equal(eight, again)


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_is_read_at_each_pass(make_palm, fused):
    palm = make_palm(fused=fused, attn_dropout=0.5, ff_dropout=0.5).train()
    ids = torch.randint(0, 37, (2, 9))
    assert (palm(ids) - palm(ids)).abs().max() > 0.1
    assert torch.equal(palm.embed(ids, dropout=0.0), palm.eval().embed(ids))
    assert (palm.embed(ids, dropout=0.5) - palm.embed(ids)).abs().max() > 0.1  # also in eval mode: the pass says so
    palm.train().set_dropout(0.0)
    assert torch.equal(palm(ids), palm(ids))
    palm.set_dropout(0.5)
    assert (palm(ids) - palm(ids)).abs().max() > 0.1
    assert palm.config["attn_dropout"] == palm.config["ff_dropout"] == 0.5


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout"])
@pytest.mark.parametrize("fused", [False, True])
def test_each_dropout_acts_on_its_own(make_palm, name, fused):
    palm = make_palm(fused=fused, **{name: 0.5})
    ids = torch.randint(0, 37, (2, 9))
    assert torch.equal(palm(ids), palm(ids))
    palm.train()
    assert (palm(ids) - palm(ids)).abs().max() > 0.1


# precision and range


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_model_stays_near_the_float32_one(fused):
    torch.manual_seed(0)
    palm = PaLM(**SMALL).eval()
    for layer in palm.layers:
        layer.fused = fused
    ids = torch.randint(0, 37, (1, 700))
    with torch.no_grad():
        exact = palm(ids)
        rounded = palm.bfloat16()(ids)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).norm() / exact.norm()) < 0.03


@torch.no_grad()
def test_bfloat16_model_tells_positions_beyond_256_apart():
    """Bfloat16 knows 256 and 258 but not 257; positions so rounded would be .03 to .05 off here, products only .005."""
    torch.manual_seed(0)
    palm = PaLM(**(SMALL | {"depth": 1})).eval()
    palm.token_emb.weight.normal_()
    palm.layers[0].in_proj.weight.mul_(3)  # attention that is far from uniform
    ids = torch.randint(0, 37, (1, 700))
    exact = palm(ids)[:, 256:]
    rounded = palm.bfloat16()(ids)[:, 256:].float()
    assert float((rounded - exact).norm() / exact.norm()) < 0.015


def test_a_long_call_changes_no_later_one(make_palm):
    palm = make_palm(depth=1)
    ids = torch.randint(0, 37, (1, 9))
    with torch.no_grad():
        before = palm(ids)
        state = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
        palm(torch.randint(0, 37, (1, 2000)))
        assert torch.equal(palm(ids), before)
    assert palm.state_dict().keys() == state.keys()
    assert not list(palm.buffers())


def test_training_works_after_a_forward_in_inference_mode(make_palm):
    palm = make_palm().train()
    ids = torch.randint(0, 37, (2, 9))
    with torch.inference_mode():
        palm(ids)
        palm.generate(12, ids)
    palm(ids, return_loss=True).backward()
    assert all(parameter.grad is not None for parameter in palm.palm_parameters())


def test_rows_beyond_the_range_of_the_dtype_are_refused(make_palm):
    palm = make_palm(rotary_xpos_scale_base=1)  # 3.5^62 is where float32 leaves no room
    limit = palm.max_length
    ids = torch.randint(0, 37, (1, limit + 1))
    assert 50 < limit < 70
    assert palm(ids[:, :limit]).isfinite().all()
    with pytest.raises(ValueError, match=rf"seq \({limit + 1} tokens\).*beyond {limit}"):
        palm(ids)
    with pytest.raises(ValueError, match=rf"seq_len \({limit + 1} tokens\)"):
        palm.generate(limit + 1, ids[:, :3])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 0] = False  # padding takes no position
    assert palm(ids, mask=mask).isfinite().all()


def test_gradients_at_the_longest_length_are_finite(make_palm):
    palm = make_palm(rotary_xpos_scale_base=1)
    palm(torch.randint(0, 37, (2, palm.max_length)), return_loss=True).backward()
    assert all(parameter.grad.isfinite().all() for parameter in palm.palm_parameters())


def test_max_length_follows_the_dtype_and_the_model(make_palm):
    palm = make_palm()
    assert 8192 < palm.max_length < 75_000
    assert palm.bfloat16().max_length > 8192
    assert palm.half().max_length < 8192
    assert make_palm(rotary_xpos_scale_base=None).max_length == make_palm(causal=False).max_length == math.inf


def test_calls_give_no_warning(make_palm, ragged):
    ids, mask = ragged(6, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fused in (False, True):
            palm = make_palm(fused=fused, finetune_scopes=("a",), attn_dropout=0.1).train()
            palm(ids, return_loss=True, mask=mask, finetune_scope="a").backward()
            palm.generate(9, ids, prompt_mask=mask, top_p=0.9, top_k=5)


# structure


def test_layers_have_one_projection_in_and_out_and_no_biases(make_palm):
    palm = make_palm(dim=24, depth=1, dim_head=8, heads=3, ff_mult=2)
    shapes = {name: tuple(parameter.shape) for name, parameter in palm.named_parameters()}
    assert shapes == {
        "token_emb.weight": (37, 24),  # tied: also the output
        "layers.0.norm.weight": (24,),
        "layers.0.in_proj.weight": (3 * 8 + 8 + 8 + 2 * 48, 24),  # queries, one key, one value, feedforward and gate
        "layers.0.out_proj.weight": (24, 3 * 8 + 48),
        "norm.weight": (24,),
    }


def test_logits_are_products_with_the_embedding(make_palm):
    palm = make_palm()
    ids = torch.randint(0, 37, (1, 5))
    hidden = palm.embed(ids)
    assert hidden.shape == (1, 5, 24)
    torch.testing.assert_close(palm(ids), torch.einsum("bnd,vd->bnv", hidden, palm.token_emb.weight))
    assert torch.equal(palm.to_logits(hidden[:, -1]), F.linear(hidden[:, -1], palm.token_emb.weight))


def test_extra_embed_is_added_to_the_embeddings(make_palm):
    palm = make_palm()
    ids = torch.tensor([[3, 9, 4]])
    shift = palm.token_emb.weight[7] - palm.token_emb.weight[9]
    extra = torch.zeros(1, 3, 24)
    extra[0, 1] = shift.detach()
    torch.testing.assert_close(palm(ids, extra_embed=extra), palm(torch.tensor([[3, 7, 4]])), atol=1e-4, rtol=0)


def test_parameters_come_in_a_fixed_order(make_palm):
    palm = make_palm(finetune_scopes=("a",))
    base = [parameter for name, parameter in palm.named_parameters() if "finetune" not in name]
    assert [id(parameter) for parameter in palm.palm_parameters()] == [id(parameter) for parameter in base]
    torch.optim.AdamW(palm.palm_parameters())


def test_config_rebuilds_the_model(make_palm):
    palm = make_palm(qk_rmsnorm=True, qk_scale=5, attn_dropout=0.25, causal=False, finetune_scopes=("a",))
    twin = PaLM(**palm.config)
    assert twin.config == palm.config
    assert list(twin.state_dict()) == [name for name in palm.state_dict() if "finetune" not in name]


# refused input


@pytest.mark.parametrize("name", ["num_tokens", "dim", "depth", "dim_head", "heads", "ff_mult", "lora_r"])
@pytest.mark.parametrize("size", [0, -2])
def test_sizes_that_are_not_positive_are_refused(name, size):
    with pytest.raises(ValueError, match=rf"^{name} \({size}\)"):
        PaLM(**(SMALL | {name: size}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim_head": 7}, r"dim_head \(7\) must be even"),
        ({"attn_dropout": 1.0}, r"attn_dropout \(1.0\)"),
        ({"ff_dropout": -0.1}, r"ff_dropout \(-0.1\)"),
        ({"qk_scale": 0.0}, r"qk_scale \(0.0\)"),
        ({"rotary_xpos_scale_base": 0}, r"rotary_xpos_scale_base \(0\)"),
    ],
)
def test_settings_of_no_model_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        PaLM(**(SMALL | wrong))


@pytest.mark.parametrize("wrong", [{"dim": 24.0}, {"depth": "2"}, {"causal": None}, {"finetune_scopes": 3}])
def test_arguments_of_another_type_are_refused(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        PaLM(**(SMALL | wrong))


def test_set_dropout_refuses_what_is_no_probability(make_palm):
    with pytest.raises(ValueError, match=r"dropout \(1.5\)"):
        make_palm().set_dropout(1.5)


@pytest.mark.parametrize(
    ("seq", "error", "message"),
    [
        ([[1, 2]], TypeError, "seq is a list"),
        (torch.zeros(1, 4), TypeError, "seq holds torch.float32"),
        (torch.zeros(1, 4, dtype=torch.bool), TypeError, "seq holds torch.bool"),
        (torch.tensor([1, 2, 3]), ValueError, r"seq has shape \(3,\)"),
        (torch.zeros(1, 0, dtype=torch.long), ValueError, r"seq has shape \(1, 0\)"),
        (torch.zeros(0, 4, dtype=torch.long), ValueError, r"seq has shape \(0, 4\)"),
        (torch.tensor([[1, 2], [37, 3]]), ValueError, r"id 37 \(row 1, place 0\).*0 to 36"),
        (torch.tensor([[1, 2], [3, -1]]), ValueError, r"id -1 \(row 1, place 1\)"),
    ],
)
def test_tokens_that_are_none_are_refused(make_palm, seq, error, message):
    with pytest.raises(error, match=message):
        make_palm()(seq)


def test_a_single_token_has_no_loss(make_palm):
    palm = make_palm()
    assert palm(torch.tensor([[3]])).shape == (1, 1, 37)
    with pytest.raises(ValueError, match="return_loss.*at least 2"):
        palm(torch.tensor([[3]]), return_loss=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integer_tokens_of_any_width_will_do(make_palm, dtype):
    palm = make_palm()
    ids = torch.randint(0, 37, (2, 5))
    assert torch.equal(palm(ids.to(dtype), return_loss=True), palm(ids, return_loss=True))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), ValueError, r"\(2, 3\)"),
        (torch.ones(2, 4), TypeError, "torch.bool"),
        (torch.tensor([[True] * 4, [False] * 4]), ValueError, "row 1 is all padding"),
    ],
)
def test_masks_that_do_not_fit_are_refused(make_palm, mask, error, message):
    with pytest.raises(error, match=message):
        make_palm()(torch.zeros(2, 4, dtype=torch.long), mask=mask)


def test_a_row_of_negative_ids_alone_is_refused(make_palm):
    with pytest.raises(ValueError, match="row 1 is all padding"):
        make_palm(causal=False)(torch.tensor([[3, -1], [-1, -1]]))


@pytest.mark.parametrize("settings", [{}, {"qk_rmsnorm": True}, {"causal": False}, {"depth": 1}, {"heads": 1}])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("since", [1, 4, 6])
def test_hidden_states_from_a_place_on_are_those_of_the_whole_pass(make_palm, settings, padding, since):
    palm = make_palm(finetune_scopes=("a",), **settings)
    ids, extra = torch.randint(0, 37, (3, 7)), torch.randn(3, 7, palm.dim)
    mask = torch.tensor([7, 3, 5])[:, None] > torch.arange(7)
    mask = {None: None, "left": mask.flip(-1), "right": mask}[padding]
    given = {"mask": mask, "adapter": palm.finetune_modules["a"], "extra_embed": extra}
    real = torch.ones(3, 7 - since, dtype=torch.bool) if mask is None else mask[:, since:]
    whole, late = palm.embed(ids, **given)[:, since:], palm.embed(ids, **given, since=since)
    assert late.shape == whole.shape
    torch.testing.assert_close(late[real], whole[real], atol=1e-5, rtol=0)
    weights = [*palm.parameters()]
    upstream = torch.randn_like(whole) * real[..., None]
    expected, found = (torch.autograd.grad(x, weights, upstream, materialize_grads=True) for x in (whole, late))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_holds_all_places_whatever_was_asked_for(make_palm, ragged, padded):
    palm = make_palm()
    ids, mask = ragged(7, 2, 5) if padded else (torch.randint(0, 37, (3, 7)), None)
    caches = [palm.new_cache(3, 9) for _ in range(2)]
    whole, last = (palm.embed(ids, mask=mask, cache=cache, since=at) for cache, at in zip(caches, (0, 6), strict=True))
    torch.testing.assert_close(last, whole[:, 6:], atol=1e-5, rtol=0)
    for name in ("keys", "values"):
        torch.testing.assert_close(getattr(caches[0], name), getattr(caches[1], name), atol=1e-5, rtol=0)


def test_recomputed_layers_give_the_same_from_a_place_on(make_palm):
    palm, ids = make_palm(), torch.randint(0, 37, (2, 7))
    expected = torch.autograd.grad(palm.embed(ids, since=3).square().sum(), [*palm.parameters()])
    palm.set_activation_checkpointing()
    found = torch.autograd.grad(palm.embed(ids, since=3).square().sum(), [*palm.parameters()])
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance", "masked"), [(torch.float32, 1e-5, True), (torch.bfloat16, 0.1, False)])
def test_a_pass_can_be_compiled_as_one_graph(make_palm, dtype, tolerance, masked):
    palm, ids = make_palm(depth=1, finetune_scopes=("a",)).to(dtype), torch.randint(0, 37, (2, 7))
    mask = torch.tensor([7, 5])[:, None] > torch.arange(7) if masked else None
    torch.compiler.reset()
    compiled = torch.compile(palm.embed, backend="eager", fullgraph=True)
    given = {"mask": mask, "adapter": palm.finetune_modules["a"], "since": 3}
    found, expected = (embed(ids, **given)[:, :2] for embed in (compiled, palm.embed))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
