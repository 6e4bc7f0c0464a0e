"""`palm-rlhf inspect` and `plot` on the run of a tiny model."""

import json

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.policy.inspection import Inspected, InspectedUpdate, write_rollouts


@pytest.fixture
def run(tmp_path):
    """A folder with the files of a run of two updates."""
    numbers = {"logprobs": torch.tensor([-0.5, -2.0]), "ref_logprobs": torch.tensor([-1.0, -1.25])}
    numbers |= {name: torch.tensor([0.125, -3.5]) for name in ("rewards", "advantages")}
    numbers |= {"ratios": torch.tensor([1.5, 1.0]), "clipped": torch.tensor([1.0, 0.0])}
    best = Inspected(True, 0.75, 0.5, False, 0, [65, 32], [10, 66], numbers)
    update = InspectedUpdate(
        "GRPOTrainer", 2, [best, best._replace(best=False, score=-1.0)], {65: "A", 32: " ", 10: "\n"}
    )
    folder = tmp_path / "run"
    write_rollouts(folder / "rollouts" / "update-00000002.safetensors", update)
    lines = [{"step": step, "reward/score": step / 4, "objective/kl": 0.5} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sample = {"step": 2, "kind": "best", "prompt": "A ", "response": "\n<B>", "score": 0.75, "length": 2}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_inspect_prints_a_line_for_each_token(run, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "GRPOTrainer, update 2; 2 rows, the first 1 are the best" in printed[0]
    assert printed[2] == "row 0, best: score 0.75, held-out score 0.5, KL -0.25 nats, 2 tokens, cut at the limit"
    assert printed[3:5] == ["prompt    |A |", "response  |↵<66>|"]
    assert printed[6].split() == "# token logprob reference KL reward advantage ratio clipped".split()
    assert printed[7].split() == "0 ↵ -0.5000 -1.0000 0.5000 0.1250 0.1250 1.5000 clipped".split()
    assert printed[8].split() == "1 <66> -2.0000 -1.2500 -0.7500 -3.5000 -3.5000 1.0000".split()
    assert len({line.index(".") for line in printed[7:9]}) == 1  # aligned
    assert main(["inspect", str(run), "--worst"]) == 0
    assert "row 1, worst: score -1," in capsys.readouterr().out


def test_colours_are_for_terminals_that_want_them(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["inspect", str(run)]) == 0
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["inspect", str(run)]) == 0
    assert "\033[" in coloured and "\033[" not in capsys.readouterr().out


def test_inspect_and_plot_write_pages(run, tmp_path, capsys):
    assert main(["inspect", str(run), "--row", "1", "--html", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert 'id="r1"' in page and 'id="r0"' not in page
    assert main(["plot", str(run), "--out", str(tmp_path / "p.html"), str(tmp_path / "p.svg")]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "&lt;B&gt;" in page and page.count("<figure>") == 2 and "0.5 (update 2)" in page
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.count("saved") == 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "RUN", "--row", "2"], "--row 2: rows are numbered from 0 to 1"),
        (["inspect", "RUN", "--update", "1"], "keeps the rollouts of update 2, not of 1"),
        (["inspect", "nowhere"], "nowhere: there is no such run"),
        (["inspect", "RUN/metrics.jsonl"], "metrics.jsonl"),
        (["plot", "nowhere"], "nowhere: there is no such run"),
        (["plot", "RUN/rollouts"], "holds no metrics.jsonl"),
        (["plot", "RUN", "--out", "x.gif"], "its ending must be one of .html, .png, .svg, .pdf"),
        (["plot", "RUN", "--smooth", "1"], "--smooth 1.0"),
        (["plot", "RUN", "--metrics", "reward/scor"], "did you mean reward/score?"),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    assert main([part.replace("RUN", str(run)) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
