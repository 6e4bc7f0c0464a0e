"""The best of several responses, and the improved model that gives them."""

import pytest
import torch

from palm_rlhf_pytorch.palm.generation import Generation
from palm_rlhf_pytorch.policy.answers import best_response
from tests.policy.helpers import without_time

IDS = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8], [9, 7, 9]])
QUICK = {"max_seq_len": 9, "max_new_tokens": 4, "update_timesteps": 5, "use_tqdm": False}


def test_best_response_is_cut_at_its_end(judge):
    tokens = torch.tensor([[7, 1, 1], [7, 7, 7], [7, 7, 5]])
    mask = torch.tensor([[True] * 3, [True, False, False], [True] * 3])
    out = [Generation(tokens, mask, torch.zeros(3, 3), torch.zeros(3, dtype=torch.bool))]
    for batch in (1, 8):
        best = best_response(judge, torch.tensor([7, 4]), out, max_batch_size=batch, max_batch_tokens=9999)
        assert best.tolist() == [7, 4, 7, 7, 5]
    shortest = best_response(
        lambda seq, *, prompt_mask, mask: -mask.sum(dim=-1).float(),
        torch.tensor([7, 4]),
        out,
        max_batch_size=8,
        max_batch_tokens=9,
    )
    assert shortest.tolist() == [7, 4, 7]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_best_response_has_a_finite_score_among_finite_scores(bad):
    tokens, mask = torch.tensor([[7, 1]]), torch.ones(1, 2, dtype=torch.bool)
    out = [Generation(tokens, mask, torch.zeros(1, 2), torch.zeros(1, dtype=torch.bool))]
    with pytest.raises(ValueError, match=r"generate.*rows \[0\]"):
        best_response(lambda seq, **masks: torch.tensor([bad]), tokens[0], out, max_batch_size=8, max_batch_tokens=9999)


def test_generate_returns_prompt_and_best_response(make_trainer, judge):
    trainer = make_trainer()
    found = trainer.generate(12, IDS[0], num_samples=50, temperature=1.5)
    assert found.shape == (12,) and torch.equal(found[:3], IDS[0])
    single = [int((trainer.generate(12, IDS[0], num_samples=1, temperature=1.5)[3:] == 7).sum()) for _ in range(10)]
    assert int((found[3:] == 7).sum()) > sum(single) / 10 + 1


def test_generate_ends_with_the_eos_and_drops_padding(make_trainer):
    trainer = make_trainer(reward_model=lambda seq, *, prompt_mask, mask: -mask.sum(dim=-1).float())
    padded = torch.tensor([7, 3, 0, 1, 0, 0])
    found = trainer.generate(20, padded, num_samples=40, eos_token=7, pad_value=0)
    assert found[:4].tolist() == [7, 3, 0, 1] and found[-1] == 7 and 7 not in found[4:-1]
    assert trainer.generate(20, padded, num_samples=2)[:6].tolist() == padded.tolist()


def test_generate_is_greedy_at_temperature_zero_and_follows_a_generator(make_trainer):
    trainer = make_trainer()
    greedy = trainer.generate(9, IDS[1], num_samples=1, temperature=0.0)
    assert torch.equal(greedy[3:], trainer.export_palm().generate(9, IDS[1], temperature=0.0))
    first, second = (trainer.generate(9, IDS[1], generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(trainer.generate(9, IDS[1], num_samples=1).tolist()) for _ in range(8)}) > 1


def test_looking_at_samples_does_not_change_the_training(make_trainer):
    looked, plain = make_trainer(), make_trainer()
    looked.train(5, **QUICK)
    looked.generate(6, IDS[0])
    plain.train(5, **QUICK)
    assert without_time(looked.train(5, **QUICK)) == without_time(plain.train(5, **QUICK))


@pytest.mark.parametrize("lora", [True, False])
def test_exported_palm_is_the_trained_actor(make_trainer, make_palm, lora, tmp_path):
    palm = make_palm()
    trainer = make_trainer(palm, actor_lora=lora)
    trainer.train(10, **QUICK)
    exported = trainer.export_palm()
    rollout = trainer.rollout(*trainer.next_prompts(5), max_new_tokens=4)
    logits = exported(rollout.sequences)
    found = logits.log_softmax(dim=-1)[:, :-1].gather(-1, rollout.sequences[:, 1:, None])[..., 0]
    for row, start in enumerate(rollout.prompt_lengths.tolist()):
        steps = int(rollout.lengths[row])
        expected = rollout.logprobs[row, :steps]
        torch.testing.assert_close(found[row, start - 1 : start - 1 + steps], expected, atol=1e-5, rtol=0)
    assert (logits - palm(rollout.sequences)).abs().max() > 1e-3
    assert not exported.training and exported.config == palm.config
    exported.save(tmp_path / "better.pt")
    assert torch.equal(make_palm(seed=8).load(tmp_path / "better.pt").eval()(IDS), exported(IDS))
