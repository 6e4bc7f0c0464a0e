"""A run's checkpoints: what comes back is what was saved, to the bit, and what should stand does."""

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from palm_rlhf_pytorch.training import checkpoint as module
from palm_rlhf_pytorch.training import folder as folder_module
from palm_rlhf_pytorch.training.checkpoint import Checkpoint, Checkpoints, load_checkpoint, save_checkpoint
from palm_rlhf_pytorch.training.folder import NewFolder
from palm_rlhf_pytorch.training.manifest import CheckpointError

KIND = "test"


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = tensor.detach().resolve_conj().contiguous()
    return plain.dtype, tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def save(path: Path, step: int = 3, **changes: Any) -> None:
    content = {"values": {"step": step}, "tensors": {"model": {"weight": torch.full((2, 3), float(step))}}}
    save_checkpoint(path, **({"kind": KIND, "step": step} | content | changes))


def save_step(checkpoints: Checkpoints, step: int, **changes: Any) -> Path:
    tensors = {"model": {"weight": torch.full((2, 3), float(step))}}
    return checkpoints.save(step, **({"kind": KIND, "values": {}, "tensors": tensors} | changes))


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# round trips


def tensors() -> dict[str, dict[str, Tensor]]:
    shared = torch.arange(7.0)
    special = torch.tensor([math.nan, math.inf, -0.0])
    floats = {str(dtype): special.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)}
    floats |= {str(dtype): torch.tensor([0.5, -3.0]).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    integers = (torch.int8, torch.int16, torch.int32, torch.int64)
    unsigned = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
    return {
        "model": floats | {str(dtype): torch.tensor([[-7], [100]], dtype=dtype) for dtype in integers},
        "optimizer": {
            "bool": torch.tensor([True, False, True]),
            "complex": torch.tensor([1 + 2j]).conj(),
            "scalar": torch.tensor(0.1),
            "empty": torch.empty(0, 3),
            "transposed": torch.arange(6.0).reshape(2, 3).T,
            "parameter": nn.Parameter(torch.ones(2)),
            "a weight/ä": shared,
            "again": shared,
            "view": shared[2:5],
        },
        "unsigned": {str(dtype): torch.tensor([torch.iinfo(dtype).max], dtype=dtype) for dtype in unsigned},
        "nothing": {},
    }


@pytest.mark.parametrize("accelerator", [None, "cpu"])
def test_tensors_files_and_metrics_come_back_to_the_bit(tmp_path: Path, accelerator: str | None) -> None:
    attached = tmp_path / "experience.bin"
    attached.write_bytes(b"\0\1\2" * 5)
    path = tmp_path / "new" / "final"
    save_checkpoint(
        path, kind=KIND, step=12, values={"name": "ä"}, tensors=tensors(), metrics={"reward/score": math.nan, "n": 2},
        files={"experience-0.bin": attached, "model": attached, "rows.safetensors": attached},
        accelerator=Accelerator(cpu=True) if accelerator else None,
    )  # fmt: skip
    found = load_checkpoint(path, kind=KIND)
    assert isinstance(found, Checkpoint) and (found.path, found.kind, found.step) == (path, KIND, 12)
    assert {group: set(named) for group, named in found.tensors.items()} == {
        group: set(named) for group, named in tensors().items()
    }
    for group, named in tensors().items():
        for name, tensor in named.items():
            assert bits(found.tensors[group][name]) == bits(tensor), name
    assert found.files == {name: path / name for name in ("experience-0.bin", "model", "rows.safetensors")}
    assert found.files["experience-0.bin"].read_bytes() == b"\0\1\2" * 5
    assert math.isnan(found.metrics["reward/score"]) and found.metrics["n"] == 2.0
    assert names(path.parent) == ["final"]


def test_values_come_back_to_the_bit_and_type(tmp_path: Path) -> None:
    floats = [0.1, 5e-324, -0.0, 1.7976931348623157e308, 1e22, math.inf, -math.inf, math.nan, -math.nan]
    floats.append(struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))[0])
    plain = {"$float": "7ff8000000000000", "$$": [{"$float": 1.5}, {}], "": None, "ä\ud800": [True, 1, 2**200, "1"]}
    save(tmp_path / "a", values={"floats": floats, "plain": plain})
    found = load_checkpoint(tmp_path / "a", kind=KIND).values
    assert [struct.pack(">d", value) for value in found["floats"]] == [struct.pack(">d", value) for value in floats]
    assert found["plain"] == plain
    assert [type(value) for value in found["plain"]["ä\ud800"]] == [bool, int, int, str]


def test_tensors_do_not_change_with_the_files_afterwards(tmp_path: Path) -> None:
    save(tmp_path / "a")
    found = load_checkpoint(tmp_path / "a", kind=KIND).tensors["model"]["weight"]
    with (tmp_path / "a" / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * os.fstat(file.fileno()).st_size)
    assert found.tolist() == [[3.0] * 3] * 2


def test_attached_file_is_a_copy_that_later_writing_does_not_reach(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"abc")
    (tmp_path / "alias").symlink_to("rows")
    save(tmp_path / "a", files={"rows-0": tmp_path / "alias"})
    with (tmp_path / "rows").open("ab") as file:
        file.write(b"d")
    found = load_checkpoint(tmp_path / "a", kind=KIND).files["rows-0"]
    assert found.read_bytes() == b"abc" and not found.is_symlink()


# what is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": {"a": [1, {"b": (1, 2)}]}}, TypeError, r"values\['a'\]\[1\]\['b'\] is a tuple"),
        ({"values": {"a": {1: 2}}}, TypeError, r"values\['a'\] has the key 1"),
        ({"values": {"a": torch.ones(1)}}, TypeError, r"values\['a'\] is a Tensor"),
        ({"values": {"a": "x" * 10_000_001}}, ValueError, "values take 10,000,.* at most 10,000,000"),
        ({"metrics": {"loss": "low"}}, TypeError, r"metrics\['loss'\] is a str"),
        ({"tensors": {"model": {"a": [1.0]}}}, TypeError, r"tensors\['model'\]\['a'\] is a list"),
        ({"tensors": {"model": {"a": torch.eye(3).to_sparse()}}}, TypeError, r"tensors\['model'\]\['a'\] .*sparse"),
        ({"tensors": {"model": {"a": torch.empty(2, device="meta")}}}, TypeError, "meta"),
        ({"tensors": {"model": {"__metadata__": torch.ones(1)}}}, ValueError, "__metadata__"),
        ({"tensors": {"../model": {}}}, ValueError, r"'\.\./model\.safetensors' must be of letters"),
        ({"files": {"a/b": "rows"}}, ValueError, "'a/b' must be of letters"),
        ({"files": {"manifest.json": "rows"}}, ValueError, "not manifest.json"),
        ({"files": {"model.safetensors": "rows"}}, ValueError, r"names that other files have too: \['model.safe"),
        ({"files": {"a": "absent"}}, ValueError, r"files\['a'\] \(absent\) is missing"),
        ({"files": {"a": "."}}, ValueError, r"files\['a'\] \(\.\) is missing or no ordinary file"),
        ({"step": -1}, ValueError, r"step \(-1\)"),
        ({"step": True}, ValueError, r"step \(True\)"),
        ({"kind": ""}, ValueError, "kind"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").write_bytes(b"abc")
    with pytest.raises(error, match=message):
        save(tmp_path / "runs" / "a", **changes)
    assert not (tmp_path / "runs").exists() or names(tmp_path / "runs") == []


def test_values_nested_in_themselves_are_refused(tmp_path: Path) -> None:
    values: dict[str, Any] = {}
    values["self"] = values
    with pytest.raises(ValueError, match="nested deeper than 100"):
        save(tmp_path / "a", values=values)


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "manifest.json").write_text(json.dumps({"name": "mine"}))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("thesis")
    for name, message in (("thesis", "something else"), ("file", "is a file"), ("link", "symbolic link")):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / name)
    with pytest.raises(ValueError, match="names no folder"):
        save(Path("/"))
    assert names(tmp_path) == ["file", "link", "thesis"] and names(tmp_path / "thesis") == ["manifest.json"]


def test_replaced_checkpoint_is_the_new_one_alone(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"abc")
    for name in ("final", "step-00000005"):
        save(tmp_path / name, step=5, files={"rows": tmp_path / "rows"})
        save(tmp_path / name, step=5, values={"second": True}, files={"more": tmp_path / name / "rows"})
        found = load_checkpoint(tmp_path / name, kind=KIND)
        assert found.values == {"second": True} and found.files["more"].read_bytes() == b"abc"
        assert names(tmp_path / name) == ["manifest.json", "model.safetensors", "more"]
    assert names(tmp_path) == ["final", "rows", "step-00000005"]


@pytest.mark.parametrize("place", ["begin", "write", "finish"])
def test_failure_of_another_process_is_told_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    save(tmp_path / "a", step=1)
    before = load_checkpoint(tmp_path / "a", kind=KIND).values
    rounds = iter(("begin", "write", "finish"))

    def gather_object(told: list[Any]) -> list[Any]:
        return [*told, ([{}], None) if next(rounds) != place else ([], "OSError: disk full")]

    monkeypatch.setattr(folder_module, "gather_object", gather_object)
    with pytest.raises(RuntimeError, match="rank 1: OSError: disk full"):
        save(tmp_path / "a", step=2, accelerator=Accelerator(cpu=True))
    if place != "finish":  # where only the main process works
        assert load_checkpoint(tmp_path / "a", kind=KIND).values == before
    assert names(tmp_path) == ["a"]


# the checkpoints of a run


@pytest.mark.parametrize(
    ("scores", "maximize", "kept"),
    [
        ([1.0, 5.0, 2.0, 3.0, 4.0], True, [2, 4, 5]),
        ([1.0, 5.0, 2.0, 3.0, 4.0], False, [1, 4, 5]),
        ([math.nan, None, -math.inf, 0.5, math.nan], True, [4, 5]),
        ([math.nan, 3.0, None, math.nan, None], False, [2, 4, 5]),
        ([7.0, 7.0, 1.0, 1.0, 1.0], True, [2, 4, 5]),
    ],
)
def test_last_and_best_are_kept(tmp_path: Path, scores: list[float | None], maximize: bool, kept: list[int]) -> None:
    checkpoints = Checkpoints(tmp_path / "run", keep_last=2, keep_best="reward/score", maximize=maximize)
    assert checkpoints.steps() == [] and checkpoints.latest(kind=KIND) is None
    for step, score in enumerate(scores, start=1):
        checkpoints = Checkpoints(tmp_path / "run", keep_last=2, keep_best="reward/score", maximize=maximize)
        path = save_step(checkpoints, step, metrics={} if score is None else {"reward/score": score})
        assert path == tmp_path / "run" / f"step-0000000{step}"
    assert checkpoints.steps() == kept
    assert names(tmp_path / "run") == [f"step-0000000{step}" for step in kept]
    found = checkpoints.latest(kind=KIND)
    assert found is not None and found.step == 5 and found.tensors["model"]["weight"].unique().tolist() == [5.0]


def test_steps_of_any_size_are_ordered_as_numbers(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in (0, 99_999_999, 100_000_000):
        save_step(checkpoints, step)
    for name in ("step-1", "step-000000007", "step-00000007.partial", "notes"):  # not as they are named
        (tmp_path / name).mkdir()
    assert checkpoints.steps() == [0, 99_999_999, 100_000_000]
    with pytest.raises(ValueError, match=r"step \(1000000000000000000\)"):
        save_step(checkpoints, 10**18)
    with pytest.raises(ValueError, match=r"keep_last \(0\)"):
        Checkpoints(tmp_path, keep_last=0)


def test_what_a_kill_left_is_no_checkpoint_and_is_cleared_away(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = Checkpoints(run)
    save_step(checkpoints, 4)
    for hidden in (".step-00000009.partial", ".step-00000003.removed", ".step-00000004.replaced", ".mine.partial"):
        (run / hidden).mkdir()
        (run / hidden / "manifest.json").write_text("half")
    assert checkpoints.steps() == [4]
    Checkpoints(run)
    assert names(run) == [".mine.partial", "step-00000004"]
    (run / "step-00000004").rename(run / ".step-00000004.replaced")  # killed between the two renames
    assert checkpoints.steps() == [4]
    assert load_checkpoint(run / "step-00000004", kind=KIND).step == 4
    save_step(checkpoints, 5)
    assert checkpoints.steps() == [4, 5]
    assert names(run) == [".mine.partial", "step-00000004", "step-00000005"]


def test_a_checkpoint_that_is_being_written_is_let_be(tmp_path: Path) -> None:
    writing = NewFolder(tmp_path / "step-00000007")
    writing.make(ours=lambda name: False)
    Checkpoints(tmp_path)
    assert names(tmp_path) == [".step-00000007.partial"]
    with pytest.raises(FileExistsError, match="another process is saving"):
        save(tmp_path / "step-00000007", step=7)
    assert names(tmp_path) == [".step-00000007.partial"]
    writing.close()
    assert names(tmp_path) == []


def test_damaged_newest_is_warned_of_and_does_not_crowd_out_good_ones(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    save_step(run, 1)
    newest = save_step(run, 4)
    (newest / "model.safetensors").write_bytes(b"short")
    with pytest.warns(UserWarning, match=r"step-00000004/model\.safetensors has 5 bytes.*; step-00000001 is taken"):
        found = run.latest(kind=KIND)
    assert found is not None and found.step == 1
    save_step(run, 2)
    save_step(run, 3)
    assert run.steps() == [2, 3, 4]
    with pytest.raises(CheckpointError, match="step-00000003 beside it is whole: load that, or resume='auto'"):
        load_checkpoint(newest, kind=KIND)
    save_step(run, 4)
    found = run.latest(kind=KIND)
    assert found is not None and found.step == 4 and run.steps() == [3, 4]


def test_later_steps_of_another_run_are_kept_and_warned_of(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path, keep_last=1)
    for step in (5, 9):
        save(tmp_path / f"step-0000000{step}", step=step)
    with pytest.warns(UserWarning, match="step-00000009 in .* went further"):
        save_step(run, 6)
    assert run.steps() == [6, 9]


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path)
    save_step(run, 1)
    with pytest.raises(CheckpointError, match="is whole: .* of kind 'test', expected 'other'"):
        run.latest(kind="other")


def test_checkpoints_that_vanish_while_looked_for_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Checkpoints(tmp_path)
    save_step(run, 1)
    monkeypatch.setattr(module.Checkpoints, "steps", lambda self: [1, 2])
    found = run.latest(kind=KIND)
    assert found is not None and found.step == 1
