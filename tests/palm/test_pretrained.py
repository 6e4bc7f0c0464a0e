"""The published layout: what it computes, what is inferred of it, and what in it is refused.

tests/reference holds a small model saved by palm-rlhf-pytorch 0.2.1, with the numbers that release computes.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.pretrained import PUBLISHED
from tests.benchmarks.loading import measure, published_state

REFERENCE = Path(__file__).parents[1] / "reference"
SIZES = {"num_tokens": 97, "dim": 48, "depth": 2, "dim_head": 16, "heads": 3}


def reference() -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(REFERENCE / "palm.npz").items()}


def state() -> dict[str, torch.Tensor]:
    return dict(torch.load(REFERENCE / "palm.pt", weights_only=True))


def written(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, tmp_path / "palm.pt")
    return tmp_path / "palm.pt"


def load_into_new(path: Path) -> PaLM:
    return PaLM(**SIZES, cross_entropy_ignore_index=0).load(path)


@pytest.mark.parametrize("load", [PaLM.from_pretrained, PaLM.from_checkpoint, load_into_new])
def test_published_checkpoint_gives_its_release_s_numbers(load):
    numbers, palm = reference(), load(REFERENCE / "palm.pt").eval()
    assert {name: palm.config[name] for name in SIZES} == SIZES
    torch.testing.assert_close(palm(numbers["seq"]), numbers["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(palm(numbers["seq"], return_loss=True), numbers["loss"].reshape(()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".fn.", "."),
    ],
)
def test_wrapped_names_are_the_same_model(tmp_path, change):
    path = written(tmp_path, {change(name): tensor for name, tensor in state().items()})
    numbers = reference()
    logits = PaLM.from_pretrained(path).eval()(numbers["seq"])
    torch.testing.assert_close(logits, numbers["logits"], atol=1e-4, rtol=0)


def test_safetensors_without_the_tied_tensor_and_the_buffers_is_the_same_model(tmp_path):
    kept = {name: tensor for name, tensor in state().items() if "rotary" not in name and "to_logits" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"dim": 48, "model_type": "another program's"}))
    numbers = reference()
    palm = PaLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(palm(numbers["seq"]), numbers["logits"], atol=1e-4, rtol=0)


def test_scopes_come_along(tmp_path):
    """The reward model's trunk is a PaLM with a scope, whose numbers tests/reward/test_published.py compares."""
    stored = torch.load(REFERENCE / "reward_model.pt", weights_only=True)
    trunk = {name.removeprefix("palm."): tensor for name, tensor in stored.items() if name.startswith("palm.")}
    path = written(tmp_path, trunk)
    palm = PaLM.from_pretrained(path, dtype=torch.bfloat16)
    assert palm.finetune_modules.settings == {"reward": {"r": 8, "alpha": None, "last_layers": None}}
    found = palm.finetune_modules["reward"].layers["1"].v.B
    assert torch.equal(found, trunk["finetune_modules.reward.1.2.B"])  # float32 still: adapters are
    assert palm.token_emb.weight.dtype == torch.bfloat16


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor | None] = {**state(), **changes}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.fn.norm.beta": torch.full((48,), 0.1)}, r"layers\.1\.fn\.norm\.beta is not zero"),
        ({"layers.1.fn.rotary_emb.inv_freq": torch.ones(8)}, r"layers\.1\.fn\.rotary_emb\.inv_freq holds \[1\.0, 1\.0"),
        ({"layers.0.fn.rotary_emb.scale": torch.ones(8)}, r"rotary_emb\.scale holds"),
        ({"to_logits.weight": torch.ones(97, 48)}, r"to_logits\.weight differs from token_emb\.weight"),
        ({"layers.1.fn.attn_out.weight": None}, r"it lacks layers\.1\.fn\.attn_out\.weight"),
        ({"layers.0.fn.attn_out.weight": torch.ones(48, 40)}, r"shapes contradict.*464 rows, attn_out 40 columns"),
        ({"layers.1.fn.norm.gamma": torch.ones(47)}, r"layers\.1\.norm\.weight: file \(47,\), model \(48,\)"),
        ({"value_head.weight": torch.ones(1)}, r"1 unexpected keys \(value_head\.weight\)"),
        ({f"layers.{i}.fn.{side}_scale": torch.ones(16) for i in (0, 1) for side in "qk"}, r"give qk_scale \(8\.0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    path = written(tmp_path, changed(**changes))
    with pytest.raises(ValueError, match=message) as raised:
        PaLM.from_pretrained(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_normalised_queries_and_keys_take_the_scale_that_is_given(tmp_path):
    gains = {f"layers.{i}.fn.{side}_scale": torch.full((16,), 2.0) for i in (0, 1) for side in "qk"}
    palm = PaLM.from_pretrained(written(tmp_path, changed(**gains)), qk_scale=0.25)
    assert palm.config["qk_rmsnorm"] and palm.layers[1].scale == 0.25
    assert torch.equal(palm.layers[1].k_norm.weight, torch.full((16,), 2.0))


def test_arguments_that_tensors_contradict_are_refused_and_others_taken():
    with pytest.raises(ValueError, match=r"palm\.pt: heads is 3, not 6"):
        PaLM.from_pretrained(REFERENCE / "palm.pt", heads=6)
    with pytest.raises(TypeError, match="head_count: no argument of PaLM"):
        PaLM.from_pretrained(REFERENCE / "palm.pt", head_count=3)
    assert PaLM.from_pretrained(REFERENCE / "palm.pt", causal=False).causal is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_checkpoints_reach_the_length_they_were_trained_at(dtype):
    """8,192 tokens; their xPos base is 512. float16's range ends before."""
    palm = PaLM(num_tokens=7, dim=4, depth=1, dim_head=128, heads=1).to(dtype)
    assert palm.max_length >= 8192


def test_bare_weights_of_our_layout_need_what_they_do_not_tell(tmp_path, make_palm):
    palm = make_palm()
    path = written(tmp_path, palm.state_dict())
    with pytest.raises(ValueError, match=r"holds weights without a configuration: .* dim_head"):
        PaLM.from_pretrained(path)
    found = PaLM.from_pretrained(path, dim_head=8).eval()
    ids = torch.tensor([[3, 9, 4, 30, 1, 7]])
    assert torch.equal(found(ids), palm(ids))


@pytest.mark.slow
def test_public_150m_shape_loads_in_little_memory_and_generates(tmp_path):
    path = tmp_path / "palm_150m_8k_v0.pt"
    known = PUBLISHED["conceptofmind/palm-150m"]
    torch.save(published_state(known, dtype=torch.bfloat16), path)
    measured = measure(path, "bfloat16")
    assert (
        measured["weights"] == 144_811_776 * 2
    )  # embedding 50304 x 768; 12 layers of 7424 + 4096 + 1, and a norm, x 768
    assert measured["peak"] <= 1.1 * measured["weights"]
    palm = PaLM.from_pretrained(path).eval()
    new = palm.generate(7, torch.tensor([11, 50_303, 5, 0]), temperature=0.0)
    assert new.shape == (3,) and int(new.max()) < 50_304
