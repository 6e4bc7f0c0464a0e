"""Tensors read piece by piece are those of the file, in the dtype and the arrangement asked for."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from palm_rlhf_pytorch.training import tensor_reader
from palm_rlhf_pytorch.training.tensor_reader import Part, TensorReader

FORMATS = pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors", "zip-named.safetensors"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tensor_reader, "PIECE", 40)  # a row or two
    monkeypatch.setattr(tensor_reader, "HELD", 100)
    monkeypatch.setattr(tensor_reader, "TOUCH", 0)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    if path.name == "weights.safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        with path.open("wb") as file:
            torch.save(tensors, file)
    return path


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(7, 5, generator=generator), "narrow": torch.randn(7, 3, generator=generator).bfloat16(),
        "gain": torch.randn(1, 1, 6, generator=generator), "one": torch.tensor(2.5), "none": torch.empty(0, 4),
    }  # fmt: skip


@FORMATS
def test_whole_tensors_come_as_stored(tmp_path, name):
    expected = tensors()
    reader = TensorReader(write(tmp_path / name, expected))
    for key, part in reader.whole().items():
        found = reader.read(part)
        assert found.dtype == expected[key].dtype and torch.equal(found, expected[key])


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_joined_reshaped_and_converted(tmp_path, name, dtype):
    stored = tensors()
    reader = TensorReader(write(tmp_path / name, stored))
    joined = reader.read(Part(("wide", "narrow"), torch.Size((7, 8)), dim=1), dtype=dtype)
    assert torch.equal(joined, torch.cat((stored["wide"].to(dtype), stored["narrow"].to(dtype)), dim=1))
    assert torch.equal(reader.read(Part(("gain",), torch.Size((6,))), dtype=dtype), stored["gain"][0, 0].to(dtype))
    assert torch.equal(reader.read(Part((), torch.Size((2,))), dtype=dtype), torch.zeros(2, dtype=dtype))


def test_transposed_tensor_of_a_zip_is_read_by_its_rows(tmp_path):
    stored = torch.arange(12.0).reshape(3, 4).T
    torch.save({"t": stored}, tmp_path / "t.pt")
    reader = TensorReader(tmp_path / "t.pt")
    assert torch.equal(reader.read(reader.whole()["t"]), stored)


def test_what_was_read_stays_when_the_file_changes(tmp_path):
    path = write(tmp_path / "weights.safetensors", tensors())
    reader = TensorReader(path)
    found = reader.read(reader.whole()["wide"])
    content = bytearray(path.read_bytes())
    content[-200:] = bytes(200)
    with path.open("r+b") as file:  # in place: a map of the file would show it
        file.write(content)
    assert torch.equal(found, tensors()["wide"])


def test_file_replaced_meanwhile_is_refused(tmp_path):
    path = write(tmp_path / "weights.pt", tensors())
    reader = TensorReader(path)
    write(tmp_path / "other.pt", {"wide": torch.zeros(7, 5)}).replace(path)
    with pytest.raises(ValueError, match=r"weights.pt was replaced while it was read"):
        reader.read(reader.whole()["wide"])


def test_equal_tensors_are_told_whether_stored_once_or_twice(tmp_path):
    wide = tensors()["wide"]
    other = wide.clone()
    other[6, 4] += 1
    reader = TensorReader(write(tmp_path / "w.pt", {"a": wide, "tied": wide, "copy": wide.clone(), "other": other}))
    assert reader.same("a", "tied") and reader.same("a", "copy") and not reader.same("a", "other")
