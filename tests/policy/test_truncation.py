"""A policy that is cut by top-k and top-p: what is sampled is what is learnt, and everything stays finite."""

import pytest
import torch

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic

CUTS = [{"top_k": 3}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.9}]
SEQUENCES = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])
PROMPT_LENGTHS, LENGTHS = torch.tensor([3, 1]), torch.tensor([4, 3])


def set_by_hand(logits, drawn, *, top_k=None, top_p=None):
    """The likeliest tokens one after the other, of these the fewest that have top_p, and what was drawn."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    masses = [float(logits[token].exp()) for token in order]
    count = next((n for n in range(1, len(order)) if sum(masses[:n]) >= (top_p or 9) * sum(masses)), len(order))
    return sorted({*order[:count], drawn})


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("actor_lora", [True, False])
def test_preflight_passes_on_a_trained_policy_that_is_cut(make_trainer, move, cut, actor_lora):
    trainer = make_trainer(actor_lora=actor_lora, **cut)
    fresh = trainer.preflight(max_seq_len=40, temperature=0.7)
    assert not fresh.failures + fresh.warnings, fresh.table()
    checks = {check.name: check for check in fresh.checks}
    assert checks["KL is 0"].status == checks["sampler = learner"].status == checks["ratio is 1"].status == "ok"
    assert all(f"{name} {value}" in checks["temperature"].found for name, value in cut.items())
    move(trainer.actor_critic)
    trainer.learner.steps = 1
    trained = trainer.preflight(max_seq_len=40, temperature=0.7)
    assert not trained.failures + trained.warnings, trained.table()


@pytest.mark.parametrize("forgotten", ["generate", "learn"])
def test_preflight_finds_a_cut_on_one_side_only(make_trainer, forgotten):
    trainer = make_trainer(top_k=3)
    model = trainer.actor_critic
    whole, cut = ActorCritic(model.palm).truncation, model.truncation
    real = model.generate

    def other(*args, **options):
        return real(*args, **options, **(whole if forgotten == "generate" else cut)._asdict())

    model.generate = other
    model.truncation = cut if forgotten == "generate" else whole
    found = trainer.preflight(max_seq_len=40, temperature=0.7)
    assert "sampler = learner" in [check.name for check in found.failures]


@pytest.mark.parametrize("cut", CUTS)
def test_old_new_and_reference_are_each_cut_by_hand(make_palm, move, cut):
    actor_critic = move(ActorCritic(make_palm(), **cut))
    options = {"temperature": 0.7, "lengths": LENGTHS}
    learnt = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, **options)
    seen = actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4, **options)
    assert torch.equal(learnt.logprobs, seen.logprobs)
    models = actor_critic.export_palm(), actor_critic.palm
    policy, reference = (palm(SEQUENCES).detach().double() / 0.7 for palm in models)
    for row, start in enumerate((3, 1)):
        for step in range(LENGTHS[row]):
            place, token = start + step - 1, int(SEQUENCES[row, start + step])
            kept = set_by_hand(policy[row, place], token, **cut)
            own = policy[row, place, kept].log_softmax(dim=-1)
            ref_kept = sorted({*set_by_hand(reference[row, place], token, **cut), *kept})
            ref = dict(zip(ref_kept, reference[row, place, ref_kept].log_softmax(dim=-1), strict=True))
            expected = {
                "logprobs": own[kept.index(token)], "ref_logprobs": ref[token],
                "kl_exact": sum(p.exp() * (p - ref[one]) for p, one in zip(own, kept, strict=True)),
            }  # fmt: skip
            for name, value in expected.items():
                assert getattr(seen, name)[row, step].item() == pytest.approx(float(value), abs=1e-4)
            assert learnt.entropy[row, step].item() == pytest.approx(-float((own.exp() * own).sum()), abs=1e-4)


@pytest.mark.parametrize("cut", CUTS)
def test_only_the_likeliest_are_sampled_and_what_has_left_the_set_is_still_learnt_from(make_trainer, move, cut):
    trainer = make_trainer(epochs=2, kl_exact_coef=0.1, entropy_coef=0.1, **cut)
    prompts = trainer.next_prompts(5)
    rollout = trainer.rollout(*prompts, max_seq_len=12, temperature=0.7)
    mask = rollout.response_mask
    assert not rollout.kl_exact.any()
    torch.testing.assert_close(rollout.sampler_logprobs[mask], rollout.logprobs[mask], atol=1e-5, rtol=0)
    logits = trainer.actor_critic.palm(rollout.sequences.long()).detach().double() / 0.7
    for row, (start, length) in enumerate(rollout.spans()):
        for place in range(start, start + length):
            token = int(rollout.sequences[row, place])
            assert token in set_by_hand(logits[row, place - 1], int(logits[row, place - 1].argmax()), **cut)
    move(trainer.actor_critic)  # far from what has sampled
    moved = trainer.actor_critic.observe(
        rollout.sequences, rollout.prompt_lengths, mask.shape[1], temperature=0.7, lengths=rollout.lengths
    )
    assert moved.logprobs[mask].min() < -4  # no longer in the set, by far
    assert all(part.isfinite().all() for part in moved) and moved.kl_exact.min() >= 0
    metrics = trainer.learn(trainer.score(rollout))
    assert metrics["policy/skipped_steps"] == 0 and metrics["policy/grad_norm"] > 0
