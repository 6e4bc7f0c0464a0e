"""What must hold of a judge: finite scores, one a response; and what should: it repeats itself, ignores padding.

Scores are asked for as training asks for them. Knows nothing of the policy but a few of its responses.
"""

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.probe import Finding, Probe
from palm_rlhf_pytorch.policy.scores import judge_sequences


def judge_scores(probe: Probe) -> Finding:
    """One finite number a response."""
    probe.scores = _judged(probe)
    bad = ~probe.scores.isfinite()
    if bool(bad.any()):
        return Finding(
            "fail", f"{int(bad.sum())} of {len(bad)} scores are NaN or infinite",
            "the judge divides by 0 or overflows: look at responses of one token and at empty texts after decoding;"
            " return a finite score for each response",
        )  # fmt: skip
    low, high = (float(extreme) for extreme in probe.scores.aminmax())
    return Finding("ok", f"{len(bad)} finite scores from {low:.4g} to {high:.4g}")


def judge_repeats(probe: Probe) -> Finding:
    """The same responses get the same scores again."""
    apart = float((_judged(probe) - probe.scores).abs().max())
    if apart <= 1e-5 * _most(probe):
        return Finding("ok", "the same scores when asked again")
    return Finding(
        "warn", f"asked again, a score moved by {apart:.2g}",
        "the judge is random: dropout that eval() does not turn off, a sampled rating, a judge that writes at a"
        " temperature above 0; its noise is learnt from like a score",
    )  # fmt: skip


def judge_tells_apart(probe: Probe) -> Finding:
    """Different responses get different scores."""
    mask = probe.texts.mask.tolist()
    texts = {tuple(row[: sum(real)]) for row, real in zip(probe.texts.sequences.tolist(), mask, strict=True)}
    if len(texts) == 1:
        return Finding("skip", f"all {len(mask)} responses sampled are alike")
    different = len(probe.scores.unique())
    if different > 1:
        return Finding("ok", f"{different} different scores for {len(texts)} different texts")
    return Finding(
        "warn", f"{float(probe.scores[0]):.4g} for all of {len(texts)} different texts",
        "there is nothing to learn from a constant judge: see that it reads the response, mask & ~prompt_mask; one that"
        " seldom scores at all needs longer or more responses between updates",
    )  # fmt: skip


def judge_and_padding(probe: Probe) -> Finding:
    """A response gets the same score alone and among longer ones."""
    if bool(probe.texts.mask.all()):
        return Finding("skip", "nothing sampled is padded")
    alone = torch.cat([_judged(probe, row) for row in range(len(probe.scores))])
    apart, spread = float((alone - probe.scores).abs().max()), float(probe.scores.std())
    if apart <= max(0.1 * spread, 1e-4 * _most(probe)):  # in half precision batches of another size round differently
        return Finding("ok", f"alone and in the batch {apart:.1e} apart, deviation of the scores {spread:.2g}")
    return Finding(
        "warn", f"alone and in the batch {apart:.2g} apart, deviation of the scores {spread:.2g}",
        "the judge reads padding: use `mask`, True on real tokens (padding is id 0, on the right), in every sum, mean,"
        " last place and attention; a response's score would depend on its neighbours",
    )  # fmt: skip


def normalisation(probe: Probe) -> Finding:
    """The scores' deviation, by which they are divided, is above rounding."""
    if not probe.settings.normalize_scores:
        return Finding("skip", "normalize_scores is False: raw scores are learnt from")
    if probe.trainer.normalizer.std is not None:
        return Finding("skip", f"fixed already, at a deviation of {probe.trainer.normalizer.std:.3g}")
    mean, spread = float(probe.scores.double().mean()), float(probe.scores.double().std(correction=0))
    if spread > 1e-6 * abs(mean):
        return Finding("ok", f"deviation {spread:.3g} around {mean:.3g}")
    return Finding(
        "warn", f"deviation {spread:.3g} around {mean:.3g}: no more than rounding",
        "the scale would stay 1: subtract what all scores have in common in the judge, or set normalize_scores=False",
    )  # fmt: skip


def _most(probe: Probe) -> float:
    return float(probe.scores.abs().max())


def _judged(probe: Probe, row: int | None = None) -> Tensor:
    """Scores of all responses, or of one alone."""
    rollout = probe.texts if row is None else probe.texts.select(torch.tensor([row], device=probe.device))
    return judge_sequences(
        probe.trainer.reward_model, rollout.sequences, rollout.prompt_mask, rollout.mask, where="preflight",
        timeout=probe.settings.judge_timeout, **probe.settings.batch_limits(),
    )  # fmt: skip
