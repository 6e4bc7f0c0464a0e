"""KTOTrainer: it learns from votes, over a baseline read from responses to other prompts."""

import pytest
import torch

from palm_rlhf_pytorch.text.records import Text, Vote
from tests.policy.direct_runs import Letters, make_kto, some_pairs, trained


def votes(ups, downs):
    prompts = ("ab", "c", "dd")
    return [
        Vote(text=Text(prompts[row % 3], ("a" if row < ups else "g") * (1 + row % 4)), up=row < ups)
        for row in range(ups + downs)
    ]


def test_votes_up_become_likelier_than_votes_down():
    trainer = make_kto(held_out=some_pairs(5), lr=3e-2)
    before = trainer.evaluate()
    assert before == {"eval/loss": pytest.approx(0.5), "eval/accuracy": 0.5}  # sigma(0), weights of mean 1
    found = trainer.train(2, use_tqdm=False)
    assert found["eval/accuracy"] > 0.8 and found["eval/loss"] < 0.45
    assert found["kto/reward_up"] > 0.1 > -0.1 > found["kto/reward_down"] and found["kto/baseline"] >= 0


def test_the_baseline_is_read_from_the_steps_other_responses():
    trainer = make_kto(votes=votes(5, 4))
    with torch.no_grad():
        trainer.policy.hat.adapter.layers["0"].v.B += 0.5
    reference, rows = trainer.reference()["train"], [7, 2, 3]
    improved, ratios = trainer.export_palm(), []
    for row in rows:
        ids, prompt = trainer.votes.texts.ids[2 * row + 1].long(), trainer.votes.texts.prompt_lengths[2 * row + 1]
        old, new = (palm(ids[None])[0].detach().log_softmax(dim=-1) for palm in (trainer.policy.palm, improved))
        ratios.append(sum(float((new - old)[place - 1, ids[place]]) for place in range(prompt, len(ids))))
        own = trainer.votes.texts.ids[2 * row]
        assert ids[0] == own[0] and Letters()(("ab", "c", "dd")[row % 3])[0] == own[0]  # its own prompt
    expected = max(0.0, sum(ratios) / 3)
    found = trainer.common_facts(trainer.votes, reference, rows)["baseline"]
    assert float(found()) == pytest.approx(expected, abs=1e-5) and abs(sum(ratios)) > 0.01
    assert found() is found()  # one pass a step, whatever asks


def test_passes_of_any_size_give_one_gradient():
    whole, parts = make_kto(max_batch_tokens=4000), make_kto(max_batch_tokens=1)
    for trainer in (whole, parts):
        trainer.train(1, use_tqdm=False)
    for name, weight in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("ups", "downs", "options", "advice"),
    [(6, 3, {}, "up_weight=0.5 evens it"), (3, 6, {}, "up_weight=2"), (6, 3, {"up_weight": 0.6}, None)],
)
def test_unequal_numbers_of_votes_are_told_of_unless_weights_make_up_for_them(ups, downs, options, advice, recwarn):
    trainer = make_kto(votes=votes(ups, downs), **options)
    assert [advice in str(told.message) for told in recwarn if "votes up" in str(told.message)] == [True] * bool(advice)
    [check] = [check for check in trainer.preflight().checks if check.name == "votes"]
    assert check.status == ("warn" if advice else "ok") and f"{ups} votes up, {downs} down" in check.found


def test_votes_of_one_kind_fail_the_proof():
    report = make_kto(votes=votes(4, 0)).preflight()
    assert [check.name for check in report.failures] == ["votes"]


def test_held_out_votes_on_one_prompt_are_named():
    with pytest.raises(ValueError, match=r"held_out \(3\) all have one prompt"):
        make_kto(held_out=[Vote(text=Text("ab", "c" * length), up=length > 1) for length in (1, 2, 3)])


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"down_weight": -1.0}, {"up_weight": float("inf")}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_kto(**wrong)
