"""Small models, judges and trainers for the tests of the policy."""

from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer

NUM_TOKENS = 13


@pytest.fixture(autouse=True)
def own_accelerate_state() -> Iterator[None]:
    """Accelerate keeps precision and accumulation for the whole process; no test sees another's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def make_palm() -> Callable[..., PaLM]:
    """A tiny PaLM whose distributions are far from uniform."""

    def make(*, seed: int = 0, **options) -> PaLM:
        sizes = {"num_tokens": NUM_TOKENS, "dim": 12, "depth": 2, "dim_head": 6, "heads": 3, "ff_mult": 2}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            palm = PaLM(**{**sizes, **options})
            torch.nn.init.normal_(palm.token_emb.weight, std=0.4)
        return palm

    return make


def count_sevens(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
    """A judge: how many of the response's ids are 7."""
    return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float()


@pytest.fixture
def judge() -> Callable[..., Tensor]:
    return count_sevens


RAGGED = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]


@pytest.fixture
def make_trainer(make_palm: Callable[..., PaLM]) -> Callable[..., RLHFTrainer]:
    """A trainer over ragged prompts, with a judge that counts an id."""

    def make(palm: PaLM | None = None, **options) -> RLHFTrainer:
        if not {"prompt_token_ids", "prompts", "prompts_path"} & options.keys():
            options["prompt_token_ids"] = RAGGED
        settings = {"reward_model": count_sevens, "actor_lr": 1e-2, "critic_lr": 1e-2, "minibatch_size": 4}
        return RLHFTrainer(palm=make_palm() if palm is None else palm, **{**settings, **options})

    return make


@pytest.fixture
def move() -> Callable[[ActorCritic], ActorCritic]:
    """Give actor and critic weights that training might have given them."""

    def moved(actor_critic: ActorCritic, seed: int = 1) -> ActorCritic:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in (actor_critic.actor_parameters() | actor_critic.critic_parameters()).items():
                noise = torch.randn(parameter.shape, generator=generator)
                if ".adapter." in name:
                    parameter.copy_(0.4 * noise)
                else:
                    parameter += 0.2 * noise
        return actor_critic

    return moved
