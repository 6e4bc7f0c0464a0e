"""The reward model: a PaLM that reads a prompt with its response and gives one score.

Stiennon et al., "Learning to Summarize from Human Feedback", https://arxiv.org/abs/2009.01325; prompt and response
embeddings and bins are upstream's (lucidrains/PaLM-rlhf-pytorch).
It is trained on ratings or on pairs, and knows no policy.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.objectives.preference import bins_loss, bradley_terry_loss, scalar_loss
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.files import unshare, with_normalization
from palm_rlhf_pytorch.reward.saving import RewardModelFiles
from palm_rlhf_pytorch.reward.settings import Settings
from palm_rlhf_pytorch.reward.texts import Reading, Texts, check_labels, checked_texts, join, same_prompt_lengths
from palm_rlhf_pytorch.tensors import RunningMoments, masked_mean
from palm_rlhf_pytorch.typecheck import typecheck


class RewardModel(RewardModelFiles, nn.Module):
    """A judge: token ids (b, n) in, scores (b,) out, or the loss of labelled texts.

    score = head(mean of the response tokens' features), with prompt and response embeddings added to the tokens'.
    With bins the head gives logits over c ratings, and the score is their expectation, never a draw unless asked for.
    Scores are in the labels' unit until `normalize_scores`, whose shift and scale are saved with the model.

    With LoRA the trunk shares its frozen weights with the PaLM it was made from, which it leaves untouched; what is
    trained afterwards is the adapter, the two embeddings and the head. Whoever goes on to change that PaLM's own
    weights changes this trunk too: give a deepcopy of it to keep them apart.
    """

    score_mean: Tensor
    score_std: Tensor

    @typecheck
    def __init__(
        self,
        palm: PaLM,
        *,
        num_binned_output: int = 0,
        label_offset: int = 0,
        use_lora: bool = True,
        lora_r: int = 8,
        lora_alpha: float | None = None,
        dropout: float = 0.0,
        pool_prompt: bool = False,
        pool_last: bool = False,
    ) -> None:
        """Make a judge of a language model's trunk, causal or not; scopes of the PaLM are left out.

        Args:
            palm: the language model; it is neither changed nor kept.
            num_binned_output: ratings c, at least 2; 0 for a scalar head.
            label_offset: the lowest rating; 1 for "1 to 5" with five bins. Scores have the same unit.
            use_lora: train a low-rank adapter; False copies the trunk and trains all of it.
            lora_r: the adapter's rank.
            lora_alpha: the adapter's update is scaled by alpha / r; None means r.
            dropout: probability in train mode, in place of the PaLM's own.
            pool_prompt: average the features of all real tokens, not of the response's alone.
            pool_last: read the features of the last real token, as in the paper, in place of a mean.

        Raises:
            ValueError: if a number is out of its range, or pool_prompt and pool_last contradict each other.
        """
        super().__init__()
        self.settings = Settings(
            num_binned_output=num_binned_output, label_offset=label_offset, use_lora=use_lora, lora_r=lora_r,
            lora_alpha=lora_alpha, dropout=dropout, pool_prompt=pool_prompt, pool_last=pool_last,
        )  # fmt: skip
        device = palm.token_emb.weight.device
        self.palm = palm.share(trainable=None if use_lora else lambda name: True)
        self.adapter = self.palm.new_adapter(r=lora_r, alpha=lora_alpha) if use_lora else None
        self.prompt_embed = nn.Parameter(torch.zeros(palm.dim, dtype=torch.float32, device=device))
        self.response_embed = nn.Parameter(torch.zeros(palm.dim, dtype=torch.float32, device=device))
        self.head = nn.Linear(palm.dim, max(num_binned_output, 1), dtype=torch.float32, device=device)
        nn.init.normal_(self.head.weight, std=(palm.dim + 1) ** -0.5)  # Stiennon et al., in their code
        nn.init.zeros_(self.head.bias)
        self.register_buffer("score_mean", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("score_std", torch.ones((), dtype=torch.float32, device=device))

    @typecheck
    def forward(
        self,
        seq: Tensor,
        mask: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        rejected: Tensor | None = None,
        rejected_mask: Tensor | None = None,
        rejected_prompt_mask: Tensor | None = None,
        rejected_prompt_lengths: Tensor | None = None,
        margin: Tensor | float | None = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scores of texts; the loss of their labels; or, with `rejected`, the loss of pairs.

        The losses are the cross entropy of binned labels (nats), the mean squared error of scalar ones, and Bradley-
        Terry of pairs, -mean(log sigmoid(score(seq) - score(rejected) - margin)), each averaged over the batch.

        Args:
            seq: token ids, (b, n); the preferred texts of pairs.
            mask: True on real tokens, (b, n), padding on either side; None for all. A trunk that is not causal takes
                negative ids for padding where there is no mask.
            prompt_mask: True on the prompt's tokens, (b, n). The response is mask & ~prompt_mask.
            prompt_lengths: real tokens of each prompt, (b,), in place of prompt_mask. Without either all is response.
            labels: with bins integers from label_offset to label_offset + c - 1, else floats, (b,).
            rejected: token ids of the other texts of the pairs, (b, m).
            rejected_mask: as mask, (b, m).
            rejected_prompt_mask: as prompt_mask, (b, m); None for a prompt as long as that of seq.
            rejected_prompt_lengths: as prompt_lengths.
            margin: by how much the scores of each pair should differ, (b,) or one number.
            sample: draw each score from its bins in place of their expectation.
            generator: random state of the draws, on the model's device.

        Returns:
            Scores (b,) in float32, normalised once `normalize_scores` has been called; or a scalar loss, of scores in
            the labels' unit.

        Raises:
            TypeError: if ids, lengths or labels have the wrong dtype, or a mask is not bool.
            ValueError: if shapes, ids or labels do not fit, a row has no response token, or arguments contradict.
        """
        if sample and (labels is not None or rejected is not None or not self.settings.num_binned_output):
            raise ValueError("sample=True draws scores from bins: it goes without labels and rejected, and needs bins")
        texts = self._reader()(seq, mask, prompt_mask, prompt_lengths)
        if rejected is not None:
            if labels is not None:
                raise ValueError("labels and rejected: give ratings or pairs, not both")
            if rejected.shape[:1] != seq.shape[:1]:
                raise ValueError(f"rejected {tuple(rejected.shape)} and seq {tuple(seq.shape)}: a pair has one of each")
            if rejected_prompt_mask is None and rejected_prompt_lengths is None:
                rejected_prompt_lengths = same_prompt_lengths(texts)
            other = self._reader()(
                rejected, rejected_mask, rejected_prompt_mask, rejected_prompt_lengths, rejected=True
            )
            return self._pair_loss(texts, other, margin)
        of_pairs = {
            "rejected_mask": rejected_mask, "rejected_prompt_mask": rejected_prompt_mask,
            "rejected_prompt_lengths": rejected_prompt_lengths, "margin": margin,
        }  # fmt: skip
        idle = [name for name, value in of_pairs.items() if value is not None]
        if idle:
            raise ValueError(f"{', '.join(idle)} without rejected: give the rejected texts too")
        if labels is not None:
            bins, lowest = self.settings.num_binned_output, self.settings.label_offset
            check_labels(labels, batch=len(seq), num_bins=bins, lowest=lowest)
            return self._label_loss(self._outputs(texts), labels)
        outputs = self._outputs(texts)
        if not sample:
            return self._normalized(self._scores(outputs))
        drawn = torch.multinomial(outputs.softmax(dim=-1), 1, generator=generator)
        return self._normalized(rearrange(drawn, "b 1 -> b") + self.settings.label_offset)

    def read(
        self, seq: Tensor, mask: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Reading:  # fmt: skip
        """Scores before they are normalised, whose differences are log-odds of preferences; see `forward`."""
        outputs = self._outputs(self._reader()(seq, mask, prompt_mask, prompt_lengths))
        return Reading(self._scores(outputs), outputs if self.settings.num_binned_output else None)

    def bin_logits(
        self, seq: Tensor, mask: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of the ratings, (b, c) in float32, for calibration; arguments as in `forward`.

        Raises:
            ValueError: if the head is scalar, or the arguments do not fit.
        """
        logits = self.read(seq, mask, prompt_mask=prompt_mask, prompt_lengths=prompt_lengths).logits
        if logits is None:
            raise ValueError("bin_logits: this model has a scalar head; build it with num_binned_output")
        return logits

    @torch.no_grad()
    def normalize_scores(self, references: Iterable[Mapping[str, Any]]) -> Self:
        """From now on scores have mean 0 and deviation 1 over these texts, whatever they were normalised by before.

        Take responses of the policy's reference, so that a score of 0 is that of an average one; losses keep the
        labels' unit. https://arxiv.org/abs/2009.01325, appendix C, and its code.

        Args:
            references: batches of `read`'s arguments by name.

        Raises:
            ValueError: if there are fewer than two texts, or their scores are not finite or all alike; nothing changes.
        """
        moments, training = RunningMoments(), self.training
        self.eval()
        try:
            for batch in references:
                scores = self.read(**batch).scores.cpu()
                moments.add(scores, torch.ones_like(scores, dtype=torch.bool))
        finally:
            self.train(training)
        count, mean, var = (float(moment) for moment in moments.compute())
        if count < 2 or not 1e-6 * abs(mean) < var**0.5 < float("inf"):  # above what rounding alone gives
            raise ValueError(
                f"references: {count:.0f} texts have scores of mean {mean:.4g} and deviation {var**0.5:.4g}; they must"
                " be at least two, and scores finite and not all alike: has the model learnt anything?"
            )
        self.score_mean.fill_(mean)
        self.score_std.fill_(var**0.5)
        return self

    def finetune_parameters(self) -> list[nn.Parameter]:
        """All that is trained, in a fixed order: adapter or whole trunk, the two embeddings, the head."""
        trunk: nn.Module = self.palm if self.adapter is None else self.adapter
        return [*trunk.parameters(), self.prompt_embed, self.response_embed, *self.head.parameters()]

    @property
    def config(self) -> dict[str, Any]:
        """What a file must say to build this model again, JSON-able: `palm`, and the constructor's own arguments."""
        return {"palm": self.palm.config, **asdict(self.settings)}

    # from tokens to scores

    def _reader(self) -> Callable[..., Texts]:
        return partial(
            checked_texts, num_tokens=self.palm.num_tokens, negative_is_padding=not self.palm.causal,
            pool_prompt=self.settings.pool_prompt, pool_last=self.settings.pool_last,
        )  # fmt: skip

    def _outputs(self, texts: Texts) -> Tensor:
        """What the head gives, (b, c or 1), in float32 whatever the trunk's dtype and autocast."""
        kinds = torch.where(texts.prompt_mask[..., None], self.prompt_embed, self.response_embed)
        dropout = self.settings.dropout if self.training else 0.0
        # nothing before the first place that is pooled is looked at; a GPU would be waited for, a compiler stopped
        asks = texts.pooled.device.type == "cpu" and not torch.compiler.is_compiling()
        since = int(texts.pooled.any(dim=0).int().argmax()) if asks else 0
        hidden = self.palm.embed(
            texts.seq, mask=texts.mask, adapter=self.adapter, extra_embed=kinds, dropout=dropout, since=since
        )
        with torch.autocast(hidden.device.type, enabled=False):
            features = masked_mean(hidden, texts.pooled[:, since:], dim=1)
            return self.head(features.to(self.head.weight.dtype)).float()

    def _scores(self, outputs: Tensor) -> Tensor:
        """Scores (b,): the expectation over bins, or the scalar head's output."""
        if not self.settings.num_binned_output:
            return rearrange(outputs, "b 1 -> b")
        ratings = torch.arange(self.settings.num_binned_output, device=outputs.device) + self.settings.label_offset
        return (outputs.softmax(dim=-1) * ratings).sum(dim=-1)  # autocast rounds products of matrices

    def _normalized(self, scores: Tensor) -> Tensor:
        return (scores - self.score_mean) / self.score_std

    def _label_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        if self.settings.num_binned_output:
            return bins_loss(outputs, labels.long() - self.settings.label_offset).loss
        return scalar_loss(self._scores(outputs), labels.float()).loss

    def _pair_loss(self, chosen: Texts, rejected: Texts, margin: Tensor | float | None) -> Tensor:
        """Bradley-Terry, by one pass over both."""
        if margin is not None and not bool(torch.as_tensor(margin).isfinite().all()):
            raise ValueError(f"margin ({margin}) must be finite")
        scores = self._scores(self._outputs(join(chosen, rejected)))
        first, second = scores.chunk(2)
        return bradley_terry_loss(first, second, margin=margin).loss

    # copies; files are reward/saving.py's

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        unshare(self.palm, state_dict, prefix)
        state_dict.update(with_normalization(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move like any module, but leave all except the trunk in float32 where that becomes bfloat16 or float16."""

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        if recurse:
            for child in self.children():
                child._apply(fn if child is self.palm else keep_float32)
        return super()._apply(keep_float32, recurse=False)
