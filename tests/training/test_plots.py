"""Plots: the points that were measured, in a file, and nothing left behind."""

import sys
from types import SimpleNamespace

import pytest

from palm_rlhf_pytorch.training.plots import reliability_plot


def part(low, high, count, confidence, accuracy):
    return SimpleNamespace(low=low, high=high, count=count, confidence=confidence, accuracy=accuracy)


BINS = [part(0.5, 0.7, 9, 0.61, 0.55), part(0.7, 0.8, 0, None, None), part(0.8, 1.0, 4, 0.93, 0.75)]


def test_plot_shows_a_point_for_each_bin_that_is_not_empty(tmp_path):
    pytest.importorskip("matplotlib")
    loaded = set(sys.modules)
    path = tmp_path / "reports" / "reliability.svg"
    for bins, points in ((BINS, 2), (BINS[:2], 1)):  # the second replaces the first
        reliability_plot(bins, path, title="a judge")
        svg = path.read_text()
        scatter = svg[svg.index('id="PathCollection_1"') :]
        assert scatter[: scatter.index("</g>\n   <g ")].count("clip-path") == points
        assert "a judge" in svg and "confidence in the higher score" in svg
    assert not {name for name in set(sys.modules) - loaded if name.startswith("matplotlib.pyplot")}
    assert [file.name for file in path.parent.iterdir()] == ["reliability.svg"]
    reliability_plot(BINS, tmp_path / "reliability.PNG")
    assert (tmp_path / "reliability.PNG").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_plotted_is_refused_and_the_old_file_kept(tmp_path, monkeypatch):
    path = tmp_path / "old.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"must end with one of .png"):
        reliability_plot(BINS, tmp_path / "plot.txt")
    with pytest.raises(ValueError, match="hold no prediction"):
        reliability_plot(BINS[1:2], path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"palm-rlhf-pytorch\[plot\]"):
        reliability_plot(BINS, path)
    assert path.read_bytes() == b"old"
