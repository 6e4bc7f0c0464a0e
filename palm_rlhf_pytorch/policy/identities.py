"""The identities that PPO rests on, each looked at on the user's own models by a small function.

What the policy samples is what it learns from, a row is the same alone and among others, the ratio starts at 1, the KL
at 0, the score stands on the last token, gradients reach what is trained. Each fact is taken by a second route where
there is one. Knows nothing of judges, tables or the order of the checks: `preflight` does.
"""

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.objectives.policy_gradient import policy_loss, value_loss
from palm_rlhf_pytorch.policy.probe import Finding, Probe, gap, listed
from palm_rlhf_pytorch.policy.targets import make_targets
from palm_rlhf_pytorch.truncation import Truncation


def dropout(probe: Probe) -> Finding:
    """Nothing is random in eval mode: two passes under different random states agree."""
    rollout, tolerance, passes = probe.rollout, probe.tolerance(), []
    with probe.reading():
        for seed in (1, 2):
            torch.manual_seed(seed)
            passes.append((probe.forward(rollout), probe.features(rollout.sequences)))
    (probe.read, probe.read_features), (again, features_again) = passes
    gaps = {
        "the actor's eval passes": gap(probe.read.logprobs, again.logprobs, probe.mask),
        "the critic's eval passes": gap(probe.read_features, features_again, rollout.mask),
    }
    for which, apart in gaps.items():
        if not apart.within(tolerance / 10):
            return Finding(
                "fail", f"two of {which} differ: {apart}",
                "dropout, or other noise, is on in eval mode: pass `training=self.training` to F.dropout and let"
                " eval() reach every layer",
            )  # fmt: skip
    if probe.settings.actor_dropout > 0:
        return Finding(
            "warn", f"actor_dropout is {probe.settings.actor_dropout}",
            "the ratio starts off 1 by the dropout's noise, on while learning and off while sampling: set"
            " actor_dropout=0",
        )  # fmt: skip
    critic = "" if probe.model.critic is None else " and of critic"
    return Finding("ok", f"two eval passes agree, of actor{critic}")


def values(probe: Probe) -> Finding:
    """The critic gives numbers."""
    found = probe.rollout.values[probe.mask]
    if bool(found.isfinite().all()):
        return Finding("ok", f"from {float(found.min()):.3g} to {float(found.max()):.3g}")
    return Finding(
        "fail", f"{int((~found.isfinite()).sum())} of {len(found)} values are NaN or infinite",
        "the critic's features or value_head overflow: look at the size of value_head's weights, lower critic_lr, or"
        " train in bfloat16 or float32 rather than float16",
    )  # fmt: skip


def by_hand(probe: Probe) -> Finding:
    """One row alone: the learner's log-probabilities are log_softmax(logits / temperature) of the ids, written out.

    Where top-k or top-p cut the policy, over the tokens that they leave.
    """
    row = max(range(len(probe.lengths)), key=probe.lengths.__getitem__)
    only = probe.alone(row)
    start, steps = int(only.prompt_lengths), int(only.lengths)
    ids = only.sequences.long()
    actor, trunk = probe.model.actor, probe.model.palm
    with probe.reading():
        model = actor.model(trunk)
        hidden = model.embed(ids, adapter=actor.adapter, dropout=0.0)[:, start - 1 : start - 1 + steps]
        logits = model.to_logits(hidden)[0].float() / probe.temperature
        learnt = probe.forward(only).logprobs[:, :steps]
    probe.largest_logit = float(logits.abs().max())
    drawn = ids[0, start : start + steps].tolist()
    truncation = probe.model.truncation
    kept = [_kept_by_hand(*step, truncation) for step in zip(logits, drawn, strict=True)]
    expected = torch.stack([step[of].log_softmax(dim=-1)[0] for step, of in zip(logits, kept, strict=True)])[None]
    apart = gap(learnt, expected, torch.ones_like(expected, dtype=torch.bool))
    cut = "".join(f", {name} {value:g}" for name, value in truncation._asdict().items() if value is not None)
    found = f"log_softmax(logits / {probe.temperature:g}{cut}) by hand: {apart} nats apart"
    if apart.within(probe.tolerance()):
        return Finding("ok", found)
    return Finding(
        "fail", found,
        f"the pass that learns does not divide logits by the temperature of sampling ({probe.temperature:g}), or reads"
        " a neighbouring place: token k is predicted by the hidden state of token k - 1",
    )  # fmt: skip


def _kept_by_hand(logits: Tensor, drawn: int, truncation: Truncation) -> list[int]:
    """The token that was drawn, then the others that the cut of logits (v,) leaves, one after the other."""
    order: list[int] = logits.argsort(descending=True).tolist()[: truncation.top_k]
    mass, kept = 0.0, [drawn]
    for token, chance in zip(order, logits[order].softmax(dim=-1).tolist(), strict=True):
        if truncation.top_p is not None and mass >= truncation.top_p < 1:
            break
        kept += [token] if token != drawn else []
        mass += chance
    return kept


def padding(probe: Probe) -> Finding:
    """A row reads the same alone and among longer ones."""
    whole, features, tolerance = probe.read, probe.read_features, probe.tolerance()
    with probe.reading():
        logprobs, values, read = (torch.zeros_like(x) for x in (whole.logprobs, whole.values, features))
        for row in range(len(probe.lengths)):
            only = probe.alone(row)
            out, steps = probe.forward(only), only.logprobs.shape[1]
            logprobs[row, :steps], values[row, :steps] = out.logprobs[0], out.values[0]
            read[row, : only.sequences.shape[1]] = probe.features(only.sequences)[0]
    size = 1 + float(whole.values[probe.mask].abs().max())
    gaps = {
        "actor": gap(logprobs, whole.logprobs, probe.mask),
        "critic": gap(read, features, probe.rollout.mask),
        "value head": gap(values / size, whole.values / size, probe.mask),
    }
    for who, apart in gaps.items():
        if not apart.within(tolerance):
            return Finding(
                "fail", f"a row alone and in the batch, by the {who}: {apart} apart",
                f"the {who} sees padding, or counts positions through it: attention must be causal, and what a row"
                " reads must not depend on the width of its batch",
            )  # fmt: skip
    return Finding("ok", f"alone and in the batch: {gaps['actor']} nats apart")


def sampler(probe: Probe) -> Finding:
    """What the sampler said of each token it drew is what the pass that learns says of it."""
    mask = probe.mask
    if probe.model.truncation.top_p is not None:  # by rounding a token at the nucleus' border may fall on either side
        off = (probe.rollout.sampler_logprobs - probe.read.logprobs).abs().masked_fill(~mask, -1.0)
        most = off.flatten().topk(max(1, int(mask.sum()) // 20)).indices
        mask = mask.flatten().index_fill(0, most, False).reshape(mask.shape)
    apart = gap(probe.rollout.sampler_logprobs, probe.read.logprobs, mask)
    if apart.within(probe.tolerance()):
        return Finding("ok", f"{apart} nats apart")
    return Finding(
        "fail", f"{apart} nats apart",
        "the sampler draws from another distribution than the one that learns: look at its temperature"
        f" ({probe.temperature:g}), its cache (positions, left padding), a cut (top_k, top_p), its weights' dtype",
    )  # fmt: skip


def ratio(probe: Probe) -> Finding:
    """In train mode, through the learner's model, by its microbatches: every ratio to what was recorded is 1."""
    rollout = probe.rollout
    if probe.settings.actor_dropout > 0:
        return Finding("skip", "actor_dropout is above 0: it starts off 1 by noise")
    learnt = torch.zeros_like(rollout.logprobs)
    probe.model.train()
    for rows in probe.microbatches():
        with torch.enable_grad():
            learnt[rows.numbers, : rows.steps] = probe.forward(rollout.select(rows), rows).logprobs.detach().float()
    apart = gap(learnt.exp() / rollout.logprobs.exp(), torch.ones_like(learnt), probe.mask)
    log_apart = gap(learnt, rollout.logprobs, probe.mask)
    if log_apart.within(probe.tolerance()):
        return Finding("ok", f"{apart} off 1")
    return Finding(
        "fail", f"{apart} off 1",
        "old and new log-probabilities come from different functions: look for what train mode changes in the model,"
        " for weights changed between recording and learning, for another autocast",
    )  # fmt: skip


def kl(probe: Probe) -> Finding:
    """Before training, policy and reference are one distribution, on the tokens drawn and on all others."""
    if probe.trainer.learner.steps > 0:
        return Finding("skip", f"{probe.trainer.learner.steps} optimizer steps were taken: it may be anything")
    rollout, zeros = probe.rollout, torch.zeros_like(probe.rollout.kl_exact)
    drawn = gap(rollout.logprobs, rollout.ref_logprobs, probe.mask)
    whole = gap(rollout.kl_exact, zeros, probe.mask)
    found = f"exact {whole.largest:.1e}, on the tokens drawn {drawn.largest:.1e} nats at most"
    if drawn.within(probe.tolerance()) and whole.within(probe.tolerance()):
        return Finding("ok", found)
    return Finding(
        "fail", found,
        "the policy does not start as the reference: an adapter's B must be 0 and a copy the trunk's own weights;"
        " build a fresh trainer, or load a checkpoint by trainer.load, which brings its count of steps",
    )  # fmt: skip


def score_placement(probe: Probe) -> Finding:
    """With a KL of 1/2 nat a token at price 1/4: each token earns -1/8, the last its score on top, others nothing."""
    rollout = probe.rollout
    scores = torch.arange(1.0, len(probe.lengths) + 1, device=probe.device)
    made = make_targets(
        rollout._replace(ref_logprobs=rollout.logprobs - 0.5), scores, kl_coef=0.25, gamma=1.0, gae_lambda=0.95
    )
    for row, (rewards, length) in enumerate(zip(made.rewards.tolist(), probe.lengths, strict=True)):
        expected = [-0.125] * (length - 1) + [row + 0.875] + [0.0] * (len(rewards) - length)
        off = [step for step, (a, b) in enumerate(zip(rewards, expected, strict=False)) if not abs(a - b) < 1e-4]
        if off or len(rewards) < length:
            landed = 1 + max(range(len(rewards)), key=rewards.__getitem__)
            return Finding(
                "fail", f"response {row} has {length} tokens; its largest reward is on token {landed}",
                "the response's mask or length is shifted: the score belongs to the last token drawn (EOS included),"
                " a share of the KL to each, nothing to padding",
            )  # fmt: skip
    return Finding("ok", f"on the last token of {len(probe.lengths)} responses, KL on each")


def gradients(probe: Probe) -> Finding:
    """The policy loss reaches all of the actor, the value loss all of the critic, and neither the other's."""
    hats = {"actor": probe.model.actor_parameters(), "critic": probe.model.critic_parameters()}
    trained = hats["actor"] | hats["critic"]
    zeros = []
    for hat, loss in _losses(probe).items():
        if not loss.requires_grad:
            return _unreached(hat, [*hats[hat]])
        found = torch.autograd.grad(loss, [*trained.values()], retain_graph=True, allow_unused=True)
        grads = {name: grad for name, grad in zip(trained, found, strict=True) if grad is not None}
        lost = [name for name in hats[hat] if name not in grads]
        if lost:
            return _unreached(hat, lost)
        strangers = [name for name in grads if name not in hats[hat]]
        if strangers:
            return Finding(
                "fail", f"the {hat}'s loss reaches {listed(strangers)}",
                "actor and critic share a trained tensor, or features: detach what one reads of the other",
            )  # fmt: skip
        broken = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
        if broken:
            return Finding(
                "fail", f"NaN or infinite for {listed(broken)}",
                "a product overflows in the backward pass: look for extreme weights, or leave float16",
            )  # fmt: skip
        zeros += [name for name, grad in grads.items() if not bool(grad.any()) and not _must_be_zero(name, trained)]
    if zeros:
        return Finding(
            "warn", f"exactly 0 for {listed(zeros)}",
            "these weights had no influence on what was sampled: look for a factor of 0, or a branch never taken",
        )  # fmt: skip
    return Finding("ok", f"reach all {len(trained)} trained tensors, each from its own loss")


def _losses(probe: Probe) -> dict[str, Tensor]:
    """Policy and value loss (where there is a critic) of one microbatch, advantages and returns being noise."""
    rows = probe.microbatches()[0]
    part, mask = probe.rollout.select(rows), probe.mask[rows.numbers, : rows.steps]
    noise = torch.randn(2, *part.logprobs.shape, generator=probe.generator, device=probe.device)
    probe.model.train()
    with torch.enable_grad():
        out = probe.forward(part, rows)
        losses = {"actor": policy_loss(out.logprobs, part.logprobs, noise[0], mask).loss}
        if probe.model.critic is not None:
            aim = part.values + noise[1]
            losses["critic"] = value_loss(out.values, part.values, aim, mask, value_clip=None).loss
        return losses


def _unreached(hat: str, lost: list[str]) -> Finding:
    return Finding(
        "fail", f"the {hat}'s loss does not reach {listed(lost)}",
        "it was detached (.detach(), .data, no_grad, a copy), or the pass does not use it: its weights would never"
        " change",
    )  # fmt: skip


def _must_be_zero(name: str, parameters: dict[str, nn.Parameter]) -> bool:
    """A LoRA's A under a B of 0, and the critic's features under a head of 0, get a gradient of 0."""
    partner = parameters.get(name.removesuffix("A") + "B") if name.endswith(".A") else None
    under_zero = partner is not None and not bool(partner.any())
    return under_zero or (name.startswith("critic.") and not bool(parameters["value_head.weight"].any()))
