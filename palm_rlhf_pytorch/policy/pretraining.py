"""Text that the policy goes on to read while it learns from a judge, so that it forgets less of it: PPO-ptx.

Ouyang et al., "Training language models to follow instructions with human feedback", https://arxiv.org/abs/2203.02155
(eq. 2). Knows tokens alone: the loss is taken by the learner, which asks for windows of them.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.settings import PolicySettings

SAMPLED = 4096  # tokens that the digest looks at


class Pretraining:
    """Random windows of one long run of tokens, drawn from a state that is given: a resumed run reads the same ones.

    Args:
        tokens: ids (n,), a tensor or an array; a memory map is read window by window and never held whole.
        length: tokens of a window.
        num_tokens: of the model's vocabulary.

    Raises:
        TypeError: if tokens are not integers.
        ValueError: if tokens are not one row of at least `length`, or an id sampled from them is not the model's.
    """

    def __init__(self, tokens: Tensor | np.ndarray, *, length: int, num_tokens: int) -> None:
        array = tokens.detach().cpu().numpy() if isinstance(tokens, Tensor) else np.asanyarray(tokens)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"pretraining holds {array.dtype}: it must be token ids, integers")
        if array.ndim != 1 or len(array) < length:
            raise ValueError(
                f"pretraining has shape {array.shape}: it must be one row of ids (n,) with n at least ptx_length"
                f" ({length})"
            )
        self.tokens, self.length, self.num_tokens = array, length, num_tokens
        self._check(np.asarray(array[:SAMPLED]))

    def windows(self, count: int, *, generator: torch.Generator) -> Tensor:
        """Windows (count, length) of ids, int64, on the CPU; every start is equally likely."""
        starts = torch.randint(len(self.tokens) - self.length + 1, (count,), generator=generator)
        found = np.stack([self.tokens[start : start + self.length] for start in starts.tolist()]).astype(np.int64)
        self._check(found)
        return torch.from_numpy(found)

    def digest(self) -> str:
        """SHA-256 of how many tokens there are and of some of them, evenly spaced: a resumed run must have the same."""
        places = np.linspace(0, len(self.tokens) - 1, min(SAMPLED, len(self.tokens))).astype(np.int64)
        content = np.asarray(self.tokens[places]).astype("<i8").tobytes()
        return hashlib.sha256(f"{len(self.tokens)} {self.length} ".encode() + content).hexdigest()

    def _check(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_tokens:
            raise ValueError(f"pretraining holds ids from {ids.min()} to {ids.max()}: the model has {self.num_tokens}")


def pretraining_from(
    tokens: Tensor | np.ndarray | None, settings: PolicySettings, *, num_tokens: int
) -> Pretraining | None:
    """What a trainer's `pretraining` names, if its settings ask for any.

    Raises:
        ValueError: if one is given without the other.
    """
    if (tokens is None) != (settings.ptx_coef == 0):
        missing = "pretraining is None: give ids (n,)" if tokens is None else "ptx_coef is 0: give it a weight"
        raise ValueError(f"ptx_coef ({settings.ptx_coef}) and pretraining go together, but {missing}")
    return None if tokens is None else Pretraining(tokens, length=settings.ptx_length, num_tokens=num_tokens)
