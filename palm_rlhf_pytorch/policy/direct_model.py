"""A policy that learns straight from texts, beside the reference it came from, on one trunk.

Log-probabilities of whole responses come from one function for both, so that they start equal. What a step's loss is,
an objective says. Those of the reference are read once and kept in a file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm.auto import tqdm

from palm_rlhf_pytorch.logprobs import chosen_logprobs
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import Hat
from palm_rlhf_pytorch.policy.direct_data import TokenTexts
from palm_rlhf_pytorch.tensors import split_rows
from palm_rlhf_pytorch.training.digests import tensors_digest
from palm_rlhf_pytorch.training.ranks import Ranks
from palm_rlhf_pytorch.training.tensor_file import load_tensors, save_tensors

KIND = "reference log-probabilities"

Figures = Mapping[str, tuple[Tensor, Tensor | float]]  # of some examples: means by name, and of how many each is one
# objective(logprobs (b,), lengths (b,), **facts) -> loss, a mean over examples, and figures of it
Objective = Callable[..., tuple[Tensor, Figures]]


class Tally:
    """Means over many batches and all ranks; sums stay where they are made, so adding waits for no GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, figures: Figures, *, counted: bool = True) -> None:
        """Take in means with their counts; without `counted` the names alone, so that all ranks have the same."""
        for name, (mean, count) in figures.items():
            count = torch.as_tensor(count, dtype=torch.float32, device=mean.device) * counted
            mean = mean.detach().float()
            part = torch.stack([torch.where(count > 0, mean * count, 0.0), count])
            self._sums[name] = self._sums[name] + part if name in self._sums else part

    def taken(self, ranks: Ranks) -> dict[str, float]:
        """The means since this was last asked for; a name that was counted nowhere is left out."""
        if not self._sums:
            return {}
        names, sums = list(self._sums), ranks.sum(torch.stack(list(self._sums.values())))
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}


class DirectPolicy(nn.Module):
    """The trunk, frozen, which is the reference; the hat that is trained on it; and the loss of a batch of texts."""

    def __init__(
        self,
        palm: PaLM,
        objective: Objective,
        *,
        lora: bool,
        lora_r: int,
        lora_alpha: float | None,
        last_layers: int | None,
        activation_checkpointing: bool,
        generator: torch.Generator,
    ) -> None:
        """Put a hat on a model, whose weights are shared and not changed; its scopes are left out.

        Raises:
            ValueError: if palm is not causal, or a rank or a number of layers is out of range.
        """
        super().__init__()
        if not palm.causal:
            raise ValueError("palm must be causal: a model that sees later tokens cannot be a policy; use causal=True")
        self.palm = palm.share()
        self.palm.set_activation_checkpointing(activation_checkpointing)
        self.hat = Hat(
            self.palm, name="policy", lora=lora, r=lora_r, alpha=lora_alpha, last_layers=last_layers, dropout=0.0,
            generator=generator,
        )  # fmt: skip
        self.objective = objective
        self.tally = Tally()

    def forward(self, ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, share: float, **facts: object) -> Tensor:
        """The objective's loss, times the share that these texts have in a step's mean; figures go to `tally`.

        Args:
            ids: prompts and responses, padded on the right, (b, n).
            prompt_lengths: tokens of each prompt, at least 1, (b,).
            lengths: tokens of each response, (b,).
            share: 0 for a batch that only keeps step with other ranks.
            **facts: what else the objective takes.
        """
        loss, figures = self.objective(self.logprobs(ids, prompt_lengths, lengths), lengths, **facts)
        self.tally.add(figures, counted=share > 0)
        return loss * share

    def logprobs(self, ids: Tensor, prompt_lengths: Tensor, lengths: Tensor, *, reference: bool = False) -> Tensor:
        """Log-probability (nats) of each whole response, (b,), float32; under the reference, if that is asked for."""
        model = self.palm if reference else self.hat.model(self.palm)
        hidden = self.palm.embed(ids, dropout=0.0) if reference else self.hat.embed(self.palm, ids)
        place = torch.arange(ids.shape[1], device=ids.device)
        counted = (place >= prompt_lengths[:, None]) & (place < (prompt_lengths + lengths)[:, None])
        rows, columns = counted.nonzero().unbind(dim=1)
        found = chosen_logprobs(
            hidden[rows, columns - 1], model.token_emb.weight, ids[rows, columns], entropy_grad=False
        ).logprobs
        return torch.zeros_like(counted, dtype=found.dtype).masked_scatter(counted, found).sum(dim=-1)

    def export_palm(self) -> PaLM:
        """The improved model on its own: new weights, the update inside, nothing shared."""
        palm = self.hat.model(self.palm).share(trainable=lambda name: True)
        if self.hat.adapter is not None:
            palm.merge_adapter(self.hat.adapter)
        palm.set_activation_checkpointing(False)
        return palm.eval()


def check_whole(accelerator: Accelerator) -> None:
    """Raise a ValueError where processes hold pieces of the weights: here each reads texts on its own."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(f"weights spread by {kind.value} are not supported here: launch with DDP, or one process")


def digest_of(palm: PaLM) -> str:
    """SHA-256 of a model's configuration and base weights; it takes seconds a gigabyte."""
    weights = ((f"{name} {weight.dtype}", weight) for name, weight in palm.named_base_parameters())
    return tensors_digest(weights, told=json.dumps(palm.config, sort_keys=True, default=str))


class Reference:
    """Log-probabilities of texts under the trunk: from a file that fits, else computed, once, and written there."""

    def __init__(self, path: Path | None, *, ranks: Ranks, accelerator: Accelerator, max_batch_tokens: int) -> None:
        """Say where they are kept; without a path they are computed for every trainer."""
        self.path, self.ranks, self.accelerator = path, ranks, accelerator
        self.max_batch_tokens = max_batch_tokens

    def __call__(
        self, policy: DirectPolicy, texts: Mapping[str, TokenTexts], *, digest: str, progress: bool
    ) -> dict[str, Tensor]:
        """Log-probabilities (m,) of all texts under each name, float32, on the CPU; to be called on every process.

        Args:
            policy: holds the trunk.
            texts: by name.
            digest: of trunk and texts; a file of another one is replaced.
            progress: show a bar on stderr (main process only).

        Raises:
            ValueError: if something else than such a file stands at the path.
        """
        with self.ranks.together():
            found = self._read(digest)
        if not self.ranks.any(found is None) and found is not None:
            return found
        show = progress and self.accelerator.is_main_process
        with tqdm(total=sum(map(len, texts.values())), disable=not show, desc="reference", unit="text") as bar:
            found = {name: self._computed(policy, part, bar) for name, part in texts.items()}
        with self.ranks.together():
            if self.path is not None and self.accelerator.is_main_process:
                save_tensors(self.path, found, kind=KIND, config={"digest": digest})
        return found

    def _read(self, digest: str) -> dict[str, Tensor] | None:
        if self.path is None or not self.path.exists():
            return None
        file = load_tensors(self.path, kind=KIND)
        if file.kind != KIND:
            raise ValueError(f"{self.path} holds something else than {KIND}; move it away, or name another path")
        return dict(file.tensors) if file.config.get("digest") == digest else None

    @torch.no_grad()
    def _computed(self, policy: DirectPolicy, texts: TokenTexts, bar: tqdm) -> Tensor:
        """Each rank reads every so-many-th text."""
        own = list(range(self.ranks.rank, len(texts), self.ranks.count))
        lengths = texts.lengths
        sums = torch.zeros(len(texts), dtype=torch.float64)  # a sum over ranks, of which one alone is not 0
        for batch in split_rows([lengths[row] for row in own], max_rows=len(own), max_tokens=self.max_batch_tokens):
            rows = [own[place] for place in batch]
            tensors = (tensor.to(self.accelerator.device) for tensor in texts.batch(rows).values())
            with self.accelerator.autocast():
                sums[rows] = policy.logprobs(*tensors, reference=True).double().cpu()
            bar.update(len(rows) * self.ranks.count)
        return self.ranks.sum(sums).float()
