"""Weights spread over processes: FSDP2, and the whole of them for whatever is not learning.

The learner's model is a second ActorCritic, split layer by layer with `fully_shard`: each process holds its share of
every weight, gradient and moment. The first one stays what it was, a plain module, and has its weights only inside a
block of `Sharding.whole`: sampling packs weights, and passes differ in number from process to process, so that neither
can go through hooks that gather. Outside such a block its weights are NaN, of the right shape and of no size. So
what learning holds shrinks with the number of processes; while it samples each process holds the whole model.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", https://arxiv.org/abs/2304.11277
Knows no loss and no optimizer. torch's own modules for this are imported where they are used: they take a second, and
bring warning filters of sympy's, which nobody should have who trains in one process.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic, PolicyOutput


def asks_for_sharding(accelerator: Accelerator) -> bool:
    """Whether the user's accelerate settings ask for FSDP: the plugin, or ACCELERATE_USE_FSDP, which a config sets.

    accelerate itself passes over that on a CPU; here it is obeyed there too. One process has nothing to share out.

    Raises:
        ValueError: if the settings ask for what this library cannot do with two clipped groups and skipped steps.
    """
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"accelerate is set to {kind.value}, whose engine clips and steps by itself: no step that is not finite"
            " could be skipped, nor actor and critic clipped apart; use FSDP2 (fsdp_version: 2) or plain processes"
        )
    on_cpu = kind == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if kind != DistributedType.FSDP:
        return on_cpu
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version ({plugin.fsdp_version}) must be 2: FSDP1 keeps no parameter by its name")
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ValueError("fsdp_offload_params (True) is not supported: weights stay where the processes compute")
    if accelerator.scaler is not None:
        raise ValueError("mixed_precision ('fp16') is not supported with FSDP: take 'bf16', which needs no scaler")
    return True


class Sharding:
    """A plain ActorCritic and its sharded twin, `model`, which has the same names and is the one that learns."""

    def __init__(self, actor_critic: ActorCritic, accelerator: Accelerator) -> None:
        """Split the weights; afterwards the plain module has none of its own."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.plain, self._depth = actor_critic, 0
        # the twin begins with the very parameters of the plain one: fully_shard replaces them, module by module
        twin: ActorCritic = copy.deepcopy(actor_critic, {id(weight): weight for weight in actor_critic.parameters()})
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        # casting is autocast's, as in the passes of the plain module: old and new log-probabilities are then alike
        on_gpu = accelerator.distributed_type == DistributedType.FSDP
        reshard = accelerator.state.fsdp_plugin.reshard_after_forward if on_gpu else True
        for palm in [part for part in twin.modules() if isinstance(part, PaLM)]:
            for layer in palm.layers:
                layer.register_forward_hook(_no_view)
                fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
        if twin.value_head is not None:
            fully_shard(twin.value_head, mesh=mesh, reshard_after_forward=reshard)  # float32, whatever the trunk is
        trained = twin.actor_parameters() | twin.critic_parameters()
        kinds = {str(weight.dtype) for name, weight in trained.items() if not name.startswith("value_head.")}
        if len(kinds) > 1:
            raise ValueError(
                f"FSDP takes trained weights of one dtype, not {sorted(kinds)}: give actor and critic both an adapter,"
                " both none, or a float32 palm"
            )
        twin.register_forward_hook(_no_view)
        fully_shard(twin, mesh=mesh)
        self.model = twin
        self._empty()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block the plain module has all weights, as they are now; every process must enter it."""
        if self._depth == 0:
            self._fill()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._empty()

    @torch.no_grad()
    def _fill(self) -> None:
        shards = dict(self.model.named_parameters())
        for name, weight in self.plain.named_parameters():
            weight.data = whole_tensor(shards[name].detach())

    def _empty(self) -> None:
        for weight in self.plain.parameters():
            weight.grad = None
            weight.data = weight.data.new_full((), torch.nan).expand(weight.shape)


def _no_view(module: nn.Module, given: object, out: Tensor | PolicyOutput) -> Tensor | PolicyOutput:
    """A forward hook before FSDP's own, which are hung on the output, and would be lost to a change of a view."""
    return out.clone() if isinstance(out, Tensor) else PolicyOutput(*(tensor.clone() for tensor in out))


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes must ask."""
    gather = getattr(tensor, "full_tensor", None)  # a DTensor's
    return tensor if gather is None else gather()


def spread_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor of a parameter's shape in its shards, where it has some."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@contextmanager
def gathering_gradients(model: nn.Module, accelerator: Accelerator, *, last: bool) -> Iterator[None]:
    """A forward and backward pass of one microbatch; gradients go over the processes in the last one of a step."""
    share = getattr(model, "set_requires_gradient_sync", None)  # an FSDPModule's
    if share is not None:
        share(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield
