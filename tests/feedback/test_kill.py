"""The server is killed while people submit: every judgement that it had acknowledged is there afterwards."""

import json
import threading
import urllib.error
from http.client import HTTPException

import pytest

from tests.feedback.conftest import PASSWORD
from tests.feedback.databases import database_variables
from tests.feedback.http_judge import Judge
from tests.feedback.serving import SETUP, run_program, serving, start

pytest.importorskip("django", reason="needs the extra [feedback]")

PROJECT = "kill"
PEOPLE, SUBMITS, KILLS = 4, 200, 1
STORED = """
import json
from palm_rlhf_pytorch.feedback.begin import begin
begin()
from palm_rlhf_pytorch.feedback.checks import findings
from palm_rlhf_pytorch.feedback.models import Judgement
wrong = [one.detail for one in findings() if one.ok is False]
print(json.dumps([{str(one.assignment_id): one.note for one in Judgement.objects.all()}, wrong]))
"""


def submit_until_gone(address, name, said, enough):
    """Judge until the server is gone; each acknowledged assignment and its note goes into `said`."""
    try:
        judge, page = Judge(address, name, PASSWORD), None
        while not enough.is_set():
            note = f"{name} {len(said)}"
            done = judge.judge(PROJECT, page, choice="2", note=note)
            assert done is not None, "the queue ended before the server was killed"
            assignment, page = done
            said[assignment] = note
    except (urllib.error.URLError, HTTPException, ConnectionError):
        pass  # killed; what was on its way was not acknowledged


@pytest.mark.slow
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_acknowledged_judgement_is_lost_when_the_server_is_killed(tmp_path, database):
    with database_variables(database, tmp_path / "data") as variables:
        names = [f"person{number}" for number in range(PEOPLE)]
        run_program(SETUP, variables, PROJECT, str(3 * SUBMITS), PASSWORD, *names)
        acknowledged: dict[str, dict[str, str]] = {name: {} for name in names}
        for kill in range(1, KILLS + 1):
            process, address = start(tmp_path / "data", variables=variables)
            enough = threading.Event()
            threads = [
                threading.Thread(target=submit_until_gone, args=(address, name, acknowledged[name], enough))
                for name in names
            ]
            for thread in threads:
                thread.start()
            while sum(map(len, acknowledged.values())) < kill * SUBMITS // KILLS:
                assert any(thread.is_alive() for thread in threads)
                threads[0].join(0.002)
            process.kill()
            for thread in threads:
                thread.join()
            enough.set()
            process.wait()
        stored, wrong = json.loads(run_program(STORED, variables))
        assert wrong == []
        said = {assignment: note for own in acknowledged.values() for assignment, note in own.items()}
        assert len(said) >= SUBMITS - KILLS
        assert {assignment: stored.get(assignment) for assignment in said} == said
        assert len(stored) - len(said) <= KILLS * PEOPLE  # stored, and killed before that was said
        with serving(tmp_path / "data", variables=variables) as address:  # and it goes on
            assert Judge(address, names[0], PASSWORD).judge(PROJECT, choice="1") is not None
