"""RejectionTrainer: the judge's favourites become likelier, round after round, and a stopped run goes on."""

import signal

import pytest
import torch

from palm_rlhf_pytorch.policy.rejection import RejectionTrainer, response_loss
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from tests.distributed.ranks import in_ranks
from tests.policy.direct_runs import tiny_palm, trained

PROMPTS = [torch.tensor(ids) for ids in ([3, 1, 4, 1, 5], [9], [2, 6], [5, 3, 5], [8, 9, 7, 9])]
CALL = {"prompts_per_round": 12, "max_new_tokens": 4, "num_epochs": 2, "use_tqdm": False}


def count_sevens(sequences, *, prompt_mask, mask):
    return ((sequences == 7) & mask & ~prompt_mask).sum(dim=-1).float()


def make(**options):
    settings = {"lr": 1e-2, "minibatch_size": 4, "max_batch_tokens": 30, "accelerate_kwargs": {"cpu": True}}
    given = {"palm": tiny_palm(), "reward_model": count_sevens, "prompt_token_ids": PROMPTS, "num_samples": 5}
    return RejectionTrainer(**given | settings | options)


def test_the_judges_favourites_become_likelier():
    trainer = make()
    before = {name: weight.clone() for name, weight in tiny_palm().named_parameters()}
    history = trainer.train(6, **CALL | {"prompts_per_round": 30})
    assert history[-1]["rejection/score"] > 2 * history[0]["rejection/score"]
    assert all(line["rejection/best_score"] > line["rejection/score"] for line in history)
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.policy.palm.named_parameters())


@pytest.mark.parametrize("min_score", [None, 2.0])
def test_the_best_response_is_kept_where_the_judge_told_them_apart(min_score):
    trainer = make(min_score=min_score)
    best = trainer.sample(1, 12, max_new_tokens=4, temperature=1.0, eos_token=None)
    kept, figures = trainer._chosen(1, best)
    sevens = count_sevens(best.sequences, prompt_mask=best.prompt_mask, mask=best.mask)
    expected = [
        best.sequences[row][best.mask[row]].tolist()
        for row, scores in enumerate(best.all_scores.tolist())
        if len(set(scores)) > 1 and max(scores) >= (min_score or 0)
    ]
    assert [ids.tolist() for ids in kept.ids] == expected and 0 < len(expected) < 12
    assert torch.equal(sevens, best.scores) and torch.equal(best.scores, best.all_scores.amax(dim=-1))
    assert figures["rejection/kept"] == len(expected)
    assert figures["rejection/score"] == pytest.approx(float(best.all_scores.mean()))


def test_the_loss_is_that_of_response_tokens_alone():
    loss, figures = response_loss(torch.tensor([-3.0, -5.0]), torch.tensor([1, 3]))
    assert float(loss) == 2.0 and figures["loss"][1] == 4


@pytest.mark.parametrize(("fault", "step"), [("told", 2), ("killed", 2), ("told", 4)])
def test_a_run_ended_in_the_middle_goes_on_to_the_same_bits(fault, step, tmp_path, monkeypatch):
    class FaultError(Exception):
        pass

    log = MetricsLog.log

    def ending(self, metrics, at):
        log(self, metrics, at)
        if self.path.parent.name == "round-00000002" and at == step:
            if fault == "killed":
                raise FaultError
            signal.raise_signal(signal.SIGTERM)

    whole = make(run_dir=tmp_path / "whole")
    history = whole.train(3, **CALL)
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "log", ending)
        stopped = make(run_dir=tmp_path / "run", save_every=3)
        if fault == "killed":
            with pytest.raises(FaultError):
                stopped.train(3, **CALL)
        else:
            assert len(stopped.train(3, **CALL)) == 1 and stopped.stopped == "SIGTERM"
    with pytest.raises(ValueError, match="holds a run already"):
        make(run_dir=tmp_path / "run").train(3, **CALL)
    resumed = make(run_dir=tmp_path / "run", save_every=3)
    assert resumed.train(3, resume="auto", **CALL)[-1] == history[-1]
    assert all(torch.equal(weight, trained(whole)[name]) for name, weight in trained(resumed).items())
    logged = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    assert logged[0] == logged[1] and len(logged[0]) == 3
    with pytest.raises(ValueError, match="another run"):
        make(run_dir=tmp_path / "run", num_samples=4).train(3, resume="auto", **CALL)
    with pytest.raises(ValueError, match=r"num_rounds \(2\) is less than the 3 rounds"):
        make(run_dir=tmp_path / "run").train(2, resume="auto", **CALL)


def run_of_two(folder):
    trainer = make()
    return trainer.train(2, **CALL), trained(trainer)


def test_two_processes_sample_apart_and_learn_together(tmp_path):
    (first, weights), (second, others) = in_ranks(tmp_path / "ranks", run_of_two)
    assert first == second and all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert 1 <= first[0]["rejection/kept"] <= 12


def test_a_judge_that_tells_nothing_apart_stops_the_run():
    def indifferent(sequences, *, prompt_mask, mask):
        return torch.zeros(len(sequences))

    with pytest.raises(ValueError, match="round 1 keeps no response: to none of its prompts"):
        make(reward_model=indifferent).train(2, **CALL)
    with pytest.raises(ValueError, match=r"min_score \(9.0\)"):
        make(min_score=9.0).train(2, **CALL)


def test_a_later_round_that_keeps_nothing_ends_the_run(tmp_path):
    def soon_indifferent(sequences, *, prompt_mask, mask):
        first = not (tmp_path / "rounds" / "round-00000001" / "metrics.jsonl").exists()
        return count_sevens(sequences, prompt_mask=prompt_mask, mask=mask) * first

    with pytest.warns(UserWarning, match=r"round 2 keeps no response.*mean score is 0; the run ends here"):
        assert len(make(reward_model=soon_indifferent, run_dir=tmp_path).train(5, **CALL)) == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"num_samples": 1}, {}, r"num_samples \(1\)"),
        ({"min_score": float("nan")}, {}, "min_score"),
        ({"seed": -1}, {}, "seed"),
        ({}, {"temperature": 0.0}, r"temperature \(0.0\)"),
        ({}, {"eos_token": 13}, r"eos_token \(13\)"),
        ({}, {"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ({}, {"resume": "auto"}, "run_dir"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_sampled(options, call, message):
    with pytest.raises(ValueError, match=message):
        make(**options).train(1, **CALL | call)
