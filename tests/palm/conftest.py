"""Small language models whose logits are far apart, and ragged batches, for the tests of this room."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from palm_rlhf_pytorch.palm import PaLM, native
from palm_rlhf_pytorch.processor import is_allowed
from palm_rlhf_pytorch.tensors import pad_ragged


def build(seed: int = 0, *, fused: bool = True, **changes: Any) -> PaLM:
    torch.manual_seed(seed)
    sizes = {"num_tokens": 37, "dim": 24, "depth": 3, "dim_head": 8, "heads": 3, "ff_mult": 2, "lora_r": 4}
    palm = PaLM(**(sizes | changes))
    with torch.no_grad():  # a new model's logits are nearly equal; here they have a deviation near 5
        palm.token_emb.weight.normal_()
        for parameter in palm.layers.parameters():
            parameter.mul_(1.5)
    for layer in palm.layers:
        layer.fused = fused  # False: attention by plain products
    for scope in palm.finetune_modules:
        train_scope(palm, scope)
    return palm.eval()


def train_scope(palm: PaLM, scope: str) -> None:
    """Give an untrained scope, which changes nothing, an effect."""
    with torch.no_grad():
        for name, parameter in palm.finetune_modules[scope].named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.3)


@pytest.fixture
def make_palm() -> Callable[..., PaLM]:
    return build


@pytest.fixture
def effective() -> Callable[[PaLM, str], None]:
    return train_scope


@pytest.fixture
def ragged() -> Callable[..., tuple[Tensor, Tensor]]:
    """A batch of rows of unequal length: ids and mask, padded left or right, `extra` columns wider than needed."""

    def make(*lengths: int, left: bool = True, extra: int = 0, num_tokens: int = 37) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(lengths))
        rows = [torch.randint(0, num_tokens, (length,), generator=generator) for length in lengths]
        ids, mask = pad_ragged(rows, left=left, pad_value=5)
        wider = (extra, 0) if left else (0, extra)
        return torch.nn.functional.pad(ids, wider, value=5), torch.nn.functional.pad(mask, wider)

    return make


@pytest.fixture(params=[name for name, _, _ in native.BUILDS])
def native_build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One build of the native code after the other, in place of the best that the processor runs."""
    (needed,) = [(flags, level) for name, flags, level in native.BUILDS if name == request.param]
    library = native.load(request.param) if is_allowed(*needed[0], level=needed[1]) else None
    if library is None:
        pytest.skip(f"needs {request.param}: such a processor, and a C compiler when the package is installed")
    monkeypatch.setattr(native, "_library", lambda: library)
    native.native.cache_clear()
    yield request.param
    native.native.cache_clear()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing was compiled."""
    monkeypatch.setattr(native, "_library", lambda: None)
    native.native.cache_clear()
    yield
    native.native.cache_clear()
