"""Other optimizers than AdamW: any that torch's interface fits, Muon for the matrices, several taken as one.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", https://kellerjordan.github.io/posts/muon
Liu et al., "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982 (its factor of the learning rate)
Knows no model: parameters come in groups, with their names.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch.optim import Muon, Optimizer

from palm_rlhf_pytorch.training.optimizer import adamw

Groups = list[dict[str, Any]]  # params, param_names, lr and weight_decay of each, as `parameter_groups` gives them
OptimizerFactory = Callable[[Groups], Optimizer]
# matrices that are no map from features to features: tables of embeddings, and heads
NO_MAPS = ("token_emb", "embed", "head")


def new_optimizer(factory: OptimizerFactory | None, groups: Groups, *, lr: float, **of_adamw: Any) -> Optimizer:
    """The optimizer of these groups: AdamW, fused, or what a factory makes of them.

    Args:
        factory: called with the groups; None for AdamW with the arguments `of_adamw`.
        groups: what `parameter_groups` gives.
        lr: learning rate of AdamW's groups that have none.
        **of_adamw: betas and eps, of AdamW alone.

    Raises:
        TypeError: if the factory gives no optimizer.
        ValueError: if the optimizer does not hold just the parameters given.
    """
    if factory is None:
        return adamw(groups, lr=lr, **of_adamw)
    wanted = [parameter for group in groups for parameter in group["params"]]
    optimizer = factory(groups)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer gave a {type(optimizer).__name__}: give a function from parameter groups to a"
            " torch.optim.Optimizer, such as lambda groups: torch.optim.SGD(groups, lr=0.1)"
        )
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(map(id, held)) != sorted(map(id, wanted)):
        raise ValueError(f"optimizer holds {len(held)} parameters, not just the {len(wanted)} that it was given")
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what schedules are factors of
    return optimizer


def muon(groups: Groups, *, momentum: float = 0.95, ns_steps: int = 5, no_maps: Sequence[str] = NO_MAPS) -> "Together":
    """Muon for matrices between layers, AdamW for all else, at the learning rates and decays of the groups.

    Muon's steps are scaled to the size of AdamW's (its factor 0.2 sqrt(max(rows, columns))), so that a learning rate
    that suits AdamW suits both. Not for sharded parameters (FSDP): a step needs whole matrices.

    Args:
        groups: what `parameter_groups` gives.
        momentum: of Muon; 0.95 in its authors' code.
        ns_steps: Newton-Schulz iterations of a step; 5 as there.
        no_maps: parts of the names of matrices that AdamW keeps.

    Raises:
        ValueError: if parameters are sharded.
    """
    if any(hasattr(parameter, "full_tensor") for group in groups for parameter in group["params"]):  # a DTensor's
        raise ValueError(
            "optimizer (muon) needs whole matrices, and FSDP gives each process a share of them: train in plain"
            " processes (DDP), or leave optimizer out for AdamW"
        )
    split: dict[bool, Groups] = {True: [], False: []}
    for group in groups:
        names = group.get("param_names", [""] * len(group["params"]))
        pairs = list(zip(names, group["params"], strict=True))
        for is_map, members in split.items():
            chosen = [(n, p) for n, p in pairs if (p.ndim == 2 and not any(part in n for part in no_maps)) == is_map]
            if chosen:
                sides = {"param_names": [name for name, _ in chosen], "params": [part for _, part in chosen]}
                members.append({**group, **sides})
    parts: list[Optimizer] = []
    if split[True]:
        parts.append(Muon(split[True], momentum=momentum, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"))
    if split[False]:
        parts.append(adamw(split[False], lr=0.0))
    return Together(parts)


class Together(Optimizer):
    """Several optimizers of different parameters as one: they share its groups and its state.

    Args:
        parts: at least one; no parameter is in two.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts this optimizer's groups and state, as the same objects."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            for parameter, kept in part.state.items():
                self.state.setdefault(parameter, kept)
            part.param_groups, part.state = self.param_groups[begin:end], self.state
            begin = end

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over groups and state of all."""
        super().load_state_dict(state_dict)
        self._share()


def kind_of(optimizer: Optimizer) -> str:
    """What a checkpoint calls it: its class, "AdamW", and those of its parts, "Together(Muon, AdamW)"."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper holds the real one
    parts = f"({', '.join(map(kind_of, inner.parts))})" if isinstance(inner, Together) else ""
    return type(inner).__name__ + parts
