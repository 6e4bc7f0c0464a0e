"""The critic that starts as the reward model: what its values are, and every reason that forbids it."""

import pytest
import torch

from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.critic_start import start_critic
from palm_rlhf_pytorch.reward.model import RewardModel

SEQUENCES = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 0, 0]])
PROMPT_LENGTHS, LENGTHS = torch.tensor([3, 1]), torch.tensor([4, 4])


@pytest.fixture
def make_judge(make_palm):
    """A reward model that looks trained, with normalised scores."""

    def make(palm=None, *, normalize=True, **options):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            judge = RewardModel(make_palm() if palm is None else palm, **{"lora_r": 3, "pool_last": True, **options})
            with torch.no_grad():
                for weight in judge.finetune_parameters()[:-4]:
                    weight += 0.3 * torch.randn(weight.shape)
        if normalize:
            judge.normalize_scores([{"seq": torch.arange(12).reshape(4, 3)}])
        return judge

    return make


@pytest.mark.parametrize("lora", [True, False])
def test_value_of_a_token_is_the_normalised_score_of_what_stands_before_it(make_palm, make_judge, move, lora):
    palm = make_palm()
    judge = make_judge(palm, use_lora=lora, lora_alpha=6.0)
    settings = {"critic_lora_r": 3, "critic_lora_alpha": 6.0} if lora else {"critic_lora": False}
    actor_critic = move(ActorCritic(palm, **settings))
    kept = {
        name: tensor.clone()
        for name, tensor in (actor_critic.state_dict() | judge.state_dict(prefix="judge.")).items()
        if not name.startswith(("critic.", "value_head."))
    }
    start_critic(actor_critic, judge)
    found = actor_critic(SEQUENCES, PROMPT_LENGTHS, 4, lengths=LENGTHS).values
    for row, start in enumerate((3, 1)):
        for step in range(4):
            score = judge.eval()(
                SEQUENCES[row : row + 1, : start + step]
            )  # embeddings are 0, and the last token is read
            torch.testing.assert_close(found[row, step], score[0], atol=1e-4, rtol=1e-4)
    after = actor_critic.state_dict() | judge.state_dict(prefix="judge.")
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())
    assert all(weight.requires_grad for weight in actor_critic.critic_parameters().values())
    shared = {weight.data_ptr() for weight in judge.parameters()}
    assert not any(weight.data_ptr() in shared for weight in actor_critic.critic_parameters().values())


def test_critic_that_starts_as_the_reward_model_explains_more_than_one_from_zero(make_trainer, make_palm):
    palm, generator = make_palm(), torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = RewardModel(palm, pool_last=True)
    # without the embeddings, which the critic lacks
    optimizer = torch.optim.Adam([*judge.adapter.parameters(), *judge.head.parameters()], lr=2e-2)
    starts = torch.full((64,), 3)
    for _ in range(50):
        ids = torch.randint(13, (64, 6), generator=generator)
        optimizer.zero_grad()
        labels = (ids > 6).sum(dim=-1).float()
        judge(ids, prompt_lengths=starts, labels=labels).backward()
        optimizer.step()
    judge.eval().normalize_scores([{"seq": ids, "prompt_lengths": starts}])
    prompts, explained = torch.randint(13, (20, 3), generator=generator), []
    for start in (False, True):
        trainer = make_trainer(palm, reward_model=judge, prompt_token_ids=prompts)
        if start:
            start_critic(trainer.actor_critic, judge)
        rollout = trainer.score(trainer.rollout(*trainer.next_prompts(20), max_seq_len=6))
        explained.append(trainer.learn(rollout)["value/explained_variance"])
    assert explained[0] == pytest.approx(0, abs=1e-3) and explained[1] > 0.3, explained


@pytest.mark.parametrize(
    ("judged", "settings", "reason"),
    [
        ({"num_binned_output": 5}, {}, "5 bins"),
        ({"normalize": False}, {}, "not normalised"),
        ({"lora_r": 2}, {}, "rank 2, alpha 2, layers 0 to 1, the critic's rank 3, alpha 3"),
        ({"lora_alpha": 4.0}, {}, "alpha 4"),
        ({}, {"critic_last_layers": 1}, "layers 1 to 1"),
        ({}, {"critic_lora": False}, "an adapter of the trunk, the critic a copy; set critic_lora=True"),
        ({"use_lora": False}, {}, "a copy of the trunk, the critic an adapter; set critic_lora=False"),
        ({"use_lora": False}, {"critic_lora": False, "critic_last_layers": 1}, "some layers only"),
    ],
)
def test_reward_model_of_another_build_is_refused(make_palm, make_judge, judged, settings, reason):
    palm = make_palm()
    actor_critic = ActorCritic(palm, critic_lora_r=3, **settings)
    before = {name: tensor.clone() for name, tensor in actor_critic.state_dict().items()}
    with pytest.raises(ValueError, match=rf"critic_from_reward_model(.|\n)*{reason}"):
        start_critic(actor_critic, make_judge(palm, **judged))
    assert all(torch.equal(tensor, before[name]) for name, tensor in actor_critic.state_dict().items())


@pytest.mark.parametrize(
    ("palm", "reason"),
    [({"seed": 1}, "other weights"), ({"depth": 3}, "depth 3, not 2"), ({"causal": False}, "not causal")],
)
def test_reward_model_on_another_trunk_is_refused(make_palm, make_judge, palm, reason):
    with pytest.raises(ValueError, match=reason):
        start_critic(ActorCritic(make_palm(), critic_lora_r=3), make_judge(make_palm(**palm)))


def test_reward_model_on_equal_weights_elsewhere_in_memory_will_do(make_palm, make_judge):
    actor_critic = ActorCritic(make_palm(), critic_lora_r=3)
    start_critic(actor_critic, make_judge(make_palm()))
    assert actor_critic.value_head.weight.any()


def test_other_judges_and_a_missing_critic_are_refused_and_all_reasons_named(make_palm, make_judge, judge):
    palm = make_palm()
    with pytest.raises(ValueError, match="the judge is a function"):
        start_critic(ActorCritic(palm), judge)
    with pytest.raises(ValueError, match="there is no critic"):
        start_critic(ActorCritic(palm, critic=False), make_judge(palm))
    with pytest.raises(ValueError, match="3 bins(.|\n)*not normalised(.|\n)*rank 3"):
        start_critic(ActorCritic(palm), make_judge(palm, num_binned_output=3, normalize=False))


def test_reward_model_that_averages_is_warned_of(make_palm, make_judge):
    palm = make_palm()
    with pytest.warns(UserWarning, match="pool_last=True"):
        start_critic(ActorCritic(palm, critic_lora_r=3), make_judge(palm, pool_last=False))
