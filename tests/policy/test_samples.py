"""The best and the worst responses of an update, and the file that keeps them."""

import json

import pytest
import torch

from palm_rlhf_pytorch.policy.rollout import Rollout
from palm_rlhf_pytorch.policy.samples import SampleLog, extremes, extremes_of, read_samples
from tests.policy.helpers import one_process

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def rollout():
    """Six responses, to prompts of 1 to 3 ids, of 1 to 4 tokens: row r has response ids r0, r1, ..."""
    prompt_lengths, lengths = torch.tensor([1, 3, 2, 1, 2, 3]), torch.tensor([4, 1, 2, 3, 1, 2])
    sequences = torch.zeros(6, 5, dtype=torch.int32)
    for row, (start, length) in enumerate(zip(prompt_lengths.tolist(), lengths.tolist(), strict=True)):
        sequences[row, :start] = 90 + row
        sequences[row, start : start + length] = 10 * row + torch.arange(length)
    blank = torch.zeros(6, 4)
    logprobs = torch.arange(24.0).reshape(6, 4)  # beyond a response's end too, where it means nothing
    return Rollout(
        sequences=sequences, prompt_lengths=prompt_lengths, lengths=lengths, logprobs=logprobs,
        ref_logprobs=0.5 * logprobs, values=blank, sampler_logprobs=blank, kl_exact=blank,
        ended=torch.tensor([False, True, True, False, True, False]), prompt_rows=torch.tensor([7, 5, 3, 1, 0, 2]),
        versions=torch.zeros(6, dtype=torch.long), temperature=1.0, eos_token=None,
    )  # fmt: skip


class Ids:
    def decode(self, ids):
        return " ".join(map(str, ids))


def test_extremes_tell_the_best_and_the_worst(rollout):
    scores = torch.tensor([0.5, 2.0, -1.0, NAN, 2.0, 0.0])
    held_out = torch.tensor([9.0, NAN, 8.0, 7.0, 6.0, 5.0])
    found = extremes(rollout, scores, 2, tokenizer=Ids(), held_out_scores=held_out)
    assert found[0] == {
        "kind": "best", "prompt": "91 91 91", "response": "10", "score": 2.0, "held_out_score": None,
        "kl": 2.0, "length": 1, "ended": True, "prompt_row": 5,
    }  # fmt: skip
    assert found[2] == {
        "kind": "worst", "prompt": "92 92", "response": "20 21", "score": -1.0, "held_out_score": 8.0,
        "kl": 8.5, "length": 2, "ended": True, "prompt_row": 3,
    }  # fmt: skip
    assert [sample["prompt_row"] for sample in found] == [5, 0, 3, 2]


@pytest.mark.parametrize(
    ("scores", "k", "best", "worst"),
    [
        ([1.0, 2.0, 3.0, NAN, INF, -INF], 2, [2, 1], [0]),  # three scores: the best take the odd one
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 9, [5, 4, 3], [0, 1, 2]),
        ([0.0] * 6, 2, [0, 1], [2, 3]),
        ([NAN] * 6, 2, [], []),
        ([1.0] * 6, 0, [], []),
    ],
)
def test_no_response_is_told_of_twice(rollout, scores, k, best, worst):
    found = extremes(rollout, torch.tensor(scores), k, tokenizer=None)
    rows = {
        kind: [sample["response"][0] // 10 for sample in found if sample["kind"] == kind] for kind in ("best", "worst")
    }
    assert rows == {"best": best, "worst": worst}
    assert all(sample["held_out_score"] is None for sample in found)


def test_extremes_of_two_processes_are_those_of_all_rows(rollout):
    scores = torch.tensor([0.5, 2.0, -1.0, 4.0, 1.5, 0.0])
    halves = [torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])]
    parts = [extremes(rollout.select(rows), scores[rows], 2, tokenizer=None) for rows in halves]
    assert extremes_of(parts[0] + parts[1], 2) == extremes(rollout, scores, 2, tokenizer=None)


def test_extremes_of_the_disk_are_those_of_memory(make_trainer, tmp_path):
    trainer = make_trainer(run_dir=tmp_path)
    trainer.train(4, max_seq_len=9, max_new_tokens=4, update_timesteps=4, use_tqdm=False, preflight=False)
    stored = trainer.experience()
    whole = stored.select(torch.arange(4))
    assert extremes(stored, stored.scores, 1, tokenizer=None) == extremes(whole, stored.scores, 1, tokenizer=None)


def test_extremes_refuse_scores_of_other_rows(rollout):
    with pytest.raises(ValueError, match=r"scores \(5,\).*6 responses"):
        extremes(rollout, torch.zeros(5), 1, tokenizer=None)
    with pytest.raises(ValueError, match=r"held_out_scores \(1,\)"):
        extremes(rollout, torch.zeros(6), 1, tokenizer=None, held_out_scores=torch.zeros(1))
    with pytest.raises(ValueError, match=r"k \(-1\)"):
        extremes(rollout, torch.zeros(6), -1, tokenizer=None)


def test_log_goes_on_after_a_crash_and_is_rewound(tmp_path):
    path, lines = tmp_path / "run" / "samples.jsonl", "a\u2028b\nc\x1cd\ud800"
    log = SampleLog(path)
    for step in (1, 2, 3):
        log.log([{"kind": "best", "response": lines, "score": float(step)}, {"kind": "worst", "score": 0.0}], step)
    log.log([], 4)
    with path.open("a") as file:
        file.write('{"step": 4, "kind": "be')  # a crash
    again = SampleLog(path)
    assert [sample["step"] for sample in read_samples(path)] == [1, 1, 2, 2, 3, 3]
    again.rewind(1)
    again.log([{"kind": "best", "score": 7.0}], 2)
    assert [(sample["step"], sample["score"]) for sample in read_samples(path)] == [(1, 1.0), (1, 0.0), (2, 7.0)]
    assert read_samples(path)[0]["response"] == lines
    SampleLog(None).log([{"score": 1.0}], 1)  # writes nothing


def test_log_picks_the_extremes_of_a_source_itself(rollout, tmp_path):
    log, scored = SampleLog(tmp_path / "samples.jsonl"), rollout._replace(scores=torch.tensor([0.5, 2, -1, NAN, 1, 0]))
    common = {"ranks": one_process(), "held_out_scores": torch.arange(6.0)}
    log.log_extremes(scored, 0, step=1, tokenizer=Ids(), **common)
    log.log_extremes(scored, 1, step=2, tokenizer=Ids(), **common)
    log.log_extremes(scored, 1, step=3, tokenizer=len, **common)  # which cannot decode
    found = [(sample["step"], sample["kind"], sample["response"]) for sample in read_samples(log.path)]
    assert found == [(2, "best", "10"), (2, "worst", "20 21"), (3, "best", [10]), (3, "worst", [20, 21])]
    assert [sample["held_out_score"] for sample in read_samples(log.path)] == [1.0, 2.0, 1.0, 2.0]


def test_reading_names_the_line_that_is_no_sample(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n[1]\n")
    with pytest.raises(ValueError, match="line 2"):
        read_samples(path)
    path.write_text("{}\nnot json\n")
    with pytest.raises(ValueError, match="line 2"):
        read_samples(path)
