"""Judges as folders, and in the layout of the published PaLMs' judges; tests/reference has that release's numbers."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, load_judge

REFERENCE = Path(__file__).parents[1] / "reference"
SIZES = {"num_tokens": 97, "dim": 48, "depth": 2, "dim_head": 16, "heads": 3}
IDS = torch.tensor([[3, 9, 4, 30, 1, 7], [5, 5, 96, 0, 2, 8]])


def load_into_another(path: Path) -> RewardModel:
    with pytest.warns(UserWarning, match="pool_prompt .False here, True in the file."):
        return RewardModel(PaLM(**SIZES), num_binned_output=3).load(path)


def state() -> dict[str, torch.Tensor]:
    return dict(torch.load(REFERENCE / "reward_model.pt", weights_only=True))


@pytest.mark.parametrize(
    "load", [RewardModel.from_pretrained, RewardModel.from_checkpoint, load_judge, load_into_another]
)
def test_published_reward_model_gives_its_release_s_numbers(load):
    given = {name: torch.from_numpy(array) for name, array in np.load(REFERENCE / "reward_model.npz").items()}
    model = load(REFERENCE / "reward_model.pt").eval()
    assert {name: model.palm.config[name] for name in SIZES} == SIZES and model.settings.num_binned_output == 5
    logits = model.bin_logits(given["seq"], mask=given["mask"], prompt_mask=given["prompt_mask"])
    torch.testing.assert_close(logits, given["pred"], atol=1e-4, rtol=0)


def test_adapter_head_and_embeddings_stay_float32():
    stored, model = state(), RewardModel.from_pretrained(REFERENCE / "reward_model.pt", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.palm.parameters()} == {torch.bfloat16}
    assert torch.equal(model.head.weight, stored["to_pred.weight"])
    assert torch.equal(model.adapter.layers["1"].o.A, stored["palm.finetune_modules.reward.1.3.A"])
    assert torch.equal(model.prompt_embed, stored["prompt_embed"][0, 0])


def test_scalar_head_and_trunk_without_adapter_are_read(tmp_path):
    stored = {name: tensor for name, tensor in state().items() if "finetune" not in name and "to_pred" not in name}
    stored["to_pred.0.weight"] = torch.full((1, 48), 0.5)
    torch.save(stored, tmp_path / "reward.pt")
    model = RewardModel.from_pretrained(tmp_path / "reward.pt").eval()
    assert model.adapter is None and model.settings.num_binned_output == 0
    hidden = model.palm.embed(IDS, extra_embed=stored["response_embed"])
    torch.testing.assert_close(model(IDS), hidden.mean(dim=1).sum(dim=-1) * 0.5)


def test_one_kind_is_not_taken_for_another(tmp_path):
    with pytest.raises(ValueError, match=r"reward_model\.pt holds a RewardModel, expected a PaLM"):
        PaLM.from_pretrained(REFERENCE / "reward_model.pt")
    with pytest.raises(ValueError, match=r"palm\.pt holds a PaLM, expected a RewardModel"):
        RewardModel.from_pretrained(REFERENCE / "palm.pt")
    PaLM(**SIZES).save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"kind 'PaLM', expected 'RewardModel'"):
        RewardModel.from_pretrained(tmp_path / "m")


def test_folder_gives_a_reward_model_back(tmp_path):
    model = RewardModel.from_pretrained(REFERENCE / "reward_model.pt", label_offset=1).eval()
    model.score_mean.fill_(0.25)
    model.save_pretrained(tmp_path / "judge")
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["palm"]["dim"] == 48
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = RewardModel.from_pretrained(tmp_path / "judge").eval()
    assert found.config == model.config and found.settings.label_offset == 1
    assert torch.equal(found(IDS), model(IDS)) and torch.equal(load_judge(tmp_path / "judge").eval()(IDS), model(IDS))
    with pytest.raises(TypeError, match="bins: no argument of RewardModel or PaLM"):
        RewardModel.from_pretrained(tmp_path / "judge", bins=3)


def test_folder_gives_an_ensemble_back_with_one_trunk(tmp_path):
    palm = PaLM(**SIZES)
    members = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        members.append(RewardModel(palm))
    ensemble = RewardEnsemble(members).eval()
    ensemble.save_pretrained(tmp_path / "judges")
    for load in (RewardEnsemble.from_pretrained, load_judge):
        found = load(tmp_path / "judges").eval()
        assert torch.equal(found(IDS), ensemble(IDS))
        assert found.models[0].palm.token_emb.weight.data_ptr() == found.models[2].palm.token_emb.weight.data_ptr()
