"""Who judges what next: leases, their end, items with known answers."""

from datetime import timedelta

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")


@pytest.fixture
def later(monkeypatch):
    """Moves the clock of claims and judgements on by so many seconds."""
    from django.utils import timezone

    real, moved = timezone.now, [0.0]
    monkeypatch.setattr(timezone, "now", lambda: real() + timedelta(seconds=moved[0]))

    def move(seconds):
        moved[0] += seconds

    return move


def finish(assignment, user):
    from palm_rlhf_pytorch.feedback.judgements import Answer, submit

    return submit(assignment.pk, user, Answer(choice=1))


def test_people_get_different_items_and_a_second_claim_resumes(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim

    project, (anna, ben, cleo) = make_project(items=2), people("anna", "ben", "cleo")
    first, second = claim(project, anna), claim(project, ben)
    assert first.item_id != second.item_id
    assert claim(project, cleo) is None
    assert claim(project, anna).pk == first.pk


def test_an_item_is_asked_of_as_many_people_as_required_and_never_twice_of_one(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.models import Item

    project, team = make_project(items=3, required=2), people("anna", "ben", "cleo")
    seen = {user.username: [] for user in team}
    busy = True
    while busy:
        busy = False
        for user in team:
            if (assignment := claim(project, user)) is not None:
                finish(assignment, user)
                seen[user.username].append(assignment.item_id)
                busy = True
    assert list(Item.objects.values_list("done", flat=True)) == [2, 2, 2]
    assert all(len(set(items)) == len(items) for items in seen.values())


def test_order_holds_every_completion_once_and_both_sides_come_first(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim

    project, (anna,) = make_project(items=40), people("anna")
    firsts = set()
    for _ in range(40):
        assignment = claim(project, anna)
        assert sorted(completion.place for completion in assignment.shown) == [0, 1]
        firsts.add(assignment.shown[0].place)
        finish(assignment, anna)
    assert firsts == {0, 1}  # of 40 fair draws all alike: once in 5e11


def test_higher_priority_comes_first_and_unready_items_only_when_live(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.models import Item

    project, (anna, ben, cleo) = make_project(items=3), people("anna", "ben", "cleo")
    low, waiting, high = Item.objects.order_by("pk")
    Item.objects.filter(pk=high.pk).update(priority=0.7)
    Item.objects.filter(pk=waiting.pk).update(ready=False)
    assert claim(project, anna).item_id == high.pk
    assert claim(project, ben).item_id == low.pk
    assert claim(project, cleo) is None
    assert claim(project, cleo, live=True).item_id == waiting.pk


def test_an_expired_lease_goes_to_another_and_the_late_answer_is_refused(make_project, people, later):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import GoneError
    from palm_rlhf_pytorch.feedback.models import Judgement

    project, (anna, ben) = make_project(items=1, lease_seconds=60), people("anna", "ben")
    mine = claim(project, anna)
    assert claim(project, ben) is None
    later(61)
    theirs = claim(project, ben)
    assert theirs.item_id == mine.item_id
    with pytest.raises(GoneError):
        finish(mine, anna)
    finish(theirs, ben)
    with pytest.raises(GoneError):
        finish(mine, anna)
    assert Judgement.objects.count() == 1


def test_a_late_answer_counts_while_nobody_else_has_taken_the_item(make_project, people, later):
    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.models import Item

    project, (anna, ben) = make_project(items=1, lease_seconds=60), people("anna", "ben")
    mine = claim(project, anna)
    later(61)
    finish(mine, anna)
    assert Item.objects.get().done == 1
    assert claim(project, ben) is None


def test_an_own_expired_lease_is_begun_anew_on_the_same_row(make_project, people, later):
    from palm_rlhf_pytorch.feedback.claims import claim

    project, (anna,) = make_project(items=1, lease_seconds=60), people("anna")
    first = claim(project, anna)
    for _ in range(20):  # a page that is still open shows the sides as they were: drawn again, 20 times alike is 1e-6
        later(61)
        again = claim(project, anna)
        assert (again.pk, again.order) == (first.pk, first.order) and again.expires > first.expires


def test_a_released_item_is_free_for_others(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim, release

    project, (anna, ben) = make_project(items=1), people("anna", "ben")
    mine = claim(project, anna)
    release(mine.pk, ben)  # not his
    assert claim(project, ben) is None
    release(mine.pk, anna)
    assert claim(project, ben).item_id == mine.item_id


def test_everyone_is_asked_items_with_a_known_answer_about_one_in_so_many(make_project, people):
    from palm_rlhf_pytorch.feedback.claims import claim, gold_is_due
    from palm_rlhf_pytorch.feedback.models import Item

    project, (anna, ben) = make_project(items=8, gold_every=1), people("anna", "ben")
    last = list(Item.objects.order_by("-pk").values_list("pk", flat=True)[:2])
    Item.objects.filter(pk__in=last).update(gold={"choice": 1})
    for user in (anna, ben):  # one in one: both gold ones first, for both people, though one is required
        assert {finish(claim(project, user), user).judgement.assignment.item_id for _ in range(2)} == set(last)
    assert claim(project, anna).item.gold is None
    share = sum(gold_is_due(anna, number, 5) for number in range(2000)) / 2000
    assert share == pytest.approx(1 / 5, abs=0.04)  # 4.5 standard deviations
    assert not any(gold_is_due(anna, number, 0) for number in range(50))
