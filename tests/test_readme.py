"""The README's snippets run as printed: at reduced sizes, and once with their printed shapes and one update."""

import json
import re
from pathlib import Path

import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer
from palm_rlhf_pytorch.text import ByteTokenizer, tokenizer_of

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
(
    LANGUAGE_MODEL, REWARD_MODEL, TRAINER, ON_TEXT, JUDGE, OWN_LOOP, PUBLISHED, OWN_TEXT, LABELS, SEVERAL, GROUPS,
    DIRECT, RESUMED,
) = SNIPPETS  # fmt: skip

SMALL = {
    "num_tokens=20000": "num_tokens=300",
    "(0, 20000,": "(0, 300,",
    "dim=512": "dim=24",
    "depth=12": "depth=2",
    "2048": "40",
    "(50000, 512)": "(70, 31)",
    "num_episodes=50000": "num_episodes=70, max_seq_len=40",
    "max_seq_len=1024": "max_seq_len=40",
    "(1, 1024": "(1, 19",
    "torch.zeros(1, 1024)": "torch.zeros(1, 19)",
    "num_episodes=640, max_new_tokens=64": "num_episodes=5, max_new_tokens=6",
}
# one answer of 64 tokens to a prompt of the printed 512, by the printed models; all of 2048 would take minutes
ONE_UPDATE = {
    "num_episodes=50000": "num_episodes=1, max_seq_len=576",
    "trainer.generate(2048,": "trainer.generate(576,",
}


def run(snippet, changes, **names):
    for printed, reduced in changes.items():
        snippet = snippet.replace(printed, reduced)
    exec(compile(snippet, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("printed", [*SMALL, *ONE_UPDATE])
def test_readme_prints_what_the_reductions_replace(printed):
    # else a README that was only formatted anew would run at its full size, 50000 episodes of it
    assert any(printed in snippet for snippet in SNIPPETS)


def write_files(**sizes):
    """The two files that the third snippet loads: a causal PaLM, and the second snippet's non-causal reward model."""
    torch.manual_seed(0)
    PaLM(**sizes).save("path/to/pretrained/palm.pt")
    judge = RewardModel(PaLM(causal=False, **sizes), num_binned_output=5)
    torch.nn.init.normal_(judge.head.weight)
    judge.save("path/to/pretrained/reward_model.pt")
    return judge.eval()


def test_readme_has_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert "pip install -e . && palm-rlhf demo" in text
    assert 'pip install -e ".[test]" && pytest' in text
    assert ".cuda()" not in text


def test_language_model_snippet_runs_when_reduced():
    names = run(LANGUAGE_MODEL, SMALL)
    assert names["generated"].shape == (1, 40)
    assert all(parameter.grad is not None for parameter in names["palm"].parameters())


def test_reward_model_snippet_runs_when_reduced():
    names = run(REWARD_MODEL, SMALL)
    assert names["reward"].shape == (1,)
    assert 0 <= names["reward"].item() <= 4


@pytest.mark.filterwarnings("ignore:.*trunk:UserWarning")
def test_trainer_snippet_runs_when_reduced_and_keeps_the_trained_scores(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = write_files(num_tokens=300, dim=24, depth=2)
    names = run(TRAINER, SMALL)
    assert names["trainer"].episodes == 70
    answer, prompts = names["answer"], names["prompts"]
    assert 31 < len(answer) <= 40
    assert torch.equal(answer[:31], prompts[0])
    seq = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(names["reward_model"].eval()(seq), saved(seq), atol=1e-5, rtol=0)
    own = run(JUDGE, {})["judge"](seq, torch.zeros_like(seq, dtype=torch.bool), torch.ones_like(seq, dtype=torch.bool))
    assert own.tolist() == [float((row == 7).sum()) for row in seq]
    loop = run(OWN_LOOP, SMALL, trainer=names["trainer"])
    assert loop["trainer"].episodes == 134


def test_text_snippet_runs_when_reduced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    palm = PaLM(num_tokens=259, dim=24, depth=2)
    names = run(ON_TEXT, SMALL, palm=palm, reward_model=RewardModel(palm), RLHFTrainer=RLHFTrainer)
    assert names["trainer"].episodes == 5
    assert PaLM.from_checkpoint("improved_palm.pt").config == palm.config


def test_published_snippet_writes_text_with_a_folder_in_the_hubs_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PaLM(num_tokens=259, dim=24, depth=2).save_pretrained("folder")
    changes = {
        "conceptofmind/palm-410m": "folder",
        "EleutherAI/gpt-neox-20b": "bytes",
        "max_new_tokens=100": "max_new_tokens=7",
    }
    assert all(printed in PUBLISHED for printed in changes)
    palm = run(PUBLISHED, changes)["palm"]
    assert palm.token_emb.weight.dtype == torch.bfloat16
    assert len(capsys.readouterr().out) > 0
    assert PaLM.from_pretrained("my-palm").config == palm.config
    assert {path.name for path in (tmp_path / "my-palm").iterdir()} >= {"model.safetensors", "config.json", "README.md"}


def test_own_text_snippet_learns_from_a_folder_and_from_dialogues(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_books").mkdir()
    Path("my_books", "a.txt").write_text("It was a dark night. " * 400, encoding="utf-8")
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    Path("dialogues.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * 5, encoding="utf-8")
    palm = run(OWN_TEXT, {"dim=128, depth=4": "dim=24, depth=2", "num_steps=1000": "num_steps=9"})["palm"]
    assert 0 < float(capsys.readouterr().out) < 9
    assert PaLM.from_checkpoint("chat.pt").config == palm.config
    assert tokenizer_of("chat.pt", num_tokens=259).num_tokens == 259


def test_resume_snippet_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    palm = PaLM(num_tokens=300, dim=24, depth=2)
    given = {"palm": palm, "reward_model": RewardModel(palm), "RLHFTrainer": RLHFTrainer}
    given["prompts"] = torch.randint(0, 300, (70, 31))
    assert run(RESUMED, SMALL, **given)["trainer"].episodes == 70
    longer = SMALL | {"num_episodes=50000": "num_episodes=75, max_seq_len=40"}
    trainer = run(RESUMED, longer, **given)["trainer"]
    assert (trainer.episodes, trainer.updates) == (75, 3)
    assert {path.name for path in (tmp_path / "runs" / "first").iterdir()} == {
        "metrics.jsonl", "samples.jsonl", "experience", "checkpoints", "rollouts",
    }  # fmt: skip


def test_snippets_on_labels_judges_and_objectives_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    lines = [{"prompt": f"{day}? ", "chosen": "yes", "rejected": f"not on day {day}"} for day in range(40)]
    Path("labels.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    palm = PaLM(num_tokens=259, dim=24, depth=2)
    given = {"palm": palm, "RewardModel": RewardModel, "tokenizer": ByteTokenizer()}
    labels = run(LABELS, {}, **given)
    assert "40 pairs" in capsys.readouterr().out
    assert RewardModel.from_checkpoint("reward_model.pt").config == labels["judge"].config
    judge = run(SEVERAL, {}, reward_model=labels["judge"], **given)["judge"]
    assert sorted(judge.judges) == ["liked", "short"]
    trainer = run(
        GROUPS,
        {"num_episodes=50000": "num_episodes=72, max_seq_len=40"},
        judge=judge,
        prompts=torch.randint(0, 256, (70, 31)),
        **given,
    )["trainer"]
    assert trainer.episodes == 72 and "reward/short" in trainer.metrics.defined
    assert run(DIRECT, {}, **given)["trainer"].steps > 0


@pytest.mark.slow
def test_language_model_snippet_runs_with_its_printed_shapes():
    names = run(LANGUAGE_MODEL, {})
    assert names["generated"].shape == (1, 2048)
    assert abs(float(names["loss"].detach()) - 9.903) < 0.1  # ln 20000


@pytest.mark.slow
def test_reward_model_snippet_runs_with_its_printed_shapes():
    assert run(REWARD_MODEL, {})["reward"].shape == (1,)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*trunk:UserWarning")
def test_trainer_snippet_runs_with_its_printed_shapes_and_one_update(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_files(num_tokens=20000, dim=512, depth=12)
    names = run(TRAINER, ONE_UPDATE)
    assert names["trainer"].episodes == names["trainer"].updates == 1
    assert len(names["answer"]) == 576
