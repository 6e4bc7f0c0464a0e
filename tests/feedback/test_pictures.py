"""The statistics page: what it says of judgements made by hand."""

import re

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")


@pytest.fixture
def judge(make_project, people):
    """Judges pairs whose second text is longer and scored higher: the second better, the first better, ties."""
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import Answer, submit
    from palm_rlhf_pytorch.feedback.models import Completion

    def make(second, first, ties):
        project, (anna,) = make_project(items=second + first + ties), people("anna")
        Completion.objects.filter(place=1).update(text="longer " * 9, score=2.0)
        Completion.objects.filter(place=0).update(text="short", score=-1.0)
        for said in [1] * second + [-1] * first + [0] * ties:
            held = claim(project, anna)
            side = 1 if held.shown[1].place == 1 else -1
            submit(held.pk, anna, Answer(choice=said * side * 2))
        return project

    return make


def findings(project):
    from palm_rlhf_pytorch.feedback.pictures import pictures

    return {picture.title: picture for picture in pictures(project)["pictures"]}


def test_findings_are_those_of_the_judgements(judge):
    found = findings(judge(18, 6, 6))
    # Wilson's interval of 18 of 24 by hand: (0.75 + 0.0800 -+ 0.1908) / 1.1601
    share = "75% of 24 decided pairs (95 % interval 55% to 88%)."
    assert found["Length"].finding == f"The longer response is the better one in {share}"
    assert found["Scores against votes"].finding.startswith(f"The higher-scored response is the better one in {share}")
    assert found["Choices as shown"].finding.startswith("20% ties, 0% both bad.")
    assert found["Judgements per day"].finding == "30 in the last seven days (UTC)."
    assert ">75%<" in found["Length"].svg and "Agreement with the others" not in found


def test_few_pairs_are_called_too_few_and_an_even_share_chance(judge):
    assert "in 75% of 4 decided pairs (too few to tell)." in findings(judge(3, 1, 0))["Length"].finding


def test_an_even_share_may_be_chance_and_figures_follow_an_undo(judge, people):
    from palm_rlhf_pytorch.feedback.judgements import undo
    from palm_rlhf_pytorch.feedback.models import Assignment

    project = judge(11, 10, 0)
    assert (
        "52% of 21 decided pairs (95 % interval 32% to 72%, which may be chance)" in findings(project)["Length"].finding
    )
    undo(project, Assignment.objects.first().user)
    assert "55% of 20" in findings(project)["Length"].finding


def test_scores_are_grouped_by_their_distance_in_parts_of_equal_size(database):
    from types import SimpleNamespace

    from palm_rlhf_pytorch.feedback.pictures import _scores
    from palm_rlhf_pytorch.feedback.statistics import Share

    # of 40 pairs the 20 near ones go either way, the 20 far ones as scored
    margins = tuple([0.1, -0.1] * 10 + [1.5] * 20)
    found = SimpleNamespace(margins=margins, scores=Share(first=30, of=40))
    (picture,) = _scores(found)
    assert re.findall(r">(\d+%)<", picture.svg.split('class="even"')[1]) == ["50%", "100%"]
    assert ">0.1 to 0.1<" in picture.svg and ">1.5 to 1.5<" in picture.svg
