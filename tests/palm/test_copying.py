"""Models moved together: what shared memory shares it afterwards, and nothing else moves."""

import torch
from torch import nn

from palm_rlhf_pytorch.palm.copying import move_together
from palm_rlhf_pytorch.reward.model import RewardModel


def memory(tensor):
    """Which memory a tensor reads; a device without any has addresses of the record of it."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset()


def test_models_over_one_trunk_share_it_on_the_new_device_too(make_palm):
    palm = make_palm()
    judge, trunk = RewardModel(palm), palm.share()
    move_together(trunk, judge, device="meta")
    moved = dict(trunk.named_parameters())
    assert all(parameter.is_meta for parameter in [*moved.values(), *judge.parameters()])
    shared = {name: parameter for name, parameter in judge.palm.named_parameters()}
    assert shared.keys() == moved.keys()
    for name, parameter in shared.items():
        assert memory(parameter) == memory(moved[name]) and not parameter.requires_grad
    assert len({memory(parameter) for parameter in [*moved.values(), *judge.parameters()]}) == len(
        list(judge.parameters())
    )
    assert all(parameter.requires_grad for parameter in judge.finetune_parameters())
    assert not any(parameter.is_meta for parameter in palm.parameters())  # the one they were made from stays


def test_memory_that_is_read_in_another_way_is_not_taken_for_shared():
    weight = torch.arange(6.0)
    modules = [nn.Module() for _ in range(3)]
    views = weight.reshape(2, 3), weight.reshape(3, 2), weight.view(torch.int32)
    for module, view in zip(modules, views, strict=True):
        module.register_buffer("view", view)
    move_together(*modules, device="meta")
    assert [tuple(module.view.shape) for module in modules] == [(2, 3), (3, 2), (6,)]
    assert modules[2].view.dtype == torch.int32 and len({memory(module.view) for module in modules}) == 3
