"""Checkpoints under fire: damage, hostile folders, a full disk, kills. What is loaded is whole, or nothing is."""

import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint
from palm_rlhf_pytorch.training.manifest import CheckpointError

CORRUPTIONS = 1000
KILLS = 20  # at random moments; a longer run may raise it
KIND = "test"


def run_of_two(folder: Path) -> tuple[Checkpoints, Path]:
    """Checkpoints of steps 1 and 2, and the path of the second."""
    (folder / "rows").write_bytes(bytes(range(37)))
    checkpoints = Checkpoints(folder / "run")
    for step in (1, 2):
        tensors = {"model": {"weight": torch.randn(3, 5)}, "optimizer": {"step": torch.tensor(step)}}
        values = {"lr": 0.1, "best": math.inf}
        path = checkpoints.save(step, kind=KIND, values=values, tensors=tensors, files={"rows": folder / "rows"})
        (folder / "rows").write_bytes(bytes(range(41)))
    return checkpoints, path


# damage


def test_every_flipped_byte_and_truncation_is_refused_and_the_previous_one_offered(tmp_path: Path) -> None:
    checkpoints, path = run_of_two(tmp_path)
    files = sorted(path.iterdir())
    assert [file.name for file in files] == ["manifest.json", "model.safetensors", "optimizer.safetensors", "rows"]
    generator = random.Random(0)
    for _ in range(CORRUPTIONS):
        file = generator.choice(files)
        content = file.read_bytes()
        place = generator.randrange(len(content))
        damaged = bytearray(content)
        damaged[place] ^= generator.randrange(1, 256)
        file.write_bytes(damaged if generator.random() < 0.7 else content[:place])
        with pytest.raises(CheckpointError, match=f"{file.name}.*step-00000001 beside it is whole"):
            load_checkpoint(path, kind=KIND)
        with pytest.warns(UserWarning, match=f"{file.name}.*step-00000001 is taken instead"):
            found = checkpoints.latest(kind=KIND)
        assert found is not None and found.step == 1 and found.tensors["optimizer"]["step"] == 1
        file.write_bytes(content)
    assert load_checkpoint(path, kind=KIND).values == {"lr": 0.1, "best": math.inf}


# hostile folders: their SHA-256 are right, as a forger's would be


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def sealed(text: str) -> bytes:
    """A manifest's content, of its canonical JSON, as the format is documented."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(',"step":', f',"sha256":"{digest}","step":', 1).encode()


def forge(folder: Path, *, files: dict[str, bytes] | None = None, entry: str = "", **changes: Any) -> None:
    """A folder whose manifest fits its files but for what is changed; `entry` is one more file in the manifest."""
    folder.mkdir(exist_ok=True)
    files = {"model.safetensors": safetensors({})} if files is None else files
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    listed |= {entry: {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}} if entry else {}
    record = {
        "files": listed, "format_version": 1, "groups": ["model"], "kind": KIND, "metrics": {}, "step": 2, "values": {},
    } | changes  # fmt: skip
    (folder / "manifest.json").write_bytes(sealed(json.dumps(record, sort_keys=True, separators=(",", ":"))))


def reseal(folder: Path, old: str, new: str) -> None:
    """Change the text of a forged manifest and seal it again."""
    forge(folder, values={"a": 1.5})
    record = json.loads((folder / "manifest.json").read_bytes())
    del record["sha256"]
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    assert old in text
    (folder / "manifest.json").write_bytes(sealed(text.replace(old, new)))


def safetensors(header: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    encoded = json.dumps(header).encode()
    return (len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data


def tensor(**changes: Any) -> dict[str, bytes]:
    """A safetensors file of one tensor, two float32, with changes to its header."""
    header = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}
    return {"model.safetensors": safetensors(header, bytes(8))}


def pickled_file(folder: Path, marker: Path) -> None:
    forge(folder, files={"model.safetensors": pickle.dumps(Payload(marker))})


def pickled_manifest(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "manifest.json").write_bytes(pickle.dumps(Payload(marker)))


def torch_zip(folder: Path, marker: Path) -> None:
    folder.mkdir()
    torch.save({"weight": Payload(marker)}, folder / "model.safetensors")
    forge(folder, files={"model.safetensors": (folder / "model.safetensors").read_bytes()})


def linked_file(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "model.safetensors").rename(marker.with_name("elsewhere"))
    (folder / "model.safetensors").symlink_to(marker.with_name("elsewhere"))


def linked_manifest(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "manifest.json").rename(marker.with_name("elsewhere"))
    (folder / "manifest.json").symlink_to(marker.with_name("elsewhere"))


def linked_folder(folder: Path, marker: Path) -> None:
    forge(marker.with_name("elsewhere"))
    folder.symlink_to(marker.with_name("elsewhere"))


def pipe(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def pipe_as_manifest(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


def unlisted(name: str) -> Callable[[Path, Path], None]:
    def build(folder: Path, marker: Path) -> None:
        forge(folder)
        (folder / name).write_bytes(b"import os")

    return build


def subfolder(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "more").mkdir()


def nested_manifest(folder: Path, marker: Path) -> None:
    reseal(folder, '{"a":1.5}', '{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


def huge_manifest(folder: Path, marker: Path) -> None:
    forge(folder, values={"a": "x" * 10_000_001})


def manifest_of_a_list(folder: Path, marker: Path) -> None:
    forge(folder)
    (folder / "manifest.json").write_bytes(b"[]")


def forged(**changes: Any) -> Callable[[Path, Path], None]:
    return lambda folder, marker: forge(folder, **changes)


def resealed(old: str, new: str) -> Callable[[Path, Path], None]:
    return lambda folder, marker: reseal(folder, old, new)


def whole(folder: Path, marker: Path) -> None:
    forge(folder, files=tensor(), values={"a": [{"$float": "7ff0000000000000"}]}, metrics={"$$": 1.5})


def test_forged_folder_loads_when_nothing_is_wrong(tmp_path: Path) -> None:
    whole(tmp_path / "step-00000002", tmp_path / "marker")
    found = load_checkpoint(tmp_path / "step-00000002", kind=KIND)
    assert found.tensors["model"]["weight"].tolist() == [0.0, 0.0]
    assert (found.values, found.metrics, found.files) == ({"a": [math.inf]}, {"$": 1.5}, {})


HOSTILE = {
    "pickle as safetensors": (pickled_file, "model.safetensors is no safetensors"),
    "pickle as manifest": (pickled_manifest, "manifest.json is damaged or no manifest"),
    "torch zip": (torch_zip, "model.safetensors is no safetensors"),
    "linked file": (linked_file, "model.safetensors' is a symbolic link"),
    "linked manifest": (linked_manifest, "manifest.json' is a symbolic link"),
    "linked folder": (linked_folder, "step-00000002 is a symbolic link"),
    "pipe": (pipe, "model.safetensors' is not an ordinary file"),
    "pipe as manifest": (pipe_as_manifest, "manifest.json' is not an ordinary file"),
    "unlisted": (unlisted("extra.py"), "extra.py' is not in the manifest"),
    "unlisted, odd name": (unlisted("a\nb"), r"a\\nb' is not in the manifest"),
    "subfolder": (subfolder, "more' is not an ordinary file"),
    "huge header": (forged(files={"model.safetensors": safetensors({}, length=2**40)}), "header too large"),
    "header over 100 MB": (forged(files={"model.safetensors": safetensors({}, length=100_000_001)}), "too large"),
    "header past the end": (forged(files={"model.safetensors": safetensors({}, length=99)}), "no safetensors"),
    "absurd shape": (forged(files=tensor(shape=[2**40])), "no safetensors"),
    "overflowing shape": (forged(files=tensor(shape=[2**62, 2**62])), "overflow"),
    "overflowing empty shape": (forged(files=tensor(shape=[0, 2**64 - 1], data_offsets=[0, 0])), "no safetensors"),
    "negative offsets": (forged(files=tensor(data_offsets=[-8, 0])), "no safetensors"),
    "negative shape": (forged(files=tensor(shape=[-2])), "no safetensors"),
    "offsets past the end": (forged(files=tensor(shape=[4], data_offsets=[0, 16])), "no safetensors"),
    "hole": (forged(files=tensor(shape=[1], data_offsets=[4, 8])), "no safetensors"),
    "unknown type": (forged(files=tensor(dtype="F33")), "no safetensors"),
    "path up": (forged(entry="../x"), r"file name '\.\./x'"),
    "path absolute": (forged(entry="/etc/passwd"), "file name '/etc/passwd'"),
    "path below": (forged(entry="a/b"), "file name 'a/b'"),
    "path parent": (forged(entry=".."), r"file name '\.\.'"),
    "path control": (forged(entry="a\n"), r"file name 'a\\n'"),
    "path manifest": (forged(entry="manifest.json"), "file name 'manifest.json'"),
    "name empty": (resealed('"model.safetensors":', '"":'), "file name ''"),
    "group up": (forged(groups=["../model"]), r"group name '\.\./model'"),
    "group of no file": (forged(groups=["model", "critic"]), "group critic has no file"),
    "group twice": (forged(groups=["model", "model"]), "named twice"),
    "group no string": (forged(groups=[["model"]]), "group name"),
    "missing file": (forged(entry="rows"), "rows is missing"),
    "nested manifest": (nested_manifest, "manifest.json is damaged or no manifest"),
    "huge manifest": (huge_manifest, "larger than a manifest can be"),
    "manifest a list": (
        lambda folder, marker: (forge(folder), (folder / "manifest.json").write_bytes(b"[]")),
        "object",
    ),
    "step nan": (forged(step=math.nan), "no manifest"),
    "step infinite": (resealed('"step":2', '"step":1e999'), "no manifest"),
    "step huge": (forged(step=10**300), "step .* must be an integer"),
    "step of 5,000 digits": (resealed('"step":2', '"step":' + "9" * 5000), "no manifest"),
    "step negative": (forged(step=-2), r"step \(-2\)"),
    "step true": (forged(step=True), r"step \(True\)"),
    "step of another folder": (forged(step=3), "was renamed"),
    "sizes huge": (resealed('"bytes":10', '"bytes":' + "9" * 40), "bytes or sha256 of model.safetensors"),
    "doubled keys": (resealed('"step":2', '"step":2,"step":2'), "its own SHA-256"),
    "blanks": (resealed('"step":2', '"step": 2'), "its own SHA-256"),
    "newer version": (forged(format_version=2), "reads up to 1; upgrade"),
    "no version": (forged(format_version="1"), "format_version is '1'"),
    "other fields": (forged(exec="import os"), "its fields are exec,"),
    "other kind": (forged(kind="other"), "kind 'other', expected 'test'"),
    "odd float": (forged(values={"a": {"$float": "3ff0000000000000"}}), "not encoded"),
    "short float": (forged(values={"a": {"$float": "7f"}}), "no manifest"),
    "odd key": (forged(values={"$a": 1}), "not encoded"),
    "metrics of text": (forged(metrics={"loss": "low"}), "metrics are not numbers"),
}


@pytest.mark.parametrize("build_and_message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_folder_is_refused_and_runs_nothing(
    tmp_path: Path, build_and_message: tuple[Callable[[Path, Path], None], str]
) -> None:
    build, message = build_and_message
    folder, marker = tmp_path / "step-00000002", tmp_path / "marker"
    forge(tmp_path / "step-00000001", step=1)
    build(folder, marker)
    with pytest.raises(CheckpointError, match=message) as refused:
        load_checkpoint(folder, kind=KIND)
    assert len(str(refused.value)) < 1000 and "step-00000001 beside it is whole" in str(refused.value)
    with pytest.warns(UserWarning, match="step-00000001 is taken instead"):
        found = Checkpoints(tmp_path).latest(kind=KIND)
    assert found is not None and found.step == 1
    assert not marker.exists()


def test_payloads_of_the_corpus_do_run_when_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


# a full disk, and kills

FULL_DISK = """
import resource, signal, sys
import torch
from palm_rlhf_pytorch.training.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, kind="test", values={}, tensors={"model": {"weight": torch.ones(50)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for step in (1, 2):  # one to replace, one new
    try:
        checkpoints.save(step, kind="test", values={}, tensors={"model": {"weight": torch.zeros(30_000)}})
    except OSError as error:
        print(error)
"""


def test_full_disk_names_path_and_bytes_and_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    replaced, new = done.stdout.splitlines()
    for line, step in ((replaced, 1), (new, 2)):
        assert "File too large" in line and "after 100,000 bytes; nothing was saved" in line
        assert str(tmp_path / f"step-0000000{step}") in line
    assert os.listdir(tmp_path) == ["step-00000001"]
    found = load_checkpoint(tmp_path / "step-00000001", kind=KIND)
    assert found.tensors["model"]["weight"].unique().tolist() == [1.0]


# forks from a process without threads, so that a kill does not cost an import
KILLER = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from palm_rlhf_pytorch.training.checkpoint import Checkpoints, load_checkpoint

folder = sys.argv[1]
generator = random.Random(0)
WORK = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}

def save(checkpoints, step, content):
    rows = Path(folder).parent / "rows"
    tensors = {"model": {"weight": torch.full((7,), content)}}
    checkpoints.save(step, kind="test", values={"content": content}, tensors=tensors, files={"rows": rows})

def die_before(number):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in WORK:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

def child(pipe, number, step, content):
    checkpoints = Checkpoints(folder, keep_last=1)
    if mode != "moments":
        die_before(number)
        save(checkpoints, step, content)
        os._exit(0)
    while True:
        step += 1
        save(checkpoints, step, float(step))
        os.write(pipe, b"%d " % step)

def killed(number, step, content):
    "What the child said, whether it was killed, and the time it had."
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        child(writing, number, step, content)
    os.close(writing)
    if mode == "moments":
        time.sleep(generator.uniform(0.0, 0.06))
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    said = [int(word) for word in os.read(reading, 100_000).split()]
    os.close(reading)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return said, os.WIFSIGNALED(status)

def check(low, high):
    checkpoints = Checkpoints(folder, keep_last=1)
    for step in checkpoints.steps():
        load_checkpoint(checkpoints.folder / f"step-{step:08d}", kind="test")
    found = checkpoints.latest(kind="test")
    content = found.values["content"]
    assert found.tensors["model"]["weight"].tolist() == [content] * 7
    assert low <= content <= high, (low, content, high)
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    assert not hidden, hidden
    return found.step, content

def deaths(kills):
    number, deaths, content, died = 0, 0, 1.0, True
    while died and number < kills:
        number += 1
        if number == 1 or mode != "moments":  # each place of a save from the same start
            shutil.rmtree(folder, ignore_errors=True)
            save(Checkpoints(folder), 1, 1.0)
            step, content = 1, 1.0
        said, died = killed(number, step + (mode == "new"), content + 1)
        low = max([content, *said])
        step, content = check(low, low + 1)
        deaths += died
    assert content > 1.0  # some saves went through
    return deaths

found = {}
for mode in ("new", "replaced", "moments"):
    found[mode] = deaths(int(sys.argv[2]) if mode == "moments" else 500)
print(json.dumps(found))
"""


def test_kill_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """Before each thing done to the file system in a save of a new step and of one that stands, and at random."""
    (tmp_path / "rows").write_bytes(b"abc")
    command = [sys.executable, "-c", KILLER, str(tmp_path / "run"), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    deaths = json.loads(done.stdout)
    assert 10 < deaths["new"] < 500 and 10 < deaths["replaced"] < 500 and deaths["moments"] == KILLS
