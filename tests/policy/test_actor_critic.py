"""Actor, critic and reference: alignment with the plain model, what is shared, what is trained, what is untouched."""

import pytest
import torch
from accelerate import Accelerator

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.losses import PPOLoss
from palm_rlhf_pytorch.policy.ppo_settings import PPOSettings
from palm_rlhf_pytorch.policy.rollout import observed, recorded
from palm_rlhf_pytorch.policy.targets import Targets
from tests.policy.helpers import GivenLesson, seeded_by

PROMPT_LENGTHS = torch.tensor([3, 1])
SEQUENCES = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 0, 0, 0]])  # responses of 4 and 3, padded with 0
MASK = torch.tensor([[True, True, True, True], [True, True, True, False]])


def logprobs_by_hand(palm, temperature):
    """The plain model's full softmax in float64, one row at a time, without padding."""
    out = torch.zeros(2, 4, dtype=torch.float64)
    for row, (start, end) in enumerate(((3, 7), (1, 4))):
        logits = palm(SEQUENCES[row : row + 1, :end]).double()[0] / temperature
        table = logits.log_softmax(dim=-1)
        for step, place in enumerate(range(start, end)):
            out[row, step] = table[place - 1, SEQUENCES[row, place]]
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reference_logprobs_are_those_of_the_palm(make_palm, temperature):
    palm = make_palm()
    found = ActorCritic(palm).observe(SEQUENCES, PROMPT_LENGTHS, 4, temperature=temperature).ref_logprobs
    expected = logprobs_by_hand(palm, temperature)
    torch.testing.assert_close(found[MASK].double(), expected[MASK], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_actor_logprobs_are_those_of_the_exported_palm(make_palm, move, lora, temperature):
    actor_critic = move(ActorCritic(make_palm(), actor_lora=lora))
    found = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, temperature=temperature).logprobs
    expected = logprobs_by_hand(actor_critic.export_palm(), temperature)
    reference = actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4, temperature=temperature).ref_logprobs
    torch.testing.assert_close(found[MASK].double(), expected[MASK], atol=1e-4, rtol=0)
    assert (found - reference)[MASK].abs().max() > 0.05


@pytest.mark.parametrize("lora", [True, False])
def test_actor_and_reference_are_the_same_to_the_bit_before_training(make_palm, lora):
    actor_critic = ActorCritic(make_palm(), actor_lora=lora, critic_lora=lora)
    found = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4).logprobs
    assert torch.equal(found, actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4).ref_logprobs)


@torch.no_grad()
@pytest.mark.parametrize("lora", [True, False])
def test_what_is_not_computed_changes_nothing_that_is_read_out(make_palm, move, lora):
    actor_critic = move(ActorCritic(make_palm(), actor_lora=lora, critic_lora=lora))
    sequences, prompts = torch.randint(1, 10, (3, 11)), torch.tensor([5, 3, 8])
    for lengths in (torch.tensor([4, 2, 3]), None):
        given = {"lengths": lengths}
        if lengths is None:  # beyond the sequence its last token stands for what is not there
            given, prompts = {}, torch.tensor([11, 9, 8])
        for read in (actor_critic, actor_critic.observe):
            whole = read(sequences, prompts, 4, **given)
            part = read(sequences, prompts, 4, **given, since=int(prompts.min()) - 1)
            for one, other in zip(whole, part, strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_nothing_is_read_out_of_no_rows(make_palm):
    nothing = torch.zeros(0, dtype=torch.long)
    found = ActorCritic(make_palm()).observe(SEQUENCES[:0], PROMPT_LENGTHS[:0], 4, lengths=nothing)
    assert all(numbers.shape == (0, 4) for numbers in found)


def test_entropy_is_that_of_the_tempered_distribution(make_palm):
    palm = make_palm()
    found = ActorCritic(palm)(SEQUENCES, PROMPT_LENGTHS, 4, temperature=0.7).entropy
    table = (palm(SEQUENCES[:1]).double()[0, 2:6] / 0.7).softmax(dim=-1)
    torch.testing.assert_close(found[0].double(), -(table * table.log()).sum(dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_observed_has_the_bits_of_what_is_learnt_from(make_palm, move, lora, temperature, dtype):
    actor_critic = move(ActorCritic(make_palm().to(dtype), actor_lora=lora))
    lengths = torch.tensor([4, 3])
    for options in ({}, {"lengths": lengths}, {"lengths": lengths, "num_tokens": 7, "entropy_grad": False}):
        learnt = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, temperature=temperature, **options)
        options.pop("entropy_grad", None)
        seen = actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4, temperature=temperature, **options)
        assert torch.equal(seen.logprobs, learnt.logprobs) and torch.equal(seen.values, learnt.values)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("cut", [{}, {"top_k": 4, "top_p": 0.9}])
def test_exact_kl_in_learning_has_the_bits_of_the_observed_and_reaches_the_actor_alone(make_palm, move, lora, cut):
    fresh = ActorCritic(make_palm(), actor_lora=lora, **cut)
    assert not fresh(SEQUENCES, PROMPT_LENGTHS, 4, kl_grad=True).kl_exact.any()
    actor_critic = move(ActorCritic(make_palm(), actor_lora=lora, **cut)).train()
    plain = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, temperature=0.7)
    found = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, temperature=0.7, kl_grad=True)
    seen = actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4, temperature=0.7)
    assert torch.equal(found.kl_exact, seen.kl_exact) and found.kl_exact[MASK].min() > 1e-3
    assert not plain.kl_exact.any()
    for name in ("logprobs", "entropy", "values"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    found.kl_exact[MASK].sum().backward()
    reached = {name for name, p in actor_critic.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == actor_critic.actor_parameters().keys()


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}])
def test_exact_kl_alone_pulls_a_perturbed_actor_back_to_the_reference(make_palm, move, cut):
    actor_critic = move(ActorCritic(make_palm(), **cut))
    settings = PPOSettings(actor_lr=3e-2, epochs=40, minibatch_size=2, kl_exact_coef=1.0)
    learner = Learner(
        actor_critic, Accelerator(cpu=True), loss=PPOLoss(**settings.loss_arguments()), **settings.learner_arguments()
    )
    lengths = torch.tensor([4, 3])
    rollout = observed(actor_critic, recorded(SEQUENCES, PROMPT_LENGTHS, lengths, temperature=1.0), max_batch_tokens=99)
    zeros = torch.zeros(2, 4)
    learner.update(GivenLesson(rollout, Targets(zeros, zeros, zeros, rollout.values)), random=seeded_by(0))
    after = actor_critic.observe(SEQUENCES, PROMPT_LENGTHS, 4, lengths=lengths)
    assert rollout.kl_exact.sum() > 2 and after.kl_exact.sum() < 0.02 * rollout.kl_exact.sum()


def test_places_beyond_a_response_are_not_read_out(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    whole = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4)
    found = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, lengths=torch.tensor([2, 3]), num_tokens=5)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    for name in ("logprobs", "entropy", "values"):
        kept = getattr(found, name)
        torch.testing.assert_close(kept[mask], getattr(whole, name)[mask], atol=1e-6, rtol=0)
        assert not kept[~mask].any()
    grads = [
        torch.autograd.grad((out.logprobs * mask).sum(), list(actor_critic.actor_parameters().values()))
        for out in (found, whole)
    ]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_ids_may_be_of_32_bits(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    for record in ("forward", "observe"):
        wide, narrow = (getattr(actor_critic, record)(ids, PROMPT_LENGTHS, 4) for ids in (SEQUENCES, SEQUENCES.int()))
        assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))


def test_logprobs_reach_far_into_the_tail_and_keep_their_gradient(make_palm):
    palm = make_palm()
    with torch.no_grad():
        palm.token_emb.weight.mul_(40)
    actor_critic = ActorCritic(palm)
    out = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4).logprobs
    expected = logprobs_by_hand(palm, 1.0)
    assert expected[MASK].min() < -60
    torch.testing.assert_close(out[MASK].double(), expected[MASK], atol=1e-3, rtol=1e-5)
    lowest = out.masked_fill(~MASK, 0.0).min()
    grads = torch.autograd.grad(lowest, list(actor_critic.actor_parameters().values()))
    assert any(bool((grad != 0).any()) for grad in grads)


def test_value_of_a_token_does_not_read_the_token_or_what_follows(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    before = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4).values
    changed = SEQUENCES.clone()
    changed[0, 5] = 11  # the third response token of row 0
    after = actor_critic(changed, PROMPT_LENGTHS, 4).values
    torch.testing.assert_close(after[0, :3], before[0, :3], atol=1e-6, rtol=0)
    assert (after[0, 3] - before[0, 3]).abs() > 1e-4
    torch.testing.assert_close(after[1], before[1], atol=1e-6, rtol=0)


def test_values_run_along_time_whatever_the_batch(make_palm, move):
    actor_critic = move(ActorCritic(make_palm()))
    both = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4)
    alone = actor_critic(SEQUENCES[1:, :4], PROMPT_LENGTHS[1:], 3)
    swapped = actor_critic(SEQUENCES.flip(0), PROMPT_LENGTHS.flip(0), 4)
    for name in ("values", "logprobs", "entropy"):
        row = getattr(both, name)[1]
        torch.testing.assert_close(getattr(alone, name)[0], row[:3], atol=1e-5, rtol=0)
        torch.testing.assert_close(getattr(swapped, name)[0][:3], row[:3], atol=1e-5, rtol=0)


def test_values_start_at_zero_and_are_unbounded(make_palm):
    actor_critic = ActorCritic(make_palm())
    assert torch.equal(actor_critic(SEQUENCES, PROMPT_LENGTHS, 4).values, torch.zeros(2, 4))
    with torch.no_grad():
        actor_critic.value_head.bias.fill_(-183.0)
    torch.testing.assert_close(actor_critic(SEQUENCES, PROMPT_LENGTHS, 4).values, torch.full((2, 4), -183.0))


def test_construction_leaves_the_palm_as_it_was(make_palm):
    palm = make_palm(finetune_scopes=("mine",))
    weights = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
    palm.train()
    for parameter in list(palm.parameters())[::2]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in palm.parameters()]
    for options in ({}, {"actor_lora": False, "critic_last_layers": 1, "critic_lora": False}):
        actor_critic = ActorCritic(palm, **options).eval()
        actor_critic.palm.set_dropout(0.5)
        assert palm.training and palm.attn_dropout == 0.0
        assert [parameter.requires_grad for parameter in palm.parameters()] == flags
        assert palm.state_dict().keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in palm.state_dict().items())


def test_second_actor_critic_on_a_palm_has_fresh_adapters(make_palm, move):
    palm = make_palm()
    first = move(ActorCritic(palm))
    second = ActorCritic(palm)
    expected = palm(SEQUENCES[:1])
    torch.testing.assert_close(second.export_palm()(SEQUENCES[:1]), expected, atol=1e-6, rtol=0)
    assert (first.export_palm()(SEQUENCES[:1]) - expected).abs().max() > 0.01


def test_only_what_a_hat_trains_gets_a_gradient(make_palm):
    actor_critic = ActorCritic(make_palm())
    out = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4)
    (out.logprobs.sum() + out.values.sum()).backward()
    trained = actor_critic.actor_parameters() | actor_critic.critic_parameters()
    with_gradient = {name for name, parameter in actor_critic.named_parameters() if parameter.grad is not None}
    assert with_gradient == trained.keys()
    assert not any(parameter.requires_grad for parameter in actor_critic.palm.parameters())


@pytest.mark.parametrize("actor_lora", [True, False])
@pytest.mark.parametrize("critic_lora", [True, False])
def test_lora_flags_of_actor_and_critic_are_each_their_own(make_palm, actor_lora, critic_lora):
    palm = make_palm()
    base = sum(parameter.numel() for parameter in palm.parameters())
    actor_critic = ActorCritic(
        palm, actor_lora=actor_lora, critic_lora=critic_lora, actor_lora_r=3, critic_lora_r=5
    )  # fmt: skip
    # dim 12, inner 18, dim_head 6: (12 + 18) + 2 (12 + 6) + (18 + 12) weights of rank 1, in each of 2 layers
    rank_one = 2 * 96
    actor = sum(parameter.numel() for parameter in actor_critic.actor_parameters().values())
    critic = sum(parameter.numel() for parameter in actor_critic.critic_parameters().values())
    assert actor == (3 * rank_one if actor_lora else base)
    assert critic == (5 * rank_one if critic_lora else base) + 12 + 1
    out = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4)
    assert out.values.shape == (2, 4)


def bytes_held(module):
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}
    return sum(storages.values())


def test_base_weights_are_held_once_under_lora(make_palm):
    palm = make_palm()
    actor_critic = ActorCritic(palm)
    ours = {p.data_ptr() for p in actor_critic.parameters()}
    assert all(p.data_ptr() in ours for p in palm.parameters())
    small = actor_critic.actor_parameters() | actor_critic.critic_parameters()
    assert bytes_held(actor_critic) == bytes_held(palm) + 4 * sum(p.numel() for p in small.values())


@pytest.mark.parametrize("hat", ["actor", "critic"])
def test_last_layers_of_a_copy_are_all_that_is_trained_and_all_that_is_copied(make_palm, hat):
    palm = make_palm(depth=3)
    actor_critic = ActorCritic(palm, **{f"{hat}_lora": False, f"{hat}_last_layers": 2})
    trained = getattr(actor_critic, f"{hat}_parameters")()
    expected = {name for name, _ in palm.named_parameters() if name.startswith(("layers.1.", "layers.2."))}
    assert {name.removeprefix(f"{hat}.copy.") for name in trained if "value_head" not in name} == expected
    mine = dict(palm.named_parameters())
    for name, parameter in getattr(actor_critic, hat).copy.named_parameters():
        assert (parameter.data_ptr() == mine[name].data_ptr()) == (name not in expected)
        assert parameter.requires_grad == (name in expected)


@pytest.mark.parametrize("hat", ["actor", "critic"])
def test_last_layers_of_an_adapter_are_all_that_is_adapted(make_palm, hat):
    actor_critic = ActorCritic(make_palm(depth=3), **{f"{hat}_last_layers": 1})
    trained = getattr(actor_critic, f"{hat}_parameters")()
    adapters = {name for name in trained if "value_head" not in name}
    assert adapters and all(name.startswith(f"{hat}.adapter.layers.2.") for name in adapters)
    other = "critic" if hat == "actor" else "actor"
    assert any(".layers.0." in name for name in getattr(actor_critic, f"{other}_parameters")())


def test_tenth_layer_is_not_taken_for_the_first(make_palm):
    actor_critic = ActorCritic(make_palm(depth=11, dim=4, dim_head=2, heads=1), actor_lora=False, actor_last_layers=10)
    layers = {name.split(".")[3] for name in actor_critic.actor_parameters()}
    assert layers == {str(layer) for layer in range(1, 11)}


@pytest.mark.parametrize("lora", [True, False])
def test_exported_palm_stands_alone_and_is_saved_like_any_other(make_palm, move, tmp_path, lora):
    palm = make_palm()
    actor_critic = move(ActorCritic(palm, actor_lora=lora))
    exported = actor_critic.export_palm()
    hidden = actor_critic.actor.embed(actor_critic.palm, SEQUENCES)
    torch.testing.assert_close(exported(SEQUENCES), palm.to_logits(hidden) if lora else
                               actor_critic.actor.copy.to_logits(hidden), atol=1e-5, rtol=1e-5)  # fmt: skip
    ours = {p.data_ptr() for p in actor_critic.parameters()}
    assert not ours & {p.data_ptr() for p in exported.parameters()}
    assert all(p.requires_grad for p in exported.parameters())
    exported.save(tmp_path / "better.pt")
    loaded = PaLM.from_checkpoint(tmp_path / "better.pt")
    assert torch.equal(loaded(SEQUENCES), exported(SEQUENCES))
    assert torch.equal(make_palm(seed=9).load(tmp_path / "better.pt")(SEQUENCES), exported(SEQUENCES))
    assert loaded.state_dict().keys() == palm.state_dict().keys()


def test_dropout_acts_in_train_mode_only_and_the_palms_own_never(make_palm, move):
    still = move(ActorCritic(make_palm(attn_dropout=0.5, ff_dropout=0.5))).train()
    first, second = (still(SEQUENCES, PROMPT_LENGTHS, 4) for _ in range(2))
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)
    noisy = move(ActorCritic(make_palm(), actor_dropout=0.3)).train()
    first, second = (noisy(SEQUENCES, PROMPT_LENGTHS, 4) for _ in range(2))
    assert not torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)
    noisy.eval()
    first, second = (noisy(SEQUENCES, PROMPT_LENGTHS, 4) for _ in range(2))
    assert torch.equal(first.logprobs, second.logprobs)


def test_adapters_and_value_head_stay_float32_on_a_bfloat16_trunk(make_palm):
    actor_critic = ActorCritic(make_palm().bfloat16())
    trained = actor_critic.actor_parameters() | actor_critic.critic_parameters()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    out = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4)
    assert {tensor.dtype for tensor in out} == {torch.float32}


def test_construction_draws_from_the_generator_alone(make_palm):
    palm = make_palm()
    state = torch.get_rng_state()
    first, second = (ActorCritic(palm, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, dict(second.named_parameters())[name])
    assert list(first.actor_parameters()) == list(second.actor_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actor_lora_r": 0}, r"r \(0\)"),
        ({"critic_lora_alpha": -1.0}, r"alpha \(-1.0\)"),
        ({"actor_last_layers": 3}, r"last_layers \(3\)"),
        ({"critic_lora": False, "critic_last_layers": 0}, r"last_layers \(0\)"),
        ({"actor_dropout": 1.0}, r"dropout \(1.0\)"),
        ({"critic_dropout": -0.1}, r"dropout \(-0.1\)"),
        ({"top_k": 0}, r"top_k \(0\)"),
        ({"top_p": 1.2}, r"top_p \(1.2\)"),
    ],
)
def test_settings_out_of_range_are_refused(make_palm, options, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic(make_palm(), **options)


def test_model_that_sees_the_future_is_refused(make_palm):
    with pytest.raises(ValueError, match="causal=True"):
        ActorCritic(make_palm(causal=False))
    with pytest.raises(TypeError):
        ActorCritic("palm")
