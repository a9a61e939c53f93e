"""`onetrans doctor` on this machine: what is here, what is spoilt on purpose, and that a look makes nothing."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import doctor
from onetrans import cli
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_NOT_READY
from tests.pod_template import EXAMPLE, own_template

SHARED = {
    "ONETRANS_LAUNCH_PLACE": "kubernetes",
    "ONETRANS_TRAINING_RUNS": "s3://bucket/runs",
    "ONETRANS_LAKE_WAREHOUSE": "/shared/lake",
    "ONETRANS_MLFLOW_TRACKING_URI": "http://mlflow:5000",
}
"""What workers and pods both see."""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def looked(capsys: pytest.CaptureFixture[str], only: str) -> tuple[int, list[dict[str, Any]]]:
    code = cli.main(["doctor", "--json", "--only", only])
    return code, json.loads(capsys.readouterr().out)["checks"]


def test_nothing_is_made_by_looking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("java", "memory", "disk", "ports", "log", "catalog", "store", "mlflow")
    code, checks = looked(capsys, ",".join(names))
    assert code == 0
    assert {check["name"] for check in checks} == set(names)
    assert [check for check in checks if check["state"] == "FAIL"] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "variable"])
def test_a_log_that_was_named_and_is_not_there_stops_a_day(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert looked(capsys, "log")[1][0]["state"] == "warn"  # of the default: nobody has named a log yet
    if place == "file":
        Path("onetrans.toml").write_text("[source]\npath = 'var/raw'\n")
    else:
        monkeypatch.setenv("ONETRANS_SOURCE_PATH", "var/raw")
    code, checks = looked(capsys, "log")
    assert code == EXIT_BAD_CONFIG
    assert checks[0]["state"] == "FAIL"
    assert "source.path = var/raw: there is nothing" in checks[0]["found"]


def test_a_log_in_s3_alone_needs_a_spark_that_reaches_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [check["state"] for check in looked(capsys, "store")[1]] == ["skip"]
    monkeypatch.setenv("ONETRANS_SOURCE_PATH", "s3://somewhere/log")
    (check,) = looked(capsys, "store")[1]
    assert check["state"] in ("warn", "ok")  # over copies, unless s3a is installed
    monkeypatch.setenv("ONETRANS_SPARK_MASTER", "yarn")
    (check,) = looked(capsys, "store")[1]
    assert check["state"] == "ok" or "Spark cannot reach S3" in check["found"]


def test_every_line_that_fails_says_how_to_mend_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "no-java"))
    monkeypatch.setenv("ONETRANS_SPARK_DRIVER_MEMORY", "9000g")
    monkeypatch.setenv("ONETRANS_AUDIT_DATA_DOCS", "onetrans.toml/docs")
    Path("onetrans.toml").write_text("[source]\npath = 'log'\n[lake]\nwarehouse = 'onetrans.toml/lake'\n")
    Path("log").mkdir()
    Path("log", "schema.toml").write_text("name = 'x'\nfeaturs = 1\n")
    assert cli.main(["doctor", "--only", "java,memory,disk,log"]) == EXIT_BAD_CONFIG
    printed = capsys.readouterr().out
    assert "FAIL  java       JAVA_HOME=" in printed
    assert "openjdk-17-jre-headless" in printed
    assert "or a smaller spark.driver_memory" in printed
    assert "lake.warehouse = onetrans.toml/lake: " in printed
    assert "audit.data_docs = onetrans.toml/docs: " in printed
    assert printed.count("onetrans.toml cannot be written") == 2
    own = Path("onetrans.toml", "docs").absolute()
    assert f"sudo mkdir -p {own} && sudo chown -R $(id -un) {own}" in printed
    assert "onetrans schema check FILE" in printed
    assert "5 to mend" in printed


def test_a_server_that_does_not_answer_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound and not listening: refused at once
        port = nobody.getsockname()[1]
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
        monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("ONETRANS_LAKE_CATALOG_TYPE", "rest")
        monkeypatch.setenv("AIRFLOW__API__BASE_URL", f"http://127.0.0.1:{port}")
        code, checks = looked(capsys, "catalog,mlflow,airflow")
    assert code == EXIT_NOT_READY
    assert [check["state"] for check in checks] == ["FAIL", "FAIL", "warn"]
    assert "MLFLOW_TRACKING_PASSWORD" in checks[1]["mend"]
    assert "secret" not in str(checks)


def test_a_server_of_mlflow_with_a_login_is_asked_as_its_client_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Basic " + base64.b64encode(b"ann:p@ss").decode()
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(importlib.metadata.version("mlflow").encode() if known else b"")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"http://ann:p%40ss@{place}")
        assert looked(capsys, "mlflow")[0] == 0
        monkeypatch.setenv("ONETRANS_MLFLOW_TRACKING_URI", f"http://{place}")
        assert "401" in looked(capsys, "mlflow")[1][0]["found"]
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss")
        assert looked(capsys, "mlflow")[0] == 0
        server.shutdown()


def test_the_template_of_pods_is_a_copy_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert looked(capsys, "pods")[1][0]["state"] == "skip"
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    other = EXAMPLE.read_text(encoding="utf-8").replace("- name: base", "- name: trainer")
    (tmp_path / "other.yaml").write_text(other, encoding="utf-8")
    for named, told in (
        ("", "names no template"),
        ("gone.yaml", "No such file"),
        (str(EXAMPLE), "registry.example.com"),
        ("list.yaml", "'list.yaml' describes no pod"),
        ("other.yaml", "none of its containers is called 'base'"),
    ):
        monkeypatch.setenv("ONETRANS_LAUNCH_POD_TEMPLATE", named)
        code, (check,) = looked(capsys, "pods")
        assert (code, check["state"]) == (EXIT_BAD_CONFIG, "FAIL")
        assert told in check["found"]
        assert "copy infra/kubernetes/training_pod.yaml" in check["mend"]
    monkeypatch.setenv("ONETRANS_LAUNCH_POD_TEMPLATE", str(own_template(tmp_path)))
    code, (check,) = looked(capsys, "pods")
    assert (code, check["state"]) == (0, "ok")
    assert "image registry.shop.test/onetrans-training:" in check["found"]


def test_what_a_step_in_a_pod_refuses_is_told_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONETRANS_LAUNCH_PLACE", "kubernetes")
    monkeypatch.setenv("ONETRANS_LAUNCH_POD_TEMPLATE", str(own_template(tmp_path)))
    code, checks = looked(capsys, "pods")
    assert code == EXIT_BAD_CONFIG
    for check, setting in zip(
        checks, ("training.runs", "lake.warehouse", "mlflow.tracking_uri", "lake.catalog_uri"), strict=True
    ):
        assert check["state"] == "FAIL"
        assert check["found"].startswith(f"{setting} = ")
        assert "of this machine" in check["found"]
        assert check["mend"]


def test_what_the_secret_of_pods_has_to_hold_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = own_template(tmp_path)
    for name, value in {
        **SHARED,
        "ONETRANS_LAUNCH_POD_TEMPLATE": str(template),
        "ONETRANS_LAKE_CATALOG_URI": "postgresql+psycopg://ann:hunter2@db/lake",
    }.items():
        monkeypatch.setenv(name, value)
    code, (check,) = looked(capsys, "pods")
    assert code == 0
    assert check["found"].endswith("; the secret 'onetrans' has to hold ONETRANS_LAKE_CATALOG_URI")
    template.write_text(template.read_text(encoding="utf-8").replace("secretRef", "configMapRef"), encoding="utf-8")
    code, (check,) = looked(capsys, "pods")
    assert code == EXIT_BAD_CONFIG
    assert check["found"].startswith("ONETRANS_LAKE_CATALOG_URI holds a password")
    assert "hunter2" not in str(check)


def test_a_taken_port_is_named_with_its_holder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("ONETRANS_SERVING_PORT", str(taken.getsockname()[1]))
        code, checks = looked(capsys, "ports")
    assert code == 0
    found = next(check for check in checks if "serving.port" in check["found"])
    assert found["state"] == "warn"
    assert f"process {doctor.os.getpid()}" in found["found"]


def test_a_package_out_of_its_range_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = importlib.metadata.requires("onetrans")
    assert declared
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda _: [*declared, "numpy<1", "no-such-package>=2", 'absent; extra == "kubernetes"'],
    )
    code, checks = looked(capsys, "versions")
    assert code == EXIT_BAD_CONFIG
    assert "numpy 2" in checks[0]["found"]
    assert "no-such-package is not installed" in checks[0]["found"]
    assert "absent" not in checks[0]["found"]
    monkeypatch.setenv("ONETRANS_LAUNCH_PLACE", "kubernetes")
    assert "absent is not installed" in looked(capsys, "versions")[1][0]["found"]


def test_what_mends_a_package_makes_the_environment_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make env` alone ends at once where `.venv/.ready` says that the environment is finished."""
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["no-such-package>=2"])
    assert looked(capsys, "versions")[1][0]["mend"] == "rm .venv/.ready && make env"
    monkeypatch.setenv("ONETRANS_TRAINING_SHARD_ROWS", "1000")
    assert looked(capsys, "versions")[1][0]["mend"] == "rm .venv/.ready && make env && make torchrec"
    monkeypatch.setattr(doctor, "_CHECKOUT", False)
    monkeypatch.setenv("ONETRANS_LAUNCH_PLACE", "kubernetes")
    assert (
        "pip install --force-reinstall 'PATH/TO/onetrans.whl[kubernetes,torchrec]'"
        in (looked(capsys, "versions")[1][0]["mend"])
    )


def test_a_version_unlike_the_tested_one_is_mended_the_same_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: [])
    monkeypatch.setattr(doctor, "_unlike_constraints", lambda: ["numpy 1.0 instead of 2.0"])
    assert looked(capsys, "versions")[1][1]["mend"] == "rm .venv/.ready && make env"


def test_another_python_is_had_by_another_environment(capsys: pytest.CaptureFixture[str]) -> None:
    """`infra/setup.sh` leaves a `.venv/bin/python` that is there as it is."""
    assert "rm -rf .venv && PYTHON=" in looked(capsys, "python")[1][0]["mend"]


def test_no_page_and_no_message_installs_a_name_that_is_on_no_index() -> None:
    root = doctor.REPOSITORY
    files = [root / "README.md", *root.glob("docs/*.md")]
    for folder in ("dags", "expectations", "infra", "jobs", "onetrans"):
        files += root.glob(f"{folder}/**/*.py")
    named = re.compile(r"pip install\b[^\n]*?['\" ]onetrans\b(?!\.whl)|['\"]onetrans\[")
    found = [(str(file), match[0]) for file in files for match in named.finditer(file.read_text(encoding="utf-8"))]
    assert found == []


def test_settings_that_are_refused_are_one_line_and_the_rest_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONETRANS_SPARK_SHUFFLE_PARTITIONS", "0")
    code, checks = looked(capsys, "python,settings,disk")
    assert code == EXIT_BAD_CONFIG
    assert [check["state"] for check in checks] == ["ok", "FAIL", "skip"]
    assert "spark.shuffle_partitions = 0" in checks[1]["found"]
    monkeypatch.setenv("ONETRANS_CONFIG", "none.toml")
    code, checks = looked(capsys, "settings,mlflow,airflow")
    assert code == EXIT_BAD_CONFIG
    assert [check["state"] for check in checks] == ["FAIL", "skip", "skip"]
    assert "none.toml, which is not a file" in checks[0]["found"]


def test_a_model_s_field_that_is_refused_is_told_before_the_night_and_ends_no_other_look(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONETRANS_TRAINING_ONETRANS", "slidng_window = 4")
    code, checks = looked(capsys, "settings,disk")
    assert code == EXIT_BAD_CONFIG
    assert [(check["name"], check["state"]) for check in checks][:2] == [("settings", "FAIL"), ("disk", "ok")]
    assert "there is no field 'slidng_window'" in checks[0]["found"]
    assert cli.main(["config"]) == EXIT_BAD_CONFIG
    printed = capsys.readouterr()
    assert "slidng_window = 4" in printed.out  # it is shown all the same, as that is where to look
    assert "there is no field 'slidng_window'" in printed.err


def test_how_java_is_had_is_said_alike_before_and_after_there_is_a_python() -> None:
    (hint,) = re.findall(r"^java_hint='(.*)'$", (doctor.REPOSITORY / "infra" / "setup.sh").read_text("utf-8"), re.M)
    assert hint == doctor._JAVA_HINT


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), "no file, defaults"),
        (("SPARK_MASTER",), "; 1 variable ONETRANS_..."),
        (("SPARK_MASTER", "LAKE_NAMESPACE"), "; 2 variables ONETRANS_..."),
    ],
)
def test_settings_by_variables_are_counted_and_what_is_no_setting_is_not(
    names: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in doctor.os.environ if name.startswith("ONETRANS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ONETRANS_TRACEBACK", "")
    for name in names:
        monkeypatch.setenv(f"ONETRANS_{name}", "local[1]")
    assert looked(capsys, "settings")[1][0]["found"].endswith(told)


@pytest.mark.parametrize("local", [False, True], ids=["of_ones_own", "make_ui"])
def test_a_server_of_airflow_that_is_ill_is_mended(
    local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    health = {part: {"status": "healthy"} for part in ("metadatabase", "scheduler", "dag_processor")}

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({**health, "triggerer": {"status": "unhealthy"}}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    config = tmp_path / "onetrans.toml"
    config.write_text("")
    monkeypatch.setenv("ONETRANS_CONFIG", str(config))
    for name in [name for name in doctor.os.environ if name.startswith("AIRFLOW")]:
        monkeypatch.delenv(name)
    home = doctor.airflow_home(config)
    home.mkdir(parents=True)
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        if local:
            (home / "airflow.cfg").write_text(f"[api]\nbase_url = {address}\n")
        else:
            monkeypatch.setenv("AIRFLOW__API__BASE_URL", address)
        code, (check,) = looked(capsys, "airflow")
        server.shutdown()
    assert (code, check["state"]) == (0, "warn")
    assert "triggerer is unhealthy (nobody notices when a log arrives" in check["found"]
    assert (f"read {home}/logs/triggerer.log" if local else "the log of `airflow triggerer`") in check["mend"]


def test_a_check_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--only", "jaba"]) == EXIT_BAD_CONFIG
    assert "there is no check 'jaba'; there are python, java" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["900m", "4g", "1024", "1 g", "2gb"])
def test_heaps_are_read_as_spark_writes_them(written: str) -> None:
    known = {"900m": 900 / 1024, "4g": 4.0, "1024": 1.0, "1 g": 1.0, "2gb": 2.0}
    assert doctor._heap_gib(written) == pytest.approx(known[written])


def test_it_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, infra.doctor, infra.status, onetrans.plan, onetrans.report, onetrans.registry; "
        "sys.exit(str({'torch', 'pyspark', 'mlflow', 'pandas'} & set(sys.modules)) if "
        "{'torch', 'pyspark', 'mlflow', 'pandas'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=doctor.REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
