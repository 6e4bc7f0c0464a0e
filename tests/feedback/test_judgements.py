"""Submit, skip and undo: what is stored, what is refused, what the log keeps."""

import pytest

pytest.importorskip("django", reason="needs the extra [feedback]")


@pytest.fixture
def api(database):
    from palm_rlhf_pytorch.feedback import claims, codes, judgements, models

    return type("Api", (), {**vars(claims), **vars(judgements), **vars(models), **vars(codes)})


def test_the_first_submit_counts_and_a_second_changes_nothing(api, make_project, people):
    project, (anna,) = make_project(items=1), people("anna")
    assignment = api.claim(project, anna)
    first = api.submit(assignment.pk, anna, api.Answer(choice=-2, note=" short "))
    again = api.submit(assignment.pk, anna, api.Answer(choice=3))
    assert (first.again, again.again) == (False, True)
    assert again.judgement.pk == first.judgement.pk
    stored = api.Judgement.objects.get()
    assert (stored.choice, stored.note, stored.assignment.item.done) == (-2, "short", 1)
    assert api.Event.objects.filter(verb="submit").count() == 1


def test_another_persons_assignment_is_refused(api, make_project, people):
    project, (anna, ben) = make_project(items=1), people("anna", "ben")
    mine = api.claim(project, anna)
    for act in (lambda: api.submit(mine.pk, ben, api.Answer(choice=1)), lambda: api.skip(mine.pk, ben)):
        with pytest.raises(api.NotYoursError):
            act()
    assert not api.Judgement.objects.exists()


def test_answers_by_place_are_stored_by_completion(api, make_project, people):
    (anna,) = people("anna")
    rated = make_project(items=1, completions=3, kind=2, name="rated", rules=["is rude", "makes things up"])
    assignment = api.claim(rated, anna)
    assignment.order = list(reversed(sorted(assignment.order)))  # shown: the last of the file first
    assignment.save()
    said = api.Answer(ratings=(5, 1, 2), rules=({"is rude": "yes"}, {}, {"makes things up": "unsure"}))
    judgement = api.submit(assignment.pk, anna, said).judgement
    low, _, high = sorted(assignment.order)
    assert judgement.ratings == {str(high): 5, str(high - 1): 1, str(low): 2}
    assert judgement.rules == {str(high): {"is rude": "yes"}, str(low): {"makes things up": "unsure"}}
    ranked = make_project(items=1, completions=4, kind=3, name="ranked")
    assignment = api.claim(ranked, anna)
    judgement = api.submit(assignment.pk, anna, api.Answer(ranking=(2, 0, 3))).judgement
    assert judgement.ranking == [assignment.order[place] for place in (2, 0, 3)]


@pytest.mark.parametrize(
    ("kind", "answer", "field"),
    [
        (1, {}, "choice"),
        (1, {"choice": 4}, "choice"),
        (1, {"choice": 0, "both_bad": True}, "choice"),
        (1, {"choice": 1, "ratings": (1, 2, 3)}, "ratings"),
        (1, {"choice": 1, "note": "x" * 4001}, "note"),
        (1, {"choice": 1, "note": "a\0b"}, "note"),
        (1, {"choice": 1, "rules": ({"is loud": "yes"},)}, "rules"),
        (1, {"choice": 1, "rules": ({"is rude": "maybe"},)}, "rules"),
        (2, {"ratings": (1, 2)}, "ratings"),
        (2, {"ratings": (0, 1, 2)}, "ratings"),
        (2, {"choice": 1}, "choice"),
        (3, {"ranking": (1,)}, "ranking"),
        (3, {"ranking": (1, 1, 0)}, "ranking"),
        (3, {"ranking": (0, 3)}, "ranking"),
    ],
)
def test_a_wrong_answer_names_its_field_and_leaves_the_item_held(api, make_project, people, kind, answer, field):
    project, (anna,) = make_project(items=1, completions=3, kind=kind, rules=["is rude"]), people("anna")
    assignment = api.claim(project, anna)
    with pytest.raises(api.AnswerError) as error:
        api.submit(assignment.pk, anna, api.Answer(**answer))
    assert error.value.field == field
    assert not api.Judgement.objects.exists()
    assert api.claim(project, anna).pk == assignment.pk


def test_a_skipped_item_goes_to_others_and_not_back(api, make_project, people):
    project, (anna, ben) = make_project(items=1), people("anna", "ben")
    mine = api.claim(project, anna)
    api.skip(mine.pk, anna, "not my field")
    api.skip(mine.pk, anna, "again")
    assert api.Assignment.objects.get().reason == "not my field"
    with pytest.raises(api.ClosedError):
        api.submit(mine.pk, anna, api.Answer(choice=1))
    assert api.claim(project, anna) is None
    theirs = api.claim(project, ben)
    api.submit(theirs.pk, ben, api.Answer(both_bad=True))
    assert api.Judgement.objects.get().choice is None
    with pytest.raises(api.ClosedError):
        api.skip(theirs.pk, ben)


def test_undo_gives_the_last_item_back_and_the_log_keeps_what_was_said(api, make_project, people):
    project, (anna,) = make_project(items=3), people("anna")
    done = []
    for choice in (3, -1):
        done.append(api.claim(project, anna))
        api.submit(done[-1].pk, anna, api.Answer(choice=choice))
    api.claim(project, anna)
    back = api.undo(project, anna)
    assert (back.pk, back.state) == (done[1].pk, api.State.LEASED)
    assert api.claim(project, anna).pk == back.pk  # and not the one held before
    assert api.Item.objects.get(pk=back.item_id).done == 0
    assert api.Event.objects.get(verb="undo").payload["choice"] == -1
    assert api.undo(project, anna) is None  # one step; the next after this one is judged
    api.submit(back.pk, anna, api.Answer(choice=2))
    assert sorted(api.Judgement.objects.values_list("choice", flat=True)) == [2, 3]
    assert api.undo(project, anna).pk == back.pk


def test_undo_takes_a_skip_back_and_nothing_where_there_is_nothing(api, make_project, people):
    project, (anna, ben) = make_project(items=1), people("anna", "ben")
    mine = api.claim(project, anna)
    api.skip(mine.pk, anna, "hm")
    assert api.undo(project, ben) is None
    assert api.undo(project, anna).reason == ""
    api.submit(mine.pk, anna, api.Answer(choice=0))


def test_events_cannot_be_changed(api, people):
    people("anna")
    event = api.Event.objects.get(verb="adduser")
    for change in (
        event.save,
        event.delete,
        api.Event.objects.all().delete,
        lambda: api.Event.objects.update(verb="x"),
        lambda: api.Event._base_manager.update(verb="x"),
        lambda: api.Event.objects.bulk_update([event], ["verb"]),
        lambda: api.Event.objects.bulk_create(
            [event], update_conflicts=True, update_fields=["verb"], unique_fields=["id"]
        ),
    ):
        with pytest.raises(TypeError, match="append-only"):
            change()


def test_too_many_judgements_in_a_short_time_are_refused(api, make_project, people, monkeypatch):
    from palm_rlhf_pytorch.feedback import events

    monkeypatch.setattr(events, "JUDGEMENTS", events.Limit(2, 60))
    project, (anna, ben) = make_project(items=4), people("anna", "ben")
    for _ in range(2):
        api.submit(api.claim(project, anna).pk, anna, api.Answer(choice=1))
    held = api.claim(project, anna)
    with pytest.raises(events.ThrottledError) as error:
        api.submit(held.pk, anna, api.Answer(choice=1))
    assert 55 <= error.value.seconds <= 61
    api.submit(api.claim(project, ben).pk, ben, api.Answer(choice=1))  # his own count


def test_logins_are_counted_by_name_and_by_address(api, monkeypatch):
    from palm_rlhf_pytorch.feedback import accounts, events

    monkeypatch.setattr(events, "LOGIN_FAILURES", events.Limit(2, 60))
    for name in ("anna", " \uff21nna\0"):  # one person to log in as, however typed
        accounts.check_login(name, "10.0.0.7")
        accounts.login_failed(name, "10.0.0.7")
    for name, address in (("anna", "10.0.0.8"), ("ben", "10.0.0.7")):
        with pytest.raises(events.ThrottledError):
            accounts.check_login(name, address)
    accounts.check_login("ben", "10.0.0.8")


@pytest.mark.parametrize(
    ("name", "password", "reason"),
    [("anna", "seven grey herons", "exists"), ("a b", "seven grey herons", "valid"), ("ben", "12345", "short")],
)
def test_a_bad_name_or_password_is_refused_with_the_reason(people, name, password, reason):
    from palm_rlhf_pytorch.feedback.accounts import add_user

    people("anna")
    with pytest.raises(ValueError, match=reason):
        add_user(name, password)
