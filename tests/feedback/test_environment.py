"""Variables, secret, database URLs, hosts; settings that Django's deployment check accepts; migrations up to date."""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from palm_rlhf_pytorch.feedback import environment


def test_the_secret_is_made_once_and_for_the_owner_alone(tmp_path):
    folder = tmp_path / "data"
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: environment.secret_key(folder, {}), range(16)))
    assert len(keys) == 1 and len(keys.pop()) >= 50
    assert [path.name for path in folder.iterdir()] == ["secret.key"]
    assert stat.S_IMODE((folder / "secret.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert environment.secret_key(folder, {"PALM_FEEDBACK_SECRET_KEY": "k" * 50}) == "k" * 50
    with pytest.raises(ValueError, match=r"PALM_FEEDBACK_SECRET_KEY holds 4 characters"):
        environment.secret_key(folder, {"PALM_FEEDBACK_SECRET_KEY": "1234"})


def test_the_file_of_the_database_is_for_the_owner_alone_also_in_a_folder_of_others(tmp_path):
    path = tmp_path / "feedback.sqlite3"
    environment.make_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("kept")
    environment.make_file(path)
    assert path.read_text() == "kept"
    with pytest.raises(ValueError, match="cannot be written"):
        environment.make_file(tmp_path / "nowhere" / "x.sqlite3")


def test_a_url_names_the_database():
    found = environment.database_of("postgresql://us%40er:p%2Fw@[::1]:5433/my%20db?sslmode=require")
    assert {name: found[name] for name in ("NAME", "USER", "PASSWORD", "HOST", "PORT")} == {
        "NAME": "my db", "USER": "us@er", "PASSWORD": "p/w", "HOST": "::1", "PORT": "5433",
    }  # fmt: skip
    assert found["OPTIONS"] == {"sslmode": "require"}
    assert environment.database_of("sqlite:////var/x.db")["NAME"] == "/var/x.db"
    assert environment.database_of("sqlite:///x.db")["NAME"] == "x.db"


@pytest.mark.parametrize("url", ["mysql://u:secret@h/x", "postgresql://u:secret@h", "sqlite://", "x.db"])
def test_a_url_of_another_kind_is_refused_without_its_password(url):
    with pytest.raises(ValueError, match="none of sqlite") as error:
        environment.database_of(url)
    assert "secret" not in str(error.value)


def test_hosts_are_those_of_loopback_and_those_given():
    assert environment.hosts({}) == ["127.0.0.1", "localhost", "[::1]"]
    assert environment.hosts({"PALM_FEEDBACK_HOSTS": " a.org, b.org,"})[3:] == ["a.org", "b.org"]
    with pytest.raises(ValueError, match="BEHIND_TLS"):
        environment.behind_tls({"PALM_FEEDBACK_BEHIND_TLS": "yes"})


def test_migrations_are_those_of_the_models(django_ready):
    from django.core.management import call_command

    call_command("makemigrations", "--check", "--dry-run", verbosity=0)  # exits with 1 where one is missing


def test_no_other_module_imports_django():
    program = (
        "import sys, palm_rlhf_pytorch, palm_rlhf_pytorch.cli.main as entry; entry.build_parser();"
        "print([name for name in sys.modules if name.split('.')[0] in ('django', 'psycopg', 'waitress')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_extra_the_command_says_what_to_install(tmp_path):
    (tmp_path / "django.py").write_text("raise ImportError('not here')\n")
    done = run_feedback(["stats", "--data-dir", str(tmp_path / "data")], {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    assert (done.returncode, done.stdout) == (2, "")
    packages = "Django, django-htmx, waitress and whitenoise"
    command = 'pip install "palm-rlhf-pytorch[feedback]"'
    assert done.stderr == f"palm-rlhf feedback: error: the feedback app needs {packages}: {command}\n"
    assert not (tmp_path / "data").exists()


def run_feedback(arguments, variables=None, **options):
    command = [sys.executable, "-m", "palm_rlhf_pytorch", "feedback", *arguments]
    return subprocess.run(
        command, env={**os.environ, **(variables or {})}, capture_output=True, text=True, timeout=120, **options
    )
