"""DPOTrainer: it learns, goes on to the same bits, and proves what it takes for granted."""

import math
import signal
from functools import partial

import pytest
import torch

from palm_rlhf_pytorch.objectives.direct import ipo_loss, with_nll
from palm_rlhf_pytorch.policy.actor_critic import Hat
from palm_rlhf_pytorch.policy.direct_model import DirectPolicy
from palm_rlhf_pytorch.policy.preflight import PreflightError
from palm_rlhf_pytorch.text.records import Text
from palm_rlhf_pytorch.training.metrics import MetricsLog, read_metrics
from tests.distributed.ranks import in_ranks
from tests.policy.direct_runs import EOS, make_dpo, make_kto, run_of, some_pairs, tiny_palm, trained


def lines(folder):
    return [
        {name: value for name, value in line.items() if "per_second" not in name}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def rows_round_alike() -> bool:
    """Whether torch's products here give a row the same bits however many come with it: MKL's on AMD's do not."""
    x, weight = torch.randn(8, 16), torch.randn(32, 16)
    together = torch.nn.functional.linear(x, weight)
    return all(torch.equal(torch.nn.functional.linear(x[:n], weight), together[:n]) for n in range(1, 8))


@pytest.mark.parametrize("lora", [True, False])
def test_preferred_responses_become_likelier_and_the_palm_given_stays(lora, tmp_path):
    palm = tiny_palm()
    before = {name: weight.clone() for name, weight in palm.named_parameters()}
    trainer = make_dpo(palm=palm, lora=lora, held_out=some_pairs(5), run_dir=tmp_path, lr=3e-2 if lora else 1e-2)
    first, exact = trainer.evaluate(), rows_round_alike()
    assert abs(first["eval/margin"]) < 1e-6 and (first["eval/accuracy"] == 0.5 or not exact)  # equal rewards
    found = trainer.train(4, use_tqdm=False)
    assert found["eval/accuracy"] > 0.9 and found["eval/margin"] > 0.2 and found["train/loss"] < 0.6
    assert found["dpo/margin"] == pytest.approx(found["dpo/reward_chosen"] - found["dpo/reward_rejected"], abs=1e-6)
    logged = lines(tmp_path)
    assert len(logged) == 12 and logged[-1]["dpo/margin"] == found["dpo/margin"]
    assert abs(logged[0]["dpo/margin"]) < 1e-6 and (logged[0]["dpo/margin"] == 0 or not exact)
    assert all(torch.equal(weight, before[name]) for name, weight in palm.named_parameters())
    improved = trainer.export_palm()
    assert any(not torch.equal(weight, before[name]) for name, weight in improved.named_parameters())


def test_the_loss_starts_at_log_two_a_pair_and_any_function_takes_its_place():
    pairs = [pair for pair in some_pairs(8) if pair.weight == 1]
    assert make_dpo(pairs=pairs).train(num_steps=1, use_tqdm=False)["train/loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )
    found = make_dpo(pairs=pairs, loss=partial(ipo_loss, beta=0.25)).train(num_steps=1, use_tqdm=False)
    assert found["train/loss"] == pytest.approx(
        sum(p.preference * 4 + (1 - p.preference) * 4 for p in pairs) / 4, abs=1e-4
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that were never stopped: their weights and metrics, by trainer."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with torch.random.fork_rng():
        return {
            make: (run_of(folder / make.__name__, make=make)[0], lines(folder / make.__name__))
            for make in (make_dpo, make_kto)
        }


@pytest.mark.parametrize("make", [make_dpo, make_kto])
@pytest.mark.parametrize("fault", ["told", "killed"])
def test_a_run_ended_in_the_middle_goes_on_to_the_same_bits(make, fault, undisturbed, tmp_path, monkeypatch):
    class FaultError(Exception):
        pass

    log = MetricsLog.log

    def ending(self, metrics, step):
        log(self, metrics, step)
        if step == 4:
            if fault == "killed":
                raise FaultError
            signal.raise_signal(signal.SIGTERM)

    expected, logged = undisturbed[make]
    options = {"held_out": some_pairs(5), "run_dir": tmp_path, "save_every": 3}
    with monkeypatch.context() as patched:
        patched.setattr(MetricsLog, "log", ending)
        stopped = make(**options)
        if fault == "killed":
            with pytest.raises(FaultError):
                stopped.train(2, use_tqdm=False)
        else:
            stopped.train(2, use_tqdm=False)
            assert stopped.stopped == "SIGTERM"
    with pytest.raises(ValueError, match="holds a run already"):
        make(**options).train(2, use_tqdm=False)
    with monkeypatch.context() as patched:  # the reference is on disk: nothing is read of it again
        patched.setattr("palm_rlhf_pytorch.policy.direct_model.Reference._computed", None)
        with pytest.raises(ValueError, match="seed 0.*now.*seed 1"):
            make(**options, seed=1).train(2, resume="auto", preflight=False, use_tqdm=False)
        resumed = make(**options)
        resumed.train(2, resume="auto", use_tqdm=False)
    assert all(torch.equal(weight, expected[name]) for name, weight in trained(resumed).items())
    assert lines(tmp_path) == logged


def run_both(folder):
    """Of one process among several: both trainers."""
    return [run_of(f"{folder}-{make.__name__}", make=make) for make in (make_dpo, make_kto)]


def test_two_processes_learn_what_one_does(undisturbed, tmp_path):
    ranks = in_ranks(tmp_path / "ranks", run_both)
    for place, make in enumerate((make_dpo, make_kto)):
        expected, logged = undisturbed[make]
        (first, told), (second, _) = (of_rank[place] for of_rank in ranks)
        for name, weight in expected.items():
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], weight, atol=2e-5, rtol=0)
        for name in ("train/loss", "eval/loss", f"{'dpo' if place == 0 else 'kto'}/accuracy"):
            assert told[name] == pytest.approx(logged[-1][name], abs=1e-5)


def test_passes_of_any_size_give_one_gradient():
    whole, parts = make_dpo(max_batch_tokens=4000), make_dpo(max_batch_tokens=1)
    for trainer in (whole, parts):
        trainer.train(1, use_tqdm=False)
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], weight, atol=1e-5, rtol=0)


def test_a_policy_that_makes_everything_unlikely_is_told_of_once():
    trainer = make_dpo(loss=partial(with_nll, coef=0.1))
    trainer.reference()["train"] += 10  # at most ten tokens a response
    with pytest.warns(UserWarning, match="both become less likely") as told:
        trainer.train(2, preflight=False, use_tqdm=False)
    assert len(told) == 1


def test_texts_that_are_cut_are_told_of():
    with pytest.warns(UserWarning, match=r"max_length \(5\) is short: \d+ prompts lost their beginning, \d+ responses"):
        make_dpo(max_length=5)


# preflight


def test_a_healthy_trainer_passes_and_is_left_as_it_was():
    trainer = make_dpo(pairs=[pair for pair in some_pairs() if pair.weight == 1])
    before, state = trained(trainer), torch.get_rng_state()
    report = trainer.preflight()
    assert report.ok and not report.warnings, str(report)
    assert f"loss {math.log(2):.6f}, of equals" in str(report)
    assert all(torch.equal(weight, before[name]) for name, weight in trained(trainer).items())
    assert torch.equal(torch.get_rng_state(), state) and trainer.policy.training


def move_policy(trainer, monkeypatch):
    with torch.no_grad():
        trainer.policy.hat.adapter.layers["0"].q.B += 0.3


def move_reference(trainer, monkeypatch):
    trainer.reference()["train"] += 0.7


def drop_out(trainer, monkeypatch):
    embed = Hat.embed
    monkeypatch.setattr(
        Hat, "embed", lambda hat, *args: torch.nn.functional.dropout(embed(hat, *args), 0.1, training=hat.training)
    )


def detach(trainer, monkeypatch):
    logprobs = DirectPolicy.logprobs
    monkeypatch.setattr(DirectPolicy, "logprobs", lambda *args, **named: logprobs(*args, **named).detach())


def thaw(trainer, monkeypatch):
    trainer.policy.palm.token_emb.weight.requires_grad_(True)


def count_prompts(trainer, monkeypatch):
    logprobs = DirectPolicy.logprobs

    def shifted(policy, ids, prompt_lengths, lengths, **named):
        return logprobs(policy, ids, prompt_lengths - 1, lengths, **named)

    monkeypatch.setattr(DirectPolicy, "logprobs", shifted)


def cut_ends(trainer, monkeypatch):
    trainer.examples.texts.ids = [ids[:-1] if ids[-1] == EOS else ids for ids in trainer.examples.texts.ids]


FAULTS = {
    "policy = reference": move_policy, "reference": move_reference, "dropout": drop_out, "gradients": detach,
    "weights": thaw, "by hand": count_prompts, "end token": cut_ends,
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_its_check_alone(name, monkeypatch):
    words = [pair for pair in some_pairs() if len(pair.chosen.prompt) > 1]
    trainer = make_dpo(pairs=words)
    FAULTS[name](trainer, monkeypatch)
    failed = [check.name for check in trainer.preflight().failures]
    assert failed == [name]
    with pytest.raises(PreflightError, match=name):
        trainer.train(1, use_tqdm=False)


@pytest.mark.parametrize(("share", "status"), [(1.0, "fail"), (0.3, "warn")])
def test_equal_texts_and_ties_are_seen(share, status):
    pairs = some_pairs(10)
    same = [type(pair)(chosen=pair.chosen, rejected=Text(*pair.chosen), preference=0.5) for pair in pairs]
    count = int(share * len(pairs))
    report = make_dpo(pairs=same[:count] + pairs[count:]).preflight()
    found = {check.name: check.status for check in report.checks}
    assert found["pairs differ"] == status and found["labels"] == ("fail" if share == 1 else "ok")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"palm": tiny_palm(causal=False)}, ValueError, "causal"),
        ({"palm": tiny_palm(num_tokens=5)}, ValueError, "must share a vocabulary"),
        ({"beta": 0.1}, TypeError, "beta and its like are the loss's"),
        ({"seed": -1}, ValueError, r"seed \(-1\)"),
        ({"max_length": 1}, ValueError, r"max_length \(1\)"),
        ({"eos_token": 13}, ValueError, r"eos_token \(13\)"),
        ({"pairs": []}, ValueError, "no record"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make_dpo(**options)
