"""The global random states of this process, for a run that must go on to the same bits.

Python's, NumPy's, torch's on the CPU and on its CUDA devices. Ours draw from generators of their own; a user's judge, a
model's dropout or a data loader may draw from these.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def random_states() -> dict[str, Any]:
    """All of them, JSON-able."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": bytes(torch.get_rng_state().numpy()).hex(),
        "cuda": [bytes(state.numpy()).hex() for state in cuda],
    }


def check_random_states(kept: Any) -> None:
    """Raise a ValueError unless these are states that `set_random_states` can take over."""
    try:
        version, internal, gauss = kept["python"]
        random.Random().setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = kept["numpy"]
        trial = np.random.RandomState()
        trial.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.Generator().set_state(_bytes(kept["torch"]))
        for state in kept["cuda"]:
            _bytes(state)
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError, IndexError) as error:
        raise ValueError(f"random states are not what a run keeps ({type(error).__name__}: {error})") from error


def set_random_states(kept: dict[str, Any]) -> None:
    """Take over what `random_states` gave; CUDA's only where there are as many devices."""
    version, internal, gauss = kept["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = kept["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(kept["torch"]))
    if kept["cuda"] and torch.cuda.is_available() and torch.cuda.device_count() == len(kept["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(state) for state in kept["cuda"]])


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
