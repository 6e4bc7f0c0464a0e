"""Generation: prefill the prompts once, then one token a step over a key/value cache.

Prompts of unequal length are the normal case: they are moved to the right, so that all responses start at one place,
and each row keeps its own positions. Knows of the model only that it embeds tokens and reads out logits.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from palm_rlhf_pytorch.attention import KVCache
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.inputs import check_generator, check_length, check_prompt_mask, check_prompts
from palm_rlhf_pytorch.palm.sampling import check_sampling, sample_tokens
from palm_rlhf_pytorch.tensors import align_right, lengths_to_mask

STEPS_BETWEEN_STOP_CHECKS = 16  # asking a CUDA device whether all rows have ended makes it wait; a CPU answers at once


class Generation(NamedTuple):
    """Responses of a batch.

    tokens: (b, t), t the longest response; what stands outside the mask means nothing.
    mask: True on generated tokens, the EOS included, (b, t); each row's True come first.
    logprobs: log-probability (nats) each token was drawn with, (b, t), 0 outside the mask.
    ended: True where the row drew EOS, (b,).
    """

    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    ended: Tensor


class Decoder(Protocol):
    """What generation asks of a language model."""

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for batch rows of max_length tokens."""
        ...

    def embed(
        self, seq: Tensor, *, mask: Tensor | None, adapter: Adapter | None, dropout: float | None, cache: KVCache | None
    ) -> Tensor:
        """Final hidden states (b, n, d) of tokens (b, n)."""
        ...

    def to_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., d)."""
        ...


class LanguageModel(Decoder, Protocol):
    """What checking a user's prompts asks besides."""

    num_tokens: int
    causal: bool

    @property
    def max_length(self) -> int | float:
        """How many tokens a row may have."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...


@torch.no_grad()
def generate_responses(
    model: Decoder,
    prompts: Tensor,
    prompt_mask: Tensor | None = None,
    *,
    max_new_tokens: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token: int | None = None,
    generator: torch.Generator | None = None,
    adapter: Adapter | None = None,
    on_step: Callable[[], object] | None = None,
) -> Generation:
    """Sample a response to each prompt.

    A row ends with its first EOS (looked for in the response, not in the prompt) or at its own max_new_tokens; the loop
    ends when all rows have. Ids are trusted here; `check_prompts` checks them.

    Args:
        model: what embeds tokens and reads out logits; its dropout is off here.
        prompts: token ids, (b, p), p at least 1.
        prompt_mask: True on real tokens, on whichever side the padding is, (b, p); None where all are real.
        max_new_tokens: at least 1, for all rows, or for each, (b,).
        temperature: 0 is greedy.
        top_k: see sampling.
        top_p: see sampling.
        eos_token: id that ends a response, or None.
        generator: random state of the draws, on the prompts' device; None takes torch's global one.
        adapter: low-rank adapter of the pass.
        on_step: called after each step, for a progress bar.

    Returns:
        Generation, at least one token a row.

    Raises:
        TypeError: if prompt_mask is not bool, or top_k is not a whole number.
        ValueError: if a setting names no distribution, max_new_tokens is below 1, a row is all padding, or the model's
            logits are not finite.
    """
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_generator(generator, prompts.device)
    prompts, prompt_mask = _pack(prompts, prompt_mask)
    batch, prompt_length = prompts.shape
    budget = torch.as_tensor(max_new_tokens, device=prompts.device).expand(batch)
    shortest, steps = (int(extreme) for extreme in budget.aminmax())
    if shortest < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1 for every prompt")
    cache = model.new_cache(batch, prompt_length + steps - 1)  # the last token drawn is never embedded
    check_every = 1 if prompts.device.type == "cpu" else STEPS_BETWEEN_STOP_CHECKS

    tokens = prompts.new_zeros(batch, steps)
    logprobs = torch.zeros(batch, steps, device=prompts.device)
    lengths = budget  # of the responses, shortened where EOS comes first
    ended = torch.zeros(batch, dtype=torch.bool, device=prompts.device)
    new, new_mask = prompts, prompt_mask
    for step in range(steps):
        hidden = model.embed(new, mask=new_mask, adapter=adapter, dropout=0.0, cache=cache)
        logits = model.to_logits(hidden[:, -1])
        drawn = sample_tokens(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        tokens[:, step], logprobs[:, step] = drawn
        if eos_token is not None:
            hit = (drawn.tokens == eos_token) & ~ended & (step < budget)
            lengths = torch.where(hit, step + 1, lengths)
            ended = ended | hit
        if on_step is not None:
            on_step()
        if step % check_every == check_every - 1 and bool((lengths <= step + 1).all()):
            break
        # a row past its own budget goes on as padding: its positions would grow beyond what the model can place
        new, new_mask = drawn.tokens[:, None], None if shortest == steps else (step + 1 < budget)[:, None]

    longest = int(lengths.max())
    mask = lengths_to_mask(lengths, longest)
    logprobs = logprobs[:, :longest].masked_fill(~mask, 0.0)
    _check_finite(logprobs)
    return Generation(tokens[:, :longest], mask, logprobs, ended)


@torch.no_grad()
def continue_prompts(
    model: LanguageModel,
    seq_len: int,
    prompt: Tensor | None,
    *,
    prompt_mask: Tensor | None,
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token: int | None,
    pad_value: int,
    generator: torch.Generator | None,
    use_tqdm: bool,
    adapter: Adapter | None,
) -> Tensor:
    """What `PaLM.generate` does, all arguments as there: check everything, sample, and pad each row after its end."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if not model.causal:
        raise ValueError("generate: a model with causal=False cannot generate; build it with causal=True")
    if seq_len < 1:
        raise ValueError(f"seq_len ({seq_len}) counts tokens of prompt and response: it must be at least 1")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1, or None")
    if eos_token is not None and not 0 <= eos_token < model.num_tokens:
        raise ValueError(f"eos_token ({eos_token}) must be from 0 to {model.num_tokens - 1}, or None")
    check_length(seq_len, model.max_length, name="seq_len")
    check_generator(generator, model.device)
    begun = prompt
    if begun is None:
        if prompt_mask is not None:
            raise ValueError("prompt_mask was given without a prompt; give the prompt it belongs to")
        begun = torch.randint(0, model.num_tokens, (1, 1), device=model.device, generator=generator)
        if seq_len == 1:
            return begun
    prompts = check_prompts(begun, prompt_mask, num_tokens=model.num_tokens, seq_len=seq_len, device=model.device)
    room = prompts.room if max_new_tokens is None else prompts.room.clamp(max=max_new_tokens)
    with tqdm(total=int(room.max()), disable=not use_tqdm, desc="generate", leave=False) as bar:
        out = generate_responses(
            model, prompts.ids, prompts.mask, max_new_tokens=room, temperature=temperature, top_k=top_k,
            top_p=top_p, eos_token=eos_token, generator=generator, adapter=adapter, on_step=bar.update,
        )  # fmt: skip
    new = out.tokens.masked_fill(~out.mask, pad_value)
    if prompt is None:
        return torch.cat((begun, new), dim=1)
    return new[0] if prompt.dim() == 1 else new


def _pack(prompts: Tensor, prompt_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Move real tokens to the right, and drop the columns that no row needs, so that wider padding costs nothing."""
    if prompt_mask is None:
        return prompts, None
    check_prompt_mask(prompt_mask, prompts)
    prompts, prompt_mask = align_right(prompts, prompt_mask)
    longest = int(prompt_mask.sum(dim=-1).max())
    return prompts[:, -longest:], prompt_mask[:, -longest:]


def _check_finite(logprobs: Tensor) -> None:
    """Asked once at the end, since asking waits for the device."""
    finite = logprobs.isfinite().all(dim=-1)
    if not bool(finite.all()):
        row = int((~finite).int().argmax())
        raise ValueError(f"the model's logits for row {row} are not finite (NaN or infinity); its weights are broken")
