"""Checkpoints: what comes back is what was saved, nothing half-written stays, and no file runs code."""

import collections
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.training import tensor_file as module
from palm_rlhf_pytorch.training.tensor_file import check_state, load_tensors, save_tensors

BOTH = pytest.mark.parametrize("name", ["palm.pt", "palm.safetensors"])
CONFIG = {"dim": 12, "rate": 0.1, "causal": True, "scopes": ["actor"], "mask": None, "name": "ä"}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "float": torch.randn(3, 5, generator=generator),
        "nonfinite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "bfloat16": torch.randn(7, generator=generator).bfloat16(),
        "half": torch.randn(2, 3, generator=generator).half(),
        "double": torch.randn(4, generator=generator, dtype=torch.float64),
        "int64": torch.tensor([2**62, -1]),
        "int8": torch.tensor([[-128], [127]], dtype=torch.int8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(0.1),
        "integer_scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "parameter": nn.Parameter(torch.ones(2)),
    }


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = tensor.detach().contiguous()
    return plain.dtype, tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def save(path: Path, **changes: Any) -> None:
    save_tensors(path, tensors(), **({"kind": "palm", "config": CONFIG} | changes))


@BOTH
def test_round_trip_is_bit_equal(tmp_path: Path, name: str) -> None:
    path = tmp_path / "new" / "folder" / name
    save(path, extra={"step": 3, "history": (1, [2.5, {"a": None}])})
    found = load_tensors(path, kind="palm")
    assert found.tensors.keys() == tensors().keys()
    for key, tensor in tensors().items():
        assert bits(found.tensors[key]) == bits(tensor), key
        assert not found.tensors[key].requires_grad
    assert found.kind == "palm"
    assert found.config == CONFIG
    assert found.extra == {"step": 3, "history": [1, [2.5, {"a": None}]]}


@BOTH
def test_plain_floats_come_back_exactly(tmp_path: Path, name: str) -> None:
    values = [0.1, 1e-300, 2**53 + 1, np.float64(1 / 3), float("inf")]
    save(tmp_path / name, config={"values": values})
    found = load_tensors(tmp_path / name).config["values"]
    assert found == values
    assert [type(value) for value in found] == [float, float, int, float, float]


def test_extra_holds_the_state_of_an_optimizer(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()
    save(tmp_path / "a.pt", extra={"optimizer": optimizer.state_dict()})
    fresh = torch.optim.AdamW([nn.Parameter(torch.ones(2, 3))], lr=0.5)
    fresh.load_state_dict(load_tensors(tmp_path / "a.pt").extra["optimizer"])
    state = fresh.state_dict()
    assert state["param_groups"][0]["lr"] == 0.1
    assert torch.equal(state["state"][0]["exp_avg_sq"], optimizer.state_dict()["state"][0]["exp_avg_sq"])


@BOTH
@pytest.mark.parametrize("value", [torch.float32, Path("x"), {1.5: 2}, {True: 2}, {1, 2}, torch.ones(1), b"x"])
def test_config_refuses_what_no_format_holds(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=r"config\['odd'\]"):
        save(tmp_path / name, config={"odd": value})
    assert os.listdir(tmp_path) == []


@BOTH
def test_tensor_of_another_layout_is_refused(tmp_path: Path, name: str) -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(2, device="meta"), [1.0]):
        with pytest.raises(TypeError, match="tensors\\['odd'\\]"):
            save_tensors(tmp_path / name, {"odd": tensor}, kind="palm", config={})  # type: ignore[dict-item]


@BOTH
def test_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path, name: str) -> None:
    large = torch.zeros(1_000_000)
    save_tensors(tmp_path / name, {"row": large[:3], "end": large[-2:]}, kind="palm", config={})
    assert (tmp_path / name).stat().st_size < 10_000


@BOTH
def test_tensors_that_share_a_storage_are_saved(tmp_path: Path, name: str) -> None:
    shared = torch.arange(5.0)
    save_tensors(tmp_path / name, {"a": shared, "b": shared, "c": shared[1:]}, kind="palm", config={})
    found = load_tensors(tmp_path / name).tensors
    assert found["a"].tolist() == found["b"].tolist() == [0, 1, 2, 3, 4]
    assert found["c"].tolist() == [1, 2, 3, 4]


@BOTH
def test_bare_state_dict_is_read(tmp_path: Path, name: str) -> None:
    state = nn.Linear(3, 2).state_dict()
    if name.endswith("pt"):
        torch.save(state, tmp_path / name)
    else:
        from safetensors.torch import save_file

        save_file(dict(state), tmp_path / name, metadata={"format": "pt"})
    found = load_tensors(tmp_path / name, kind="palm")
    assert (found.kind, found.config, found.extra) == (None, {}, {})
    assert type(found.tensors) is dict
    assert torch.equal(found.tensors["weight"], state["weight"])


@BOTH
def test_format_is_told_by_content(tmp_path: Path, name: str) -> None:
    save(tmp_path / name)
    other = tmp_path / ("x.safetensors" if name.endswith("pt") else "x.pt")
    (tmp_path / name).rename(other)
    assert load_tensors(other).config == CONFIG


# damaged and foreign files


@BOTH
def test_truncated_file_names_the_path(tmp_path: Path, name: str) -> None:
    save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    cut = tmp_path / f"cut-{name}"
    for size in (0, 1, 3, 8, 9, 30, 100, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"cut-{name}"):
            load_tensors(cut)


@BOTH
def test_flipped_bit_is_refused_or_harmless(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    original = {"a": torch.arange(9.0), "b": torch.tensor(3)}
    save_tensors(path, original, kind="palm", config={"dim": 3})
    whole = path.read_bytes()
    refused = 0
    places = np.random.default_rng(0).choice(len(whole), size=250, replace=False)
    for place in places.tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            found = load_tensors(path)
        except ValueError as error:
            assert name in str(error)
            refused += 1
        else:  # the zip has bytes that mean nothing (alignment)
            assert (found.kind, found.config, found.extra) == ("palm", {"dim": 3}, {})
            assert {key: bits(tensor) for key, tensor in found.tensors.items()} == {
                key: bits(tensor) for key, tensor in original.items()
            }
    assert refused == 250 if name.endswith("safetensors") else refused > 50


def test_flipped_weight_of_a_bare_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bare.pt"
    torch.save({"a": torch.full((50,), 1.5)}, path)
    whole = path.read_bytes()
    place = whole.index(struct.pack("<f", 1.5) * 4)
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    assert torch.load(path, weights_only=True)["a"][0] != 1.5  # torch itself does not see it
    with pytest.raises(ValueError, match="damaged"):
        load_tensors(path)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def payloads(folder: Path, target: Path) -> list[Path]:
    """Files of every kind whose unpickling makes the folder `target`."""
    harmless = {"format_version": 1, "kind": "palm", "config": {}, "extra": {}, "tensors": {"a": torch.ones(1)}}
    odd: dict[str, Any] = {
        "whole": Payload(target),
        "value": {"a": torch.ones(1), "b": Payload(target)},
        "config": harmless | {"config": Payload(target)},
        "extra": harmless | {"extra": {"a": [Payload(target)]}},
        "tensors": harmless | {"tensors": {"a": Payload(target)}},
        "key": collections.OrderedDict([("a", torch.ones(1)), ("b", Payload(target))]),
    }
    files = []
    for name, record in odd.items():
        for zipped in (True, False):
            files.append(folder / f"{name}-{zipped}.pt")
            torch.save(record, files[-1], _use_new_zipfile_serialization=zipped)
    for protocol in range(6):
        files.append(folder / f"pickle-{protocol}.pt")
        files[-1].write_bytes(pickle.dumps(Payload(target), protocol))
        files.append(folder / f"pickle-{protocol}.safetensors")
        files[-1].write_bytes(pickle.dumps({"a": Payload(target)}, protocol))
    return files


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    files = payloads(tmp_path, target)
    for path in files:
        with pytest.raises(ValueError, match=path.name) as caught:
            load_tensors(path)
        assert "weights_only" not in str(caught.value)
        assert not target.exists(), path.name
    assert "posix.mkdir" in str(pytest.raises(ValueError, load_tensors, files[0]).value)
    torch.load(files[0], weights_only=False)
    assert target.exists()  # the payload does work


def test_compressed_records_are_refused_unread(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", compression=zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in source.namelist():
            bomb.writestr(entry, source.read(entry))
    with pytest.raises(ValueError, match="compressed"):
        load_tensors(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello, this is text", "starts with b'hello"),
        (b"{'a': 1}{'b': 2}", "starts with"),
        (b"\x93NUMPY and so on", "numpy array"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS pointer"),
        (b"\xff" * 7 + b"\x7f{ huge header", "starts with"),
        (struct.pack("<Q", 90_000_000) + b'{"a": 1}', "truncated or damaged"),
    ],
)
def test_foreign_file_says_what_it_is(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "odd.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\.bin.*{reason}"):
        load_tensors(tmp_path / "odd.bin")


def test_foreign_zip_says_what_it_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    with zipfile.ZipFile(tmp_path / "b.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    torch.save({"state_dict": {"a": torch.ones(1)}, "epoch": 3}, tmp_path / "c.pt")
    torch.save([torch.ones(1)], tmp_path / "d.pt")
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("e/data.pkl", b"\x80\x02}.")
        archive.writestr("e/constants.pkl", b"\x80\x02).")
    reasons = {"a.npz": "numpy .npz", "b.docx": "word/document.xml", "c.pt": "'state_dict'", "d.pt": "no dict"}
    for name, reason in (reasons | {"e.pt": "TorchScript"}).items():
        with pytest.raises(ValueError, match=rf"{name}.*{reason}"):
            load_tensors(tmp_path / name)


@BOTH
def test_checkpoint_of_another_kind_names_both(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, kind="reward")
    assert load_tensors(tmp_path / name).kind == "reward"
    with pytest.raises(ValueError, match=rf"{name}.*'reward', expected 'palm'"):
        load_tensors(tmp_path / name, kind="palm")


@BOTH
def test_newer_format_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT_VERSION", 9)
    save(tmp_path / name)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"{name} has format_version 9.*up to 1"):
        load_tensors(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [{"kind": 3}, {"config": [1]}, {"extra": None}, {"tensors": [1]}, {"tensors": {"a": 1}}, {"format_version": "1"}],
)
def test_record_of_wrong_types_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"format_version": 1, "kind": "palm", "config": {}, "extra": {}, "tensors": {"a": torch.ones(1)}}
    torch.save(record | change, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt is truncated or damaged"):
        load_tensors(tmp_path / "odd.pt")


@BOTH
def test_missing_file_and_folder_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        load_tensors(tmp_path / name)
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=name):
        load_tensors(tmp_path / name)
    with pytest.raises(ValueError, match="folder"):
        load_tensors(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(ValueError, match="pipe"):
        load_tensors(tmp_path / "pipe.pt")


def test_file_saved_on_cuda_loads_on_the_cpu(tmp_path: Path) -> None:
    save(tmp_path / "cpu.pt")
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as source,
        zipfile.ZipFile(tmp_path / "cuda.pt", "w") as target,
    ):
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith("data.pkl"):
                tag, moved = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
                assert tag in content
                content = content.replace(tag, moved)
            target.writestr(entry, content)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / "cuda.pt", weights_only=True)
    found = load_tensors(tmp_path / "cuda.pt")
    assert all(tensor.device.type == "cpu" for tensor in found.tensors.values())
    assert bits(found.tensors["float"]) == bits(tensors()["float"])


# writing


@BOTH
@pytest.mark.parametrize("fault", [RuntimeError("odd"), KeyboardInterrupt()])
def test_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, name: str, fault: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def half_way(*arguments: Any) -> bytes:
        for target in arguments:
            if hasattr(target, "write"):
                target.write(before[: len(before) // 2])
                target.flush()
        raise fault

    monkeypatch.setattr(module.torch, "save", half_way)
    monkeypatch.setattr(module.safetensors.torch, "save", half_way)
    with pytest.raises(type(fault)):
        save(tmp_path / name, kind="other")
    assert (tmp_path / name).read_bytes() == before
    assert os.listdir(tmp_path) == [name]


SCRIPT = """
import resource, sys, torch
from palm_rlhf_pytorch.training.tensor_file import save_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    save_tensors(sys.argv[1], {"a": torch.zeros(100_000)}, kind="palm", config={})
except OSError as error:
    print(error)
"""


@BOTH
def test_full_disk_names_the_path_and_keeps_the_old_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    save(path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert "50,000 bytes" in done.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@BOTH
def test_save_respects_the_umask_and_keeps_permissions(tmp_path: Path, name: str) -> None:
    old = os.umask(0o027)
    try:
        save(tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
        (tmp_path / name).chmod(0o604)
        save(tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o604
    finally:
        os.umask(old)


@BOTH
def test_save_refuses_folders_links_and_devices(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").write_bytes(b"precious")
    (tmp_path / name).symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="symbolic link"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="folder"):
        save(tmp_path)
    with pytest.raises(ValueError, match="device"):
        save(Path("/dev/null"))
    with pytest.raises(ValueError, match="names no file"):
        save(Path("/"))
    assert (tmp_path / "real").read_bytes() == b"precious"


@BOTH
def test_saving_leaves_global_state_alone(tmp_path: Path, name: str) -> None:
    before = torch.random.get_rng_state()
    save(tmp_path / name)
    load_tensors(tmp_path / name)
    assert torch.equal(before, torch.random.get_rng_state())


def test_safetensors_file_is_plain_to_other_readers(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(whole[8 : 8 + struct.unpack("<Q", whole[:8])[0]])
    assert json.loads(header["__metadata__"]["config"]) == CONFIG
    assert header["bfloat16"]["dtype"] == "BF16"


# check_state


def test_check_state_accepts_equal_names_and_shapes() -> None:
    check_state(nn.Linear(3, 2).state_dict(), nn.Linear(3, 2).state_dict(), path="a.pt")


def test_check_state_lists_the_first_five_of_each() -> None:
    expected = {f"layer{place}": torch.ones(1) for place in range(7)} | {"weight": torch.ones(2, 3)}
    found = {"weight": torch.ones(3, 2), "odd": torch.ones(1)}
    with pytest.raises(ValueError, match=r"^a\.pt does not fit") as caught:
        check_state(expected, found, path="a.pt")
    message = str(caught.value)
    assert "7 missing keys (layer0, layer1, layer2, layer3, layer4, ...)" in message
    assert "1 unexpected keys (odd)" in message
    assert "1 differing shapes (weight: file (3, 2), model (2, 3))" in message
