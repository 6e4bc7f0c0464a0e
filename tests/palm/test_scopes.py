"""Scopes: added, used, merged, removed; and models that share the weights of another."""

import pytest
import torch

from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm import PaLM

IDS = torch.tensor([[3, 9, 4, 30, 1, 7], [8, 8, 2, 0, 36, 5]])


@pytest.fixture
def palm(make_palm) -> PaLM:
    return make_palm(finetune_scopes=("a", "b"))


def test_untrained_scope_changes_nothing(make_palm):
    palm = make_palm()
    palm.add_finetune_params("new")
    assert torch.equal(palm(IDS, finetune_scope="new"), palm(IDS))


def test_scope_acts_only_where_it_is_named(palm):
    base, a, b = palm(IDS), palm(IDS, finetune_scope="a"), palm(IDS, finetune_scope="b")
    assert (a - base).abs().max() > 0.1 and (b - base).abs().max() > 0.1 and (a - b).abs().max() > 0.1
    assert torch.equal(palm(IDS, finetune_scope="a", disable_lora=True), base)
    assert torch.equal(palm.to_logits(palm.embed(IDS, adapter=palm.finetune_modules["a"])), a)


@pytest.mark.parametrize("settings", [{}, {"qk_rmsnorm": True}, {"flash_attn": True}])
def test_merged_scope_equals_the_unmerged_one(make_palm, effective, settings):
    palm = make_palm(**settings)
    palm.add_finetune_params("a", r=3, alpha=6.0, last_layers=2)
    effective(palm, "a")
    apart, base = palm(IDS, finetune_scope="a"), palm(IDS)
    palm.merge_finetune_params("a")
    torch.testing.assert_close(palm(IDS), apart, atol=1e-4, rtol=1e-4)
    assert (apart - base).abs().max() > 0.1
    assert "a" not in palm.finetune_modules


def test_merging_keeps_the_weights_dtype_and_identity(make_palm):
    palm = make_palm(finetune_scopes=("a",)).bfloat16()
    before = [id(parameter) for parameter in palm.palm_parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in palm.finetune_parameters("a"))
    palm.merge_finetune_params("a")
    assert [id(parameter) for parameter in palm.palm_parameters()] == before
    assert all(parameter.dtype == torch.bfloat16 for parameter in palm.palm_parameters())


def test_removed_scope_is_returned_and_can_be_added_again(palm):
    adapter = palm.remove_finetune_params("a")
    assert isinstance(adapter, Adapter)
    with pytest.raises(ValueError, match="unknown scope 'a' .known: 'b'."):
        palm(IDS, finetune_scope="a")
    palm.add_finetune_params("a")
    assert torch.equal(palm(IDS, finetune_scope="a"), palm(IDS))


def test_training_a_scope_leaves_the_base_weights_bitwise_alone(palm):
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    gradients = torch.autograd.grad(palm(IDS, return_loss=True, finetune_scope="a"), palm.finetune_parameters("a"))
    with torch.no_grad():
        torch._foreach_add_(palm.finetune_parameters("a"), gradients, alpha=-0.1)
    for name, parameter in palm.named_parameters():
        assert torch.equal(parameter, before[name]) == ("finetune_modules.a." not in name), name


def test_finetune_parameters_are_those_of_the_scope_in_order(palm):
    parameters = palm.finetune_parameters("a")
    named = [parameter for name, parameter in palm.named_parameters() if name.startswith("finetune_modules.a.")]
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in named]
    assert len(parameters) == 3 * 4 * 2
    assert not {id(p) for p in parameters} & {id(p) for p in palm.palm_parameters()}


def test_rank_and_alpha_reach_the_adapter(make_palm):
    palm = make_palm(lora_r=4)
    palm.add_finetune_params("a")
    palm.add_finetune_params("b", r=2, alpha=7.0)
    a, b = (palm.finetune_modules[scope].layer(0).q for scope in "ab")
    assert (a.A.shape, a.scale) == ((24, 4), 1.0)
    assert (b.A.shape, b.scale) == ((24, 2), 3.5)


def test_new_adapter_is_not_kept_and_leaves_the_random_state_alone(make_palm):
    palm = make_palm()
    state = torch.get_rng_state()
    adapter = palm.new_adapter(r=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("finetune" in name for name in palm.state_dict())
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


def test_a_lone_name_is_one_scope(make_palm):
    assert list(make_palm(finetune_scopes="reward").finetune_modules) == ["reward"]


# refused


def test_doubled_scope_is_refused_before_anything_is_drawn(palm):
    state, before = torch.get_rng_state(), palm.finetune_modules["a"]
    with pytest.raises(ValueError, match="scope 'a' exists already"):
        palm.add_finetune_params("a")
    assert palm.finetune_modules["a"] is before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("disable_lora", [False, True])
def test_unknown_scope_is_refused_even_where_disabled(palm, disable_lora):
    for call in (palm, lambda seq, **scope: palm.generate(9, seq, **scope)):
        with pytest.raises(ValueError, match="unknown scope 'c' .known: 'a', 'b'.; add_finetune_params"):
            call(IDS, finetune_scope="c", disable_lora=disable_lora)


@pytest.mark.parametrize("use", ["remove_finetune_params", "merge_finetune_params", "finetune_parameters"])
def test_unknown_scope_is_refused_by_every_method(make_palm, use):
    with pytest.raises(ValueError, match="unknown scope 'c' .known: none yet."):
        getattr(make_palm(), use)("c")


@pytest.mark.parametrize("name", ["", "a.b", "keys", "training"])
def test_names_that_torch_cannot_keep_are_refused(make_palm, name):
    with pytest.raises(ValueError, match=f"scope '{name}'"):
        make_palm().add_finetune_params(name)


@pytest.mark.parametrize("wrong", [{"r": 0}, {"last_layers": 4}, {"alpha": -1.0}])
def test_adapters_that_do_not_fit_are_refused(make_palm, wrong):
    palm = make_palm()
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        palm.add_finetune_params("a", **wrong)
    assert not palm.finetune_modules


# models over the same weights


def facts(palm: PaLM) -> dict[str, tuple]:
    return {
        name: (weight.data_ptr(), weight.requires_grad, weight.sum().item()) for name, weight in palm.named_parameters()
    }


def test_share_uses_the_same_memory_without_gradients(palm):
    shared = palm.share()
    assert torch.equal(shared(IDS), palm(IDS))
    own = dict(palm.named_parameters())
    for name, weight in shared.named_parameters():
        assert weight is not own[name] and weight.data_ptr() == own[name].data_ptr()
        assert not weight.requires_grad
    assert not shared.finetune_modules


def test_share_copies_what_is_to_be_trained(palm):
    shared = palm.share(trainable=lambda name: name.startswith("layers.2."))
    own = dict(palm.named_parameters())
    for name, weight in shared.named_parameters():
        trained = name.startswith("layers.2.")
        assert weight.requires_grad == trained
        assert (weight.data_ptr() != own[name].data_ptr()) == trained
        assert torch.equal(weight, own[name])


def test_share_leaves_the_original_as_it_was(palm):
    palm.palm_parameters()[1].requires_grad_(False)
    palm.train()
    before, base = facts(palm), palm.eval().embed(IDS)
    shared = palm.train().share(trainable=lambda name: True)
    shared.eval().set_dropout(0.3)
    shared.add_finetune_params("c")
    with torch.no_grad():
        for weight in shared.parameters():
            weight.add_(1)
    assert palm.training and list(palm.finetune_modules) == ["a", "b"]
    assert palm.config["attn_dropout"] == palm.attn_dropout == 0.0
    assert facts(palm) == before
    assert torch.equal(palm.eval().embed(IDS), base)


def test_merging_into_a_shared_model_leaves_the_original_alone(palm):
    before = facts(palm)
    shared = palm.share()
    with_scope = palm(IDS, finetune_scope="a")
    shared.merge_adapter(palm.finetune_modules["a"])
    torch.testing.assert_close(shared(IDS), with_scope, atol=1e-4, rtol=1e-4)
    assert facts(palm) == before


def test_share_carries_no_gradients_over(palm):
    palm(IDS, return_loss=True).backward()
    assert all(weight.grad is None for weight in palm.share(trainable=lambda name: True).parameters())
    assert palm.token_emb.weight.grad is not None
