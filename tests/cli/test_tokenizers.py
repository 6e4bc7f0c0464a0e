"""Commands with a tokenizer that is not the bytes': a BPE one, from the reward model to the comparison."""

import json

import pytest
import torch

from palm_rlhf_pytorch.cli.evaluate import TEXT_WINDOW
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.text.chats import chat_prompt
from palm_rlhf_pytorch.text.dialogues import Turn
from palm_rlhf_pytorch.text.hf_tokenizer import HFTokenizer
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer
from palm_rlhf_pytorch.text.tokenizer_files import save_tokenizer, tokenizer_of
from tests.text.tiny_bpe import CHATML, TEXT, tiny_bpe

PROMPTS = ["the cat", "on the mat", "é"]
TOKENS = 280  # of the model: a few more than the tokenizer's 275


def bpe():
    return HFTokenizer(tiny_bpe(), chat_template=CHATML)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its tokenizer, labels, prompts, and a reward model of the labels."""
    path = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        PaLM(num_tokens=TOKENS, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2).save(path / "palm.pt")
    save_tokenizer(bpe(), path / "palm.pt")
    pairs = [{"prompt": f"{prompt} {n}", "chosen": "sat", "rejected": "hat"} for n in range(7) for prompt in PROMPTS]
    (path / "labels.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    command = ["reward", str(path / "labels.jsonl"), "--palm", str(path / "palm.pt"), "--out", str(path / "judge.pt")]
    assert main([*command, "--chat", "--epochs", "1", "--held-out", "0.3", "--device", "cpu"]) == 0
    return path


def ppo(folder, run, *options):
    return [
        "ppo", str(folder / "palm.pt"), "--reward-model", str(folder / "judge.pt"), "--prompts",
        str(folder / "prompts.txt"), "--run-dir", str(run), "--episodes", "4", "--update-timesteps", "4",
        "--max-new-tokens", "3", "--max-seq-len", "60", "--epochs", "1", "--minibatch-size", "4", "--no-preflight",
        "--device", "cpu", *options,
    ]  # fmt: skip


def test_from_labels_to_the_comparison_by_one_tokenizer(folder, tmp_path, capsys):
    assert main(ppo(folder, tmp_path / "run", "--chat")) == 0
    improved = tmp_path / "run" / "improved_palm.pt"
    for path in (folder / "judge.pt", improved):
        found = tokenizer_of(path, num_tokens=TOKENS)
        assert isinstance(found, HFTokenizer) and found.chat_template == CHATML and found.num_tokens == 275
    options = ["--prompts", str(folder / "prompts.txt"), "--judge", str(folder / "judge.pt"), "--device", "cpu"]
    options += ["--max-new-tokens", "3", "--text", str(folder / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["evaluate", str(folder / "palm.pt"), str(improved), *options, "--chat"]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary["sampling"]["eos_token"] == 2  # what ends a turn in the template, not what ends a text
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    palm, ids = PaLM.from_checkpoint(folder / "palm.pt").eval(), bpe().encode(TEXT)
    assert len(ids) < TEXT_WINDOW  # one window
    nats = palm(ids[None], return_loss=True).item() * len(ids)
    bits = nats / torch.tensor(2.0).log().item() / len(TEXT.encode())
    assert summary["figures"]["bits per byte of the text"]["a"] == pytest.approx(bits, rel=1e-5)


def test_chat_prompts_are_what_the_template_writes(folder, tmp_path):
    assert main(ppo(folder, tmp_path / "run", "--chat", "--seed", "1")) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    shown = {sample["prompt"] for line in samples for sample in line.get("samples", [line])}
    expected = {bpe().decode(chat_prompt([Turn("user", prompt)], bpe())) for prompt in PROMPTS}
    assert shown and shown <= expected


def test_a_tokenizer_may_be_named(folder, tmp_path, capsys):
    palm = PaLM.from_checkpoint(folder / "palm.pt")
    palm.save(tmp_path / "alone.pt")
    command = ppo(folder, tmp_path / "run")
    command[1] = str(tmp_path / "alone.pt")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "num_tokens=280" in error and "--tokenizer" in error and error.count("\n") == 1
    tiny_bpe().save(str(tmp_path / "tokenizer.json"))
    assert main([*command, "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    assert isinstance(tokenizer_of(tmp_path / "run" / "improved_palm.pt", num_tokens=TOKENS), HFTokenizer)


def test_a_judge_of_another_tokenizer_is_refused(folder, tmp_path, capsys):
    assert main([*ppo(folder, tmp_path / "run"), "--tokenizer", "bytes"]) == 2
    error = capsys.readouterr().err
    assert "judge.pt" in error and "palm.pt" in error and "another tokenizer" in error and error.count("\n") == 1
    PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4).save(tmp_path / "bytes.pt")
    command = ppo(folder, tmp_path / "run")
    command[1] = str(tmp_path / "bytes.pt")
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "num_tokens=280" in error and "num_tokens=259" in error and not (tmp_path / "run").exists()
