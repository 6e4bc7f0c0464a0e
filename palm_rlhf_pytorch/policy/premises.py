"""What must hold before anything is sampled: end token, prompts, memory, weights, and what the optimizer holds.

Looks at numbers and names only; no model is run.
"""

from palm_rlhf_pytorch.policy.probe import Finding, Probe, listed


def end_token(probe: Probe) -> Finding:
    """EOS is an id of the vocabulary, is not what pads, and does not end most prompts already."""
    eos, pad, num_tokens = probe.eos_token, probe.trainer.pad_token, probe.model.palm.num_tokens
    prompts = probe.trainer.prompts
    if eos is None:
        return Finding("skip", "eos_token is None: responses run to their limit")
    if not 0 <= eos < num_tokens:
        return Finding(
            "fail", f"eos_token is {eos}, ids go from 0 to {num_tokens - 1}",
            "no response could ever end: give the tokenizer's own end token, and a palm of the tokenizer's vocabulary",
        )  # fmt: skip
    if eos == probe.trainer.pad_value:
        return Finding(
            "fail", f"eos_token is {eos}, and so is pad_value",
            "where the end token pads, real ends are taken for padding: say padding by prompt_mask or prompt_lengths in"
            " place of pad_value, or pad with a token of its own",
        )  # fmt: skip
    if eos == pad:
        return Finding(
            "warn", f"eos_token is {eos}, and so is the tokenizer's padding",
            "here padding is told by lengths, and nothing goes wrong; a judge or a loss of yours that looks for the id"
            " takes real ends for padding: give the tokenizer a padding token of its own",
        )  # fmt: skip
    ended = int((prompts.ids.gather(1, prompts.lengths[:, None] - 1) == eos).sum())
    if 2 * ended > len(prompts):  # a few may be chance
        return Finding(
            "warn", f"{ended} of {len(prompts)} prompts end with it",
            "the policy would answer to texts that have ended: let the tokenizer encode prompts without its end token",
        )  # fmt: skip
    return Finding("ok", f"id {eos}" + (", no id pads" if pad is None else f", padding is {pad}"))


def prompts_fit(probe: Probe) -> Finding:
    """Every prompt leaves room for a response, within max_seq_len and within what the model can place."""
    lengths, most = probe.trainer.prompts.lengths, probe.max_seq_len
    row, longest = int(lengths.argmax()), int(lengths.max())
    wanted = probe.max_new_tokens or most - longest
    limit = probe.model.palm.max_length
    if int(lengths.min()) < 1:
        return Finding(
            "fail", f"prompt {int(lengths.argmin())} is empty", "leave it out: there is nothing to answer to"
        )  # fmt: skip
    if longest >= most:
        return Finding(
            "fail", f"prompt {row} has {longest} tokens, max_seq_len is {most}",
            "max_seq_len counts the prompt: raise it, shorten the prompt or leave it out",
        )  # fmt: skip
    if min(most, longest + wanted) > limit:
        return Finding(
            "fail", f"rows may grow to {min(most, longest + wanted)} tokens, the model places {limit}",
            "its xPos scales leave the range of its dtype: lower max_seq_len or max_new_tokens, or use bfloat16",
        )  # fmt: skip
    if longest + wanted > most:
        return Finding(
            "warn", f"prompt {row} ({longest} tokens) leaves room for {most - longest} of {wanted} new tokens",
            "responses to long prompts are cut sooner than max_new_tokens says: raise max_seq_len",
        )  # fmt: skip
    return Finding("ok", f"{len(lengths)} prompts of {int(lengths.min())} to {longest} tokens, max_seq_len {most}")


def weights(probe: Probe) -> Finding:
    """All weights are finite; the trunk is frozen."""
    trunk = dict(probe.model.palm.named_base_parameters())
    broken = [name for name, weight in probe.model.named_parameters() if not bool(weight.detach().isfinite().all())]
    if broken:
        return Finding(
            "fail", f"NaN or infinite in {listed(broken)}",
            "the checkpoint is damaged or a training before this one diverged: load one from before that",
        )  # fmt: skip
    thawed = [name for name, weight in trunk.items() if weight.requires_grad]
    if thawed:
        return Finding(
            "fail", f"the frozen trunk requires gradients for {listed(thawed)}",
            "the trunk is the reference: call requires_grad_(False) on trainer.actor_critic.palm; to train whole"
            " weights say actor_lora=False, which copies them",
        )  # fmt: skip
    count = sum(weight.numel() for weight in trunk.values())
    return Finding("ok", f"{count:,} of the trunk, finite and frozen")


def optimizer(probe: Probe) -> Finding:
    """The optimizer holds exactly what is trained, and gradients are clipped on the same tensors."""
    learner, base = probe.trainer.learner, {id(weight) for weight in probe.model.palm.parameters()}
    trained = {id(p): name for name, p in probe.model.named_parameters() if p.requires_grad and id(p) not in base}
    held = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    clipped = {id(p) for p in [*learner.actor.values(), *learner.critic.values()]}
    missing = [name for key, name in trained.items() if key not in held]
    if missing:
        return Finding(
            "fail", f"it lacks {listed(missing)}, which require gradients",
            "these would never change: set requires_grad before the trainer is built, and replace no parameter after",
        )  # fmt: skip
    if held - trained.keys():
        return Finding(
            "fail", f"it holds {len(held - trained.keys())} tensors that are frozen, or not the model's",
            "a parameter was frozen or replaced after the trainer was built: build the trainer last",
        )  # fmt: skip
    if clipped != held:
        return Finding(
            "fail", f"{len(clipped ^ held)} tensors are stepped but not clipped, or clipped but not stepped",
            "parameters were replaced after learner.actor and learner.critic were listed: list them again",
        )  # fmt: skip
    return Finding("ok", f"holds the {len(held)} trained tensors and no other")


def memory_fits(probe: Probe) -> Finding:
    """A step of learning fits the device."""
    if probe.memory is None:
        return Finding("skip", "no estimate was given")
    needed, available = probe.memory()
    found = f"{needed / 1e9:.2f} GB needed, {available / 1e9:.2f} GB available"
    if needed <= 0.9 * available:
        return Finding("ok", found)
    return Finding(
        "fail" if needed > available else "warn", found,
        "lower max_batch_tokens or turn activation_checkpointing on, neither of which changes a result; then lower"
        " max_batch_size (other responses are drawn), max_seq_len or max_new_tokens",
    )  # fmt: skip
