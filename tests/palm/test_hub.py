"""Models as folders and Hub repositories; the Hub is a folder here, behind its library's own functions."""

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from accelerate.utils import load_state_dict
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from safetensors import safe_open

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm import hub
from palm_rlhf_pytorch.palm.hub import DTYPES, choose_weights
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.text.tokenizer_files import tokenizer_of
from palm_rlhf_pytorch.training.folder import NewFolder
from palm_rlhf_pytorch.training.tensor_file import save_tensors

IDS = torch.tensor([[3, 9, 4, 30, 1, 7]])


def same(first: PaLM, second: PaLM) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(make_palm, tmp_path):
    make_palm(qk_rmsnorm=True, finetune_scopes=["a"]).save_pretrained(tmp_path / "m", with_scopes=True)
    return tmp_path / "m"


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# folders


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_folder_gives_the_model_back_to_the_bit(make_palm, tmp_path, effective, dtype):
    palm = make_palm(finetune_scopes=("a",), causal=False, attn_dropout=0.25).bfloat16()
    effective(palm, "a")
    palm.save_pretrained(tmp_path / "new" / "m", with_scopes=True)
    found = PaLM.from_pretrained(tmp_path / "new" / "m", dtype=dtype)
    assert found.config == palm.config and found.training
    assert found.token_emb.weight.dtype == (dtype or torch.bfloat16)
    assert same(palm, found.bfloat16())
    assert sorted(os.listdir(tmp_path / "new" / "m")) == ["README.md", "config.json", "model.safetensors"]
    assert os.listdir(tmp_path / "new") == ["m"]


def test_other_loaders_read_the_weights_and_the_configuration(make_palm, tmp_path):
    palm = make_palm()
    palm.save_pretrained(tmp_path)
    found = load_state_dict(str(tmp_path / "model.safetensors"))
    assert found.keys() == palm.state_dict().keys()  # the tied embedding is there once
    assert all(torch.equal(found[name], tensor) for name, tensor in palm.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dim"] == 24 and config["kind"] == "PaLM"
    card = (tmp_path / "README.md").read_text()
    assert "library_name: palm-rlhf-pytorch" in card and "- palm\n" in card


def test_tokenizer_is_saved_with_the_model(make_palm, tmp_path):
    make_palm(num_tokens=259).save_pretrained(tmp_path / "m", tokenizer=ByteTokenizer())
    assert isinstance(tokenizer_of(tmp_path / "m", num_tokens=259), ByteTokenizer)
    PaLM.from_pretrained(tmp_path / "m")


def test_saving_again_keeps_other_files_and_the_card(folder, make_palm):
    (folder / "README.md").write_text("mine")
    (folder / "notes.txt").write_text("kept")
    other = make_palm(seed=5)
    other.save_pretrained(folder)
    assert same(PaLM.from_pretrained(folder), other)
    assert (folder / "README.md").read_text() == "mine" and (folder / "notes.txt").read_text() == "kept"


def test_failure_leaves_no_folder_and_no_changed_one(make_palm, folder, tmp_path, monkeypatch):
    before = (folder / "model.safetensors").read_bytes()

    def full_disk(path, *args, **kwargs):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(hub, "save_tensors", full_disk)
    for target in (tmp_path / "new", folder):
        with pytest.raises(OSError, match="No space left"):
            make_palm(seed=5).save_pretrained(target)
    assert os.listdir(tmp_path) == ["m"] and (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; give the path of a folder"):
        make_palm().save_pretrained(folder / "model.safetensors")


def test_folder_that_appears_while_a_new_one_is_written_is_kept(make_palm, tmp_path, monkeypatch):
    def meanwhile(path, *args, **kwargs):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "notes.txt").write_text("kept")
        save_tensors(path, *args, **kwargs)

    monkeypatch.setattr(hub, "save_tensors", meanwhile)
    with pytest.raises(OSError, match="Directory not empty .* what stood there is untouched"):
        make_palm().save_pretrained(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and os.listdir(tmp_path / "m") == ["notes.txt"]


def test_what_a_killed_save_left_is_cleared_away_and_a_living_one_is_let_be(make_palm, tmp_path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model.safetensors").write_text("half")
    make_palm().save_pretrained(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    (tmp_path / "mine").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "mine").stat().st_mode  # the umask's
    writing = NewFolder(tmp_path / "other")
    writing.make(ours=lambda name: False)
    with pytest.raises(FileExistsError, match="another process is saving to this path"):
        make_palm().save_pretrained(tmp_path / "other")
    assert writing.partial.is_dir()
    writing.close()


def test_weights_without_a_record_take_config_json(make_palm, tmp_path, folder):
    """A state dict that another program wrote beside the configuration, as accelerate's save_model does."""
    palm = PaLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(palm.state_dict(), folder / "pytorch_model.bin")
    edit(folder, causal=False)
    found = PaLM.from_pretrained(folder)
    assert same(found, palm) and found.config == palm.config | {"causal": False}


def test_configuration_of_a_newer_version_is_refused_by_its_keys(folder):
    edit(folder, rope_theta=5, experts=8)
    with pytest.raises(ValueError, match=r"does not know: rope_theta, experts; upgrade"):
        PaLM.from_pretrained(folder)
    edit(folder, format_version=2)
    with pytest.raises(ValueError, match=r"config\.json has format_version 2; upgrade"):
        PaLM.from_pretrained(folder)


def test_edited_configuration_is_warned_of(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PaLM.from_pretrained(folder)
    edit(folder, causal=False)
    with pytest.warns(UserWarning, match=r"config\.json beside .* says causal False, not True"):
        assert PaLM.from_pretrained(folder).causal
    edit(folder, causal=True)
    assert PaLM.from_pretrained(folder, causal=False).causal is False


def test_file_beside_another_model_s_configuration_has_its_own(folder, make_palm):
    palm = make_palm(causal=False)
    palm.save(folder / "other.pt")
    edit(folder, kind="RewardModel", dim=99)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PaLM.from_pretrained(folder / "other.pt").config == palm.config
    with pytest.raises(ValueError, match=r"config\.json is of a RewardModel, expected PaLM"):
        PaLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("names", "where", "chosen"),
    [
        (["a.pt", "model.safetensors", "README.md"], "m", "model.safetensors"),
        (["weights.pt", "config.json", ".hidden.pt"], "m", "weights.pt"),
        (["palm_410m_8k_v0.pt", "older.pt"], "conceptofmind/palm-410m", "palm_410m_8k_v0.pt"),
        (["palm_150m_v1.pt"], "conceptofmind/palm-150m", "palm_150m_v1.pt"),  # not the name we know
    ],
)
def test_weights_are_chosen_among_a_model_s_files(names, where, chosen):
    assert choose_weights(names, where=where) == chosen


def test_no_choice_among_several_or_none():
    with pytest.raises(ValueError, match=r"m has several files of weights \(a\.pt, b\.bin\); give the path of one"):
        choose_weights(["b.bin", "a.pt"], where="m")
    with pytest.raises(FileNotFoundError, match="m has no file of weights"):
        choose_weights(["README.md"], where="m")


@pytest.mark.parametrize("name", ["missing.pt", "runs/missing.pt", "./runs/missing", "/runs/missing", "one"])
def test_what_is_no_repository_s_name_is_not_asked_for(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    with pytest.raises(FileNotFoundError, match="the model's name is empty"):
        PaLM.from_pretrained("")
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no repository's name"):
        PaLM.from_pretrained(name)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.float8_e4m3fn, torch.complex64, 16])
def test_dtype_must_be_one_that_a_model_computes_in(folder, dtype):
    with pytest.raises(TypeError, match=r"dtype \(.*\) must be torch\.float32, .*torch\.float64 or None"):
        PaLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_computes_in_each_dtype_that_it_may_be_read_in(folder, make_palm, dtype):
    found = PaLM.from_pretrained(folder, dtype=dtype)
    converted = make_palm(qk_rmsnorm=True, finetune_scopes=["a"]).to(dtype)
    assert found(IDS).dtype == dtype and torch.equal(found(IDS), converted(IDS))
    assert {weight.dtype for weight in found.finetune_modules.parameters()} == {torch.float32}
    found(IDS, return_loss=True, finetune_scope="a").backward()
    assert found.token_emb.weight.grad.isfinite().all()
    assert found.generate(9, prompt=IDS, finetune_scope="a").shape == (1, 3)


# the Hub


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A Hub on the disk: what is uploaded to a repository is what is downloaded from it."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, *, repo_id, private, exist_ok):
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision, create_pr):
            for path in Path(folder_path).iterdir():
                (root / repo_id / path.name).write_bytes(path.read_bytes())
            return f"https://huggingface.co/{repo_id}/commit/1"

        def model_info(self, repo_id, *, revision, timeout):
            names = os.listdir(root / repo_id)
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    def download(repo_id, file, *, force_download, revision, cache_dir, token):
        return str(root / repo_id / file)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return root


def test_what_is_pushed_is_what_is_read(make_palm, repositories):
    palm = make_palm(finetune_scopes=["a"])
    url = palm.push_to_hub("me/mine", private=True, with_scopes=True)
    assert url == "https://huggingface.co/me/mine/commit/1"
    assert sorted(os.listdir(repositories / "me/mine")) == ["README.md", "config.json", "model.safetensors"]
    found = PaLM.from_pretrained("me/mine")
    assert same(found, palm) and found.config == palm.config
    with safe_open(repositories / "me/mine/model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    with pytest.raises(ValueError, match=r"repo_id \('mine'\) must be 'owner/name'"):
        palm.push_to_hub("mine")


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (RepositoryNotFoundError, FileNotFoundError, r"a/b: no such file or folder, and no such repository"),
        (HfHubHTTPError, ConnectionError, r"a/b: the Hub answers"),
        (OSError, ConnectionError, r"a/b: .* not in the Hub's cache; the Hub cannot be reached \(no route\)"),
    ],
)
def test_refusals_of_the_hub_are_one_line(tmp_path, monkeypatch, raised, error, message):
    def model_info(self, *args, **kwargs):
        raise raised("no route") if raised is OSError else raised("no route", response=SimpleNamespace(
            headers={}, request=None, status_code=404
        ))  # fmt: skip

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(error, match=message) as found:
        PaLM.from_pretrained("a/b", cache_dir=tmp_path)
    assert "\n" not in str(found.value)


def test_cache_is_taken_where_the_hub_is_out_of_reach(make_palm, tmp_path, monkeypatch):
    cached = tmp_path / "models--a--b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    palm = make_palm()
    palm.save_pretrained(cached / "snapshots" / ("0" * 40))
    assert same(PaLM.from_pretrained("a/b", cache_dir=tmp_path, local_files_only=True), palm)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: (_ for _ in ()).throw(OSError("cut")))
    assert same(PaLM.from_pretrained("a/b", cache_dir=tmp_path), palm)
    with pytest.raises(ConnectionError, match=r"a/c: .* local_files_only=True"):
        PaLM.from_pretrained("a/c", cache_dir=tmp_path, local_files_only=True)
