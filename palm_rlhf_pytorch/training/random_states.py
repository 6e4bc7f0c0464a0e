"""The global random states of this process, for a run that must go on to the same bits.

Python's, NumPy's, torch's on the CPU and on its CUDA devices. Ours draw from generators of their own; a user's judge, a
model's dropout or a data loader may draw from these.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS = 624  # of the Mersenne Twister, which Python, NumPy and torch share
KEPT = {"python", "numpy", "torch", "cuda"}


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
    """Refuse what `set_random_states` could not take over whole; nothing is set.

    Raises:
        ValueError: naming the first of the states that is none, and what is wrong with it.
    """
    if not isinstance(kept, dict) or kept.keys() != KEPT:
        raise ValueError(f"random states must hold {', '.join(sorted(KEPT))}, and nothing else")
    _check_python(kept["python"])
    _check_numpy(kept["numpy"])
    _check_torch(kept["torch"], "torch", "cpu")
    cuda = kept["cuda"]
    if not isinstance(cuda, list):
        raise ValueError(f"the random states of cuda are a {type(cuda).__name__}, expected a list, one for each device")
    for number, text in enumerate(cuda):
        _check_torch(text, f"cuda:{number}", f"cuda:{number}" if _is_for_these_devices(cuda) else None)


def set_random_states(kept: dict[str, Any]) -> None:
    """Take over what `random_states` gave; CUDA's only where there are as many devices."""
    version, internal, gauss = kept["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = kept["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(kept["torch"]))
    if _is_for_these_devices(kept["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(state) for state in kept["cuda"]])


def _is_for_these_devices(states: list[str]) -> bool:
    return bool(states) and torch.cuda.is_available() and torch.cuda.device_count() == len(states)


def _check_python(state: Any) -> None:
    """Version, words with the place of the next one, and a normal number that waits."""
    if not (
        isinstance(state, list)
        and len(state) == 3
        and state[0] == random.getstate()[0]
        and isinstance(state[1], list)
        and _is_twister(state[1][:-1], state[1][-1:])
        and (state[2] is None or isinstance(state[2], float))
    ):
        raise ValueError(f"the random state of python is not [version, {WORDS} words and a place, number or None]")


def _check_numpy(state: Any) -> None:
    """NumPy itself takes any place, and would then read beyond the words."""
    if not (
        isinstance(state, list)
        and len(state) == 5
        and state[0] == "MT19937"
        and _is_twister(state[1], state[2:3])
        and type(state[3]) is int
        and state[3] in (0, 1)
        and isinstance(state[4], float)
    ):
        raise ValueError(f"the random state of numpy is not ['MT19937', {WORDS} words, place, 0 or 1, number]")


def _check_torch(text: Any, name: str, device: str | None) -> None:
    """Torch checks length and content itself, here on a generator of its own; without a device, the digits alone."""
    try:
        state = _bytes(text)
        if device is not None:
            torch.Generator(device).set_state(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the random state of {name} is not one as this torch writes it ({reason})") from error


def _is_twister(words: Any, place: list[Any]) -> bool:
    """Whether these are the words, and the one place among them or just after."""
    return (
        isinstance(words, list)
        and len(words) == WORDS
        and all(type(word) is int and 0 <= word < 2**32 for word in words)
        and [type(number) for number in place] == [int]
        and 0 <= place[0] <= WORDS
    )


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
