"""How `palm-rlhf ppo` ends where a check before the run fails, or its numbers are not finite."""

import pytest
import torch

from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.policy.learning import Learner
from palm_rlhf_pytorch.policy.preflight import WIDTH
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


@pytest.fixture
def command(tmp_path):
    """The command line of three updates of a tiny model, by a judge of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        palm = PaLM(num_tokens=ByteTokenizer.num_tokens, dim=8, depth=1, heads=2, dim_head=4, ff_mult=2)
        RewardModel(palm).save(tmp_path / "judge.pt")
    palm.save(tmp_path / "palm.pt")
    (tmp_path / "prompts.txt").write_text("The cat\nA\n", encoding="utf-8")
    return [
        "ppo", str(tmp_path / "palm.pt"), "--reward-model", str(tmp_path / "judge.pt"),
        "--prompts", str(tmp_path / "prompts.txt"), "--run-dir", str(tmp_path / "run"), "--episodes", "6",
        "--update-timesteps", "2", "--max-new-tokens", "3", "--epochs", "1", "--device", "cpu",
    ]  # fmt: skip


def test_what_preflight_found_stands_in_lines_of_its_own(command, tmp_path, capsys):
    judge = RewardModel.from_checkpoint(tmp_path / "judge.pt")
    torch.nn.init.constant_(judge.head.bias, torch.nan)
    judge.save(tmp_path / "judge.pt")
    assert main(command) == 2
    told = capsys.readouterr().err.split("palm-rlhf ppo: error: ")[1].splitlines()
    assert told[0].startswith("1 of ") and told[2].startswith("judge's scores: ") and told[3].startswith("    ")
    assert max(map(len, told)) <= WIDTH


@pytest.mark.parametrize(("good", "kept"), [(0, "keeps no checkpoint"), (1, "keeps the last checkpoint")])
def test_a_checkpoint_is_promised_only_where_there_is_one(command, capsys, monkeypatch, good, kept):
    update, calls = Learner.update, []

    def failing(self, *args, **options):
        calls.append(None)
        if len(calls) > good:
            raise FloatingPointError("policy/loss nan")
        return update(self, *args, **options)

    monkeypatch.setattr(Learner, "update", failing)
    assert main([*command, "--no-preflight"]) == 2
    error = capsys.readouterr().err
    assert "policy/loss nan; " in error and kept in error and "Traceback" not in error
