"""What must hold of a judge: finite scores, one a response; and what should: it repeats itself, ignores padding.

Scores are asked for as training asks for them. Knows nothing of the policy but a few of its responses.
"""

import torch
from torch import Tensor

from palm_rlhf_pytorch.policy.judging import Judge, judge_sequences, uncached
from palm_rlhf_pytorch.policy.probe import Finding, Probe
from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.tensors import pad_ragged

UNMOVED = 0.01  # a score that a swapped response moves by less, in deviations of the scores, does not follow it


def judge_scores(probe: Probe) -> Finding:
    """One finite number a response."""
    probe.scores = _judged(probe, probe.texts)
    return _finite(probe.scores)


def held_out_judge(probe: Probe) -> Finding:
    """The same of the judge that is never learnt from: its failure would end a run as well."""
    judge = probe.trainer.held_out_judge
    if judge is None:
        return Finding("skip", "there is none")
    return _finite(_judged(probe, probe.texts, judge=judge, where="preflight, as held-out judge"))


def _finite(scores: Tensor) -> Finding:
    bad = ~scores.isfinite()
    if bool(bad.any()):
        return Finding(
            "fail", f"{int(bad.sum())} of {len(bad)} scores are NaN or infinite",
            "the judge divides by 0 or overflows: look at responses of one token and at empty texts after decoding;"
            " return a finite score for each response",
        )  # fmt: skip
    low, high = (float(extreme) for extreme in scores.aminmax())
    return Finding("ok", f"{len(bad)} finite scores from {low:.4g} to {high:.4g}")


def judge_repeats(probe: Probe) -> Finding:
    """The same responses get the same scores again."""
    apart = float((_judged(probe, probe.texts) - probe.scores).abs().max())
    if apart <= 1e-5 * _most(probe):
        return Finding("ok", "the same scores when asked again")
    return Finding(
        "warn", f"asked again, a score moved by {apart:.2g}",
        "the judge is random: dropout that eval() does not turn off, a sampled rating, a judge that writes at a"
        " temperature above 0; its noise is learnt from like a score",
    )  # fmt: skip


def judge_tells_apart(probe: Probe) -> Finding:
    """Different responses get different scores, also to one prompt."""
    mask = probe.texts.mask.tolist()
    texts = {tuple(row[: sum(real)]) for row, real in zip(probe.texts.sequences.tolist(), mask, strict=True)}
    if len(texts) == 1:
        return Finding("skip", f"all {len(mask)} responses sampled are alike")
    different = len(probe.scores.unique())
    if different > 1:
        swapped, changed = _responses_swapped(probe.texts, most=probe.max_seq_len)
        if not changed or _moved(probe, swapped):
            return Finding("ok", f"{different} different scores for {len(texts)} different texts")
        return Finding(
            "warn", f"no score moved when {changed} of {len(mask)} prompts got another's response",
            "the judge follows the prompt alone, from which nothing can be learnt: see that it reads the response,"
            " mask & ~prompt_mask, and that it does not cut a text before its response",
        )  # fmt: skip
    return Finding(
        "warn", f"{float(probe.scores[0]):.4g} for all of {len(texts)} different texts",
        "there is nothing to learn from a constant judge: see that it reads the response, mask & ~prompt_mask; one that"
        " seldom scores at all needs longer or more responses between updates",
    )  # fmt: skip


def judge_and_padding(probe: Probe) -> Finding:
    """A response gets the same score alone and among longer ones."""
    if bool(probe.texts.mask.all()):
        return Finding("skip", "nothing sampled is padded")
    rows = torch.arange(len(probe.scores), device=probe.device)
    alone = torch.cat([_judged(probe, probe.texts.select(row)) for row in rows.split(1)])
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


def _responses_swapped(texts: Rollout, *, most: int) -> tuple[Rollout, int]:
    """Each prompt with the next one's response, as far as `most` tokens allow; how many responses are others."""
    spans = texts.spans()
    prompts = [ids[:start] for ids, (start, _) in zip(texts.sequences, spans, strict=True)]
    own = [ids[start : start + steps] for ids, (start, steps) in zip(texts.sequences, spans, strict=True)]
    given = [other[: most - len(prompt)] for prompt, other in zip(prompts, own[1:] + own[:1], strict=True)]
    sequences, _ = pad_ragged([torch.cat(parts) for parts in zip(prompts, given, strict=True)])
    lengths = torch.tensor([len(response) for response in given], device=texts.device)
    changed = sum(not torch.equal(a, b) for a, b in zip(own, given, strict=True))
    return texts._replace(sequences=sequences, lengths=lengths), changed


def _moved(probe: Probe, swapped: Rollout) -> bool:
    """Whether any score is another than before, by more than rounding."""
    return float((_judged(probe, swapped) - probe.scores).abs().max()) > UNMOVED * float(probe.scores.std())


def _judged(probe: Probe, texts: Rollout, *, judge: Judge | None = None, where: str = "preflight") -> Tensor:
    """Scores by the judge, or by another."""
    return judge_sequences(
        uncached(judge or probe.trainer.reward_model), texts.sequences, texts.prompt_mask, texts.mask, where=where,
        timeout=probe.settings.judge_timeout, **probe.settings.batch_limits(),
    )  # fmt: skip
