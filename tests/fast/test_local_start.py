"""How the local servers and the environment are started: which configuration, which Python."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from infra.local.__main__ import _links
from infra.local.airflow import REPOSITORY, LocalAirflow, configuration
from infra.local.homes import DEMO_CONFIG, airflow_home, chosen_config
from infra.local.pages import Page
from infra.local.processes import Server, ServerError, wait_until
from onetrans.errors import BadConfigError
from onetrans.settings import AuditSettings, MlflowSettings, Settings, load_settings


def test_a_users_own_configuration_goes_before_the_demos(tmp_path: Path) -> None:
    assert chosen_config({}, tmp_path) is None
    demo, own, named = tmp_path / DEMO_CONFIG, tmp_path / "onetrans.toml", tmp_path / "other.toml"
    demo.parent.mkdir(parents=True)
    demo.touch()
    assert chosen_config({}, tmp_path) == demo
    own.touch()
    assert chosen_config({}, tmp_path) == own
    assert chosen_config({"ONETRANS_CONFIG": str(named)}, tmp_path) == named


def _what_setup_reads(folder: Path) -> Path:
    """Copy what `infra/setup.sh` is and reads into a folder; return its folder for programs."""
    (folder / "infra").mkdir()
    shutil.copy(REPOSITORY / "infra" / "setup.sh", folder / "infra")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder)
    programs = folder / "bin"
    programs.mkdir()
    return programs


PYTHON_HINT = "sudo apt-get install python3.11 python3.11-venv (python3.12 python3.12-venv where there is no 3.11)"
JAVA_HINT = "sudo apt-get install openjdk-17-jre-headless (openjdk-21-jre-headless where there is no 17)"
TOOLS = ("cat", "cksum", "dirname", "head", "sed")


@pytest.mark.parametrize(
    ("installed", "variables", "said", "hint"),
    [
        ({"java": "17.0.9"}, {}, "Python 3.11 or 3.12 is needed; found: python3 is not there.", PYTHON_HINT),
        (
            {"java": "17.0.9", "python3": "3.9.2"}, {},
            "Python 3.11 or 3.12 is needed; found: python3 is 3.9.2.", PYTHON_HINT,
        ),
        (
            {"java": "21", "python3": "3.13.1"}, {},
            "Python 3.11 or 3.12 is needed; found: python3 is 3.13.1.", PYTHON_HINT,
        ),
        (
            {"java": "17.0.9", "python3.9": "3.9.2"}, {"PYTHON": "python3.9"},
            "Python 3.11 or 3.12 is needed; found: PYTHON=python3.9 is 3.9.2.", PYTHON_HINT,
        ),
        (
            {"java": "17.0.9"}, {"PYTHON": "/none/python"},
            "Python 3.11 or 3.12 is needed; found: PYTHON=/none/python is not there.", PYTHON_HINT,
        ),
        ({}, {}, "Java 17 or newer is needed (Spark 4.1 runs on it); found: java is not on PATH.", JAVA_HINT),
        (
            {"java": "1.8.0_392"}, {},
            "Java 17 or newer is needed (Spark 4.1 runs on it); found: java is 1.8.0_392.", JAVA_HINT,
        ),
        (
            {"java": ""}, {},  # macOS has a /usr/bin/java that only says where to get one
            "Java 17 or newer is needed (Spark 4.1 runs on it); found: java is no working Java.", JAVA_HINT,
        ),
        (
            {"java": "17.0.9"}, {"JAVA_HOME": "/none"},
            "JAVA_HOME=/none has no bin/java; unset JAVA_HOME or set it to the folder of a Java; "
            "java on PATH is 17.0.9.", JAVA_HINT,
        ),
        (
            {}, {"JAVA_HOME": "/none"},
            "JAVA_HOME=/none has no bin/java; unset JAVA_HOME or set it to the folder of a Java; "
            "java on PATH is not there.", JAVA_HINT,
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_too_old_is_named_with_the_command_that_installs_it(
    tmp_path: Path, installed: dict[str, str], variables: dict[str, str], said: str, hint: str
) -> None:
    """The wrong one failed minutes later, in a package."""
    programs = _what_setup_reads(tmp_path)
    for name in TOOLS:
        (programs / name).symlink_to(shutil.which(name) or name)
    for name, version in installed.items():
        if name == "java":
            told = f"echo 'openjdk version \"{version}\" 2023-10-17' >&2" if version else "exit 1"
        else:
            told = f'[ "$1" = --version ] && echo "Python {version}" && exit 0\nexit 1'
        (programs / name).write_text(f"#!/bin/sh\n{told}\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(tmp_path / "infra" / "setup.sh")],
        env={"PATH": str(programs), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"setup: {said} Debian/Ubuntu: {hint}; macOS: brew install "), line
    assert not (tmp_path / ".venv").exists()


def test_the_environment_is_installed_once_and_again_only_when_its_files_change(tmp_path: Path) -> None:
    """Whoever pulls a newer version and waits is told why."""
    programs = _what_setup_reads(tmp_path)
    # A Python whose pip installs nothing: what is asked is when and why it is called.
    making = 'mkdir -p .venv/bin && cp "$0" .venv/bin/python'
    told = (
        f"""case "$*" in --version) echo Python 3.11.9;; "-m venv .venv") {making};; *pip*) echo "$@" >>calls;; esac"""
    )
    for name, text in {"java": "echo 'openjdk version \"17.0.9\" 2023-10-17' >&2", "python3.11": told}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    def set_up() -> list[str]:
        done = subprocess.run(
            [shutil.which("bash") or "bash", str(tmp_path / "infra" / "setup.sh")],
            env={"PATH": os.pathsep.join([str(programs), os.environ["PATH"]]), "PYTHON": "python3.11"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.splitlines()

    first = ["setup: installing into .venv with Python 3.11.9 (a few minutes, once)", "setup: done"]
    assert set_up() == first
    assert "--constraint constraints.txt --editable .[dev]" in (tmp_path / "calls").read_text()
    assert set_up() == []
    with (tmp_path / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# newer\n")
    changed, done = set_up()
    assert changed.startswith("setup: pyproject.toml or constraints.txt has changed; .venv is brought up to date")
    assert done == "setup: done"
    assert set_up() == []


def test_a_folder_that_database_addresses_cannot_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfigError, match="100% done/airflow has a '%' in its path"):
        LocalAirflow(tmp_path / "100% done" / "airflow")


def test_steps_learn_where_people_open_the_pages_unless_the_settings_say_it() -> None:
    shown = [Page("MLflow", "http://127.0.0.1:5000", None), Page("Data Docs", "http://127.0.0.1:8088", None)]
    assert _links(Settings(), shown) == {
        "ONETRANS_MLFLOW_ADDRESS": "http://127.0.0.1:5000",
        "ONETRANS_AUDIT_ADDRESS": "http://127.0.0.1:8088",
    }
    said = Settings(mlflow=MlflowSettings(address="https://mlflow"), audit=AuditSettings(address="https://docs"))
    assert _links(said, shown) == {}
    load_settings(_links(Settings(), shown))  # they are settings


def test_airflows_home_is_always_inside_a_var_folder(tmp_path: Path) -> None:
    assert airflow_home(None) == REPOSITORY / "var" / "airflow"
    assert airflow_home(REPOSITORY / DEMO_CONFIG) == REPOSITORY / DEMO_CONFIG.parent / "airflow"
    assert airflow_home(tmp_path / "onetrans.toml") == tmp_path / "var" / "airflow"


def test_a_postgresql_is_reached_by_one_driver_for_both_kinds_of_calls(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    address = "postgresql://airflow@/airflow?host=%2Frun%2Fpostgresql"
    sections = configuration(tmp_path, tmp_path, 8080, 2, address, schedule=True)
    wanted = address.replace("postgresql:", "postgresql+psycopg:")
    assert sections["database"] == {"sql_alchemy_conn": wanted, "sql_alchemy_conn_async": wanted}
    assert sections["scheduler"]["use_job_schedule"] == "True"
    airflow = LocalAirflow(tmp_path, {}, database=address)
    assert "on_sqlite" not in airflow.environment["PYTHONPATH"]


def test_the_laptop_default_is_a_file_and_no_clock(tmp_path: Path) -> None:
    sections = configuration(tmp_path, tmp_path, 8080, 2)
    assert sections["database"] == {"sql_alchemy_conn": f"sqlite:///{tmp_path}/airflow.db"}
    assert sections["scheduler"]["use_job_schedule"] == "False"
    assert "on_sqlite" in LocalAirflow(tmp_path, {}).environment["PYTHONPATH"]


def test_a_database_that_airflow_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfigError, match=r"airflow.database begins with 'mysql'; write postgresql://"):
        LocalAirflow(tmp_path, {}, database="mysql://root@localhost/airflow")


def test_a_server_that_ended_is_started_again_but_not_for_ever(tmp_path: Path) -> None:
    airflow = LocalAirflow(tmp_path, {})
    command = ["sh", "-c", "echo began; exec sleep 60"]
    lasting, lost = (Server(name, command, os.environ, tmp_path / f"{name}.log", tmp_path) for name in ("api", "dag"))
    airflow.servers = [lasting, lost]
    try:
        for server in airflow.servers:
            server.start()
        first = lasting.pid
        for number in range(1, 6):
            wait_until(lambda n=number: lost.log.read_text().count("began") == n, [lost], "the log", 10)
            os.kill(lost.process.pid, signal.SIGKILL)
            lost.process.wait()
            assert airflow.revive() == ["dag"]
            assert lost.pid is not None
            assert airflow.revive() == []
        assert lasting.pid == first
        os.kill(lost.process.pid, signal.SIGKILL)
        lost.process.wait()
        with pytest.raises(ServerError, match="dag ended with exit code -9"):
            airflow.revive()
    finally:
        airflow.stop()


def test_airflow_is_ready_when_every_file_of_dags_was_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are parsed one after another, and a backfill of a DAG that is not there yet is refused."""
    airflow = LocalAirflow(tmp_path, dags=REPOSITORY / "dags")
    monkeypatch.setattr(airflow.api, "import_errors", list)
    there = {"retention.py"}
    monkeypatch.setattr(airflow.api, "dag_files", lambda: there)
    assert not airflow._parsed()
    there |= {"feature_tables.py", "ranking_model.py"}
    assert airflow._parsed()


def test_another_port_is_named_where_the_usual_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_further() -> None:
        raise ServerError("enough")

    airflow = LocalAirflow(tmp_path, {})
    monkeypatch.setattr(airflow, "_prepare_database", no_further)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setattr("infra.local.airflow._PREFERRED_PORT", taken)
        with pytest.raises(ServerError, match="enough"):
            airflow.start()
    assert airflow.port != taken
    assert f"port {taken} is taken, so Airflow listens on {airflow.port}" in capsys.readouterr().out
