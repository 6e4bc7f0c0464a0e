"""The doctor: what the metrics of a run say is going wrong, in a sentence, and the next thing to try.

Rules of thumb over the last updates, each a small pure function, all in the table `RULES`; the names of metrics are
those of `training/metrics.py`. Knows no model, no trainer and no file; it neither prints nor stops anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

# How much of a run is looked at, in updates.
FIRST = 5  # the beginning, against which drift is measured
RECENT = 20  # the longest window
FEW = 3  # a fault of settings shows at every update, an outlier at one
SEVERAL = 5  # for what one rollout's noise moves

# Thresholds. Where a paper or a library names one it stands beside it; the others are orders of magnitude.
NEGATIVE_KL = -0.05  # nats; of b responses the estimate's deviation is about sqrt(2 KL / b), and KL is never below 0
# nats; the response is e^50 times likelier than under the reference, the judge has seen none like it; scores part from
# what they stand for as KL grows (Gao et al. 2022, https://arxiv.org/abs/2210.10760)
MAX_KL = 50.0
MAX_KL_OVER_TARGET = 10.0
DOUBLING_FROM = 1.0  # nats; below it KL is leaving 0, where every run doubles
MAX_CLIPPED = 0.3  # 0.1 to 0.2 is usual at eps_clip 0.2
MAX_APPROX_KL = 0.1  # nats; OpenAI's Spinning Up stops an update at 1.5 times 0.01, "usually 0.01 or 0.05"
CRITIC_UPDATES = 10  # the value head starts at 0: it is given time to learn
MIN_ENTROPY = 0.2  # of the first updates'
MAX_LENGTH_FACTOR = 2.0
HIGH_LENGTH_CORR = 0.5  # that judges pay for length: Singhal et al. 2023, https://arxiv.org/abs/2310.03716
ALIKE = 1e-6  # of the score: what rounding alone gives
TREND_POINTS, TREND = 10, 3.0  # slope over its standard error; by chance 1 in 100 or rarer, for two at once 1 in 10,000
MAX_CLIPPING = 30.0  # times max_norm; critics that learn well were seen at 20
MAX_SAMPLER_DIFF = 0.1  # nats; float32 stays below 1e-4, bfloat16 around 0.02: beyond are bugs, not rounding

WATCHED = (
    "objective/kl", "objective/kl_coef", "policy/clipped_fraction", "policy/approx_kl", "policy/entropy",
    "policy/grad_norm", "policy/skipped_steps", "value/explained_variance", "value/grad_norm", "response/eos_rate",
    "response/length_mean", "reward/score", "reward/score_std", "reward/held_out_score", "reward/dropped",
    "score/length_corr", "rollout/sampler_logprob_diff_max",
)  # fmt: skip

Record = dict[str, float]


class Finding(NamedTuple):
    """What a rule has seen."""

    rule: str
    message: str  # what is seen, with the numbers
    advice: str  # the next thing to try, naming the setting

    def __str__(self) -> str:
        return f"{self.message}. Try: {self.advice}."


class Doctor:
    """Reads the metrics of each update and says what looks wrong; a rule that spoke is quiet for some updates.

    It remembers the first and the last updates only, so that its state stays small however long the run.
    """

    def __init__(
        self, *, eos_token: bool, target_kl: float | None = None, max_norm: float | None = None, critic: bool = True,
        repeat_after: int = 10,
    ) -> None:  # fmt: skip
        """Begin with an empty memory.

        Args:
            eos_token: whether a token ends responses in this run.
            target_kl: nats a response that an adaptive kl_coef steers to; None for a fixed one.
            max_norm: the norm that gradients are clipped to; None for no clipping.
            critic: whether the run has one; the price of KL is then a setting, else a part of the objective.
            repeat_after: updates until a rule that spoke may speak again.

        Raises:
            ValueError: if repeat_after is not positive.
        """
        if repeat_after < 1:
            raise ValueError(f"repeat_after ({repeat_after}) must be at least 1 update")
        self.run = Run(eos_token=eos_token, target_kl=target_kl, max_norm=max_norm, critic=critic)
        self.repeat_after, self.updates = repeat_after, 0
        self._first, self._recent = list[Record](), list[Record]()
        self._said: dict[str, int] = {}

    def examine(self, metrics: Mapping[str, float]) -> list[Finding]:
        """What is wrong after one more update; call it once an update, with all its metrics.

        A metric that is missing, or not finite, is left out: its rules wait. What makes numbers non-finite is told by
        policy/skipped_steps and reward/dropped.
        """
        record = {name: float(metrics[name]) for name in WATCHED if name in metrics and math.isfinite(metrics[name])}
        self.updates += 1
        if len(self._first) < FIRST:
            self._first.append(record)
        self._recent = [*self._recent, record][-RECENT:]
        history = History(self.updates, self._first, self._recent, self.run)
        findings = []
        for name, rule in RULES.items():
            quiet = name in self._said and self.updates - self._said[name] < self.repeat_after
            if not quiet and (said := rule(history)) is not None:
                self._said[name] = self.updates
                findings.append(Finding(name, said[0], self.run.named(said[1])))
        return findings

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        memory = {"first": [*map(dict, self._first)], "recent": [*map(dict, self._recent)]}
        return {"updates": self.updates, "said": dict(self._said), **memory}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave: from here on it says what the other would have said."""
        self.updates, self._said = state["updates"], dict(state["said"])
        self._first, self._recent = list(map(dict, state["first"])), list(map(dict, state["recent"]))


class Run(NamedTuple):
    """What the rules must know of the run's settings; see Doctor."""

    eos_token: bool
    target_kl: float | None
    max_norm: float | None
    critic: bool

    def named(self, advice: str) -> str:
        """Advice that names nothing but what there is to be set."""
        other = advice.replace(" and critic_lr", "").replace("kl_coef", "the objective's kl_coef or kl_loss_coef")
        return advice if self.critic else other


class History(NamedTuple):
    """What a rule looks at: finite values only, oldest first."""

    updates: int
    first: Sequence[Record]
    recent: Sequence[Record]
    run: Run

    def last(self, name: str, count: int) -> list[float]:
        """A metric at each of the last `count` updates; empty if there are fewer, or one lacks it."""
        values = [record[name] for record in self.recent[-count:] if name in record]
        return values if len(values) == count else []

    def at_start(self, name: str) -> float | None:
        """Mean of a metric over the first updates; None if none of them has it."""
        values = [record[name] for record in self.first if name in record]
        return fmean(values) if values else None


# rules: message and advice, or None

Said = tuple[str, str] | None


def _skipped_steps(history: History) -> Said:
    skipped = history.last("policy/skipped_steps", 1)
    if not skipped or skipped[0] <= 0:
        return None
    return (
        f"{skipped[0]:g} optimizer steps were skipped in this update: a loss or a gradient norm was not finite",
        "lower actor_lr and critic_lr; look for extreme scores (normalize_scores=True); in float16 try bfloat16",
    )


def _dropped_scores(history: History) -> Said:
    dropped = history.last("reward/dropped", 1)
    if not dropped or dropped[0] <= 0:
        return None
    return (
        f"{dropped[0]:g} responses of this update had no finite score and were left out",
        "run the judge on their prompts: empty, very long or odd responses are the usual cause",
    )


def _sampler_mismatch(history: History) -> Said:
    gaps = history.last("rollout/sampler_logprob_diff_max", FEW)
    if not gaps or min(gaps) <= MAX_SAMPLER_DIFF:
        return None
    return (
        f"the sampler's log-probabilities are up to {max(gaps):.2g} nats off the learner's: more than rounding gives",
        "trainer.preflight() shows where they part; run the model in a wider dtype (float32 in place of bfloat16)",
    )


def _kl_negative(history: History) -> Said:
    kl = history.last("objective/kl", SEVERAL)
    if not kl or max(kl) >= NEGATIVE_KL:
        return None
    return (
        f"KL to the reference is negative, {fmean(kl):.3g} nats a response over the last {SEVERAL} updates: responses"
        " are not drawn from the policy whose log-probabilities are recorded",
        "trainer.preflight(), which compares sampler and learner; see rollout/sampler_logprob_diff_max",
    )


def _kl_exploding(history: History) -> Said:
    kl, target = history.last("objective/kl", FEW), history.run.target_kl
    limit = MAX_KL if target is None else min(MAX_KL_OVER_TARGET * target, max(MAX_KL, 2 * target))
    if kl and min(kl) > limit:
        why = f"above {limit:g}" + ("" if target is None else f", with a target of {target:g}")
        return f"KL to the reference is {fmean(kl):.3g} nats a response, {why}", _against_kl(history)
    windows = history.last("objective/kl", 3 * SEVERAL)
    if windows:
        oldest, middle, newest = (fmean(windows[at : at + SEVERAL]) for at in range(0, 3 * SEVERAL, SEVERAL))
        if oldest > DOUBLING_FROM and middle > 2 * oldest and newest > 2 * middle:
            grown = f"{oldest:.3g} -> {middle:.3g} -> {newest:.3g} nats a response"
            return f"KL to the reference doubles every {SEVERAL} updates ({grown})", _against_kl(history)
    return None


def _against_kl(history: History) -> str:
    coef = history.last("objective/kl_coef", 1)
    now = f" (now {coef[0]:.3g})" if coef else ""
    fixed = history.run.target_kl is None and history.run.critic
    steer = ", or steer it with target_kl_nats_per_response" if fixed else ""
    return f"raise kl_coef{now}{steer}; lower actor_lr; go back to an earlier checkpoint"


def _clip_fraction(history: History) -> Said:
    clipped = history.last("policy/clipped_fraction", FEW)
    if not clipped or fmean(clipped) <= MAX_CLIPPED:
        return None
    return (
        f"{fmean(clipped):.0%} of response tokens are clipped (above {MAX_CLIPPED:.0%}): they teach nothing",
        "lower actor_lr, or epochs; raise minibatch_size",
    )


def _approx_kl(history: History) -> Said:
    moved = history.last("policy/approx_kl", FEW)
    if not moved or fmean(moved) <= MAX_APPROX_KL:
        return None
    return (
        f"the policy moves {fmean(moved):.2g} nats a token in an update (above {MAX_APPROX_KL:g}): it learns from"
        " responses that it would no longer give",
        "lower actor_lr, or epochs",
    )


def _explained_variance(history: History) -> Said:
    explained = history.last("value/explained_variance", SEVERAL)
    if not explained or max(explained) >= 0 or history.updates <= CRITIC_UPDATES:
        return None
    return (
        f"the critic explains {fmean(explained):.2g} of the returns' variance, below 0 in each of the last {SEVERAL}"
        " updates: a constant would do better",
        "raise critic_lr if value/loss still falls, else lower it; with raw scores set value_clip=None",
    )


def _clipped_gradients(history: History) -> Said:
    limit = history.run.max_norm
    if limit is None:
        return None
    for part, setting in (("policy", "actor_lr"), ("value", "critic_lr")):
        norms = history.last(f"{part}/grad_norm", SEVERAL)
        if norms and min(norms) > MAX_CLIPPING * limit:
            return (
                f"the {part} gradient's norm is {fmean(norms):.3g}, clipped to max_norm ({limit:g}) in each of the"
                f" last {SEVERAL} updates: the limit sets the step, not the data",
                f"normalize_scores=True if scores are large; else raise max_norm, with a lower {setting}",
            )
    return None


def _no_eos(history: History) -> Said:
    rates = history.last("response/eos_rate", FEW)
    if not history.run.eos_token or not rates or max(rates) > 0:
        return None
    seen = f"no response of the last {FEW} updates ended with the end token"
    if history.at_start("response/eos_rate"):
        return f"{seen}, though some did at first: the judge pays for going on", "raise missing_eos_penalty, or kl_coef"
    return (
        f"{seen}: what is never sampled cannot be learnt",
        "raise max_new_tokens; check that eos_token is the id that ends a text in the model's training data",
    )


def _scores_alike(history: History) -> Said:
    spreads, scores = history.last("reward/score_std", FEW), history.last("reward/score", FEW)
    if not spreads or not scores or max(spreads) > ALIKE * max(map(abs, scores)):
        return None
    return (
        f"all responses of an update got one score ({scores[-1]:.4g} in the last): nothing tells good from bad",
        "give the judge two different responses by hand; if it seldom rewards, easier prompts or more update_timesteps",
    )


def _entropy_collapse(history: History) -> Said:
    entropy, start = history.last("policy/entropy", FEW), history.at_start("policy/entropy")
    if not entropy or start is None or start <= 0 or fmean(entropy) >= MIN_ENTROPY * start:
        return None
    return (
        f"the policy's entropy fell from {start:.3g} to {fmean(entropy):.3g} nats a token: responses become alike",
        "raise kl_coef, lower actor_lr, or give a small entropy_coef (0.001); look at samples and rollout/distinct_2",
    )


def _length_drift(history: History) -> Said:
    lengths, start = history.last("response/length_mean", SEVERAL), history.at_start("response/length_mean")
    if not lengths or start is None or start <= 0:
        return None
    factor = fmean(lengths) / start
    if 1 / MAX_LENGTH_FACTOR <= factor <= MAX_LENGTH_FACTOR:
        return None
    seen = f"responses went from {start:.3g} to {fmean(lengths):.3g} tokens"
    correlation = history.last("score/length_corr", SEVERAL)
    paid = fmean(correlation) if correlation else 0.0
    if (paid if factor > 1 else -paid) > HIGH_LENGTH_CORR:
        return (
            f"{seen}, and that is what the judge pays for (correlation of score and length {paid:.2f}): length hacking",
            "train the judge on pairs of equal length, or put a price on length into the score; raise kl_coef",
        )
    return seen, "read samples of both kinds; see score/length_corr and response/eos_rate; raise kl_coef"


def _overoptimized(history: History) -> Said:
    both = ("reward/score", "reward/held_out_score")
    places = [at for at, record in enumerate(history.recent) if all(name in record for name in both)]
    if len(places) < TREND_POINTS:
        return None
    scores, held_out = ([history.recent[at][name] for at in places] for name in both)
    if _trend(places, scores) <= TREND or _trend(places, held_out) >= -TREND:
        return None
    return (
        f"the score rises ({scores[0]:.3g} -> {scores[-1]:.3g} over {places[-1] - places[0] + 1} updates) while the"
        f" held-out judge's falls ({held_out[0]:.3g} -> {held_out[-1]:.3g}): the policy exploits the judge",
        "stop at the checkpoint of the best reward/held_out_score; raise kl_coef; train the judge on new responses",
    )


def _trend(places: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line over its standard error; 0 where values do not change, infinite on a line."""
    middle, mean = fmean(places), fmean(values)
    spread = sum((place - middle) ** 2 for place in places)
    slope = sum((place - middle) * (value - mean) for place, value in zip(places, values, strict=True)) / spread
    if abs(slope) * (max(places) - min(places)) <= 1e-9 * max(map(abs, values)):  # rounding
        return 0.0
    off = sum((value - mean - slope * (place - middle)) ** 2 for place, value in zip(places, values, strict=True))
    error = math.sqrt(off / (len(values) - 2) / spread)
    return slope / error if error > 0 else math.copysign(math.inf, slope)


RULES: dict[str, Callable[[History], Said]] = {
    "skipped_steps": _skipped_steps, "dropped_scores": _dropped_scores, "sampler_mismatch": _sampler_mismatch,
    "kl_negative": _kl_negative, "kl_exploding": _kl_exploding, "clip_fraction": _clip_fraction,
    "approx_kl": _approx_kl, "explained_variance": _explained_variance, "clipped_gradients": _clipped_gradients,
    "no_eos": _no_eos, "scores_alike": _scores_alike, "entropy_collapse": _entropy_collapse,
    "length_drift": _length_drift, "overoptimized": _overoptimized,
}  # fmt: skip
