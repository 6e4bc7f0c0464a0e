"""Import and export with the database between them; figures; what `check` finds."""

import json

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")

ROWS = [
    {"prompt": "Name a bird.", "response_a": "Heron.", "response_b": "Any table", "scores": [1.5, 0.5]},
    {"prompt": "Name a fish.", "response_a": "Cod", "response_b": "A chair", "source_a": "old", "source_b": "new"},
    {"prompt": "Name a tree.", "response_a": "Oak", "response_b": "A stone", "gold": "a"},
]


def write_rows(path, rows):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in rows))
    return path


def judge_all(project, user, side):
    """Prefer the text that `side` picks, much; gives how many."""
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import Answer, submit

    number = 0
    while (assignment := claim(project, user)) is not None:
        texts = [completion.text for completion in assignment.shown]
        submit(assignment.pk, user, Answer(choice=3 if side(texts) == texts[1] else -3))
        number += 1
    return number


@pytest.fixture
def birds(database, tmp_path):
    from palm_rlhf_pytorch.feedback.imports import add_items, make_project, read_items

    project = make_project("birds", required=2, gold_every=1)
    items, _ = read_items(write_rows(tmp_path / "in.jsonl", ROWS), project.kind)
    assert add_items(project, items) == (3, 0)
    assert add_items(project, items) == (0, 3)
    return project


def test_what_was_judged_is_exported_by_text_whatever_the_side_it_was_shown_on(birds, people, tmp_path):
    from palm_rlhf_pytorch.feedback.exports import write
    from palm_rlhf_pytorch.text.datasets import read_labels

    for user in people("anna", "ben"):
        assert judge_all(birds, user, lambda texts: max(texts, key=len)) == 3
    assert write(birds, tmp_path / "out.jsonl") == 4  # the known answer is left out
    pairs = read_labels(tmp_path / "out.jsonl").records
    assert {(pair.chosen.response, pair.margin, pair.annotator) for pair in pairs} == {
        (text, 3.0, who) for text in ("Any table", "A chair") for who in ("anna", "ben")
    }
    assert write(birds, tmp_path / "out.csv", gold=True) == 6
    assert len(read_labels(tmp_path / "out.csv").records) == 6


def test_figures_by_hand(birds, people):
    from palm_rlhf_pytorch.feedback.statistics import own_progress, progress, statistics

    anna, ben = people("anna", "ben")
    assert progress(birds).wanted == 4
    judge_all(birds, anna, lambda texts: max(texts, key=len))
    judge_all(birds, ben, lambda texts: min(texts, key=len))
    found = statistics(birds)
    assert (found.progress.finished, found.progress.judgements, found.progress.share) == (2, 4, 1.0)
    assert (found.longer.first, found.longer.of) == (2, 4)
    assert (found.scores.first, found.scores.of, sorted(found.margins)) == (1, 2, [-1.0, 1.0])
    assert sum(found.sides.values()) == found.left.of == 4
    assert found.left.first == found.sides[-3]
    by_name = {one.name: one for one in found.annotators}
    assert [by_name[name].gold for name in ("anna", "ben")] == [(0, 1), (1, 1)]
    assert by_name["anna"].rest.share == 0.0 and by_name["anna"].judged == 3
    assert found.agreement.nominal < 0
    assert [dict(counts) for counts in found.days.values()] == [{"anna": 3, "ben": 3}]
    assert own_progress(birds, anna) == (3, 0)


def test_broken_lines_are_named_and_nothing_is_imported_or_they_are_left_out(database, tmp_path):
    from palm_rlhf_pytorch.feedback.imports import add_items, make_project, read_items
    from palm_rlhf_pytorch.text.datasets import skip_bad_record

    path = write_rows(tmp_path / "in.jsonl", [ROWS[0], "not json\n", {"prompt": "p", "response_a": "x"}, "\n"])
    with pytest.raises(ValueError, match=r"in\.jsonl, line 2: is not JSON"):
        read_items(path, 1)
    items, bad = read_items(path, 1, on_bad_record=skip_bad_record)
    assert len(items) == 1 and [(one.line, one.field) for one in bad] == [(2, ""), (3, "response_a")]
    plain = tmp_path / "in.txt"
    plain.write_bytes(b"one\nt\0wo\n")
    with pytest.raises(ValueError, match="holds a null character"):
        add_items(make_project("plain"), read_items(plain, 1)[0])
    with pytest.raises(ValueError, match="holds nothing to judge; the first bad row"):
        read_items(write_rows(tmp_path / "bad.jsonl", ["{}\n"]), 1, on_bad_record=skip_bad_record)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"required": 0}, r"required \(0\)"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"required": 40_000}, r"required \(40000\) must be 32767 or less"),
        ({"lease_seconds": 10**12}, "lease_seconds"),
        ({"rules": ["a", "a"]}, "rules holds one twice"),
        ({"rules": ["a\ud800"]}, "rules holds half of a pair"),
        ({"instructions": "a\0"}, "instructions holds a null character"),
        ({"kind": 2}, "asks for PAIRS, not RATINGS"),
    ],
)
def test_settings_of_a_project_are_checked(birds, settings, reason):
    from palm_rlhf_pytorch.feedback.imports import make_project

    with pytest.raises(ValueError, match=reason):
        make_project("birds", **settings)
    assert make_project("birds").required == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"format": "ratings"}, "cannot say PAIRS"), ({"format": "x"}, "none of"), ({}, "no judgement to write yet"),
     ({"format": "unpaired", "ties": True}, "has none")],
)  # fmt: skip
def test_an_export_that_cannot_be_is_refused(birds, tmp_path, options, reason):
    from palm_rlhf_pytorch.feedback.exports import write

    with pytest.raises(ValueError, match=reason):
        write(birds, tmp_path / "out.jsonl", **options)
    assert not (tmp_path / "out.jsonl").exists()


def test_completions_written_later_are_shown_in_an_order_of_each_persons_own(database, people):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem
    from palm_rlhf_pytorch.feedback.imports import add_completions, add_items, make_project
    from palm_rlhf_pytorch.feedback.models import Assignment

    project, (anna,) = make_project("live"), people("anna")
    add_items(project, [NewItem(prompt="Name a bird.")])
    assignment = claim(project, anna, live=True)
    assert assignment.order == [] and assignment.shown == []
    for texts in (("Heron", "Wren"), ("too", "late")):
        add_completions(assignment.item, [NewCompletion(text=text) for text in texts])
    shown = Assignment.objects.get().shown
    assert {completion.text for completion in shown} == {"Heron", "Wren"}


def test_check_finds_a_count_that_is_not_that_of_the_judgements(birds, people):
    from palm_rlhf_pytorch.feedback.checks import findings
    from palm_rlhf_pytorch.feedback.models import Item

    (anna,) = people("anna")
    judge_all(birds, anna, lambda texts: texts[0])
    assert {one.name: one.ok for one in findings() if one.ok is not None} == {
        "users": True, "secret": True, "database": True, "counts": True,
    }  # fmt: skip
    Item.objects.filter(pk=Item.objects.first().pk).update(done=5)
    assert {one.name: one.ok for one in findings()}["counts"] is False
