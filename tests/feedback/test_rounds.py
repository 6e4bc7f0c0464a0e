"""Rounds: what was sampled is in the queue whole, and how it stands is counted from people's votes."""

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")

from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem


def item(prompt, *parts, **fields):
    """An item of (text, source, score) each."""
    completions = tuple(NewCompletion(text=text, source=source, score=score) for text, source, score in parts)
    return NewItem(prompt=prompt, completions=completions, **fields)


ITEMS = [
    item("p", ("good p", "new", 1.0), ("bad p", "old", 0.0)),
    item("q", ("bad q", "new", 1.0), ("good q", "old", 0.0)),
    item("r", ("even r", "old", 0.0), ("even too r", "new", 2.0)),
    item("s", ("good s", "old", 3.0), ("bad s", "old", 3.0)),
    item("known", ("good", "new", 0.0), ("bad", "old", 9.0), gold={"choice": -1}),
]


def choice_of(texts):
    """What the people of these tests say of two texts as shown: the good one, else a tie."""
    return 0 if "even" in texts[0] else -3 if "good" in texts[0] else 2


def judge_all(project, user, said):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import submit

    while (assignment := claim(project, user)) is not None:
        submit(assignment.pk, user, said([one.text for one in assignment.shown]))


def test_a_round_is_counted_by_hand_whatever_side_a_response_was_shown_on(people, make_project):
    from palm_rlhf_pytorch.feedback.judgements import Answer
    from palm_rlhf_pytorch.feedback.rounds import add_round, round_of

    project = make_project(items=2, required=2, gold_every=1)
    assert add_round(project, ITEMS, new="new", old="old", reward_model="rm.pt") == 1
    for user in people("anna", "ben"):
        judge_all(project, user, lambda texts: Answer(choice=choice_of(texts) if "answer" not in texts[0] else 1))
    found = round_of(project, 1)
    assert (found.new, found.old, found.reward_model, found.annotators) == ("new", "old", "rm.pt", 2)
    assert (found.progress.items, found.progress.judgements, found.progress.finished) == (4, 8, 4)
    assert sorted((one.prompt, one.value) for one in found.wins) == [
        ("p", 1.0), ("p", 1.0), ("q", 0.0), ("q", 0.0), ("r", 0.5), ("r", 0.5),
    ]  # fmt: skip
    assert sorted((one.prompt, one.value) for one in found.accuracy) == [("p", 1.0), ("p", 1.0), ("q", 0.0), ("q", 0.0)]
    assert found.agreement.items == 4 and found.agreement.nominal == pytest.approx(1.0)
    imports = round_of(project, 0)
    assert (imports.new, imports.at, imports.wins, imports.progress.items) == ("", None, (), 2)


def test_what_is_there_already_makes_no_round(make_project):
    from palm_rlhf_pytorch.feedback.models import Event
    from palm_rlhf_pytorch.feedback.rounds import add_round, last_round, round_of

    project = make_project(items=0)
    assert add_round(project, ITEMS[:2], new="new") == 1
    events = Event.objects.count()
    with pytest.raises(ValueError, match="all 2 items are in project 'birds' already: take another seed"):
        add_round(project, ITEMS[:2], new="newer")
    assert (last_round(project), Event.objects.count()) == (1, events)
    assert add_round(project, ITEMS[:3], new="newer", old="old") == 2
    assert (round_of(project, 2).progress.items, round_of(project, 2).new, round_of(project, 1).new) == (
        1,
        "newer",
        "new",
    )
    with pytest.raises(ValueError, match="has no round 3; its newest is 2"):
        round_of(project, 3)


@pytest.mark.parametrize(
    ("kind", "parts", "answer", "wins"),
    [
        (1, 2, {"both_bad": True}, [0.5]),
        (2, 3, {"ratings": [2, 5, 2]}, [0.0, 0.5]),
        (3, 3, {"ranking": [2, 0]}, [0.0]),
        (3, 3, {"ranking": [1, 0, 2]}, [0.0, 1.0]),
    ],
)
def test_every_kind_of_answer_compares_the_new_model_with_the_old(
    people, make_project, monkeypatch, kind, parts, answer, wins
):
    from palm_rlhf_pytorch.feedback import claims
    from palm_rlhf_pytorch.feedback.judgements import Answer
    from palm_rlhf_pytorch.feedback.rounds import add_round, round_of

    # shown as they were written: the new model's first, then the old one's
    monkeypatch.setattr(claims, "draw_order", lambda item: list(item.completions.values_list("pk", flat=True)))
    project = make_project(items=0, kind=kind)
    told = [("a", "new", 1.0), ("b", "old", 0.0), ("c", "old", 0.0)][:parts]
    add_round(project, [item("p", *told)], new="new", old="old")
    (anna,) = people("anna")
    judge_all(project, anna, lambda texts: Answer(**answer))
    found = round_of(project, 1)
    assert sorted(one.value for one in found.wins) == wins
    assert sorted(one.value for one in found.accuracy) == [value for value in wins if value != 0.5]
