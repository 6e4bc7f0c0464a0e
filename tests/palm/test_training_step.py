"""A training step: the loss against logits, attention's flag, recomputed activations, and what is kept for backward."""

import pytest
import torch
import torch.nn.functional as F


def gradients(palm):
    found = [parameter.grad.clone() for parameter in palm.parameters() if parameter.grad is not None]
    palm.zero_grad()
    return found


@pytest.mark.parametrize("padded", [True, False])
def test_loss_and_gradients_equal_those_of_the_logits(make_palm, ragged, padded):
    palm = make_palm().double()
    ids, mask = ragged(9, 4, 6, left=False)
    mask = mask if padded else torch.ones_like(mask)
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    F.cross_entropy(palm(ids, mask=mask)[:, :-1].flatten(0, 1), targets.flatten()).backward()
    expected = gradients(palm)
    palm(ids, return_loss=True, mask=mask if padded else None).backward()
    assert not palm.token_emb.weight.grad.is_sparse
    torch.testing.assert_close(gradients(palm), expected)


def test_gradients_of_several_losses_add_up(make_palm):
    palm = make_palm().double()
    first, second = torch.randint(0, 37, (2, 1, 9))
    expected = []
    for ids in (first, second):
        palm(ids, return_loss=True).backward()
        expected.append(gradients(palm))
    palm(first, return_loss=True).backward()
    palm(second, return_loss=True).backward()
    torch.testing.assert_close(gradients(palm), [a + b for a, b in zip(*expected, strict=True)])


def test_a_frozen_embedding_gets_no_gradient_and_adapters_do(make_palm):
    palm = make_palm(finetune_scopes=("a",))
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(False)
    palm(torch.randint(0, 37, (2, 9)), return_loss=True, finetune_scope="a").backward()
    assert all(parameter.grad is None for parameter in palm.palm_parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in palm.finetune_parameters("a"))


def test_flash_attn_changes_nothing(make_palm):
    ids = torch.randint(0, 37, (2, 9))
    assert torch.equal(make_palm(flash_attn=True)(ids), make_palm(flash_attn=False)(ids))


# recomputed activations


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scope", [None, "a"])
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_activations_give_the_same_gradients(make_palm, ragged, dropout, scope, autocast):
    palm = make_palm(finetune_scopes=("a",), attn_dropout=dropout, ff_dropout=dropout).train()
    ids, mask = ragged(9, 4, 6)
    found = []
    for enabled in (False, True):
        palm.set_activation_checkpointing(enabled)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = palm(ids, return_loss=True, mask=mask, finetune_scope=scope)
        loss.backward()
        found.append((loss, gradients(palm), torch.rand(())))
    (loss, plain, drawn), (again, recomputed, then) = found
    assert torch.equal(loss, again)
    torch.testing.assert_close(recomputed, plain, atol=1e-7, rtol=1e-6)
    assert torch.equal(drawn, then)  # the stream of random numbers goes on from the same place


def saved_bytes(palm, ids):
    """Bytes of distinct memory that a loss keeps for its backward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in palm.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage, storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden = palm.embed(ids)
    return sum(size for _, size in kept.values()), hidden


def test_recomputed_activations_keep_a_tenth(make_palm):
    palm = make_palm(depth=6, dim=32, heads=4, ff_mult=4).train()
    ids = torch.randint(0, 37, (2, 50))
    plain, _ = saved_bytes(palm, ids)
    palm.set_activation_checkpointing()
    recomputed, _ = saved_bytes(palm, ids)
    one_layer_in = 2 * 50 * 32 * 4
    assert 6 * one_layer_in <= recomputed < plain / 10


def test_nothing_is_recomputed_without_gradients_or_with_a_cache(make_palm):
    palm = make_palm()
    prompt = torch.randint(0, 37, (1, 5))
    wanted = palm.generate(9, prompt, temperature=0.0)
    palm.set_activation_checkpointing()
    assert torch.equal(palm.generate(9, prompt, temperature=0.0), wanted)
    assert palm.share().activation_checkpointing and not palm.eval()(prompt).isnan().any()


def test_attention_keeps_no_map_of_tokens(make_palm):
    palm = make_palm().train()
    (short, _), (long, _) = saved_bytes(palm, torch.zeros(1, 40).long()), saved_bytes(palm, torch.zeros(1, 80).long())
    assert long < 2.1 * short
    for layer in palm.layers:
        layer.fused = False
    (short, _), (long, _) = saved_bytes(palm, torch.zeros(1, 40).long()), saved_bytes(palm, torch.zeros(1, 80).long())
    assert long > 2.3 * short
