"""`palm-rlhf evaluate` on tiny models."""

import copy
import json
from html.parser import HTMLParser

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.cli.pretrain import bits_per_byte
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

PROMPTS = ["The cat", "<b>A & B</b>", "Où\u202e est"]
TEXT = "to be, or not to be\n" * 20


@pytest.fixture
def models(tmp_path):
    """Two models that differ, two judges, prompts and a text."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
        other = copy.deepcopy(palm)
        torch.nn.init.normal_(other.token_emb.weight, std=0.3)
        palm.save(tmp_path / "a.pt")
        other.save(tmp_path / "b.pt")
        for name in ("judge", "second"):
            RewardModel(palm).save(tmp_path / f"{name}.pt")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def arguments(folder, *options, judge="judge.pt"):
    return [
        "evaluate", str(folder / "a.pt"), str(folder / "b.pt"), "--prompts", str(folder / "prompts.txt"), "--judge",
        str(folder / judge), "--max-new-tokens", "7", "--device", "cpu", *options,
    ]  # fmt: skip


class Page(HTMLParser):
    """Tags, and the text of each <pre>."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.inside = set(), [], False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "pre":
            self.texts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.texts[-1] += data


def test_evaluate_prints_figures_and_samples_and_writes_a_report(models, capsys):
    options = ["--judge", str(models / "second.pt"), "--samples", "2", "--text", str(models / "text.txt")]
    assert main(arguments(models, *options, "--out", str(models / "out"))) == 0
    printed = capsys.readouterr().out
    for line in (
        "judge: B wins",
        "second: score",
        "KL to the other, exact",
        "EOS rate",
        "distinct-2",
        "--- first prompts",
    ):
        assert line in printed
    assert "\u202e" not in printed and "\x1b" not in printed
    summary = json.loads((models / "out" / "evaluation.json").read_text())
    assert list(summary["judges"]) == ["judge", "second"] and summary["responses"] == 6
    assert f"{summary['judges']['judge']['win_rate']['value']:.3f}" in printed
    lines = [json.loads(line) for line in (models / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt for prompt in PROMPTS for _ in range(2)]
    for side, name in (("a", "a.pt"), ("b", "b.pt")):
        bits = bits_per_byte(PaLM.from_checkpoint(models / name), ByteTokenizer().encode(TEXT), length=256)
        assert summary["figures"]["bits per byte of the text"][side] == pytest.approx(bits)


def test_the_page_shows_what_models_wrote_as_text(models):
    assert main(arguments(models, "--samples", "2", "--out", str(models / "out"))) == 0
    content = (models / "out" / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(content)
    assert "b" not in page.tags and "script" not in page.tags and "http" not in content.replace("http-equiv", "")
    lines = [json.loads(line) for line in (models / "out" / "samples.jsonl").read_text().splitlines()]
    texts = {line["prompt"] + line[side]["response"] for line in lines for side in "ab"}
    readable = {"".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text) for text in texts}
    assert len(page.texts) >= 6 and set(page.texts) <= readable
    assert any(text.startswith("<b>A & B</b>") for text in page.texts) and "\u202e" not in content
    assert "Content-Security-Policy" in content and "prefers-color-scheme: dark" in content


def test_evaluate_repeats_with_its_seed(models, capsys):
    printed = []
    for seed in ("1", "1", "2"):
        assert main(arguments(models, "--seed", seed)) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "num_samples (0)"),
        (["--max-new-tokens", "0"], "max_new_tokens (0)"),
        (["--seed", "-1"], "seed (-1)"),
        (["--temperature", "0", "--samples", "2"], "temperature 0"),
        (["--show", "-1"], "--show -1"),
        (["--out", "prompts.txt"], "is not a folder"),
        (["--text", "empty.txt"], "less than two tokens"),
        (["--judge", "judge.pt"], "given twice"),
        (["--judge", "missing.pt"], "missing.pt"),
    ],
)
def test_evaluate_refuses_bad_options(models, capsys, options, message, monkeypatch):
    monkeypatch.chdir(models)
    (models / "empty.txt").write_text("", encoding="utf-8")
    given = arguments(models, *options)
    assert main([part if part != str(models / "judge.pt") else "judge.pt" for part in given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("palm-rlhf evaluate: error: ") and message in error and error.count("\n") == 1


def test_evaluate_refuses_another_vocabulary(models, capsys):
    PaLM(num_tokens=31, dim=8, depth=1, heads=1, dim_head=4).save(models / "b.pt")
    assert main(arguments(models)) == 2
    assert "num_tokens=31" in capsys.readouterr().err
