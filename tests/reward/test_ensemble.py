"""Ensembles: one trunk in memory and in files, scores combined, members that learnt from different draws."""

from copy import deepcopy

import pytest
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.ppo import RLHFTrainer
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, bootstrap, load_judge, lower_bound, mean, minimum
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.records import Text, Vote

VOCAB = 17


def small_palm(seed=0):
    torch.manual_seed(seed)
    return PaLM(num_tokens=VOCAB, dim=12, depth=2, dim_head=6, heads=3)


def stirred(judge):
    for member in judge.models if isinstance(judge, RewardEnsemble) else [judge]:
        with torch.no_grad():
            for parameter in member.finetune_parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return judge.eval()


def ids(batch, length, seed=1):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def memory(*modules):
    """Bytes of the parameters, each storage once."""
    tensors = [tensor.untyped_storage() for module in modules for tensor in module.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in tensors}.values())


def test_scores_are_combined_as_the_functions_say():
    scores = torch.tensor([[1.0, -2.0], [3.0, -2.0], [8.0, 1.0]])
    assert mean(scores).tolist() == [4, -1] and minimum(scores).tolist() == [1, -2]
    deviation = torch.tensor([(9 + 1 + 16) / 3, (1 + 1 + 4) / 3]).sqrt()
    torch.testing.assert_close(lower_bound(0.5)(scores), torch.tensor([4.0, -1.0]) - 0.5 * deviation)
    with pytest.raises(ValueError, match=r"c \(-1\)"):
        lower_bound(-1)


def test_members_score_as_they_do_alone_from_the_memory_of_one_trunk():
    palm = small_palm()
    alone = [stirred(RewardModel(palm, lora_r=rank)) for rank in (2, 3, 4)]
    seq, lengths = ids(5, 7), torch.tensor([2, 0, 3, 1, 6])
    expected = torch.stack([member(seq, prompt_lengths=lengths) for member in alone])
    ensemble = RewardEnsemble(alone, combine=minimum)
    found = ensemble.judge(seq, prompt_lengths=lengths)
    assert torch.equal(found.members, expected) and torch.equal(found.scores, expected.amin(dim=0))
    torch.testing.assert_close(found.disagreement, expected.var(dim=0, correction=0).sqrt())
    assert torch.equal(ensemble(seq, prompt_lengths=lengths), found.scores)
    own = sum(sum(parameter.nbytes for parameter in member.finetune_parameters()) for member in alone)
    for version in (ensemble, deepcopy(ensemble), deepcopy(ensemble).bfloat16()):
        trunk = sum(parameter.nbytes for parameter in version.palm.parameters())
        assert memory(version) == trunk + own
        assert sum(1 for _ in version.parameters()) == len({id(parameter) for parameter in version.parameters()})
    assert memory(palm, ensemble) == memory(ensemble)


def test_members_are_normalised_apart():
    ensemble = stirred(RewardEnsemble.of(small_palm(), 3, seed=0))
    with torch.no_grad():
        ensemble.models[1].head.bias.add_(100)
    raw = ensemble.read(ids(6, 5)).detach()
    assert torch.equal(ensemble.judge(ids(6, 5)).members, raw) and float(raw[1].min()) > 50
    ensemble.normalize_scores({"seq": part} for part in ids(6, 5).split(4))
    found = ensemble.judge(ids(6, 5)).members
    assert found.mean(dim=1).abs().max() < 1e-3 and (found.std(dim=1, correction=0) - 1).abs().max() < 1e-3
    assert torch.equal(ensemble.read(ids(6, 5)), raw)


def test_a_new_ensemble_has_members_that_differ_and_leaves_the_random_state_alone():
    palm, before = small_palm(), torch.get_rng_state()
    first, again, other = (RewardEnsemble.of(palm, 2, seed=seed, num_binned_output=5) for seed in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    scores = [ensemble.eval().read(ids(4, 6)) for ensemble in (first, again, other)]
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0][0], scores[0][1])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_saved_ensemble_scores_the_same_and_holds_its_trunk_once(tmp_path, suffix):
    path = tmp_path / f"ensemble.{suffix}"
    ensemble = stirred(RewardEnsemble.of(small_palm(), 3, seed=0, num_binned_output=5, label_offset=1))
    ensemble.normalize_scores([{"seq": ids(6, 5)}]).save(path)
    first, second = RewardEnsemble.from_checkpoint(path, combine=minimum), load_judge(path)
    for found in (first.eval(), second.eval()):
        assert torch.equal(found.judge(ids(4, 9)).members, ensemble.judge(ids(4, 9)).members)
        assert memory(found) == memory(ensemble)
    assert torch.equal(first(ids(4, 9)), ensemble.judge(ids(4, 9)).members.amin(dim=0))
    assert path.stat().st_size < 1.2 * memory(ensemble) + 40_000
    single = ensemble.models[1]
    single.save(tmp_path / "single.pt")
    judge = load_judge(tmp_path / "single.pt")
    assert isinstance(judge, RewardModel) and torch.equal(judge.eval()(ids(4, 9)), single(ids(4, 9)))
    with pytest.raises(ValueError, match="kind 'RewardEnsemble', expected 'RewardModel'"):
        RewardModel.from_checkpoint(path)


def test_members_that_cannot_share_a_trunk_are_refused():
    palm = small_palm()
    with pytest.raises(ValueError, match=r"members \(1\)"):
        RewardEnsemble([RewardModel(palm)])
    with pytest.raises(ValueError, match=r"members\[1\] has use_lora=False"):
        RewardEnsemble([RewardModel(palm), RewardModel(palm, use_lora=False)])
    with pytest.raises(ValueError, match=r"members\[1\] has another trunk"):
        RewardEnsemble([RewardModel(palm), RewardModel(small_palm(seed=1))])
    copied = RewardEnsemble([RewardModel(palm), RewardModel(deepcopy(palm))])  # equal to the bit
    assert copied.models[1].palm is copied.models[0].palm


def test_an_ensemble_is_a_judge_that_a_policy_learns_from(tmp_path):
    palm = small_palm()
    ensemble = stirred(RewardEnsemble.of(palm, 2, seed=0, combine=lower_bound(1.0)))
    trainer = RLHFTrainer(
        palm=palm, reward_model=ensemble, prompt_token_ids=ids(3, 2), accelerate_kwargs={"cpu": True}, minibatch_size=4
    )
    trainer.train(4, max_seq_len=6, update_timesteps=4)
    assert torch.equal(ensemble.palm.token_emb.weight, palm.token_emb.weight)


def test_a_bootstrap_draws_groups_with_replacement():
    labels = [
        Vote(text=Text("", f"{number}"), up=True, group=None if number < 20 else f"g{number % 7}", weight=0.5)
        for number in range(90)
    ]
    first, again, other = (bootstrap(labels, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    times = {label.text.response: round(label.weight / 0.5, 6) for label in first}
    units = {label.group or label.text.response: times[label.text.response] for label in first}
    assert sum(units.values()) == 27 and len(units) < 27  # 20 by themselves, and 7 groups
    for label in labels:
        assert times.get(label.text.response) == units.get(label.group or label.text.response)
