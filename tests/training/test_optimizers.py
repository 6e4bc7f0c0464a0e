"""Any optimizer in place of AdamW: what is asked of it, Muon's split, and runs that go on with it to the same bits."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from palm_rlhf_pytorch.training.checkpoint import Checkpoints
from palm_rlhf_pytorch.training.optimizer import parameter_groups
from palm_rlhf_pytorch.training.optimizers import Together, kind_of, muon, new_optimizer
from palm_rlhf_pytorch.training.saves import Saves
from palm_rlhf_pytorch.training.supervised import fit


class Lion(Optimizer):
    """Chen et al., https://arxiv.org/abs/2302.06675, as a user may bring it: it counts its steps by a plain number."""

    def __init__(self, groups, betas=(0.9, 0.99)):
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                moment = state.setdefault("moment", torch.zeros_like(weight))
                state["count"] = state.get("count", 0) + 1
                update = (first * moment + (1 - first) * weight.grad).sign() + group["weight_decay"] * weight
                weight -= group["lr"] * update
                moment.mul_(second).add_(weight.grad, alpha=1 - second)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(7, 3)
            self.inner = nn.Linear(3, 5)
            self.head = nn.Linear(5, 1)

    def forward(self, ids):
        return (self.head(torch.tanh(self.inner(self.embed(ids)))) - ids[..., None]).square().mean()


def batches():
    generator = torch.Generator().manual_seed(3)
    while True:
        yield {"ids": torch.randint(7, (4, 2), generator=generator)}


def train(model, optimizer, *, num_steps=7, saves=None):
    return fit(
        model, batches(), num_steps=num_steps, lr=0.01, weight_decay=0.1, warmup_steps=2, progress=False, saves=saves,
        optimizer=optimizer,
    )  # fmt: skip


def state(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_first_step_of_a_given_optimizer_is_that_of_its_formula():
    model, expected = Net(), Net()
    loss = expected(**next(batches()))
    loss.backward()
    nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    for weight in expected.parameters():  # Lion from rest: lr (sign(g) + decay w), decay on matrices alone
        decay = 0.1 if weight.ndim == 2 else 0.0
        weight.data -= 0.01 * (weight.grad.sign() + decay * weight.data)
    fit(model, batches(), num_steps=1, lr=0.01, weight_decay=0.1, progress=False, optimizer=Lion)
    assert torch.allclose(state(model), state(expected), atol=1e-7)


def test_learning_rate_follows_the_schedule_whatever_the_optimizer():
    found = train(Net(), lambda groups: SGD(groups, momentum=0.9))
    # warm-up of 2 of 7 steps, then half a cosine from 1 to 0.1
    assert found["train/lr"] == pytest.approx(0.01 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi))))


@pytest.mark.parametrize(
    ("factory", "kind"),
    [(None, "AdamW"), (Lion, "Lion"), (muon, "Together(Muon, AdamW)"), (lambda groups: SGD(groups), "SGD")],
)
def test_run_goes_on_to_the_same_bits_with_any_optimizer(tmp_path: Path, factory, kind):
    whole = Net()
    train(whole, factory)
    model = Net()
    halves = [Saves(Checkpoints(tmp_path / kind), every=3, resume=resume) for resume in (False, True)]

    def stopping(step, metrics):
        return step == 3

    fit(model, batches(), num_steps=7, lr=0.01, weight_decay=0.1, warmup_steps=2, progress=False, saves=halves[0],
        optimizer=factory, evaluate=lambda: {}, eval_every=3, stop=stopping)  # fmt: skip
    resumed = Net()
    train(resumed, factory, saves=halves[1])
    assert torch.equal(state(resumed), state(whole)) and not torch.equal(state(model), state(whole))
    with pytest.raises(ValueError, match="optimizer"):
        train(Net(), Lion if factory is not Lion else None, saves=Saves(Checkpoints(tmp_path / kind), resume=True))


def test_muon_takes_matrices_between_layers_alone():
    optimizer = muon(parameter_groups(Net().named_parameters(), lr=0.01, weight_decay=0.1))
    named = {
        type(part): sorted(name for group in part.param_groups for name in group["param_names"])
        for part in optimizer.parts
    }
    assert named == {Muon: ["inner.weight"], AdamW: ["embed.weight", "head.bias", "head.weight", "inner.bias"]}
    assert kind_of(optimizer) == "Together(Muon, AdamW)"


def test_steps_taken_together_are_those_of_each_alone():
    torch.manual_seed(0)
    first, second = (nn.Parameter(torch.randn(*shape)) for shape in ((3, 4), (5,)))
    alone = [nn.Parameter(part.detach().clone()) for part in (first, second)]
    together = Together([SGD([first], lr=0.1, momentum=0.9), AdamW([second], lr=0.2)])
    apart = [SGD([alone[0]], lr=0.1, momentum=0.9), AdamW([alone[1]], lr=0.2)]
    for step in range(3):
        for parts in ((first, second), alone):
            for part in parts:
                part.grad = torch.full_like(part, 1.0 + step)
        together.step()
        for optimizer in apart:
            optimizer.step()
        if step == 1:  # and after its state went to a file and back
            together.load_state_dict(together.state_dict())
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1])
    together.param_groups[1]["lr"] = 0.0
    before = second.clone()
    together.step()
    assert torch.equal(second, before)


def test_what_is_no_optimizer_of_the_parameters_is_refused():
    def groups():
        return parameter_groups(Net().named_parameters(), lr=0.01)

    with pytest.raises(TypeError, match="list"):
        new_optimizer(lambda groups: [], groups(), lr=0.01)
    with pytest.raises(ValueError, match="holds 4 parameters, not just the 5"):
        new_optimizer(lambda groups: SGD(groups[0]["params"] + groups[1]["params"][1:], lr=0.1), groups(), lr=0.01)


def test_muon_refuses_what_is_no_whole_matrix():
    shard = nn.Parameter(torch.ones(3, 2))
    shard.full_tensor = lambda: shard  # as a DTensor has it
    with pytest.raises(ValueError, match=r"optimizer \(muon\) needs whole matrices.*FSDP"):
        muon([{"params": [shard], "param_names": ["inner.weight"], "lr": 0.1, "weight_decay": 0.0}])
