"""`palm-rlhf generate` on a tiny checkpoint."""

import io

import pytest
import torch

from palm_rlhf_pytorch.cli.generate import encodable, printable, sample_texts
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM


@pytest.fixture
def palm():
    torch.manual_seed(0)
    return PaLM(num_tokens=259, dim=16, depth=1, heads=3, dim_head=4)


@pytest.fixture
def checkpoint(palm, tmp_path):
    palm.save(tmp_path / "palm.pt")
    return str(tmp_path / "palm.pt")


def test_generate_prints_the_prompt_with_each_sample(checkpoint, capsys):
    assert main(["generate", checkpoint, "Hé", "--max-new-tokens", "5", "--num-samples", "3", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("--- sample") == 3 and printed.count("\nHé") == 3


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\tb\nç\x00") == "a\N{REPLACEMENT CHARACTER}[2J\tb\nç\N{REPLACEMENT CHARACTER}"


def test_generate_repeats_with_its_seed(checkpoint, capsys):
    printed = []
    for seed in ("1", "1", "2"):
        main(["generate", checkpoint, "abc", "--max-new-tokens", "12", "--seed", seed, "--device", "cpu"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_greedy_samples_are_the_most_likely_bytes(palm):
    with torch.no_grad():
        palm.token_emb.weight.mul_(3)
    first, second = sample_texts(palm.eval(), "ab", max_new_tokens=1, temperature=0.0, num_samples=2)
    token = int(palm(torch.tensor([[97, 98]]))[0, -1].argmax())
    assert first == second == "ab" + bytes([token] if token < 256 else []).decode("utf-8", errors="replace")


def greedy(*ids, palm, steps):
    """Most likely continuation, by whole passes over the text so far."""
    text = list(ids)
    for _ in range(steps):
        text.append(int(palm(torch.tensor([text]))[0, -1, :256].argmax()))
    return bytes(text[len(ids) :]).decode("utf-8", errors="replace")


def test_prompts_come_from_a_file_or_a_pipe_and_stream(checkpoint, palm, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("ab\n\nHé\n")
    options = ["--temperature", "0", "--max-new-tokens", "3", "--device", "cpu"]
    expected = [printable(prompt + greedy(*prompt.encode(), palm=palm, steps=3)) for prompt in ("ab", "Hé")]
    several = f"--- prompt 1 of 2\n{expected[0]}\n--- prompt 2 of 2\n{expected[1]}\n"
    for extra in ([], ["--stream"]):
        assert main(["generate", checkpoint, "--prompts", str(tmp_path / "prompts.txt"), *options, *extra]) == 0
        assert capsys.readouterr().out == several
        monkeypatch.setattr("sys.stdin", io.StringIO("Hé\n"))
        assert main(["generate", checkpoint, "-", *options, *extra]) == 0
        assert capsys.readouterr().out == expected[1] + "\n"


def test_a_text_ends_before_a_stop_string(checkpoint, capsys):
    printed = []
    for stop in ([], ["--stop", r"\n", "--stop", "e", "--stop", "o"]):
        main(["generate", checkpoint, "x", "--max-new-tokens", "200", "--seed", "4", "--device", "cpu", *stop])
        printed.append(capsys.readouterr().out[1:-1])
    ends = [place for place, letter in enumerate(printed[0]) if letter in "\neo"]
    assert ends and printed[1] == printed[0][: ends[0]]


def test_what_the_terminal_cannot_write_is_replaced():
    assert encodable("né🙂", io.TextIOWrapper(io.BytesIO(), encoding="latin-1")) == "né?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a PROMPT"),
        (["a", "--prompts", "file"], "give either a PROMPT"),
        (["a", "--stop", ""], "stop[0] is empty"),
        (["a", "--num-samples", "0"], "--num-samples 0"),
        (["a", "--max-new-tokens", "0"], r"max_new_tokens (0)"),
        (["a", "--temperature", "-1"], "temperature"),
        (["a", "--top-p", "2"], "top_p"),
        (["a", "--device", "abacus"], "--device abacus"),
    ],
)
def test_generate_refuses_bad_options(checkpoint, capsys, options, message):
    assert main(["generate", checkpoint, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("palm-rlhf generate: error: ") and message in error and error.count("\n") == 1


def test_generate_refuses_a_missing_file_and_another_vocabulary(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "none.pt"), "a"]) == 2
    assert "none.pt" in capsys.readouterr().err
    PaLM(num_tokens=31, dim=8, depth=1, heads=1, dim_head=4).save(tmp_path / "small.pt")
    assert main(["generate", str(tmp_path / "small.pt"), "a"]) == 2
    assert "num_tokens=31" in capsys.readouterr().err


def test_a_model_is_read_in_the_dtype_that_is_asked_for(checkpoint, monkeypatch):
    seen = []

    def told(self, *args, **kwargs):
        seen.append(next(self.parameters()).dtype)
        return [""]

    monkeypatch.setattr("palm_rlhf_pytorch.palm.transformer.PaLM.generate_text", told)
    for options in ([], ["--dtype", "bfloat16"]):
        assert main(["generate", checkpoint, "a", *options]) == 0
    assert seen == [torch.float32, torch.bfloat16]
