"""Two models on the same prompts: who wins, by how much, how far they are apart, and what they write.

    prompts -> responses of a and of b, drawn with the same random numbers -> judges -> win rates, differences, KL

With common random numbers responses part only where the models do, so that fewer of them tell the two apart. Nothing is
learnt; `comparison.py` has the statistics.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from palm_rlhf_pytorch.exact_kl import compared_logprobs
from palm_rlhf_pytorch.objectives.policy_gradient import kl_k1, kl_k3
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.comparison import (
    HEAD,
    Contest,
    Figure,
    PairJudge,
    cluster_numbers,
    contest_of,
    distinct_shares,
    mean_estimate,
    pair_contest,
    swapped_preferences,
)
from palm_rlhf_pytorch.policy.judging import Judge, evaluating, judge_sequences
from palm_rlhf_pytorch.policy.prompts import Prompts, prompts_from
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged, split_rows
from palm_rlhf_pytorch.text.tokenizer import Decoder
from palm_rlhf_pytorch.training.atomic import replacing


class Divergence(NamedTuple):
    """How far a model's responses are from the other model: sums over the tokens of each, nats, (n,).

    With d = logprob - other's logprob: k1 sums d, k3 exp(-d) - 1 + d, exact KL of the whole next-token distributions.
    The mean of each is KL(own || other) of responses; k1 may be negative, exact has the least noise.
    """

    k1: Tensor
    k3: Tensor
    exact: Tensor


@dataclass(frozen=True)
class Side:
    """What one model wrote, an entry a response, and what it is worth.

    Attributes:
        responses: texts.
        lengths: tokens, the EOS included, (n,).
        ended: True where the response drew EOS, (n,).
        scores: of each judge that sees one response at a time, by name, (n,).
        kl: to the other model; None at temperature 0, where a model is no distribution.
    """

    responses: list[str]
    lengths: Tensor
    ended: Tensor
    scores: dict[str, Tensor]
    kl: Divergence | None

    def record(self, row: int) -> dict[str, Any]:
        """What is to be known of a response, JSON-able but for numbers that are not finite."""
        scores = {name: float(found[row]) for name, found in self.scores.items()}
        kl = None if self.kl is None else {kind: float(sums[row]) for kind, sums in self.kl._asdict().items()}
        length, ended = int(self.lengths[row]), bool(self.ended[row])
        return {"response": self.responses[row], "length": length, "ended": ended, "scores": scores, "kl": kl}


@dataclass(frozen=True)
class Evaluation:
    """Two models compared; rows are responses, those to one prompt side by side.

    Attributes:
        prompts: the texts, (m,).
        prompt_rows: which prompt each row answers, (n,).
        a: one model's responses.
        b: the other's.
        contests: by the judge's name.
        sampling: how responses were drawn.
        bits_per_byte: of a and b on a text, where that was measured: what alignment has cost.
    """

    prompts: list[str]
    prompt_rows: Tensor
    a: Side
    b: Side
    contests: dict[str, Contest]
    sampling: dict[str, Any]
    bits_per_byte: tuple[float, float] | None = None

    def figures(self) -> dict[str, Figure]:
        """What does not depend on a judge, by name."""
        a, b = self.a, self.b
        clusters = cluster_numbers([self.prompts[row] for row in self.prompt_rows.tolist()])
        found: dict[str, Figure] = {}
        columns = {"response length (tokens)": (a.lengths, b.lengths), "EOS rate": (a.ended, b.ended)}
        for name, (first, second) in columns.items():
            mean, other = (mean_estimate(column.double(), clusters).value for column in (first, second))
            found[name] = Figure(mean, other, mean_estimate(second.double() - first.double(), clusters))
        for words in (1, 2):
            found[f"distinct-{words} (words)"] = Figure(*distinct_shares(a.responses, b.responses, words=words))
        if a.kl is not None and b.kl is not None:
            for kind, first, second in zip(Divergence._fields, a.kl, b.kl, strict=True):
                found[f"KL to the other, {kind} (nats a response)"] = Figure(float(first.mean()), float(second.mean()))
            first, second = a.kl.exact.sum() / a.lengths.sum(), b.kl.exact.sum() / b.lengths.sum()
            found["KL to the other, exact (nats a token)"] = Figure(float(first), float(second))
        if self.bits_per_byte is not None:
            found["bits per byte of the text"] = Figure(*self.bits_per_byte)
        return found

    def table(self) -> str:
        """All figures for a terminal; intervals are of 95 %, over prompts."""
        contests = [line for name, contest in self.contests.items() for line in contest.lines(name)]
        return "\n".join([HEAD, *contests, *(figure.line(name) for name, figure in self.figures().items())])

    def summary(self) -> dict[str, Any]:
        """All figures, JSON-able; what is not finite is None."""
        contests = {name: contest.summary() for name, contest in self.contests.items()}
        figures = {name: figure.summary() for name, figure in self.figures().items()}
        counts = {"prompts": len(self.prompts), "responses": len(self.prompt_rows)}
        return _finite({**counts, "sampling": self.sampling, "judges": contests, "figures": figures})

    def to_json(self) -> str:
        """`summary` as text."""
        return json.dumps(self.summary(), indent=2, allow_nan=False)

    def records(self) -> Iterator[dict[str, Any]]:
        """What is to be known of each row, JSON-able; `margins` are by how much each judge prefers b."""
        for row, prompt in enumerate(self.prompt_rows.tolist()):
            known = {"prompt_row": prompt, "prompt": self.prompts[prompt]}
            known |= {"a": self.a.record(row), "b": self.b.record(row)}
            margins = {name: float(contest.margins[row]) for name, contest in self.contests.items()}
            yield _finite(known | {"margins": margins})

    def to_jsonl(self, path: str | Path) -> None:
        """Write a line for each row; the file is replaced whole."""
        with replacing(path) as file:
            for record in self.records():
                file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def chosen(self, count: int) -> dict[str, list[int]]:
        """Rows to read, none twice: where the first judge sees b most ahead, most behind, and the first prompts'."""
        margins = next((contest.margins.nan_to_num() for contest in self.contests.values()), torch.zeros(0))
        ahead, behind = (
            [row for row in (sign * margins).argsort(stable=True).tolist() if sign * margins[row] < 0][:count]
            for sign in (-1, 1)
        )
        rows = {prompt: row for row, prompt in reversed([*enumerate(self.prompt_rows.tolist())])}
        first = [row for _, row in sorted(rows.items()) if row not in {*ahead, *behind}][:count]
        return {"first prompts": first, "B most ahead": ahead, "B most behind": behind}


@torch.no_grad()
def evaluate(
    a: PaLM,
    b: PaLM,
    prompts: Sequence[str],
    judges: Mapping[str, Judge],
    tokenizer: Decoder,
    *,
    pair_judges: Mapping[str, PairJudge] | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    eos_token: int | None = None,
    seed: int = 0,
    max_batch_size: int = 64,
    max_batch_tokens: int = 4096,
    use_tqdm: bool = False,
) -> Evaluation:
    """Sample from both models, have the responses judged, and compare.

    Args:
        a: one model, causal; its mode does not matter, and stays.
        b: the other, with the same vocabulary and on the same device.
        prompts: texts; the same text twice counts as one prompt with more responses.
        judges: by name, each called as judge(sequences, prompt_mask=..., mask=...) -> scores (b,).
        tokenizer: makes ids of prompts (a callable, or by `encode`) and text of responses (`decode`).
        pair_judges: by name, judges that see two responses; each is asked twice, see `swapped_preferences`.
        num_samples: responses of each model to each prompt.
        max_new_tokens: tokens of a response at most.
        temperature: of sampling, and so of KL; 0 is greedy, and leaves KL out.
        eos_token: id that ends a response, or None.
        seed: of all draws.
        max_batch_size: responses in a batch.
        max_batch_tokens: tokens, padding included, in one pass over whole sequences.
        use_tqdm: show progress.

    Raises:
        TypeError: if a judge gives no tensor of numbers.
        ValueError: if models, prompts or a number do not fit, or a judge has no finite score for any pair.
    """
    pair_judges = pair_judges or {}
    _check_models(a, b)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    sampling |= {"eos_token": eos_token, "seed": seed, "num_samples": num_samples}
    _check_arguments([*judges, *pair_judges], a.num_tokens, **sampling)
    asked = prompts_from(num_tokens=a.num_tokens, seed=seed, prompts=prompts, tokenizer=tokenizer)
    rows = torch.arange(len(asked)).repeat_interleave(num_samples)
    work = _Work(asked, rows, sampling, max_batch_size, max_batch_tokens, use_tqdm)
    drawn = [work.sample(model, name) for model, name in ((a, "A"), (b, "B"))]
    scores = [{name: work.judge(judge, texts, name) for name, judge in judges.items()} for texts in drawn]
    both = zip(((a, b), (b, a)), drawn, strict=True)
    kl = [work.divergence(*models, texts) if temperature else None for models, texts in both]
    sides = [
        Side(texts.responses(tokenizer), texts.lengths.cpu(), texts.ended.cpu(), given, far)
        for texts, given, far in zip(drawn, scores, kl, strict=True)
    ]
    clusters = cluster_numbers(asked_texts := [prompts[row] for row in rows.tolist()])
    contests = {name: contest_of(scores[0][name], scores[1][name], clusters) for name in judges}
    for name, pair_judge in pair_judges.items():
        answers = swapped_preferences(pair_judge, asked_texts, sides[0].responses, sides[1].responses)
        contests[name] = pair_contest(answers, clusters)
    return Evaluation(list(prompts), rows, sides[0], sides[1], contests, sampling)


class _Drawn(NamedTuple):
    """Sequences of prompt and response, padded on the right, (n, w), and their tokens, (n,)."""

    sequences: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    ended: Tensor

    @property
    def masks(self) -> tuple[Tensor, Tensor]:
        """True on the prompt; True on prompt and response; (n, w)."""
        width = self.sequences.shape[1]
        return lengths_to_mask(self.prompt_lengths, width), lengths_to_mask(self.prompt_lengths + self.lengths, width)

    def responses(self, tokenizer: Decoder) -> list[str]:
        """Texts, without the EOS."""
        starts, ends = self.prompt_lengths.tolist(), (self.prompt_lengths + self.lengths - self.ended.long()).tolist()
        ids = [row[start:end] for row, start, end in zip(self.sequences.tolist(), starts, ends, strict=True)]
        return [tokenizer.decode(row) for row in ids]


class _Work(NamedTuple):
    """What is done with each model, batch by batch; rows name prompts, (n,)."""

    prompts: Prompts
    rows: Tensor
    sampling: dict[str, Any]
    max_batch_size: int
    max_batch_tokens: int
    show: bool

    def sample(self, model: PaLM, name: str) -> _Drawn:
        """A response to each row. A batch's random numbers are its own, so that both models get the same."""
        options = {key: value for key, value in self.sampling.items() if key not in ("seed", "num_samples")}
        lengths, steps = self.prompts.lengths[self.rows], self.sampling["max_new_tokens"]
        batches = split_rows(lengths.tolist(), max_rows=self.max_batch_size)
        texts: dict[int, Tensor] = {}
        ended = torch.zeros(len(self.rows), dtype=torch.bool, device=model.device)
        with self.bar(f"sample {name}", steps * len(batches), "token") as bar:
            for number, batch in enumerate(batches):
                ids, mask = (part.to(model.device) for part in self.prompts.select(self.rows[batch]))
                state = np.random.SeedSequence([self.sampling["seed"], number]).generate_state(1, np.uint64)
                generator = torch.Generator(model.device).manual_seed(int(state[0] >> 1))
                out = generate_responses(model, ids, mask, generator=generator, on_step=bar.update, **options)
                parts = zip(batch, ids, mask, out.tokens, out.mask, strict=True)
                texts |= {row: torch.cat((begun[real], new[kept])) for row, begun, real, new, kept in parts}
                ended[batch] = out.ended
                bar.update(steps * (number + 1) - bar.n)
        sequences, mask = pad_ragged([texts[row] for row in range(len(self.rows))])
        lengths = lengths.to(model.device)
        return _Drawn(sequences, lengths, mask.sum(dim=-1) - lengths, ended)

    def judge(self, judge: Judge, drawn: _Drawn, name: str) -> Tensor:
        """A judge's scores, (n,), on the CPU."""
        prompt_mask, mask = drawn.masks
        with evaluating(judge), self.bar(f"judge {name}", len(self.rows), "response") as bar:

            def counted(sequences: Tensor, **masks: Tensor) -> Tensor:
                scores = judge(sequences, **masks)
                bar.update(len(sequences))
                return scores

            return judge_sequences(
                counted, drawn.sequences, prompt_mask, mask, max_batch_size=self.max_batch_size,
                max_batch_tokens=self.max_batch_tokens, where=f"evaluate, judge {name}",
            ).cpu()  # fmt: skip

    def divergence(self, own: PaLM, other: PaLM, drawn: _Drawn) -> Divergence:
        """How far the model that drew these is from the other."""
        (prompt_mask, mask), sums = drawn.masks, torch.zeros(3, len(self.rows), dtype=torch.float64)
        totals = mask.sum(dim=-1).tolist()
        with self.bar("KL", len(self.rows), "response") as bar:
            for batch in split_rows(totals, max_rows=len(totals), max_tokens=self.max_batch_tokens):
                width = max(totals[row] for row in batch)
                ids, read = drawn.sequences[batch, :width], (mask & ~prompt_mask)[batch, 1:width]
                hidden, other_hidden = (model.embed(ids, dropout=0.0)[:, :-1][read] for model in (own, other))
                found = compared_logprobs(
                    hidden, own.token_emb.weight, ids[:, 1:][read], ref_hidden=other_hidden,
                    ref_weight=other.token_emb.weight, temperature=self.sampling["temperature"],
                )  # fmt: skip
                ours, theirs = found.logprobs, found.ref_logprobs
                values = torch.stack((kl_k1(ours, theirs), kl_k3(ours, theirs), found.kl)).cpu().double()
                sums.index_add_(1, torch.tensor(batch)[read.nonzero()[:, 0].cpu()], values)
                bar.update(len(batch))
        return Divergence(*sums)

    def bar(self, what: str, total: int, unit: str) -> tqdm:
        """Progress of one stage."""
        return tqdm(total=total, desc=what, unit=unit, disable=not self.show, leave=False)


def _check_models(a: PaLM, b: PaLM) -> None:
    if a.num_tokens != b.num_tokens or a.device != b.device:
        raise ValueError(
            f"a has num_tokens={a.num_tokens} on {a.device}, b {b.num_tokens} on {b.device}: they must be the same"
        )
    if not (a.causal and b.causal):
        raise ValueError("a model with causal=False writes no text: evaluate takes causal ones")


def _check_arguments(
    names: list[str], num_tokens: int, *, num_samples: int, max_new_tokens: int, temperature: float,
    eos_token: int | None, seed: int,
) -> None:  # fmt: skip
    if len(set(names)) < len(names):
        raise ValueError(f"judges have the same name: {names}")
    if num_samples < 1 or (num_samples > 1 and temperature == 0):
        raise ValueError(f"num_samples ({num_samples}) must be at least 1, and 1 at temperature 0: the rest are copies")
    if max_new_tokens < 1 or seed < 0:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1, and seed ({seed}) at least 0")
    if eos_token is not None and not 0 <= eos_token < num_tokens:
        raise ValueError(f"eos_token ({eos_token}) must be from 0 to {num_tokens - 1}, or None")
    check_sampling(temperature=temperature, top_k=None, top_p=None)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
