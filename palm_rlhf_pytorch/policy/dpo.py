"""DPOTrainer: a policy learns straight from pairs of which people prefer one, without a judge and without sampling.

Rafailov et al., "Direct Preference Optimization", https://arxiv.org/abs/2305.18290
The loss is a function of `objectives/direct.py`: DPO, cDPO, robust DPO, IPO, hinge, SimPO ... or one of the user's own.
The policy is an adapter on the trunk, the reference the trunk without it, whose log-probabilities are read once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf_pytorch.objectives.direct import DirectLoss, PairLogprobs, PairObjective, dpo_loss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.direct import DirectTrainer
from palm_rlhf_pytorch.policy.direct_data import Encoder, PairExamples, pair_examples
from palm_rlhf_pytorch.policy.direct_model import Figures, Objective
from palm_rlhf_pytorch.policy.direct_records import Source, pairs_of
from palm_rlhf_pytorch.policy.direct_settings import described, settings_from
from palm_rlhf_pytorch.policy.probe import Finding
from palm_rlhf_pytorch.training.optimizers import OptimizerFactory
from palm_rlhf_pytorch.typecheck import typecheck

LARGE_FALL = 0.5  # nats a token


class DPOTrainer(DirectTrainer):
    """Improves a PaLM by preferences; the `palm` given stays as it is, the improved one comes from `export_palm()`.

    All randomness follows from `seed`. Resuming and printing are as in RLHFTrainer.
    """

    @typecheck
    def __init__(
        self,
        *,
        palm: PaLM,
        pairs: Source,
        tokenizer: object,
        loss: PairObjective = dpo_loss,
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
        """Prepare training: all texts become ids; nothing goes through the model yet.

        Args:
            palm: a causal PaLM, the reference and the start of the policy; its scopes are left out.
            pairs: what is learnt from, records or a file of them; `preference` is the label, `weight` a factor of the
                loss. A margin is for reward models: it is not used here. Of a ranking all pairs are taken.
            tokenizer: any callable from text to ids, Hugging Face's included.
            loss: a function of `objectives/direct.py`, its numbers fixed by `functools.partial`:
                partial(ipo_loss, beta=0.2).
            held_out: pairs that are only looked at: `eval/loss`, `eval/accuracy`, `eval/margin`.
            max_length: tokens of prompt and response; 1024. Prompts lose their beginning, responses that are longer by
                themselves their end; both are counted and warned of.
            eos_token: id that ends each response; None takes the tokenizer's own, if it names one.
            seed: of the adapter and the order; 0 or above.
            run_dir: folder of the run: metrics, the reference's log-probabilities, and the checkpoints from which
                `train` resumes. None keeps none of them.
            reference_path: where the reference's log-probabilities are kept, for runs to share; by default
                reference.safetensors in run_dir. A file of another model or other texts is replaced.
            metrics_path: a JSONL file that gets a line for each step; by default metrics.jsonl in run_dir.
            accelerate_kwargs: passed to accelerate.Accelerator.
            optimizer: makes one of parameter groups, each with its lr and weight_decay, in place of fused AdamW:
                `training/optimizers.py` has `muon`.
            log_with: see RLHFTrainer.
            **settings: the fields of DirectSettings, where each is described.

        Raises:
            TypeError: if an argument or a setting is unknown or of the wrong type.
            ValueError: if there is no pair, a pair does not fit tokenizer and palm (it is named), or a number is out
                of range.
        """
        chosen = settings_from(settings, trainer="DPOTrainer")
        encoder = Encoder(tokenizer, num_tokens=palm.num_tokens, max_length=max_length, eos_token=eos_token)
        self.pairs = pair_examples(pairs_of(pairs), encoder)
        looked_at = None if held_out is None else pair_examples(pairs_of(held_out), encoder)
        super().__init__(
            palm, pair_objective(loss), name="dpo", loss_name=described(loss), settings=chosen, encoder=encoder,
            examples=self.pairs, held_out=looked_at, seed=seed,
            run_dir=run_dir, reference_path=reference_path, metrics_path=metrics_path,
            accelerate_kwargs=accelerate_kwargs, log_with=log_with, optimizer=optimizer,
        )  # fmt: skip
        self._fall_told = False

    def complaint(self, figures: Mapping[str, float]) -> str | None:
        """Once, when both responses have become much less likely: what is gained goes to texts in neither."""
        falls = [-figures.get(f"logratio_{side}_token", 0.0) for side in ("chosen", "rejected")]
        if self._fall_told or min(falls) < LARGE_FALL:
            return None
        self._fall_told = True
        return (
            f"chosen and rejected responses have both become less likely, by {falls[0]:.2f} and {falls[1]:.2f} nats a"
            " token: what they lose goes to texts that nobody has seen; lower lr, raise beta, or use with_nll"
        )

    def checks(self) -> dict[str, Any]:
        """What pairs must be to be learnt from."""
        return {"pairs differ": lambda: pairs_differ(self.pairs), "labels": lambda: labels_say(self.pairs)}


def pair_objective(loss: PairObjective) -> Objective:
    """What a batch of texts, chosen ones first, gives under a loss on pairs."""

    def objective(
        logprobs: Tensor, lengths: Tensor, *, ref_logprobs: Tensor, label: Tensor, weight: Tensor
    ) -> tuple[Tensor, Figures]:
        (chosen, rejected), (ref_chosen, ref_rejected) = logprobs.chunk(2), ref_logprobs.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        pairs = PairLogprobs(
            chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, label, weight
        )
        found = loss(pairs)
        return found.loss, _figures(pairs, found)

    return objective


def _figures(pairs: PairLogprobs, found: DirectLoss) -> Figures:
    """What is logged of a batch: the loss's own figures, and log-probabilities as sums and beside the reference."""
    means, count = pairs.per_token(), len(pairs.chosen)
    figures = found._asdict() | {
        "logp_chosen": pairs.chosen.mean(),
        "logp_rejected": pairs.rejected.mean(),
        "logratio_chosen_token": (means.chosen - means.ref_chosen).mean(),
        "logratio_rejected_token": (means.rejected - means.ref_rejected).mean(),
    }
    return {name: (value, count) for name, value in figures.items()}


def pairs_differ(pairs: PairExamples) -> Finding:
    """Chosen and rejected are different texts."""
    ids = pairs.texts.ids
    same = [row for row in range(len(pairs)) if torch.equal(ids[2 * row], ids[2 * row + 1])]
    if not same:
        return Finding("ok", f"{len(pairs)} pairs of different texts")
    status, found = (
        "fail" if len(same) == len(pairs) else "warn",
        f"{len(same)} of {len(pairs)} pairs are of equal texts",
    )
    return Finding(
        status, f"{found}, the first pair {same[0]}",  # type: ignore[arg-type]
        "nothing can be learnt from them: look for a column read twice, or texts that were cut where they differ"
        " (max_length)",
    )  # fmt: skip


def labels_say(pairs: PairExamples) -> Finding:
    """Some labels are not ties; the longer response is not nearly always the preferred one."""
    ties = int((pairs.labels == 0.5).sum())
    lengths = pairs.texts.response_lengths
    longer = [a > b for a, b in zip(lengths[::2], lengths[1::2], strict=True) if a != b]
    share = sum(longer) / max(1, len(longer))
    found = f"{ties} ties; of responses of unequal length, the longer is preferred in {share:.0%}"
    if ties == len(pairs):
        return Finding("fail", f"all {ties} labels are ties", "nothing is preferred: look at how preferences are read")
    if len(longer) >= 20 and not 0.1 < share < 0.9:
        return Finding(
            "warn", found, "the policy may learn length alone: length_normalised_dpo_loss or simpo_loss weigh it less"
        )  # fmt: skip
    return Finding("ok", found)
