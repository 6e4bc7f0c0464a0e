"""Judges made of functions: any Python callable of text or of ids, of a batch or of one response, sync or async.

    judge = text_judge(lambda prompts, responses: [-response.count("!") for response in responses], tokenizer)
    judge = text_judge(each(ask_the_server), tokenizer)  # async def ask_the_server(prompt, response) -> float

A judge takes ids and gives scores (b,), or rewards (b, t), one for each token of the response, from where the response
starts and 0 beyond its end; whoever learns from rewards takes their sum (`summed`) for the score. NaN says that a
response could not be judged: it counts nowhere. A reward model is a judge. Knows no policy.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from numbers import Real
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from palm_rlhf_pytorch.tensors import check_masked, lengths_to_mask, pad_ragged

Function = Callable[[list[Any], list[Any]], Any]  # prompts, responses -> scores, or something to await that gives them


class Judge(Protocol):
    """What the policy learns from: anything that is called like this."""

    def __call__(self, sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        """Scores (b,) or rewards (b, t), in float32.

        Args:
            sequences: ids of prompt and response, (b, n), int64.
            prompt_mask: True on prompt tokens, (b, n).
            mask: True on prompt and response tokens, (b, n); the response is mask & ~prompt_mask.
        """


def text_judge(function: Function, tokenizer: object) -> Judge:
    """A judge made of a function of texts.

    Args:
        function: `(prompts, responses) -> scores`, two lists of b str; see `as_rewards` for what it may give. With
            `async def` it is awaited, also where a loop is running already. For one text at a time see `each`.
        tokenizer: writes the texts, by its `decode` or by being called with a list of ids; special tokens are left
            out where `decode` knows `skip_special_tokens`. Prompt and response are decoded apart.

    Raises:
        TypeError: if function or tokenizer cannot be called so. The judge: see `as_rewards`.
    """
    decode = _decoder(tokenizer)

    def read(prompts: list[Tensor], responses: list[Tensor]) -> Any:
        texts: list[list[str]] = [[], []]
        for kind, rows, found in zip(("prompt", "response"), (prompts, responses), texts, strict=True):
            for row, ids in enumerate(rows):
                with noting(f"while decoding the {kind} of response {row} of the batch"):
                    found.append(decode(ids.tolist()))
        return function(*texts)

    _check_callable(function)
    return ids_judge(read)


def ids_judge(function: Function) -> Judge:
    """A judge made of a function of ids.

    Args:
        function: as in `text_judge`, but of two lists of b tensors (n,), int64, each of its own length, without
            padding; an empty prompt or response is a tensor of length 0.

    Raises:
        TypeError: if function is not callable. The judge: see `as_rewards`.
    """
    _check_callable(function)

    def judge(sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        prompts, responses = split_ids(sequences, prompt_mask, mask)
        found = _awaited(function(prompts, responses))
        return as_rewards(found, [len(response) for response in responses], device=sequences.device)

    return judge


def each(one: Callable[[Any, Any], Any], *, max_at_once: int = 16) -> Function:
    """The function of lists that asks a function of one prompt and one response for each of them.

    Args:
        one: `(prompt, response) -> score`. With `async def` the calls of a batch run together; else in turn.
        max_at_once: async calls that run at the same time, at most.

    Raises:
        ValueError: if max_at_once is below 1. An error of `one` passes through, with a note of the response.
    """
    _check_callable(one)
    if max_at_once < 1:
        raise ValueError(f"max_at_once ({max_at_once}) must be at least 1")

    def in_turn(prompts: list[Any], responses: list[Any]) -> list[Any]:
        found = []
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            with _noting_response(row, response):
                found.append(one(prompt, response))
        return found

    async def together(prompts: list[Any], responses: list[Any]) -> list[Any]:
        turn = asyncio.Semaphore(max_at_once)

        async def ask(row: int, prompt: Any, response: Any) -> Any:
            async with turn:
                with _noting_response(row, response):
                    return await one(prompt, response)

        pairs = enumerate(zip(prompts, responses, strict=True))
        return await asyncio.gather(*(ask(row, prompt, response) for row, (prompt, response) in pairs))

    is_async = inspect.iscoroutinefunction(one) or inspect.iscoroutinefunction(getattr(one, "__call__", None))  # noqa: B004
    return together if is_async else in_turn


def summed(found: Tensor) -> Tensor:
    """Scores (b,) of what a judge gave: scores as they are, rewards (b, t) summed over the response."""
    return found if found.ndim == 1 else found.sum(dim=-1)


def split_ids(sequences: Tensor, prompt_mask: Tensor, mask: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Ids of each prompt and of each response, b tensors each, without padding, whichever side that is on."""
    check_masked(mask, sequences=sequences)
    check_masked(prompt_mask, sequences=sequences)
    prompts, responses = mask & prompt_mask, mask & ~prompt_mask
    return tuple([row[kept] for row, kept in zip(sequences, masks, strict=True)] for masks in (prompts, responses))  # type: ignore[return-value]


def as_rewards(found: object, lengths: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """What a function of texts or ids gave, as a judge gives it: scores (b,) or rewards (b, t), float32, no gradient.

    Args:
        found: a list, tuple, array or tensor of b numbers, None or NaN where a response could not be judged; or, for
            each token, b rows of as many numbers as the response has tokens, or an array or tensor (b, t).
        lengths: tokens of each response, (b,).
        device: of the result.

    Raises:
        TypeError: if it is none of these; the response is named.
        ValueError: if there are too many or too few of them; the response is named.
    """
    count, steps = len(lengths), max(lengths, default=0)
    if isinstance(found, np.ndarray):
        found = found.tolist() if found.dtype == object else torch.from_numpy(found)
    if isinstance(found, Tensor):
        if found.is_complex():
            raise TypeError(f"a judge gave {found.dtype}: give real numbers")
        if found.shape == (count,):
            return found.detach().to(device, torch.float32)
        if found.shape != (count, steps):
            raise ValueError(
                f"a judge gave shape {tuple(found.shape)} for {count} responses: give scores ({count},), or rewards"
                f" ({count}, {steps}), a number for each token of the longest response"
            )
        beyond = ~lengths_to_mask(torch.tensor(lengths, device=found.device), steps)
        return found.detach().masked_fill(beyond, 0).to(device, torch.float32)
    if not isinstance(found, list | tuple):
        raise TypeError(f"a judge gave a {type(found).__name__}: give a list, array or tensor of {count} scores")
    if len(found) != count:
        raise ValueError(f"a judge gave {len(found)} scores for {count} responses: give one for each")
    if not any(isinstance(row, list | tuple | Tensor | np.ndarray) and np.ndim(row) for row in found):
        return torch.tensor([_number(score, row) for row, score in enumerate(found)], device=device)
    rows = [_row(rewards, length, row) for row, (rewards, length) in enumerate(zip(found, lengths, strict=True))]
    return pad_ragged(rows)[0].to(device)


def _row(rewards: Any, length: int, row: int) -> Tensor:
    """Rewards (length,) of one response; NaN for all of it where there are none."""
    if rewards is None:
        return torch.full((length,), math.nan)
    numbers = rewards.tolist() if isinstance(rewards, Tensor | np.ndarray) else rewards
    if not isinstance(numbers, list | tuple) or len(numbers) != length:
        given = f"{len(numbers)} rewards" if isinstance(numbers, list | tuple) else f"a {type(rewards).__name__}"
        raise ValueError(f"a judge gave {given} for response {row} of {length} tokens: give one for each token")
    return torch.tensor([_number(number, row) for number in numbers], dtype=torch.float32)


def _number(score: Any, row: int) -> float:
    if isinstance(score, Tensor | np.ndarray | np.generic) and score.ndim == 0:
        score = score.item()
    if score is None:
        return math.nan
    if not isinstance(score, Real):
        raise TypeError(
            f"a judge gave a {type(score).__name__} for response {row}: give a number, or None if it cannot be judged"
        )
    try:
        return float(score)
    except OverflowError as error:
        raise ValueError(f"a judge gave a number for response {row} that no float can hold") from error


def _awaited(found: Any) -> Any:
    """The result of a function, awaited if it is async."""
    if not inspect.isawaitable(found):
        return found

    async def wait() -> Any:
        return await found

    def run() -> Any:
        with torch.no_grad():  # which is each thread's own
            return asyncio.run(wait())

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    # a loop runs in this thread, as in a notebook, and waits for us: another one, in a thread of its own, does the work
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(copy_context().run, run).result()
    finally:
        pool.shutdown(wait=False)


def _decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    decode = getattr(tokenizer, "decode", tokenizer)
    if not callable(decode):
        raise TypeError(
            f"tokenizer ({type(tokenizer).__name__}) must have a method decode(ids), or be a function of ids"
        )
    try:
        skips = "skip_special_tokens" in inspect.signature(decode).parameters
    except ValueError:  # a builtin, which does not say
        skips = False
    return (lambda ids: decode(ids, skip_special_tokens=True)) if skips else decode


def _check_callable(function: object) -> None:
    if not callable(function):
        raise TypeError(f"a judge's function is a {type(function).__name__}: give a callable (prompts, responses)")


def _noting_response(row: int, response: object) -> Any:
    told = f", {response[:80]!r}" if isinstance(response, str) else ""
    return noting(f"raised for response {row} of the batch{told}")


@contextmanager
def noting(note: str) -> Iterator[None]:
    """A block whose errors carry a note: which response, which judge."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise
