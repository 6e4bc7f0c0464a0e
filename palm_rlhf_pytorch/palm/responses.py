"""The responses of a batch while they grow: what was drawn, which rows have ended, which are still in the batch.

All that changes with a step is a tensor written in place, and nothing is asked of the device while recording, so that
a CUDA graph can replay it. Knows nothing of the model.
"""

from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.sampling import sample_tokens, uniform_dtype

DRAWS = 16  # steps for which random numbers are drawn in one go


class Responses:
    """Tokens drawn so far; b rows to begin with, of which those that have ended may leave.

    A row's random numbers are its own, drawn for all b rows at every step: who else is left changes none.
    """

    def __init__(
        self,
        budget: Tensor,
        steps: int,
        *,
        greedy: bool,
        eos_token: int | None,
        generator: torch.Generator | None,
        sampling: dict[str, Any],
    ) -> None:
        """Prepare for b rows.

        Args:
            budget: most tokens of each row, (b,).
            steps: the largest of them.
            greedy: no random number is drawn.
            eos_token: id that ends a row, or None.
            generator: random state of the draws; None takes torch's global one.
            sampling: what `sample_tokens` takes besides.
        """
        batch, device = len(budget), budget.device
        self.greedy, self.eos_token, self.generator, self.sampling = greedy, eos_token, generator, sampling
        self.tokens = torch.zeros(batch, steps, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(batch, steps, device=device)
        self.lengths = budget.clone()  # of all b rows, shortened where EOS comes first
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.uniforms = torch.zeros(DRAWS, batch, dtype=uniform_dtype(device), device=device)
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.rows = torch.arange(batch, device=device)  # those still in the batch, ascending
        self.current = torch.zeros(batch, dtype=torch.long, device=device)  # their last tokens
        self.may_end_early = eos_token is not None or bool((budget < steps).any())

    def refill(self) -> None:
        """Draw the random numbers of the next DRAWS steps; call it before every DRAWS-th step, the first included."""
        if not self.greedy:
            torch.rand(self.uniforms.shape, dtype=self.uniforms.dtype, generator=self.generator, out=self.uniforms)

    def record(self, logits: Tensor) -> None:
        """Draw the next token of each row in the batch from its logits (b', v)."""
        uniform = None
        if not self.greedy:
            uniform = self.uniforms.index_select(0, self.step % DRAWS)[0].index_select(0, self.rows)
        drawn = sample_tokens(logits, uniform=uniform, **self.sampling)
        place = self.rows, self.step.expand_as(self.rows)
        self.tokens.index_put_(place, drawn.tokens)
        self.logprobs.index_put_(place, drawn.logprobs.to(self.logprobs.dtype))
        self.current.copy_(drawn.tokens)
        self.step += 1
        if self.eos_token is not None:
            lengths, ended = self.lengths.index_select(0, self.rows), self.ended.index_select(0, self.rows)
            hit = (drawn.tokens == self.eos_token) & ~ended & (self.step <= lengths)
            self.lengths.index_copy_(0, self.rows, torch.where(hit, self.step, lengths))
            self.ended.index_copy_(0, self.rows, ended | hit)

    def alive(self) -> Tensor:
        """Which of the rows in the batch go on, as places in it, ascending; waits for the device."""
        return (self.lengths[self.rows] > self.step).nonzero()[:, 0]

    def end(self, row: int, length: int) -> None:
        """End one of the b rows after so many of its tokens, for a reason of the caller's."""
        with torch.inference_mode():
            self.lengths[row] = length
        self.may_end_early = True

    def keep(self, places: Tensor) -> None:
        """Go on with the rows at some places of the batch."""
        self.rows, self.current = self.rows[places], self.current[places]
