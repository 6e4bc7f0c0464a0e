"""Rollouts kept to be looked at: what they say is what was learnt from, and what the policy says now."""

import math
from dataclasses import replace

import pytest
import torch

from palm_rlhf_pytorch.objectives.group import GRPO, GSPO
from palm_rlhf_pytorch.policy.grpo import GRPOTrainer
from palm_rlhf_pytorch.policy.inspection import (
    Inspected,
    InspectedUpdate,
    column,
    find_rollouts,
    list_rollouts,
    read_rollouts,
    shown,
    summed_kl,
    token_text,
    token_texts,
    write_rollouts,
)
from palm_rlhf_pytorch.policy.losses import GroupStepLoss, PPOLoss
from palm_rlhf_pytorch.policy.rollout_page import rollout_page
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

QUICK = {"max_seq_len": 9, "max_new_tokens": 4, "update_timesteps": 6, "use_tqdm": False, "preflight": False}


def row(**changes):
    numbers = {name: torch.tensor([-0.5, -1.25]) for name in ("logprobs", "ref_logprobs", "rewards", "advantages")}
    numbers |= {"ratios": torch.tensor([1.5, 0.25]), "clipped": torch.tensor([1.0, 0.0])}
    return Inspected(True, 0.75, None, True, 3, [60, 10], [257, 0xC3], numbers)._replace(**changes)


def test_kept_rollouts_are_what_was_learnt_from_and_what_the_policy_says_now(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path, keep_samples=2, actor_lr=0.05, eps_clip=0.01)
    trainer.train(12, **QUICK)
    update = read_rollouts(find_rollouts(tmp_path))
    assert (update.trainer, update.step, len(update.rows)) == ("RLHFTrainer", 2, 4)
    assert list(list_rollouts(tmp_path / "rollouts")) == [2]
    stored = trainer.experience()
    whole = stored.select(torch.arange(6))
    scores = stored.scores.tolist()
    assert [kept.score for kept in update.rows[:2]] == sorted(scores, reverse=True)[:2]
    assert [kept.score for kept in update.rows[2:]] == sorted(scores)[:2]
    now = trainer.actor_critic.eval().observe(
        whole.sequences, whole.prompt_lengths, whole.logprobs.shape[1], lengths=whole.lengths
    )
    for kept in update.rows:
        ids = kept.prompt + kept.response
        (place,) = [
            at for at, (start, length) in enumerate(whole.spans())
            if whole.sequences[at, : start + length].tolist() == ids and int(whole.prompt_rows[at]) == kept.prompt_row
        ][:1]  # fmt: skip
        steps = len(kept.response)
        for name in ("logprobs", "ref_logprobs", "values"):
            assert torch.equal(kept.numbers[name], getattr(whole, name)[place, :steps])
        ratios = (now.logprobs - whole.logprobs)[place, :steps].exp()
        torch.testing.assert_close(kept.numbers["ratios"], ratios, rtol=1e-5, atol=1e-6)
        beyond = (kept.numbers["advantages"] * (ratios - 1) > 0) & ((ratios - 1).abs() > 0.01)
        assert torch.equal(kept.numbers["clipped"].bool(), beyond)
        assert math.isclose(summed_kl(kept), sum(column(kept, "kl")), abs_tol=1e-5)
    assert any(bool(kept.numbers["clipped"].any()) for kept in update.rows)


@pytest.mark.parametrize(("settings", "files"), [({"keep_rollouts": 2}, [2, 3]), ({"keep_rollouts": 0}, [])])
def test_so_many_updates_are_kept_and_later_ones_go_when_a_run_begins_before_them(
    make_trainer, tmp_path, settings, files
):
    trainer = make_trainer(run_dir=tmp_path, **settings)
    trainer.train(18, **QUICK)
    assert list(list_rollouts(tmp_path / "rollouts")) == files and trainer.taught is None
    trainer.kept_rollouts.rewind(2, main=True)
    assert list(list_rollouts(tmp_path / "rollouts")) == files[:1]


def test_group_methods_keep_one_advantage_a_response_and_no_values(make_palm, judge, tmp_path):
    trainer = GRPOTrainer(
        palm=make_palm(), reward_model=judge, prompt_token_ids=[torch.tensor([1, 2]), torch.tensor([3])], group_size=3,
        minibatch_size=3, run_dir=tmp_path, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    trainer.train(6, **QUICK)
    update = read_rollouts(find_rollouts(tmp_path, 1))
    for kept in update.rows:
        assert column(kept, "values") is None and column(kept, "returns") is None
        assert len(set(column(kept, "advantages"))) == 1
    assert update.texts == {} and "&lt;3&gt;" in rollout_page(update)  # a trainer without a tokenizer


def test_clipping_is_where_the_loss_no_longer_teaches():
    old, mask = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, True, False]])
    new = torch.tensor([[1.3, 0.7, 1.15], [1.3, 0.7, 9.0]]).log()
    signs = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    ratios, clipped = PPOLoss(eps_clip=0.2).clipping(new, old, signs, mask)
    torch.testing.assert_close(ratios, torch.tensor([[1.3, 0.7, 1.15], [1.3, 0.7, 0.0]]))
    assert clipped.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert PPOLoss(eps_clip=0.2, dual_clip=1.25).clipping(new, old, signs, mask).clipped.tolist()[1] == [1, 1, 0]
    high = GroupStepLoss(objective=replace(GRPO, eps_clip_high=0.4), max_length=3)
    assert high.clipping(new, old, signs, mask).clipped.tolist() == [[0, 0, 0], [0, 1, 0]]
    whole = GroupStepLoss(objective=GSPO, max_length=3).clipping(new, old, signs, mask)  # one ratio a response
    first, second = (1.3 * 0.7 * 1.15) ** (1 / 3), (1.3 * 0.7) ** 0.5
    torch.testing.assert_close(whole.ratios, torch.tensor([[first] * 3, [second, second, 0.0]]))
    assert whole.clipped.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_files_come_back_whole_and_others_are_refused(tmp_path):
    rows = [row(), row(best=False, held_out_score=-2.5, prompt=[5], score=-1.0, ended=False, prompt_row=-1)]
    update = InspectedUpdate("RLHFTrainer", 7, rows, {60: "<", 10: "\n"})
    path = tmp_path / "rollouts" / "update-00000007.safetensors"
    write_rollouts(path, update)
    found = read_rollouts(find_rollouts(tmp_path, 7))
    assert [each._replace(numbers={}) for each in found.rows] == [each._replace(numbers={}) for each in rows]
    assert all(torch.equal(a, rows[1].numbers[name]) for name, a in found.rows[1].numbers.items())
    assert (found.trainer, found.step, found.texts) == ("RLHFTrainer", 7, update.texts)
    with pytest.raises(ValueError, match="update 7, not of 6"):
        find_rollouts(tmp_path, 6)
    with pytest.raises(ValueError, match="keeps no rollouts"):
        find_rollouts(tmp_path / "rollouts")
    with pytest.raises(FileNotFoundError, match="no such run"):
        find_rollouts(tmp_path / "gone")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="update-00000007"):
        read_rollouts(path)


def test_tokens_are_written_so_that_each_can_be_told():
    texts = token_texts(ByteTokenizer(), {0x41, 10, 0xC3, 256, 257})
    assert texts == {0x41: "A", 10: "\n", 0xC3: "\\xC3", 256: "<bos>", 257: "<eos>"}
    assert token_texts(len, {1}) == {}
    assert (shown("a b\n\t\x07"), shown(" ", alone=True)) == ("a b↵⇥\\x07", "␣")
    assert token_text(InspectedUpdate("", 0, [], texts), 9) == "<9>"


def test_page_shows_texts_as_they_are_and_marks_what_is_clipped():
    page = rollout_page(
        InspectedUpdate("T", 1, [row()], {60: "<b>", 10: "\n", 257: "<eos>", 0xC3: "\\xC3"}), name="run"
    )
    assert "<b>" not in page and "&lt;b&gt;" in page and "<script" not in page
    assert page.count('class="t clipped"') == 1 and page.count('<tr id="r0t') == 2
    assert "row 0, best: score 0.75, KL 0 nats, 2 tokens, ended" in page
