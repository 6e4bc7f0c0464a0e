"""PaLM in a file: what comes back, what does not fit, and that an error changes nothing."""

import warnings
from pathlib import Path

import pytest
import torch

from palm_rlhf_pytorch.palm import PaLM

IDS = torch.tensor([[3, 9, 4, 30, 1, 7]])
NAMES = ["palm.pt", "palm.safetensors"]


def bits(palm: PaLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in palm.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", NAMES)
def test_saved_model_comes_back_from_its_file_alone(make_palm, tmp_path, name):
    palm = make_palm(qk_rmsnorm=True, qk_scale=5.0, causal=False)
    palm.save(tmp_path / "new" / name)
    found = PaLM.from_checkpoint(str(tmp_path / "new" / name))
    assert found.config == palm.config
    assert same(bits(palm), bits(found))
    assert torch.equal(found.eval()(IDS), palm(IDS))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("name", NAMES)
def test_load_takes_over_weights_in_place(make_palm, tmp_path, name):
    palm, other = make_palm(seed=1), make_palm(seed=2)
    identities = [id(parameter) for parameter in other.parameters()]
    palm.save(tmp_path / name)
    assert other.load(tmp_path / name) is other
    assert same(bits(palm), bits(other))
    assert [id(parameter) for parameter in other.parameters()] == identities


@pytest.mark.parametrize("name", NAMES)
def test_scopes_are_saved_when_asked_for(make_palm, effective, tmp_path, name):
    palm = make_palm(finetune_scopes=("a",))
    palm.add_finetune_params("b", r=2, alpha=6.0, last_layers=1)
    effective(palm, "b")
    palm.save(tmp_path / name, with_scopes=True)
    found = PaLM.from_checkpoint(tmp_path / name).eval()
    assert list(found.finetune_modules) == ["a", "b"]
    for scope in (None, "a", "b"):
        assert torch.equal(found(IDS, finetune_scope=scope), palm(IDS, finetune_scope=scope))


def test_scopes_are_left_out_unless_asked_for(make_palm, tmp_path):
    palm = make_palm(finetune_scopes=("a",))
    palm.save(tmp_path / "palm.pt")
    assert not PaLM.from_checkpoint(tmp_path / "palm.pt").finetune_modules
    assert list(make_palm(finetune_scopes=("z",)).load(tmp_path / "palm.pt").finetune_modules) == ["z"]


def test_bfloat16_checkpoint_loads_into_either_dtype(make_palm, tmp_path):
    palm = make_palm().bfloat16()
    palm.save(tmp_path / "palm.pt")
    wide, narrow = PaLM.from_checkpoint(tmp_path / "palm.pt"), make_palm(seed=3).bfloat16().load(tmp_path / "palm.pt")
    assert wide.token_emb.weight.dtype == torch.float32 and narrow.token_emb.weight.dtype == torch.bfloat16
    for found in (wide, narrow):
        for name, tensor in palm.state_dict().items():
            assert torch.equal(found.state_dict()[name].bfloat16(), tensor)


def test_checkpoint_written_on_cuda_loads_on_the_cpu(make_palm, tmp_path, monkeypatch):
    palm = make_palm()
    with monkeypatch.context() as patch:  # the tag by which torch.save notes a tensor's device
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        palm.save(tmp_path / "palm.pt")
    assert b"cuda:0" in (tmp_path / "palm.pt").read_bytes()
    assert same(bits(palm), bits(PaLM.from_checkpoint(tmp_path / "palm.pt")))


def test_bare_state_dict_loads_but_builds_nothing(make_palm, tmp_path):
    palm = make_palm(seed=1)
    torch.save(palm.state_dict(), tmp_path / "palm.pt")
    assert same(bits(palm), bits(make_palm(seed=2).load(tmp_path / "palm.pt")))
    with pytest.raises(ValueError, match=r"palm.pt holds weights without a configuration"):
        PaLM.from_checkpoint(tmp_path / "palm.pt")


def test_saving_and_loading_leave_the_random_state_alone(make_palm, tmp_path):
    palm = make_palm(finetune_scopes=("a",))
    state = torch.get_rng_state()
    palm.save(tmp_path / "palm.pt", with_scopes=True)
    PaLM.from_checkpoint(tmp_path / "palm.pt")
    palm.load(tmp_path / "palm.pt")
    assert torch.equal(torch.get_rng_state(), state)


# what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 16}, r"differing shapes \(token_emb.weight: file \(37, 16\), model \(37, 24\)"),
        ({"num_tokens": 41}, r"1 differing shapes \(token_emb.weight: file \(41, 24\), model \(37, 24\)\)"),
        ({"depth": 4}, r"3 unexpected keys \(layers.3.norm.weight"),
        ({"depth": 1}, r"6 missing keys \(layers.1.norm.weight"),
        ({"qk_rmsnorm": True}, r"6 unexpected keys \(layers.0.q_norm.weight"),
    ],
)
def test_checkpoint_of_another_model_names_what_differs_and_changes_nothing(make_palm, tmp_path, changes, message):
    make_palm(**changes).save(tmp_path / "palm.pt")
    palm = make_palm(finetune_scopes=("a",))
    before = bits(palm)
    with pytest.raises(ValueError, match=message) as error:
        palm.load(tmp_path / "palm.pt")
    assert "palm.pt" in str(error.value)
    assert same(before, bits(palm))


def test_equal_shapes_of_another_model_are_refused(make_palm, tmp_path):
    sizes = {"dim": 8, "heads": 2}
    other = make_palm(dim_head=16, ff_mult=2, **sizes)
    palm = make_palm(dim_head=8, ff_mult=4, **sizes)
    assert [p.shape for p in other.parameters()] == [p.shape for p in palm.parameters()]
    other.save(tmp_path / "palm.pt")
    before = bits(palm)
    with pytest.raises(ValueError, match="dim_head: file 16, model 8, ff_mult: file 2, model 4"):
        palm.load(tmp_path / "palm.pt")
    assert same(before, bits(palm))


def test_weights_of_another_behaviour_load_with_a_warning(make_palm, tmp_path):
    make_palm().save(tmp_path / "palm.pt")
    with pytest.warns(UserWarning, match="causal: file True, model False"):
        make_palm(causal=False).load(tmp_path / "palm.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what leaves the function as it is does not matter
        make_palm(flash_attn=True, attn_dropout=0.1, lora_r=2).load(tmp_path / "palm.pt")


def test_missing_file_is_named(make_palm, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        make_palm().load(tmp_path / "nothing.pt")


@pytest.mark.parametrize("name", NAMES)
def test_truncated_file_is_refused_and_changes_nothing(make_palm, tmp_path, name):
    path: Path = tmp_path / name
    make_palm(seed=1).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    palm = make_palm(seed=2)
    before = bits(palm)
    with pytest.raises(ValueError, match=name):
        palm.load(path)
    assert same(before, bits(palm))


def test_configuration_of_no_palm_is_refused(make_palm, tmp_path):
    palm = make_palm()
    palm._config["num_tokens"] = "many"
    palm.save(tmp_path / "palm.pt")
    with pytest.raises(ValueError, match="palm.pt holds a configuration"):
        PaLM.from_checkpoint(tmp_path / "palm.pt")


def test_failed_save_leaves_the_old_file(make_palm, tmp_path, monkeypatch):
    palm = make_palm(seed=1)
    palm.save(tmp_path / "palm.pt")
    old = (tmp_path / "palm.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        make_palm(seed=2).save(tmp_path / "palm.pt")
    assert (tmp_path / "palm.pt").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["palm.pt"]
