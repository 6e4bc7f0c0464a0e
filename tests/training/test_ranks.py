"""What processes find out together: alone, and beside another that a stand-in for accelerate plays."""

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.training import ranks as module
from palm_rlhf_pytorch.training.ranks import Ranks, new_accelerator


class Pair:
    """An Accelerator of two processes, this one the second; the other's tensors are given in the order of asking."""

    num_processes, process_index, device = 2, 1, torch.device("cpu")

    def __init__(self, *others: Tensor) -> None:
        self.others = list(others)

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return tensor + self.others.pop(0)

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([self.others.pop(0), tensor])


def pair(*others: Tensor) -> Ranks:
    return Ranks(Pair(*others))  # type: ignore[arg-type]


def test_one_process_finds_its_own_answers_and_asks_nobody() -> None:
    alone, x = Ranks(None), torch.tensor([3.0, -1.0])
    assert (alone.count, alone.rank) == (1, 0)
    assert torch.equal(alone.sum(x), x) and torch.equal(alone.gather(x), x)
    assert alone.max(x[1]) == -1.0 and alone.gather_values({"a": 2}) == [{"a": 2}]
    assert alone.any(True) is True and alone.any(False) is False
    alone.raise_together(None)
    error = KeyError("mine")
    with pytest.raises(KeyError) as raised:
        alone.raise_together(error)
    assert raised.value is error


def test_sums_and_extremes_are_of_both_processes() -> None:
    both = pair(torch.tensor([10.0, 20.0]))
    assert (both.count, both.rank) == (2, 1)
    assert both.sum(torch.tensor([1.0, 2.0])).tolist() == [11.0, 22.0]
    assert pair(torch.tensor([[7]])).gather(torch.tensor([[8]])).tolist() == [[7], [8]]
    assert pair(torch.tensor([4.0])).max(torch.tensor(-2.0)) == 4.0
    assert pair(torch.tensor([float("nan")])).max(torch.tensor(3.0)).isnan()


@pytest.mark.parametrize(("own", "other", "expected"), [(0, 0, False), (1, 0, True), (0, 1, True), (1, 1, True)])
def test_any_is_true_if_it_is_on_one_process(own: int, other: int, expected: bool) -> None:
    assert pair(torch.tensor([float(other)])).any(bool(own)) is expected


def test_an_error_of_one_process_is_raised_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str | None] = []

    def beside(other: str | None) -> Ranks:
        monkeypatch.setattr(module, "gather_object", lambda own: told.extend(own) or [other, *own])
        return pair()

    beside(None).raise_together(None)
    with pytest.raises(RuntimeError, match="rank 0: OSError: disk full"):
        beside("OSError: disk full").raise_together(None)
    with pytest.raises(KeyError, match="mine"):  # its own error, with its type, comes first
        beside("OSError: disk full").raise_together(KeyError("mine"))
    assert told == [None, None, "KeyError: 'mine'"]


def test_processes_that_accelerate_does_not_know_of_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert new_accelerator({"cpu": True}).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r'3 processes were started .*accelerate_kwargs=\{"cpu": True\}'):
        new_accelerator(None)
