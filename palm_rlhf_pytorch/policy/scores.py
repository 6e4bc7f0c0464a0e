"""From a judge's raw score to what the policy is rewarded with at the end of a response.

Which responses count, normalising, and the price of a response that never ended.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.judging import listed
from palm_rlhf_pytorch.policy.targets import Source
from palm_rlhf_pytorch.reward.weighted import ScoreNormalizer
from palm_rlhf_pytorch.training.ranks import Ranks


def counted_scores(
    scores: Tensor, prompt_rows: Tensor, *, ranks: Ranks, max_dropped: float, where: str, warn: bool = True
) -> Tensor:
    """Which responses count: those with a finite score, (n,); a few others are warned of and left out.

    Args:
        scores: the judge's, (n,).
        prompt_rows: which prompt each answers, (n,).
        ranks: all processes.
        max_dropped: the largest share of responses that may be left out, over all processes.
        where: which step this is.
        warn: whether to say so.

    Raises:
        ValueError: on every process, if more are not finite.
    """
    counted = scores.isfinite()
    bad, total = ranks.sum(torch.stack([(~counted).sum(), torch.tensor(len(scores))]).double()).tolist()
    if not bad:
        return counted
    own = (~counted).nonzero()[:, 0].tolist(), prompt_rows[~counted].tolist()
    named = "; ".join(
        f"responses {listed(rows)}" + (f" of process {rank}" if ranks.count > 1 else "") + f", to prompts {listed(of)}"
        for rank, (rows, of) in enumerate(ranks.gather_values(own))
        if rows
    )
    told = f"{bad:.0f} of {total:.0f} scores in {where} are NaN or infinite: {named}"
    if bad > max_dropped * total:
        raise ValueError(
            f"{told}. More than max_dropped ({max_dropped:.0%}) is no accident: look at the judge; nothing was learnt"
            " from these responses"
        )
    if warn and ranks.rank == 0:
        warnings.warn(f"{told}; these responses are left out", stacklevel=2)
    return counted


def learnt_scores(
    source: Source,
    counted: Tensor,
    normalizer: ScoreNormalizer | None,
    *,
    penalty: float | None,
    replacement: float | None,
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """What is learnt from raw scores: normalised, with the price of a missing EOS, (n,); 0 where a row does not count.

    Args:
        source: with its scores.
        counted: which rows count, (n,).
        normalizer: fixes its shift and scale on the first scores it sees; None takes raw scores.
        penalty: see `penalize_missing_eos`.
        replacement: likewise.
        reduce: sums a tensor over ranks.
    """
    assert source.scores is not None, "scores are asked for before this"
    scores = source.scores.masked_fill(~counted, 0.0)
    if normalizer is not None:
        scores = normalizer.fit(scores, counted, reduce=reduce)(scores)
    scores = penalize_missing_eos(scores, source.ended, source.eos_token, penalty=penalty, replacement=replacement)
    return scores.masked_fill(~counted, 0.0)


def penalize_missing_eos(
    scores: Tensor, ended: Tensor, eos_token: int | None, *, penalty: float | None, replacement: float | None
) -> Tensor:
    """Price of a response that ran into its limit, in units of the normalised score; none where no token ends one.

    Args:
        scores: (n,).
        ended: True where the response ended with its EOS, (n,).
        eos_token: the id that ends a response, or None.
        penalty: subtracted from the score; None for nothing.
        replacement: takes the score's place; None for nothing.
    """
    if eos_token is None:
        return scores
    if replacement is not None:
        return torch.where(ended, scores, replacement)
    return scores if penalty is None else scores - penalty * (~ended)
