"""Many people judge at once, each as fast as they can; prints what became of it. Run as a program of its own.

    python -m tests.feedback.racing --users 8 --items 40 --required 3 --by process

The database is that of PALM_FEEDBACK_DATABASE, or SQLite in PALM_FEEDBACK_DIR; it must be empty.
"""

import argparse
import json
import multiprocessing
import os
import threading
import traceback
from collections import Counter
from itertools import count

from palm_rlhf_pytorch.feedback.begin import begin


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--users", "--items", "--required"):
        parser.add_argument(option, type=int, required=True)
    parser.add_argument("--by", choices=("thread", "process"), required=True)
    args = parser.parse_args()
    begin()
    from django.contrib.auth import get_user_model
    from django.db import connections

    from palm_rlhf_pytorch.feedback.formats import NewCompletion, NewItem
    from palm_rlhf_pytorch.feedback.imports import add_items, make_project

    project = make_project("race", required=args.required, gold_every=0)
    responses = (NewCompletion(text="a"), NewCompletion(text="b"))
    add_items(project, [NewItem(prompt=f"prompt {number}", completions=responses) for number in range(args.items)])
    users = [get_user_model().objects.create(username=f"user {number}") for number in range(args.users)]
    connections.close_all()
    errors = (by_processes if args.by == "process" else by_threads)(project, users)
    print(json.dumps(outcome(project) | {"errors": errors}))


def judge_all(project, user, together) -> list[str]:
    """Judge until nothing is left for this person, all with an item in hand from the start; gives what went wrong."""
    from django.db import connections

    from palm_rlhf_pytorch.feedback.claims import claim
    from palm_rlhf_pytorch.feedback.judgements import Answer, submit

    errors = []
    for number in count():
        try:
            assignment = claim(project, user)
            if number == 0:
                together.wait(60)
            if assignment is None:
                break
            for _ in range(1 + number % 2):  # now and then twice, as a double click does
                submit(assignment.pk, user, Answer(choice=number % 7 - 3))
        except Exception:  # whatever it is, it is counted
            errors.append(traceback.format_exc())
            if len(errors) > 20:
                break
    connections.close_all()
    return errors


def by_threads(project, users) -> list[str]:
    errors: list[str] = []
    together = threading.Barrier(len(users))
    threads = [
        threading.Thread(target=lambda user=user: errors.extend(judge_all(project, user, together))) for user in users
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def by_processes(project, users) -> list[str]:
    """A fork for each person; each writes its errors to a pipe."""
    pipes, together = [], multiprocessing.get_context("fork").Barrier(len(users))
    for user in users:
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(judge_all(project, user, together)).encode()[:60_000])
            os._exit(0)
        os.close(write)
        pipes.append(read)
    errors = []
    for read in pipes:
        with os.fdopen(read) as pipe:
            errors += json.loads(pipe.read() or '["killed"]')
        os.wait()
    return errors


def outcome(project) -> dict:
    from palm_rlhf_pytorch.feedback.models import Assignment, Event, Judgement

    items = project.items.values_list("pk", "done")
    judged = Counter(Judgement.objects.values_list("assignment__item", flat=True))
    pairs = Counter(Assignment.objects.values_list("item", "user"))
    return {
        "judgements_of_an_item": sorted({judged[pk] for pk, _ in items}),
        "counts_that_are_wrong": sum(judged[pk] != done for pk, done in items),
        "judgements": sum(judged.values()),
        "submits_in_the_log": Event.objects.filter(verb="submit").count(),
        "same_item_twice": sum(number > 1 for number in pairs.values()),
        "left_over": Assignment.objects.filter(state=1).count(),
        "people_who_judged": len(set(Judgement.objects.values_list("assignment__user", flat=True))),
    }


if __name__ == "__main__":
    main()
