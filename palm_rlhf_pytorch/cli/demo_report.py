"""The demo's last stage: responses before and after, their scores, a table, samples side by side, `summary.json`."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from palm_rlhf_pytorch.cli.demo_text import distinct_2
from palm_rlhf_pytorch.cli.generate import printable
from palm_rlhf_pytorch.logprobs import chosen_logprobs
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.tensors import pad_ragged
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.training.atomic import replacing

TOKENIZER = ByteTokenizer()


@dataclass
class Sampled:
    """Responses to a list of prompts, and what they are worth; each list or tensor has one entry a response."""

    ids: list[Tensor]  # response tokens, EOS included
    texts: list[str]
    ended: Tensor
    gold: Tensor = field(default_factory=lambda: torch.empty(0))
    reward: Tensor = field(default_factory=lambda: torch.empty(0))
    kl: Tensor = field(default_factory=lambda: torch.empty(0))  # to the reference, nats a response

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response."""
        return torch.tensor([len(ids) for ids in self.ids]).float()

    @torch.no_grad()
    def judged(
        self,
        prompts: Sequence[str],
        *,
        gold: Callable[[str, bool], float],
        reward_model: RewardModel,
        policy: PaLM,
        reference: PaLM,
    ) -> Self:
        """Fill in gold scores, the reward model's scores, and the KL that each response has gathered."""
        self.gold = torch.tensor([gold(text, bool(end)) for text, end in zip(self.texts, self.ended, strict=True)])
        prompt_ids = [TOKENIZER.encode(prompt) for prompt in prompts]
        lengths = torch.tensor([len(ids) for ids in prompt_ids])
        device = policy.token_emb.weight.device
        rows = [torch.cat(pair) for pair in zip(prompt_ids, self.ids, strict=True)]
        seq, mask = (found.to(device) for found in pad_ragged(rows, pad_value=TOKENIZER.pad_token))
        self.reward = reward_model(seq, mask, prompt_lengths=lengths.to(device)).cpu()
        logprobs, ref_logprobs = (
            chosen_logprobs(model.embed(seq, dropout=0.0)[:, :-1], model.token_emb.weight, seq[:, 1:]).logprobs
            for model in (policy, reference)
        )
        places = torch.arange(1, seq.shape[1], device=device)
        response = mask[:, 1:] & (places >= lengths[:, None].to(device))
        self.kl = ((logprobs - ref_logprobs) * response).sum(dim=-1).cpu()
        return self


def sample_responses(palm: PaLM, prompts: Sequence[str], *, max_new_tokens: int, generator: torch.Generator) -> Sampled:
    """Sample a response to each prompt at temperature 1."""
    device = palm.token_emb.weight.device
    ids, mask = pad_ragged([TOKENIZER.encode(prompt) for prompt in prompts])
    out = generate_responses(
        palm, ids.to(device), mask.to(device), max_new_tokens=max_new_tokens, eos_token=TOKENIZER.eos_token,
        generator=generator,
    )  # fmt: skip
    responses = [tokens[real].cpu() for tokens, real in zip(out.tokens, out.mask, strict=True)]
    return Sampled(responses, [TOKENIZER.decode(tokens) for tokens in responses], out.ended.cpu())


def summarize(
    before: Sampled, after: Sampled, *, rm_accuracy: float, bits_per_byte: float, seed: int
) -> dict[str, float | int]:
    """The figures of `summary.json`.

    gold_se is the standard error of the mean gain: of gold after minus gold before, prompt by prompt.
    """
    gain = after.gold - before.gold
    figures: dict[str, float] = {
        "gold_before": float(before.gold.mean()),
        "gold_after": float(after.gold.mean()),
        "gold_se": float(gain.std() / len(gain) ** 0.5),
        "rm_before": float(before.reward.mean()),
        "rm_after": float(after.reward.mean()),
        "rm_accuracy": rm_accuracy,
        "bits_per_byte": bits_per_byte,
        "kl": float(after.kl.mean()),
        "length_before": float(before.lengths.mean()),
        "length_after": float(after.lengths.mean()),
        "eos_rate_before": float(before.ended.float().mean()),
        "eos_rate_after": float(after.ended.float().mean()),
        "distinct2_before": distinct_2(before.texts),
        "distinct2_after": distinct_2(after.texts),
    }
    return {name: round(value, 6) for name, value in figures.items()} | {"seed": seed, "n": len(gain)}


def print_report(prompts: Sequence[str], before: Sampled, after: Sampled, summary: dict[str, Any]) -> None:
    """Samples side by side, then the table."""
    print(f"\n{'before':<52}after")
    for index in range(8):
        prompt = f"[{prompts[index].strip()}] "
        sides = [
            textwrap.wrap(f"{prompt}{printable(found.texts[index].strip())}  ({float(found.gold[index]):.2f})", 48)
            for found in (before, after)
        ]
        for row in range(max(map(len, sides))):
            left, right = (side[row] if row < len(side) else "" for side in sides)
            print(f"{left:<52}{right}".rstrip())
        print()
    print("[prompt] response (gold score: share of it in known words, not repeated)\n")
    rows = [
        ("gold score", "gold_before", "gold_after"),
        ("reward-model score", "rm_before", "rm_after"),
        ("KL to the reference (nats per response)", None, "kl"),
        ("response length (bytes)", "length_before", "length_after"),
        ("EOS rate", "eos_rate_before", "eos_rate_after"),
        ("distinct-2", "distinct2_before", "distinct2_after"),
    ]
    print(f"{'mean over ' + str(summary['n']) + ' held-out prompts':<42}{'before':>9}{'after':>9}")
    for label, first, second in rows:
        print(f"{label:<42}{summary[first] if first else 0.0:>9.3f}{summary[second]:>9.3f}")
    gain, error = summary["gold_after"] - summary["gold_before"], summary["gold_se"]
    ratio = f", {gain / error:.1f} standard errors" if error > 0 else ""
    print(f"gold score gained {gain:+.3f} (standard error {error:.3f}{ratio})\n")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write values as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())
