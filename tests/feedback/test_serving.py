"""`palm-rlhf feedback serve`: what it refuses, whom it answers, and that the built wheel holds what it needs."""

import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import pytest

from palm_rlhf_pytorch.palm.native import SOURCES
from tests.feedback.conftest import PASSWORD
from tests.feedback.serving import serving
from tests.feedback.test_environment import run_feedback

pytest.importorskip("django", reason="needs the extra [feedback]")


def ask(url, **headers):
    """Status, headers and body of a page; redirects are not followed."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    try:
        response = urllib.request.build_opener(Stay).open(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.headers, response.read().decode()


def test_nobody_serves_others_before_there_is_a_user(tmp_path):
    for options, reason in ((["--host", "0.0.0.0"], "needs a user first"), ([], "nobody can log in yet")):
        done = run_feedback(["serve", "--data-dir", str(tmp_path), *options], stdin=subprocess.DEVNULL)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_a_server_answers_its_own_name_and_shows_nothing_without_login(tmp_path):
    added = run_feedback(["adduser", "anna", "--password-stdin", "--data-dir", str(tmp_path)], input=PASSWORD + "\n")
    assert (added.returncode, added.stdout) == (0, "added anna\n"), added.stderr
    with serving(tmp_path, "--allowed-host", "judge.example") as address:
        for page in ("/", "/projects/", "/nothing/", "/static/palm_feedback/nothing.css"):
            status, headers, _ = ask(address + page)
            found = (status, headers.get("Location", "").partition("?")[0])
            assert found in ((302, "/login/"), (404, "")), page
        status, headers, body = ask(address + "/login/")
        assert status == 200 and "password" in body
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        assert ask(address + "/login/", Host="judge.example")[0] == 200
        assert ask(address + "/login/", Host="evil.example")[0] == 400
        (sheet,) = re.findall(r'href="(/static/palm_feedback/[^"]+\.css)"', body) or [
            "/static/palm_feedback/feedback.css"
        ]
        assert ask(address + sheet)[0] == 200
        assert ask(address + sheet, Host="evil.example")[0] == 400
        busy = run_feedback(["serve", "--data-dir", str(tmp_path), "--port", address.rpartition(":")[2]])
        assert busy.returncode == 2 and "cannot be listened on" in busy.stderr


def test_behind_tls_the_deployment_check_is_clean_and_plain_http_is_sent_on(tmp_path):
    run_feedback(["adduser", "anna", "--password-stdin", "--data-dir", str(tmp_path)], input=PASSWORD + "\n")
    checked = run_feedback(["check", "--behind-tls", "--data-dir", str(tmp_path)])
    assert checked.returncode == 0, checked.stdout
    assert "deployment: Django finds nothing" in checked.stdout
    with serving(tmp_path, "--behind-tls", "--allowed-host", "judge.example") as address:
        status, headers, _ = ask(address + "/login/", Host="judge.example")
        assert (status, headers["Location"]) == (301, "https://judge.example/login/")
        status, headers, _ = ask(address + "/login/", **{"Host": "judge.example", "X-Forwarded-Proto": "https"})
        assert status == 200 and "Secure" in headers["Set-Cookie"]


@pytest.mark.slow
def test_the_wheel_holds_templates_static_files_migrations_and_what_is_compiled(tmp_path):
    root = Path(__file__).parents[2]
    program = "from setuptools.build_meta import build_wheel; import sys; build_wheel(sys.argv[1])"
    copy = tmp_path / "source"  # a build leaves folders behind where it runs
    shutil.copytree(root / "palm_rlhf_pytorch", copy / "palm_rlhf_pytorch")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    built = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    here = root / "palm_rlhf_pytorch" / "feedback"
    for pattern in ("templates/palm_feedback/*.html", "static/palm_feedback/*.css", "migrations/0001_*.py"):
        wanted = {path.relative_to(root).as_posix() for path in here.glob(pattern)}
        assert wanted and wanted <= names
    assert {f"palm_rlhf_pytorch/palm/{file}" for file in SOURCES} <= names


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_there_is_not_is_refused(django_ready, port):
    from palm_rlhf_pytorch.feedback.server import make_server

    with pytest.raises(ValueError, match=f"--port {port} must be from 0 to 65535"):
        make_server("127.0.0.1", port).close()
