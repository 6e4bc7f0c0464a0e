"""Several judges as one, each normalised apart and logged by name.

    short = text_judge(each(at_most(300)), tokenizer)
    judge = JudgeSum({"liked": reward_model, "short": short}, weights={"short": 0.5})

Why each apart: a judge of wide scores would drown one of narrow scores, whatever their weights. Knows no policy.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.reward.functions import Judge, noting, summed
from palm_rlhf_pytorch.tensors import identity, masked_moments
from palm_rlhf_pytorch.training.metrics import GLOSSARY


class JudgeSum(nn.Module):
    """Several judges as one: the weighted sum of their scores, each normalised apart.

    sum_k weight_k (score_k - mean_k) / std_k, mean and deviation over the first responses judged, then kept.

    A trainer asks `parts`, which it logs by name, fixes the scales once with `fit` on all of its first rollout, and
    learns from `total`. Elsewhere: `judge.fit(judge.parts(...))`, then call it like any judge. It fixes nothing by
    itself, for the first responses that a judge happens to see may be four probes, and their deviation anything.
    """

    def __init__(
        self,
        judges: Mapping[str, Judge],
        *,
        weights: Mapping[str, float] | None = None,
        normalize: bool | Collection[str] = True,
    ) -> None:
        """Put judges together.

        Args:
            judges: by name, as their scores are logged (`reward/<name>`).
            weights: of some or all names, 1.0 for the others. At 0 a judge is asked and logged, and left out of the
                sum.
            normalize: False sums raw scores; names normalise those judges alone.

        Raises:
            ValueError: if there is no judge, a name is taken or unknown, or a weight is not finite or none counts.
        """
        super().__init__()
        weights = weights or {}
        names = judges if normalize is True else normalize or ()
        if isinstance(names, str):
            raise ValueError(f"normalize ({normalize!r}) is a str: give True, False, or a list of names")
        unknown = sorted({*weights, *names} - set(judges))
        if unknown:
            raise ValueError(f"weights or normalize name {unknown}: the judges are {sorted(judges)}")
        for name in judges:
            if not name or f"reward/{name}" in GLOSSARY:
                raise ValueError(
                    f"judges holds the name {name!r}: reward/{name} is another metric; choose another name"
                )
        self.weights = {name: float(weights.get(name, 1.0)) for name in judges}
        if not all(map(math.isfinite, self.weights.values())) or not any(self.weights.values()):
            raise ValueError(f"weights ({self.weights}) must be finite, at least one of them not 0")
        self.judges = dict(judges)
        # registered, so that whoever moves this judge or puts it into eval mode reaches them
        self.models = nn.ModuleList(judge for judge in judges.values() if isinstance(judge, nn.Module))
        self.normalizers = {name: ScoreNormalizer() for name in judges if name in names}

    def forward(self, sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        """The weighted sum (b,), or (b, t) if a judge gives rewards; arguments as in `Judge`.

        Raises:
            ValueError: if the scales are not fixed yet; no judge is asked then.
        """
        if not self.is_fitted:
            raise ValueError(
                f"the scales of {sorted(self.normalizers)} are not fixed: call fit(parts) with what parts(...) gives"
                " for the first responses, a hundred or more; or raw() for the sum without scales"
            )
        parts = self.parts(sequences, prompt_mask=prompt_mask, mask=mask)
        return self.total(parts, (mask & ~prompt_mask).sum(dim=-1))

    @property
    def is_fitted(self) -> bool:
        """Whether all scales are fixed, or none is to be."""
        return all(normalizer.mean is not None for normalizer in self.normalizers.values())

    def raw(self) -> "JudgeSum":
        """The same judges and weights without scales: for looking at a judge before its first rollout."""
        return JudgeSum(self.judges, weights=self.weights, normalize=False)

    def parts(self, sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """What each judge gives, as it gives it, by name; an error of one passes through with its name."""
        found = {}
        for name, judge in self.judges.items():
            with noting(f"raised by the judge {name!r}"):
                found[name] = judge(sequences, prompt_mask=prompt_mask, mask=mask)
        return found

    def fit(self, parts: Mapping[str, Tensor], *, reduce: Callable[[Tensor], Tensor] = identity) -> Self:
        """Fix shift and scale of each judge, as far as they are not fixed, on responses of all ranks.

        Args:
            parts: of `parts`, for all the responses there are at first, not for a part of them.
            reduce: sums a tensor over ranks.
        """
        for name, normalizer in self.normalizers.items():
            scores = summed(parts[name])
            normalizer.fit(scores, scores.isfinite(), reduce=reduce)
        return self

    def total(self, parts: Mapping[str, Tensor], lengths: Tensor) -> Tensor:
        """The weighted sum of parts, normalised: (b,), or (b, t) if one of them is; NaN where a judge has no score.

        Among rewards a score, or what normalising takes off the sum of rewards, stands at the response's last token.

        Args:
            parts: of `parts`.
            lengths: tokens of each response, (b,).

        Raises:
            ValueError: if a response without a token is to carry a reward.
        """
        counted = {name: part for name, part in parts.items() if self.weights[name]}
        steps = [part.shape[1] for part in counted.values() if part.ndim == 2]
        if not steps:
            shares = [self.weights[name] * self._normalized(name, part) for name, part in counted.items()]
            return torch.stack(shares).sum(dim=0)
        if not bool((lengths > 0).all()):
            raise ValueError(f"lengths ({lengths.tolist()}): a response without a token cannot carry a reward")
        rows, last = torch.arange(len(lengths), device=lengths.device), lengths - 1
        rewards = torch.zeros(len(lengths), max(steps), device=lengths.device)
        for name, part in counted.items():
            if part.ndim == 2:
                normalizer = self.normalizers.get(name)
                rewards += self.weights[name] * part / (1.0 if normalizer is None else normalizer.std or 1.0)
            at_end = self._normalized(name, part if part.ndim == 1 else torch.zeros_like(rewards[:, 0]))
            rewards[rows, last] += self.weights[name] * at_end
        return rewards

    def state(self) -> dict[str, dict[str, float | None]]:
        """Shift and scale of each normalised judge, for a checkpoint."""
        return {name: normalizer.state() for name, normalizer in self.normalizers.items()}

    def restore(self, state: Mapping[str, Mapping[str, float | None]]) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: if it is of other judges.
        """
        if set(state) != set(self.normalizers):
            raise ValueError(f"state is of the judges {sorted(state)}: normalised here are {sorted(self.normalizers)}")
        for name, normalizer in self.normalizers.items():
            normalizer.restore(state[name])

    def _normalized(self, name: str, scores: Tensor) -> Tensor:
        return self.normalizers[name](scores) if name in self.normalizers else scores


class ScoreNormalizer:
    """Shift and scale scores to mean 0, deviation 1 over the first responses judged, then keep shift and scale.

    Where the first scores are all alike the scale stays 1, and is taken from the first that differ.
    """

    def __init__(self) -> None:
        self.mean: float | None = None
        self.std: float | None = None

    def fit(self, scores: Tensor, counted: Tensor, *, reduce: Callable[[Tensor], Tensor] = identity) -> Self:
        """Take mean and deviation of the scores that count, (n,), of all ranks, as far as they are not fixed yet."""
        if self.std is not None:
            return self
        moments = masked_moments(scores, counted, reduce=reduce)
        mean, std = float(moments.mean), float(moments.var.sqrt())
        if self.mean is None and int(moments.count) > 0:
            self.mean = mean
        if std > 1e-6 * abs(mean):  # above what rounding alone gives
            self.std = std
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """Normalised scores (b,)."""
        return (scores - (self.mean or 0.0)) / (self.std or 1.0)

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "std": self.std}

    def restore(self, state: Mapping[str, float | None]) -> None:
        """Take over what `state` gave."""
        self.mean, self.std = state["mean"], state["std"]
