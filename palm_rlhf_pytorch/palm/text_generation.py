"""Text in, text out: prompts are encoded and continued, and what comes is decoded piece by piece.

Both functions go through the same steps, so that pieces joined are the text. A text ends at the tokenizer's EOS, before
a stop string, at max_new_tokens, or where prompt and text fill the model's `max_length`.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.generation import CHECKS, LanguageModel, begin, decode_steps
from palm_rlhf_pytorch.palm.inputs import check_generator
from palm_rlhf_pytorch.palm.responses import Responses
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.tensors import check_token_ids, pad_ragged
from palm_rlhf_pytorch.text.hf_tokenizer import as_tokenizer
from palm_rlhf_pytorch.text.stops import StopFilter, check_stops
from palm_rlhf_pytorch.text.streaming import TextStream
from palm_rlhf_pytorch.text.tokenizer import Tokenizer

BROKEN = -1  # in place of a token that was drawn from logits that are not finite


class TextModel(LanguageModel, Protocol):
    """A language model with scopes."""

    finetune_modules: Scopes


class Request(NamedTuple):
    """All that one call asks for, checked.

    prompts, mask: ids with padding on the left, (b, p), and True on real ones.
    budget: most new tokens of each row, (b,).
    settings: what `begin` takes besides.
    stops: strings that end a text.
    tokenizer: decodes.
    eos_token: id that ends a text, or None.
    """

    prompts: Tensor
    mask: Tensor
    budget: Tensor
    settings: dict[str, Any]
    stops: tuple[str, ...]
    tokenizer: Tokenizer
    eos_token: int | None


@overload  # a str is a sequence of str too; the first that fits is taken
def generate_text(  # type: ignore[overload-overlap]
    self: TextModel, prompt: str | Tensor, *, tokenizer: object, num_samples: None = None, max_new_tokens: int = 256,
    temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, stop: str | Sequence[str] = (),
    eos_token: int | None = None, generator: torch.Generator | None = None, finetune_scope: str | None = None,
) -> str: ...  # fmt: skip
@overload
def generate_text(
    self: TextModel, prompt: str | Tensor | Sequence[str | Tensor], *, tokenizer: object,
    num_samples: int | None = None, max_new_tokens: int = 256, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, stop: str | Sequence[str] = (), eos_token: int | None = None,
    generator: torch.Generator | None = None, finetune_scope: str | None = None,
) -> list[str]: ...  # fmt: skip
def generate_text(
    self: TextModel, prompt: str | Tensor | Sequence[str | Tensor], *, tokenizer: object,
    num_samples: int | None = None, max_new_tokens: int = 256, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None, stop: str | Sequence[str] = (), eos_token: int | None = None,
    generator: torch.Generator | None = None, finetune_scope: str | None = None,
) -> str | list[str]:  # fmt: skip
    """Continue text; what comes back is the continuation alone, without the prompt and without what ended it.

    A text ends at EOS, before a stop string, after max_new_tokens, or where prompt and continuation together have the
    model's `max_length`. Several prompts are one batch, whatever their lengths; rows that have ended leave it.

    Args:
        self: the model.
        prompt: text, or ids (n,) of a text that was encoded already; or a list of such. An empty one is the tokenizer's
            BOS, which no other gets: `tokenizer.encode(text, bos=True)` puts it before a text.
        tokenizer: encodes and decodes: `ByteTokenizer()`, `load_tokenizer(...)`, or one of Hugging Face's. Ids that
            the model has and the tokenizer has not (a vocabulary rounded up) are left out of the text.
        num_samples: continuations of each prompt; None is one.
        max_new_tokens: tokens of a continuation at most.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: sample among the k most likely tokens.
        top_p: sample among the most likely tokens that together have this mass.
        stop: strings that end a text, wherever they begin in it; they may be cut into tokens in any way.
        eos_token: id that ends a text; None takes the tokenizer's.
        generator: random state, on the model's device; None takes torch's global one.
        finetune_scope: scope to generate with.

    Returns:
        The text; a list of them, in the prompts' order and those of one prompt side by side, where prompt is a list or
        num_samples is given.

    Raises:
        TypeError: if a prompt is neither text nor a tensor of ids, a stop string is no text, or a count is no integer.
        ValueError: if a prompt is empty and there is no BOS, or has no room in the model's `max_length`; if the
            tokenizer has more ids than the model, the model is not causal, a setting names no distribution, a stop
            string is empty, or the logits are not finite.
    """
    if not isinstance(prompt, str | Tensor | Sequence):
        raise TypeError(f"prompt is of type {type(prompt).__name__}; give text, ids (n,), or a list of them")
    prompts: Sequence[str | Tensor] = [prompt] if isinstance(prompt, str | Tensor) else prompt
    if not prompts:
        return []
    request = _ask(
        self, prompts, tokenizer=tokenizer, num_samples=1 if num_samples is None else num_samples,
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop,
        eos_token=eos_token, generator=generator, finetune_scope=finetune_scope,
    )  # fmt: skip
    # without stop strings nothing is asked of the text before its end
    every = CHECKS["cpu" if self.device.type == "cpu" else "cuda"][0] if request.stops else None
    texts = ["".join(parts) for parts in zip(*_pieces(self, request, every=every), strict=True)]
    return texts[0] if prompts is not prompt and num_samples is None else texts


def stream(
    self: TextModel, prompt: str | Tensor, *, tokenizer: object, max_new_tokens: int = 256, temperature: float = 1.0,
    top_k: int | None = None, top_p: float | None = None, stop: str | Sequence[str] = (),
    eos_token: int | None = None, generator: torch.Generator | None = None, finetune_scope: str | None = None,
) -> Generator[str, None, None]:  # fmt: skip
    """Continue text, and give it as it comes: whole characters, a token's or a few's at a time.

    The pieces joined are what `generate_text` gives with the same random state; arguments and errors are its own, and
    the errors come with the call. Nothing of a stop string is given: an end that may become one is held back until it
    is told. Leave the loop at any time: closing the iterator frees the cache. Several may be read in turn or in
    several threads; each with a generator of its own gives what it gives alone.

    Returns:
        An iterator over non-empty pieces of the continuation.
    """
    if not isinstance(prompt, str | Tensor):
        raise TypeError(f"stream continues one text, not {type(prompt).__name__}; generate_text takes several")
    request = _ask(
        self, [prompt], tokenizer=tokenizer, num_samples=1, max_new_tokens=max_new_tokens, temperature=temperature,
        top_k=top_k, top_p=top_p, stop=stop, eos_token=eos_token, generator=generator, finetune_scope=finetune_scope,
    )  # fmt: skip
    return (piece for (piece,) in _pieces(self, request, every=1) if piece)


class _Row:
    """One text of the batch while it grows: its decoder and what holds its stop strings back."""

    def __init__(self, request: Request, budget: int) -> None:
        self.request, self.left, self.taken, self.done = request, budget, 0, False
        self.text, self.filter = TextStream(request.tokenizer), StopFilter(request.stops)

    def read(self, tokens: Sequence[int]) -> str:
        """Text that the next tokens finish; looks at no token behind the one that ends the text."""
        pieces = []
        for token in tokens[: self.left - self.taken]:
            if token == BROKEN:
                raise ValueError("the model's logits are not finite (NaN or infinity); its weights are broken")
            self.taken += 1
            if token == self.request.eos_token:
                break
            if token < self.request.tokenizer.num_tokens:
                pieces.append(self.filter.add(self.text.add([token])))
            if self.filter.stopped or self.taken == self.left:
                break
        else:
            return "".join(pieces)
        return "".join(pieces) + self.end()

    def end(self) -> str:
        """What is left once the text has ended."""
        self.done = True
        return self.filter.add(self.text.finish()) + self.filter.finish()


def _pieces(model: TextModel, request: Request, *, every: int | None) -> Iterator[list[str]]:
    """What each row's text grows by, (b,), every so many steps and at the end; None: at the end alone."""
    begun = begin(model, request.prompts, request.mask, max_new_tokens=request.budget, **request.settings)
    rows = [_Row(request, budget) for budget in request.budget.tolist()]
    seen = step = 0
    for step in decode_steps(begun):
        if every is not None and step % every == 0:
            yield _read(begun.responses, rows, seen, step)
            seen = step
            if all(row.done for row in rows):
                return
    if step > seen:
        yield _read(begun.responses, rows, seen, step)


def _read(responses: Responses, rows: Sequence[_Row], start: int, end: int) -> list[str]:
    """Let each row read the tokens of some steps; those that end by a stop string end in the batch too."""
    finite = responses.logprobs[:, start:end].isfinite()
    tokens = responses.tokens[:, start:end].masked_fill(~finite, BROKEN).tolist()
    pieces = []
    for index, (row, new) in enumerate(zip(rows, tokens, strict=True)):
        pieces.append("" if row.done else row.read(new))
        if row.filter.stopped:
            responses.end(index, row.taken)
    return pieces


def _ask(
    model: TextModel, prompts: Sequence[Any], *, tokenizer: object, num_samples: int, max_new_tokens: int,
    temperature: float, top_k: int | None, top_p: float | None, stop: str | Sequence[str], eos_token: int | None,
    generator: torch.Generator | None, finetune_scope: str | None,
) -> Request:  # fmt: skip
    """Check everything a user asks for, before any work, and encode the prompts; arguments as in `generate_text`."""
    if not model.causal:
        raise ValueError("a model with causal=False cannot continue text; build it with causal=True")
    coder = as_tokenizer(tokenizer)
    if coder.num_tokens > model.num_tokens:
        raise ValueError(
            f"the tokenizer has {coder.num_tokens} ids, the model only num_tokens={model.num_tokens}; take the"
            " tokenizer that the model was trained with"
        )
    for name, value in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if not isinstance(value, int):
            raise TypeError(f"{name} ({value!r}) must be a whole number")
        if value < 1:
            raise ValueError(f"{name} ({value}) must be at least 1")
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    check_generator(generator, model.device)
    eos_token = coder.eos_token if eos_token is None else eos_token
    if eos_token is not None and not 0 <= eos_token < model.num_tokens:
        raise ValueError(f"eos_token ({eos_token}) must be from 0 to {model.num_tokens - 1}, or None")
    stops = check_stops(stop)
    adapter = model.finetune_modules.chosen(finetune_scope, disabled=False)
    rows = [_encoded(model, coder, prompt, index) for index, prompt in enumerate(prompts)]
    rows = [row for row in rows for _ in range(num_samples)]
    ids, mask = pad_ragged(rows, left=True)
    room = torch.tensor([min(max_new_tokens, model.max_length - len(row)) for row in rows], device=model.device)
    settings = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "eos_token": eos_token, "generator": generator,
        "adapter": adapter,
    }  # fmt: skip
    return Request(ids, mask, room.long(), settings, stops, coder, eos_token)


def _encoded(model: TextModel, tokenizer: Tokenizer, prompt: object, index: int) -> Tensor:
    """Ids of one prompt (n,), which leave room for at least one more."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, bos=not prompt and tokenizer.bos_token is not None)
    elif isinstance(prompt, Tensor):
        ids = prompt
    else:
        raise TypeError(f"prompt {index} is of type {type(prompt).__name__}; give text, or a tensor of ids (n,)")
    if ids.dim() != 1:
        raise ValueError(f"prompt {index} has shape {tuple(ids.shape)}; the ids of one text are (n,)")
    if len(ids) == 0:
        raise ValueError(f"prompt {index} is empty, and the tokenizer has no BOS to begin from; give some text")
    check_token_ids(ids[None], model.num_tokens, name=f"prompt {index}")
    if len(ids) >= model.max_length:
        raise ValueError(
            f"prompt {index} has {len(ids)} tokens; of this model's max_length {model.max_length} it must leave one;"
            " shorten it"
        )
    return ids.to(model.device, torch.long)
