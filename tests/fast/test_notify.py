"""Who is told of a failure and of a missed deadline: real receivers on loopback, and receivers that are not there."""

import asyncio
import importlib
import json
import os
import socketserver
import sys
import tempfile
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from dags import notify, others
from dags.configured import configured, configured_number
from dags.others import NotStartedError

SECRET = "T000-B000-whoever-has-this-can-write"
LOGICAL = datetime(2022, 5, 4, tzinfo=UTC)


class Receiver:
    """An HTTP server that keeps what it is sent; it answers with the statuses it was given, then with 200."""

    def __init__(self):
        self.got, self.statuses = [], []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.path, json.loads(body)))
                self.send_response(receiver.statuses.pop(0) if receiver.statuses else 200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/hooks/{SECRET}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def connect(monkeypatch, tmp_path):
    """Return a function that makes Airflow connections, which are then the ones to tell."""
    pauses = []
    # The name in this module alone: another thread of these tests would run its waiting loop without a pause.
    monkeypatch.setattr(notify, "sleep", pauses.append)
    monkeypatch.chdir(tmp_path)

    def connections(**described):
        monkeypatch.setenv("ONETRANS_AIRFLOW_NOTIFY", ", ".join(described))
        for name, fields in described.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(fields))
        return pauses

    return connections


def failure(text="impressions.build of 2022-05-04: BAD DATA. 3 rows."):
    return {
        "ti": SimpleNamespace(
            dag_id="feature_tables", run_id="scheduled__2022-05-05", task_id="impressions.build", log_url="http://a/log"
        ),
        "task": SimpleNamespace(unharmed="Published data is as it was."),
        "exception": (text if isinstance(text, Exception) else RuntimeError(text)) if text else None,
        "params": {},
        "logical_date": LOGICAL,
    }


def test_a_webhook_gets_the_paragraph_and_where_to_look(receiver, connect):
    connect(hook={"conn_type": "http", "password": receiver.address})
    notify.task_failed(failure())
    ((path, fields),) = receiver.got
    assert path == f"/hooks/{SECRET}"
    assert fields == {
        "title": "feature_tables 2022-05-04: impressions.build failed",
        "text": "feature_tables 2022-05-04: impressions.build failed\n"
        "impressions.build of 2022-05-04: BAD DATA. 3 rows.\nhttp://a/log",
        "dag_id": "feature_tables",
        "run_id": "scheduled__2022-05-05",
        "task_id": "impressions.build",
        "day": "2022-05-04",
        "link": "http://a/log",
    }


def test_slack_gets_what_slack_takes(receiver, connect):
    host, _, token = receiver.address.rpartition("/")
    connect(slack={"conn_type": "slackwebhook", "host": host, "password": token})
    notify.task_failed(failure())
    ((path, fields),) = receiver.got
    assert path == f"/hooks/{SECRET}"
    assert list(fields) == ["text"]
    assert "BAD DATA" in fields["text"]


def test_a_worker_that_was_killed_leaves_no_words_and_people_are_told_all_the_same(receiver, connect):
    connect(hook={"conn_type": "http", "password": receiver.address})
    notify.task_failed(failure(text=""))
    text = receiver.got[0][1]["text"]
    assert "impressions.build of 2022-05-04: ENDED WITHOUT A WORD. Its worker was killed" in text
    assert "Published data is as it was." in text


def test_a_busy_receiver_is_tried_again_and_one_that_refuses_is_not(receiver, connect):
    pauses = connect(hook={"conn_type": "http", "password": receiver.address})
    receiver.statuses = [503, 429]
    notify.task_failed(failure())
    assert (len(receiver.got), pauses) == (3, [1, 2])
    receiver.statuses = [403]
    notify.task_failed(failure())
    assert len(receiver.got) == 4


def test_receivers_that_are_down_or_described_wrongly_stop_nothing_and_nothing_secret_is_logged(
    receiver, connect, caplog, monkeypatch
):
    closed = socketserver.TCPServer(("127.0.0.1", 0), None)
    port = closed.server_address[1]
    closed.server_close()
    connect(
        down={"conn_type": "http", "password": f"http://127.0.0.1:{port}/hooks/{SECRET}"},
        refusing={"conn_type": "http", "password": receiver.address},
        wrong={"conn_type": "http", "password": SECRET},
        nobody={"conn_type": "smtp", "host": "127.0.0.1"},
        working={"conn_type": "http", "password": receiver.address},
    )
    monkeypatch.setenv("ONETRANS_AIRFLOW_NOTIFY", os.environ["ONETRANS_AIRFLOW_NOTIFY"] + ", not_there")
    receiver.statuses = [404]
    with caplog.at_level("INFO"):
        notify.task_failed(failure())
    assert len(receiver.got) == 2
    told = [record.getMessage() for record in caplog.records if record.name == "dags.notify"]
    assert "BAD DATA" in told[0]
    for line, begins in zip(
        told[1:],
        [
            "connection down did not take the message: no answer: [Errno 111]",
            "connection refusing did not take the message: HTTP status 404",
            "connection wrong did not take the message: ValueError: its password is not the address",
            "connection nobody did not take the message: ValueError: its extra fields do not say to whom",
            "told over connection working",
            "connection not_there did not take the message",
        ],
        strict=True,
    ):
        assert line.startswith(begins), line
    assert SECRET not in caplog.text


def test_a_receiver_that_never_answers_is_given_up(connect, monkeypatch, caplog):
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.05)
    with socketserver.TCPServer(("127.0.0.1", 0), None) as silent:  # takes connections and says nothing
        pauses = connect(silent={"conn_type": "http", "password": f"http://127.0.0.1:{silent.server_address[1]}/"})
        notify.task_failed(failure())
    assert pauses == [1, 2]
    assert "connection silent did not take the message" in caplog.text


def test_without_configuration_the_log_alone_is_told(monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONETRANS_AIRFLOW_NOTIFY", raising=False)
    notify.task_failed(failure())
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "feature_tables 2022-05-04: impressions.build failed. impress"
    ]


def test_a_broken_configuration_file_does_not_keep_the_failure_from_being_logged(monkeypatch, tmp_path, caplog):
    """It may be what the task has failed of."""
    (tmp_path / "onetrans.toml").write_text("[airflow\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONETRANS_AIRFLOW_NOTIFY", raising=False)
    monkeypatch.delenv("ONETRANS_CONFIG", raising=False)
    notify.task_failed(failure())
    assert "impressions.build failed" in caplog.text
    assert "nobody else is told: the configuration file cannot be read" in caplog.text


class Mailbox(socketserver.StreamRequestHandler):
    """As much of SMTP as takes one letter."""

    def handle(self):
        self.wfile.write(b"220 here\r\n")
        while line := self.rfile.readline().strip():
            word = line.split()[0].upper()
            if word == b"DATA":
                self.wfile.write(b"354 go on\r\n")
                letter = b"".join(iter(self.rfile.readline, b".\r\n"))
                self.server.letters.append(letter.decode())
            self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
            if word == b"QUIT":
                return


def test_an_e_mail_is_sent_by_airflow_s_own_notifier(connect):
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mailbox) as server:
        server.letters = []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        connect(
            mail={
                "conn_type": "smtp",
                "host": "127.0.0.1",
                "port": server.server_address[1],
                "extra": {
                    "to": "oncall@example.com", "from_email": "airflow@example.com", "disable_ssl": True,
                    "disable_tls": True, "timeout": 5, "retry_limit": 1,
                },
            }
        )  # fmt: skip
        notify.task_failed(failure())
        server.shutdown()
    (letter,) = server.letters
    assert "To: oncall@example.com" in letter
    assert "Subject: feature_tables 2022-05-04: impressions.build failed" in letter


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("timed_out", "took longer than dagrun_timeout"),
        ("task_failure", "a task has failed; its log says why"),
        ("something new", "is over: something new."),
    ],
)
def test_a_run_that_failed_says_why(receiver, connect, reason, words):
    connect(hook={"conn_type": "http", "password": receiver.address})
    dag = SimpleNamespace(dag_id="ranking_model")
    notify.run_failed({"dag": dag, "run_id": "scheduled__2022-05-05", "reason": reason, "logical_date": LOGICAL})
    fields = receiver.got[0][1]
    assert fields["title"] == "ranking_model 2022-05-04: the run failed"
    assert words in fields["text"]
    notify.run_failed({"dag": dag, "run_id": "manual__x", "reason": reason})  # all that Airflow knows at times
    assert receiver.got[1][1]["day"] == ""


def test_a_backfill_whose_day_fails_does_not_tell_of_each_task_behind_it(receiver, connect, caplog):
    """A month has dozens of days after it, which are not started; that their runs failed is told once each."""
    connect(hook={"conn_type": "http", "password": receiver.address})
    of_a_backfill = {"dag_run": SimpleNamespace(run_type="backfill")}
    cascade = "wait_for_day_before of 2022-05-04: NOT STARTED. feature_tables of 2022-05-03 has failed."
    notify.task_failed(failure() | of_a_backfill)
    behind = NotStartedError(cascade, behind_failure=True)
    notify.task_failed(failure(behind) | of_a_backfill)
    assert [fields["task_id"] for _, fields in receiver.got] == ["impressions.build"]
    assert cascade in caplog.text
    notify.task_failed(failure(behind))
    notify.task_failed(failure(NotStartedError("wait_for_day_before of ...: NOT STARTED.")) | of_a_backfill)
    assert len(receiver.got) == 3


@pytest.mark.parametrize(
    ("run_type", "queued_at", "decided", "told"),
    [
        ("scheduled", "2022-05-05T00:00:01Z", 0, "is neither promoted nor declined"),
        ("manual", "2022-05-05T11:59:00Z", 0, "is neither promoted nor declined"),
        ("scheduled", "2022-05-05T00:00:01Z", None, "Airflow did not answer"),
        ("scheduled", "2022-05-05T00:00:01Z", 1, ""),  # what follows the verdict has no deadline
        ("manual", "2022-05-05T12:01:00Z", 0, ""),  # nobody can keep a deadline that is over
        ("scheduled", "2022-05-05T13:00:00Z", 0, "It was made at 2022-05-05 13:00 UTC only: another"),
        ("backfill", "2022-05-05T00:00:01Z", 0, ""),
    ],
)
@pytest.mark.parametrize("conf", [None, {}, {"ds": "2022-05-01"}])
def test_a_day_without_a_verdict_at_its_deadline_is_told_of(
    receiver, connect, monkeypatch, run_type, queued_at, decided, told, conf
):
    """tests/day asks a real Airflow."""
    from airflow.sdk.exceptions import AirflowRuntimeError
    from airflow.sdk.execution_time.comms import ErrorResponse

    def get_ti_count(**asked):
        assert asked == {
            **{"dag_id": "ranking_model", "run_ids": ["scheduled__2022-05-05"], "task_ids": ["promote"]},
            **{"states": ["success"]},
        }
        if decided is None:
            raise AirflowRuntimeError(ErrorResponse())
        return decided

    monkeypatch.setattr(others, "_airflow", lambda: SimpleNamespace(get_ti_count=get_ti_count))
    connect(hook={"conn_type": "http", "password": receiver.address})
    run = {
        "dag_id": "ranking_model", "dag_run_id": "scheduled__2022-05-05", "run_type": run_type, "state": "running",
        "queued_at": queued_at, "run_after": "2022-05-05T00:00:00Z", "logical_date": "2022-05-04T00:00:00Z",
    }  # fmt: skip
    due = datetime(2022, 5, 5, 12, tzinfo=UTC)
    happened = {"dag_run": {**run, "conf": conf}, "deadline": {"id": "1", "deadline_time": due}}
    asyncio.run(notify.day_undecided(happened, decided_by="promote"))
    assert len(receiver.got) == bool(told)
    for _, fields in receiver.got:
        day = (conf or {}).get("ds", "2022-05-04")
        assert fields["title"] == f"ranking_model {day}: no verdict by 2022-05-05 12:00 UTC"
        assert told in fields["text"]


def test_what_airflow_reads_of_the_settings_is_what_the_library_reads(monkeypatch, tmp_path):
    from onetrans.settings import AirflowSettings, load_settings

    monkeypatch.chdir(tmp_path)
    for name in ("ONETRANS_CONFIG", "ONETRANS_AIRFLOW_NOTIFY", "ONETRANS_AIRFLOW_DEADLINE_HOURS"):
        monkeypatch.delenv(name, raising=False)

    def read():
        default = AirflowSettings()
        hours = configured_number("airflow", "deadline_hours", default.deadline_hours, most=720.0)
        return configured("airflow", "notify", default.notify), hours

    def agree():
        section = load_settings().airflow
        assert read() == (section.notify, section.deadline_hours)
        return read()

    assert agree() == ("", 36.0)
    (tmp_path / "onetrans.toml").write_text('[airflow]\nnotify = "slack"\ndeadline_hours = 30\n')
    assert agree() == ("slack", 30.0)
    monkeypatch.setenv("ONETRANS_AIRFLOW_NOTIFY", "mail")
    assert agree() == ("mail", 30.0)
    other = tmp_path / "other.toml"
    other.write_text('[spark]\nmaster = "local[1]"\n')
    monkeypatch.setenv("ONETRANS_CONFIG", str(other))
    assert agree() == ("mail", 36.0)


@pytest.mark.parametrize("value", ["noon", "-1", "721", "nan", "36 h"])
def test_a_deadline_that_is_none_is_named_where_airflow_shows_it(monkeypatch, value):
    """As the library refuses it; what raises while a DAG file is read is that DAG's import error."""
    from onetrans.errors import BadConfigError
    from onetrans.settings import load_settings

    monkeypatch.setenv("ONETRANS_AIRFLOW_DEADLINE_HOURS", value)
    with pytest.raises(BadConfigError, match=r"deadline_hours|DEADLINE_HOURS"):
        load_settings()
    monkeypatch.delitem(sys.modules, "dags.ranking_model", raising=False)
    with pytest.raises(ValueError, match=rf"airflow\.deadline_hours = '{value}' must be a number from 0 to 720"):
        importlib.import_module("dags.ranking_model")
