"""RewardModel in files: a checkpoint carries trunk and configuration, and never writes into somebody else's PaLM."""

import warnings

import pytest
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward import RewardModel
from palm_rlhf_pytorch.training.tensor_file import save_tensors

VOCAB = 13


def small_palm(*, causal=False, seed=0, **changes):
    torch.manual_seed(seed)
    return PaLM(**({"num_tokens": VOCAB, "dim": 8, "depth": 2, "causal": causal, "dim_head": 4, "heads": 3} | changes))


def trained(palm, **settings):
    model = RewardModel(palm, **settings).eval()
    with torch.no_grad():
        for parameter in model.finetune_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def ids(batch=2, length=6):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def scores(model):
    return model(ids(), prompt_lengths=torch.tensor([1, 3]))


def bits(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def pointers(module):
    return {parameter.data_ptr() for parameter in module.parameters()}


@pytest.fixture(autouse=True)
def no_stray_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("settings", [{"num_binned_output": 5, "label_offset": 1}, {"use_lora": False, "lora_r": 3}])
def test_saved_model_scores_the_same_when_loaded(tmp_path, suffix, settings):
    path = tmp_path / f"reward_model.{suffix}"
    palm = small_palm()
    model = trained(palm, **settings)
    model.save(path)
    before, state = bits(palm), torch.get_rng_state()
    rebuilt = RewardModel.from_checkpoint(path).eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(scores(rebuilt), scores(model), atol=1e-6) and rebuilt.config == model.config
    fresh = RewardModel(palm, **settings).eval()
    assert fresh.load(path) is fresh and not fresh.training
    assert torch.allclose(scores(fresh), scores(model), atol=1e-6) and same_bits(bits(palm), before)
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]


def test_load_keeps_sharing_a_trunk_that_is_the_same(tmp_path):
    palm = small_palm()
    trained(palm, num_binned_output=5).save(tmp_path / "model.pt")
    model = RewardModel(palm, num_binned_output=5).load(tmp_path / "model.pt")
    assert pointers(model.palm) == pointers(palm)
    with pytest.warns(UserWarning, match=r"num_binned_output \(0 here, 5 in the file\)") as caught:
        other = RewardModel(palm).load(tmp_path / "model.pt")
    assert pointers(other.palm) == pointers(palm) and "no longer used" not in str(caught[0].message)
    assert torch.equal(scores(other.eval()), scores(model.eval()))


def test_load_takes_over_other_weights_without_writing_into_the_palm(tmp_path):
    theirs = trained(small_palm(seed=4))
    theirs.save(tmp_path / "model.pt")
    palm = small_palm(seed=0)
    before = bits(palm)
    model = RewardModel(palm).eval().load(tmp_path / "model.pt")
    assert torch.allclose(scores(model), scores(theirs), atol=1e-6)
    assert same_bits(bits(palm), before) and not pointers(model.palm) & pointers(palm)


def test_load_adopts_a_trunk_of_another_kind_and_says_so(tmp_path):
    theirs = trained(small_palm(causal=False, seed=4), num_binned_output=5, pool_last=True)
    theirs.save(tmp_path / "model.pt")
    palm = small_palm(causal=True, depth=3)
    before = bits(palm)
    model = RewardModel(palm, num_binned_output=5, dropout=0.1).eval()
    with pytest.warns(UserWarning) as caught:
        model.load(tmp_path / "model.pt")
    message = str(caught[0].message)
    for part in ("model.pt", "causal (True here, False in the file)", "depth (3 here, 2 in the file)", "no longer used",
                 "pool_last (False here, True in the file)", "dropout (0.1 here, 0.0 in the file)"):  # fmt: skip
        assert part in message
    assert "heads" not in message and len(caught) == 1
    assert torch.allclose(scores(model), scores(theirs), atol=1e-5)
    assert model.config == theirs.config and not model.palm.causal
    assert not any(module.training for module in model.modules())
    assert same_bits(bits(palm), before) and palm.causal


def test_load_keeps_the_parameters_of_an_optimizer(tmp_path):
    palm = small_palm()
    trained(palm).save(tmp_path / "model.pt")
    model = RewardModel(palm)
    optimizer = torch.optim.SGD(model.finetune_parameters(), lr=0.1)
    model.load(tmp_path / "model.pt")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(mine is theirs for mine, theirs in zip(model.finetune_parameters(), held, strict=True))


def test_load_keeps_the_dtypes_of_the_file(tmp_path):
    theirs = trained(small_palm()).to(torch.bfloat16)
    theirs.save(tmp_path / "half.pt")
    model = RewardModel(small_palm(seed=3)).eval()
    with pytest.warns(UserWarning, match=r"dtype \(torch.float32 here, torch.bfloat16 in the file\)"):
        model.load(tmp_path / "half.pt")
    assert torch.equal(scores(model), scores(theirs))
    assert {parameter.dtype for parameter in model.finetune_parameters()} == {torch.float32}


def test_bare_state_dict_is_loaded_into_a_model_built_alike(tmp_path):
    theirs = trained(small_palm(seed=4), num_binned_output=3)
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    model = RewardModel(small_palm(), num_binned_output=3).eval().load(tmp_path / "bare.pt")
    assert torch.equal(scores(model), scores(theirs))
    with pytest.raises(ValueError, match="no configuration"):
        RewardModel.from_checkpoint(tmp_path / "bare.pt")


def test_half_precision_heads_of_a_bare_state_dict_become_float32(tmp_path):
    halves = {name: tensor.half() for name, tensor in trained(small_palm()).state_dict().items()}
    torch.save(halves, tmp_path / "bare.pt")
    model = RewardModel(small_palm())
    with pytest.warns(UserWarning, match="dtype"):
        model.load(tmp_path / "bare.pt")
    assert {parameter.dtype for parameter in model.finetune_parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, halves["head.weight"].float())


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def other_kind(path):
    small_palm().save(path)


def other_bins(path):
    torch.save(trained(small_palm(), num_binned_output=9).state_dict(), path)


def lost_tensor(path):
    record = torch.load(path)
    del record["tensors"]["prompt_embed"]
    torch.save(record, path)


def odd_config(path, **changes):
    record = torch.load(path)
    record["config"] = {name: value for name, value in (record["config"] | changes).items() if value is not None}
    torch.save(record, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "truncated or damaged"),
        (other_kind, "kind 'PaLM', expected 'RewardModel'"),
        (other_bins, r"head.weight: file \(9, 8\), model \(4, 8\)"),
        (lost_tensor, r"1 missing keys \(prompt_embed\)"),
        (lambda path: odd_config(path, palm=None), "lacks that of the trunk"),
        (lambda path: odd_config(path, dropout=2.0), r"builds no reward model: dropout \(2.0\)"),
        (lambda path: odd_config(path, unheard_of=1), "builds no reward model"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_changes(tmp_path, spoil, message):
    path = tmp_path / "model.pt"
    trained(small_palm(seed=4), num_binned_output=4).save(path)
    spoil(path)
    model = trained(small_palm(), num_binned_output=4)
    before, config = bits(model), model.config
    with pytest.raises(ValueError, match=message) as caught:
        model.load(path)
    assert str(path) in str(caught.value)
    assert same_bits(bits(model), before) and model.config == config


def test_nothing_changes_when_the_warning_is_an_error(tmp_path):
    trained(small_palm(causal=False, seed=4)).save(tmp_path / "model.pt")
    model = trained(small_palm(causal=True))
    before = bits(model)
    with pytest.raises(UserWarning, match="causal"):
        model.load(tmp_path / "model.pt")
    assert same_bits(bits(model), before) and model.palm.causal


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        RewardModel(small_palm()).load(tmp_path / "nowhere.pt")


def test_readme_steps_two_and_three_give_the_trained_scores(tmp_path):
    # step 2, at reduced size
    palm = PaLM(num_tokens=200, dim=16, depth=2, causal=False)
    reward_model = RewardModel(palm, num_binned_output=5)
    seq = torch.randint(0, 200, (1, 24))
    prompt_mask = torch.zeros(1, 24).bool()
    labels = torch.randint(0, 5, (1,))
    optimizer = torch.optim.Adam(reward_model.finetune_parameters(), lr=0.01)
    for _ in range(3):
        loss = reward_model(seq, prompt_mask=prompt_mask, labels=labels)
        loss.backward()
        optimizer.step()
    reward = reward_model(seq, prompt_mask=prompt_mask)
    assert reward.shape == (1,) and 0 <= reward.item() <= 4
    reward_model.save(tmp_path / "reward_model.pt")
    # step 3: the same file, into a model around a causal trunk
    palm = PaLM(num_tokens=200, dim=16, depth=2)
    loaded = RewardModel(palm, num_binned_output=5)
    with pytest.warns(UserWarning, match="causal"):
        loaded.load(tmp_path / "reward_model.pt")
    assert torch.allclose(loaded(seq, prompt_mask=prompt_mask), reward, atol=1e-5) and palm.causal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_move_takes_all_to_the_device_and_files_come_back(tmp_path):
    model = trained(small_palm(), num_binned_output=5)
    expected = scores(model)
    model.to("cuda")
    on_device = model(ids().cuda(), prompt_lengths=torch.tensor([1, 3], device="cuda"))
    assert torch.allclose(on_device.cpu(), expected, atol=1e-4)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    model.save(tmp_path / "model.pt")
    assert torch.allclose(scores(RewardModel.from_checkpoint(tmp_path / "model.pt").eval()), expected, atol=1e-5)
    loaded = RewardModel(small_palm(seed=3).to("cuda"), num_binned_output=5).load(tmp_path / "model.pt")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}


# the shift and scale of normalised scores


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("settings", [{}, {"num_binned_output": 5}])
def test_normalisation_is_saved_and_loaded(tmp_path, suffix, settings):
    path = tmp_path / f"model.{suffix}"
    model = trained(small_palm()).normalize_scores([{"seq": ids(7)}])
    model.save(path)
    assert torch.equal(scores(RewardModel.from_checkpoint(path)), scores(model))
    other = trained(small_palm(seed=5), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another configuration
        other.load(path)
    assert torch.equal(scores(other), scores(model))
    plain = trained(small_palm())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(scores(plain), scores(model))
    other.normalize_scores([{"seq": ids(3)}])
    assert not torch.equal(scores(other), scores(model)) and torch.equal(scores(plain), scores(model))


def test_files_from_before_there_was_a_normalisation_load_with_none(tmp_path):
    path = tmp_path / "old.pt"
    model = trained(small_palm())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("score_")}
    assert len(tensors) == len(model.state_dict()) - 2
    save_tensors(path, tensors, kind="RewardModel", config=model.config)
    first, second, third = RewardModel.from_checkpoint(path), trained(small_palm(seed=5)), trained(small_palm(seed=6))
    second.normalize_scores([{"seq": ids(7)}]).load(path)
    third.normalize_scores([{"seq": ids(7)}]).load_state_dict(tensors)
    for found in (first, second, third):
        assert torch.equal(scores(found), scores(model))
    first.normalize_scores([{"seq": ids(7)}])
    assert torch.equal(scores(RewardModel.from_checkpoint(path)), scores(model))  # two models, two normalisations


def test_a_scale_that_divides_by_nothing_is_refused(tmp_path):
    model = trained(small_palm())
    model.score_std.fill_(0.0)
    model.save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="score_std"):
        RewardModel.from_checkpoint(tmp_path / "model.pt")
