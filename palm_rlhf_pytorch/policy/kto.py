"""KTOTrainer: a policy learns from single votes, up or down, without pairs, judge or sampling.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", https://arxiv.org/abs/2402.01306
The baseline of a step is read from responses to other prompts, one for each vote, fixed for the run; as in the paper it
is an estimate of the KL to the reference, here over all votes of the step, whatever the passes and processes.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.direct import kto_baseline, kto_loss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.direct import DirectTrainer
from palm_rlhf_pytorch.policy.direct_data import Encoder, Examples, VoteExamples, vote_examples
from palm_rlhf_pytorch.policy.direct_model import Figures
from palm_rlhf_pytorch.policy.direct_records import Source, votes_of
from palm_rlhf_pytorch.policy.direct_settings import settings_from
from palm_rlhf_pytorch.policy.probe import Finding
from palm_rlhf_pytorch.tensors import split_rows
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.typecheck import typecheck

BALANCED = (1.0, 4 / 3)  # up_weight n_up / (down_weight n_down), as the paper advises


class KTOTrainer(DirectTrainer):
    """Improves a PaLM by votes; arguments, files and resuming as in DPOTrainer."""

    @typecheck
    def __init__(
        self,
        *,
        palm: PaLM,
        votes: Source,
        tokenizer: object,
        beta: float = 0.1,
        up_weight: float = 1.0,
        down_weight: float = 1.0,
        held_out: Source | None = None,
        max_length: int = 1024,
        eos_token: int | None = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        reference_path: str | Path | None = None,
        metrics_path: str | Path | None = None,
        accelerate_kwargs: Mapping[str, Any] | None = None,
        optimizer: OptimizerFactory | None = None,
        log_with: object | None = None,
        **settings: Any,
    ) -> None:
        """Prepare training; nothing goes through the model yet.

        Args:
            palm: as in DPOTrainer, as for all that is not told here.
            votes: what is learnt from, records or a file of them, on two prompts at least; a pair counts as two votes,
                see `votes_of`.
            tokenizer: any callable from text to ids.
            beta: price of straying from the reference; 0.1 in the paper.
            up_weight: factor of votes up; with unequal numbers of votes, one of the two factors should make up for it.
            down_weight: factor of votes down.
            held_out: votes that are only looked at.
            max_length: tokens of prompt and response.
            eos_token: id that ends each response.
            seed: of the adapter, the order and the choice of other responses.
            run_dir: folder of the run.
            reference_path: where the reference's log-probabilities are kept.
            metrics_path: a JSONL file that gets a line for each step.
            accelerate_kwargs: passed to accelerate.Accelerator.
            optimizer: makes one of parameter groups, each with its lr and weight_decay, in place of fused AdamW:
                `training/optimizers.py` has `muon`.
            log_with: see RLHFTrainer.
            **settings: the fields of DirectSettings; a minibatch_size of 16 to 128 suits the baseline.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if there are no votes, all are on one prompt, one does not fit tokenizer and palm (it is named),
                or a number is out of range.

        Warns:
            UserWarning: if the weighted numbers of votes are far from equal.
        """
        for name, value in (("beta", beta), ("up_weight", up_weight), ("down_weight", down_weight)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} ({value}) must be above 0")
        chosen = settings_from(settings, trainer="KTOTrainer")
        encoder = Encoder(tokenizer, num_tokens=palm.num_tokens, max_length=max_length, eos_token=eos_token)
        self.votes = vote_examples(votes_of(votes), encoder, seed=seed)
        looked_at = None if held_out is None else vote_examples(votes_of(held_out), encoder, seed=seed, name="held_out")
        self.factors = {"beta": beta, "up_weight": up_weight, "down_weight": down_weight}
        told = ", ".join(f"{name}={value}" for name, value in self.factors.items())
        super().__init__(
            palm, self._objective, name="kto", loss_name=f"kto_loss({told})", settings=chosen, encoder=encoder,
            examples=self.votes, held_out=looked_at, seed=seed, run_dir=run_dir, reference_path=reference_path,
            metrics_path=metrics_path, accelerate_kwargs=accelerate_kwargs, log_with=log_with, optimizer=optimizer,
        )  # fmt: skip
        unbalanced = self.balance()
        if unbalanced.status == "warn" and self.accelerator.is_main_process:
            warnings.warn(f"{unbalanced.found}: {unbalanced.remedy}", stacklevel=3)

    def common_facts(self, examples: Examples, reference: Tensor, rows: Sequence[int]) -> dict[str, Any]:
        """The step's baseline, computed when it is first asked for: steps that are passed over cost nothing."""
        assert isinstance(examples, VoteExamples), "votes are what this trainer made"
        return {"baseline": cache(lambda: self._baseline(examples, reference, rows))}

    def checks(self) -> dict[str, Any]:
        """What votes must be to be learnt from."""
        return {"votes": self.balance}

    def balance(self) -> Finding:
        """Both kinds of votes are there, and count about as much."""
        up, weights = self.votes.up, self.votes.weights
        ups, downs = float(weights[up].sum()), float(weights[~up].sum())
        found = f"{int(up.sum())} votes up, {int((~up).sum())} down"
        if not (ups and downs):
            return Finding("fail", found, "votes of both kinds are needed: nothing says what the others differ in")
        ratio = self.factors["up_weight"] * ups / (self.factors["down_weight"] * downs)
        found += f"; weighted {ratio:.3g} to 1"
        if BALANCED[0] - 1e-6 <= ratio <= BALANCED[1] + 1e-6:
            return Finding("ok", found)
        return Finding(
            "warn", found,
            f"between 1 and 4/3 is advised: up_weight={self.factors['down_weight'] * downs / ups:.3g} evens it",
        )  # fmt: skip

    def _objective(
        self,
        logprobs: Tensor,
        lengths: Tensor,
        *,
        ref_logprobs: Tensor,
        up: Tensor,
        weight: Tensor,
        baseline: Callable[[], Tensor],
    ) -> tuple[Tensor, Figures]:
        z0 = baseline()
        found = kto_loss(logprobs, ref_logprobs, up, baseline=z0, weight=weight, **self.factors)
        ups, count = up.sum(), len(up)
        figures: Figures = {
            "loss": (found.loss, count),
            "accuracy": (found.accuracy, count),
            "reward_up": (found.reward_up, ups),
            "reward_down": (found.reward_down, count - ups),
            "baseline": (z0, count),
        }
        return found.loss, figures

    @torch.no_grad()
    def _baseline(self, examples: VoteExamples, reference: Tensor, rows: Sequence[int]) -> Tensor:
        """KTO's z0 over some votes of all ranks, each of which reads a share of the other responses."""
        numbers = examples.mismatched(rows)[self.ranks.rank :: self.ranks.count]
        lengths, device = examples.texts.lengths, self.accelerator.device
        limits = {"max_rows": max(1, len(numbers)), "max_tokens": self.settings.max_batch_tokens}
        ratios = [torch.zeros(0, device=device)]
        for part in split_rows([lengths[number] for number in numbers], **limits):
            batch = [numbers[place] for place in part]
            tensors = (tensor.to(device) for tensor in examples.texts.batch(batch).values())
            with self.accelerator.autocast():
                ratios.append(self.policy.logprobs(*tensors) - reference[batch].to(device))
        return kto_baseline(torch.cat(ratios), reduce=self.ranks.sum)
