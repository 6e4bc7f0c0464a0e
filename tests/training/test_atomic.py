"""A replaced file is the old one or the new one, whatever happens in between."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from palm_rlhf_pytorch.training import atomic
from palm_rlhf_pytorch.training.atomic import replacing


@pytest.fixture(params=["unnamed", "hidden name"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of writing: with O_TMPFILE, and as on a system without."""
    if request.param == "hidden name":
        monkeypatch.setattr(atomic, "_open_unnamed", lambda folder: None)


@pytest.mark.usefixtures("system")
def test_replacing_shows_the_new_content_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    for content in (b"first", b"second, longer"):
        before = path.read_bytes() if path.exists() else None
        with replacing(path) as file:
            file.write(content)
            file.flush()
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["b.txt"]


@pytest.mark.usefixtures("system")
def test_failure_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"new")
        file.flush()
        raise KeyError("odd")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b.txt"]


def test_long_names_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("é" * 120)
    with replacing(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.os, "replace", refuse)
    with pytest.raises(PermissionError, match=r"3 bytes.*b\.txt"), replacing(tmp_path / "b.txt") as file:
        file.write(b"new")
    assert os.listdir(tmp_path) == []


SCRIPT = """
import sys, time
from palm_rlhf_pytorch.training.atomic import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="only Linux has files without a name")
def test_kill_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "b.txt"
    path.write_bytes(b"old")
    with subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["b.txt"]
