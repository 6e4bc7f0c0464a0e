"""Generation: prefill the prompts once, then one token a step over a key/value cache.

Prompts of unequal length are the normal case: they are moved to the right, so that all responses start at one place,
and each row keeps its own positions. Prompts that are alike are read once, and rows that have ended leave the batch.
Knows of the model only that it embeds tokens and decodes.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from palm_rlhf_pytorch.attention import KVCache
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.graphs import StepGraphs
from palm_rlhf_pytorch.palm.inputs import check_generator, check_length, check_prompt_mask, check_prompts
from palm_rlhf_pytorch.palm.responses import DRAWS, Responses
from palm_rlhf_pytorch.palm.sampling import SMALLEST_TEMPERATURE, check_sampling
from palm_rlhf_pytorch.tensors import align_right, lengths_to_mask

# Tokens, padding included, in one pass over prompts: few enough that a CPU's cache holds what a layer makes of them,
# and that a GPU has room for it.
PREFILL_TOKENS = {"cpu": 1024, "cuda": 32768}
# Steps between two looks at which rows have ended, and the share of rows alive from which on the others stay in the
# batch: a CPU answers at once; a CUDA device has to be waited for, and a batch of another size is a new graph.
CHECKS = {"cpu": (1, 0.75), "cuda": (16, 0.5)}


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
    """Rows in the middle of generation; `palm.decoding` has the one for PaLM."""

    filled: int
    place: Tensor

    @property
    def span(self) -> int:
        """How many places of the cache the next step reads."""
        ...

    def take(self, cache: KVCache, rows: Tensor, sources: Tensor, *, end: int) -> None:
        """Fill rows with what a prefill cached of its rows `sources`, the last token at place end - 1."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone."""
        ...

    def read_out(self, hidden: Tensor) -> Tensor:
        """Logits (b, v) of final hidden states (b, d)."""
        ...

    def __call__(self, tokens: Tensor, *, span: int) -> Tensor:
        """Logits (b, v) of the successors of tokens (b,)."""
        ...


class LanguageModel(Protocol):
    """What generation asks of a model."""

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

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for batch rows of max_length tokens."""
        ...

    def embed(
        self, seq: Tensor, *, mask: Tensor | None, adapter: Adapter | None, dropout: float | None,
        cache: KVCache | None, since: int,
    ) -> Tensor:  # fmt: skip
        """Final hidden states (b, n - since, d) of tokens (b, n), from a place on."""
        ...

    def new_decoder(self, *, batch: int, room: int, adapter: Adapter | None, steps: int) -> Decoder:
        """A decoder for batch rows of at most room tokens, to be called so many times."""
        ...


class Begun(NamedTuple):
    """Rows whose prompts have been read; `decode_steps` goes on from here.

    decoder: holds what is cached of them.
    hidden: the prompts' last hidden states, (b, d).
    responses: what is drawn goes here.
    steps: the most tokens a row may get.
    """

    decoder: Decoder
    hidden: Tensor
    responses: Responses
    steps: int


@torch.no_grad()
def generate_responses(
    model: LanguageModel,
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
    ends when all rows have. What a row draws does not depend on which others are still at it. Ids are trusted here;
    `check_prompts` checks them.

    Args:
        model: what embeds tokens and decodes; its dropout is off here.
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
    begun = begin(
        model, prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        eos_token=eos_token, generator=generator, adapter=adapter,
    )  # fmt: skip
    for _ in decode_steps(begun):
        if on_step is not None:
            on_step()
    responses = begun.responses
    taken = int(responses.lengths.max())
    mask = lengths_to_mask(responses.lengths, taken)
    logprobs = responses.logprobs[:, :taken].masked_fill(~mask, 0.0)
    _check_finite(logprobs)
    return Generation(responses.tokens[:, :taken], mask, logprobs, responses.ended)


@torch.no_grad()
def begin(
    model: LanguageModel,
    prompts: Tensor,
    prompt_mask: Tensor | None,
    *,
    max_new_tokens: int | Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos_token: int | None,
    generator: torch.Generator | None,
    adapter: Adapter | None,
) -> Begun:
    """Check the settings and read the prompts; arguments and errors are those of `generate_responses`."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_generator(generator, prompts.device)
    prompts, prompt_mask = _pack(prompts, prompt_mask)
    batch, prompt_length = prompts.shape
    budget = torch.as_tensor(max_new_tokens, device=prompts.device).long().expand(batch)
    shortest, steps = (int(extreme) for extreme in budget.aminmax())
    if shortest < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1 for every prompt")
    longest = prompt_length if prompt_mask is None else prompt_mask.sum(dim=-1)
    check_length(int((longest + budget).max()), model.max_length, name="a prompt with its max_new_tokens")
    # the last token drawn is never embedded
    decoder = model.new_decoder(batch=batch, room=prompt_length + steps - 1, adapter=adapter, steps=steps - 1)
    responses = Responses(
        budget, steps, greedy=temperature < SMALLEST_TEMPERATURE, eos_token=eos_token, generator=generator,
        sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
    )  # fmt: skip
    return Begun(decoder, _prefill(model, decoder, prompts, prompt_mask, adapter), responses, steps)


def decode_steps(begun: Begun) -> Iterator[int]:
    """Draw from the prompts' last hidden states, then embed and draw until all rows have ended.

    Yields how many tokens have been drawn, after each. Between two steps the caller is in its own modes, may end rows
    (`Responses.end`), and may stop asking: nothing but its own record of the rows is held.
    """
    decoder, hidden, responses, steps = begun
    check_every, share = CHECKS["cpu" if hidden.device.type == "cpu" else "cuda"]

    def advance(span: int) -> None:
        responses.record(decoder(responses.current, span=span))

    advance_fast = StepGraphs(advance, hidden.device)
    for step in range(steps):
        with torch.inference_mode(), torch.autocast(hidden.device.type, enabled=False):
            if step % DRAWS == 0:
                responses.refill()
            if step == 0:
                responses.record(decoder.read_out(hidden))
            else:
                span = decoder.span
                advance_fast(span, left=min(span - decoder.filled, steps - step))
                decoder.filled += 1
        yield step + 1
        if not responses.may_end_early or step % check_every != check_every - 1:
            continue
        with torch.inference_mode():
            alive = responses.alive()
            if len(alive) == 0:
                break
            if len(alive) <= share * len(responses.rows):
                responses.keep(alive)
                decoder.keep(alive)
                advance_fast = StepGraphs(advance, hidden.device)


def _prefill(
    model: LanguageModel, decoder: Decoder, prompts: Tensor, prompt_mask: Tensor | None, adapter: Adapter | None
) -> Tensor:
    """Read each prompt into the decoder, those that are alike once, a few of like length at a time.

    Args:
        model: reads them.
        decoder: takes their keys and values over.
        prompts: ids, padding on the left, (b, p).
        prompt_mask: True on real tokens, (b, p), or None.
        adapter: low-rank adapter of the pass.

    Returns:
        Hidden states of the last tokens, (b, d).
    """
    length, most = prompts.shape[1], PREFILL_TOKENS["cpu" if prompts.device.type == "cpu" else "cuda"]
    marked = prompts if prompt_mask is None else prompts.masked_fill(~prompt_mask, -1)
    different, which = torch.unique(marked, dim=0, return_inverse=True)
    lengths = (different >= 0).sum(dim=-1)
    hidden: Tensor | None = None
    for chosen in lengths.argsort(stable=True).split(max(1, most // length)):
        longest = int(lengths[chosen].max())
        ids = different[chosen, length - longest :]
        mask = ids >= 0
        cache = model.new_cache(len(chosen), longest)
        found = model.embed(
            ids.clamp(min=0),
            mask=None if bool(mask.all()) else mask,
            adapter=adapter,
            dropout=0.0,
            cache=cache,
            since=longest - 1,
        )[:, 0]
        rows, sources = (which[:, None] == chosen).nonzero().unbind(dim=1)
        decoder.take(cache, rows, sources, end=length)
        hidden = found.new_zeros(len(prompts), found.shape[-1]) if hidden is None else hidden
        hidden[rows] = found[sources]
    assert hidden is not None, "a batch has at least one row"
    return hidden


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
