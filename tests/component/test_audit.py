"""The audit of a day: its verdict, its message, its pages, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expectations import audit as audit_module
from expectations.audit import audit_staged
from onetrans import storage
from onetrans.errors import (
    EXIT_BAD_CONFIG,
    EXIT_BAD_DATA,
    EXIT_NOT_READY,
    EXIT_OK,
    UNHARMED,
    BadConfigError,
    BadDataError,
    NotReadyError,
)
from onetrans.lake import Lake
from onetrans.schema import FeatureSchema
from onetrans.settings import AuditSettings, LakeSettings
from tests.audit_tables import DS, FACTORIES, ROWS, audit_schema, only_file, publish, stage, valid_table

AUDITED = tuple(FACTORIES)


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


def audit(
    lake: Lake, table: str = "impressions", schema: FeatureSchema | None = None, **settings: Any
) -> dict[str, Any]:
    return audit_staged(
        lake, schema or audit_schema(), table, DS, settings=AuditSettings(**{"max_quiet_hours": 24.0, **settings})
    )


def _lenient(settings: dict[str, Any]) -> AuditSettings:
    """The rows of a valid day lie around noon."""
    return AuditSettings(**{"max_quiet_hours": 24.0, **settings})


def broken_impressions() -> pa.Table:
    kinds, rows = FACTORIES["impressions"]()
    rows[5]["click"] = 7
    rows[5]["item_id"] = "<script>alert(1)</script>"
    return pa.Table.from_pylist(rows, schema=kinds)


# What is published


def test_a_failed_audit_leaves_the_published_day_as_it_was(lake: Lake) -> None:
    snapshot = publish(lake, "impressions", valid_table("impressions"))
    before = lake.read("impressions")
    stage(lake, "impressions", broken_impressions())
    verdict = audit(lake)
    assert not verdict["passed"]
    with pytest.raises(
        BadDataError, match=r"not published, readers keep what they had: impressions 2024-02-29: 1 crit"
    ):
        lake.publish("impressions", DS)
    assert lake.snapshot_id("impressions") == snapshot
    assert lake.read("impressions").equals(before)


def test_a_warning_does_not_stop_the_day(lake: Lake) -> None:
    stage(lake, "impressions", valid_table("impressions").append_column("fold", pa.array([1] * ROWS)))
    verdict = audit(lake)
    assert (verdict["passed"], verdict["critical"], verdict["warnings"]) == (True, 0, 1)
    lake.publish("impressions", DS)
    assert lake.days("impressions") == [DS]


def test_the_verdict_speaks_of_the_audited_files_alone(lake: Lake) -> None:
    stage(lake, "impressions", valid_table("impressions"))
    assert audit(lake)["passed"]
    stage(lake, "impressions", broken_impressions())
    with pytest.raises(NotReadyError, match="the staged files were not audited"):
        lake.publish("impressions", DS)


def test_an_audit_repeated_says_the_same(lake: Lake) -> None:
    stage(lake, "impressions", broken_impressions())
    first, second = audit(lake), audit(lake)
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


# Files


def test_a_truncated_file_is_named_and_nothing_is_judged(lake: Lake) -> None:
    path = only_file(stage(lake, "impressions", valid_table("impressions")), part=1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadDataError, match=rf"impressions 2024-02-29: file://{path} is not a whole Parquet file .*Run"):
        audit(lake)
    assert lake.verdict(lake.staged("impressions", DS)) is None


def test_a_file_with_a_damaged_page_is_named(lake: Lake) -> None:
    path = only_file(stage(lake, "impressions", valid_table("impressions")))
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(BadDataError, match="is not a whole Parquet file"):
        audit(lake)


def test_an_empty_file_is_named(lake: Lake) -> None:
    path = only_file(stage(lake, "impressions", valid_table("impressions")))
    path.write_bytes(b"")
    with pytest.raises(BadDataError, match=f"{path} is not a whole Parquet file"):
        audit(lake)


def test_staged_files_that_are_gone_are_told(lake: Lake) -> None:
    staged = stage(lake, "impressions", valid_table("impressions"))
    for path in storage.local_path(staged.path).iterdir():
        path.unlink()
    with pytest.raises(BadDataError, match=r"holds no Parquet files, though the manifest says that 24 rows"):
        audit(lake)


def test_a_column_missing_from_one_file_of_two_names_the_file(lake: Lake) -> None:
    staged = stage(lake, "impressions", valid_table("impressions"))
    path = only_file(staged, part=1)
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["click"]), path)
    verdict = audit(lake)
    (finding,) = verdict["findings"]
    assert finding["column"] == "click"
    assert finding["examples"] == [
        {"column": "click", "declared": "int", "found": "missing", "file": "part-00001.parquet"}
    ]
    assert not verdict["rows_judged"]
    assert "the rows were not judged" in page(lake, "impressions")


def test_several_columns_are_all_named(lake: Lake) -> None:
    stage(lake, "impressions", valid_table("impressions").drop_columns(["click", "surface"]))
    (finding,) = audit(lake)["findings"]
    assert finding["column"] == "click, surface"


def test_a_simulators_columns_may_be_absent(lake: Lake) -> None:
    stage(lake, "impressions", valid_table("impressions").drop_columns(["true_ctr", "true_cvr"]))
    assert audit(lake)["findings"] == []


# The day on the clock


@pytest.mark.parametrize(
    ("when", "passed"),
    [
        (datetime(2024, 2, 28, 16, 0, tzinfo=UTC), True),
        (datetime(2024, 2, 28, 15, 49, 59, tzinfo=UTC), False),
        (datetime(2024, 2, 28, 15, 50, tzinfo=UTC), True),
        (datetime(2024, 2, 29, 16, 9, 59, tzinfo=UTC), True),
        (datetime(2024, 2, 29, 16, 10, tzinfo=UTC), False),
    ],
)
def test_the_day_is_that_of_the_logs_time_zone_and_tolerance(lake: Lake, when: datetime, passed: bool) -> None:
    kinds, rows = FACTORIES["impressions"]()
    for row in rows:
        row["ts"] = when
    stage(lake, "impressions", pa.Table.from_pylist(rows, schema=kinds))
    schema = audit_schema(timezone="Asia/Shanghai", day_tolerance_minutes=10)
    assert audit(lake, schema=schema)["passed"] == passed


def test_events_not_yet_settled_may_exceed_a_sequences_length(lake: Lake) -> None:
    kinds, rows = FACTORIES["behavior_sequences"]()
    late = datetime(2024, 2, 29, 23, 55, tzinfo=UTC)
    for back in (2, 1):
        event = {"ts": late, "available_at": late, "event_id": -back, "event_item": 1, "event_price": 1.0}
        rows[2]["seq_click"].append(event)
    stage(lake, "behavior_sequences", pa.Table.from_pylist(rows, schema=kinds))
    assert not audit(lake, "behavior_sequences")["passed"]
    assert audit(lake, "behavior_sequences", audit_schema(day_tolerance_minutes=10))["passed"]


def test_the_history_in_the_first_day_of_behaviors_is_no_measure(lake: Lake) -> None:
    data = valid_table("behaviors")
    for back, times in ((3, 100), (2, 1), (1, 1)):
        day = DS - timedelta(days=back)
        repeated = pa.concat_tables([data] * times)
        publish(lake, "behaviors", repeated.set_column(0, "ds", pa.array([day] * repeated.num_rows)), day)
    stage(lake, "behaviors", data)
    assert audit(lake, "behaviors")["findings"] == []


# Pages


def page(lake: Lake, table: str) -> str:
    folder = storage.local_path(lake.warehouse).parent / "data_docs"
    return (folder / "validations" / table / f"{DS}.html").read_text()


def index(lake: Lake) -> str:
    return (storage.local_path(lake.warehouse).parent / "data_docs" / "index.html").read_text()


def test_the_page_tells_table_day_expected_seen_and_an_example(lake: Lake) -> None:
    stage(lake, "impressions", broken_impressions())
    verdict = audit(lake)
    text = page(lake, "impressions")
    assert verdict["data_docs"].endswith("/data_docs/validations/impressions/2024-02-29.html")
    for told in ("impressions 2024-02-29", "click is 0 or 1", "not so in 1 of 24 rows", "request_id = r1, item_id"):
        assert told in text, told
    for rule in ("there is one row per (request_id, item_id)", "a conversion has a click"):
        assert rule in text, rule
    assert "An unexpected Exception" not in text
    assert "Success Percent" not in text, "Great Expectations' overview calls a warning a failure"


def test_the_page_sets_values_of_several_columns_apart(lake: Lake) -> None:
    data = valid_table("impressions")
    stage(lake, "impressions", pa.concat_tables([data, data.slice(0, 1)]))
    audit(lake)
    text = page(lake, "impressions")
    assert "r0, i0" in text
    assert "r0i0" not in text


def test_pages_need_no_network_and_no_script(lake: Lake) -> None:
    stage(lake, "impressions", broken_impressions())
    audit(lake)
    for text in (page(lake, "impressions"), index(lake)):
        assert not re.findall(r"""(?:src|href)\s*=\s*["']https?:""", text)
        assert "<script" not in text
        assert "@import" not in text


def test_the_index_lists_every_audited_day(lake: Lake) -> None:
    for table in ("impressions", "behaviors"):
        stage(lake, table, valid_table(table))
        audit(lake, table)
    assert index(lake).count('class="passed"') == 2
    stage(lake, "impressions", broken_impressions())
    audit(lake)
    text = index(lake)
    assert text.count('class="passed"') == 1
    assert 'class="failed" href="validations/impressions/2024-02-29.html"' in text


def test_data_docs_may_lie_elsewhere(lake: Lake, tmp_path: Path) -> None:
    stage(lake, "impressions", valid_table("impressions"))
    verdict = audit(lake, data_docs=str(tmp_path / "site"))
    assert verdict["data_docs"] == f"file://{tmp_path}/site/validations/impressions/2024-02-29.html"
    assert (tmp_path / "site" / "index.html").is_file()


def test_audits_at_the_same_time_lose_no_page(lake: Lake) -> None:
    for table in AUDITED:
        stage(lake, table, valid_table(table))
    threads = [threading.Thread(target=audit, args=(lake, table)) for table in AUDITED]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index(lake).count('class="passed"') == len(AUDITED)


# The process


def test_nothing_leaves_the_machine(lake: Lake, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"the audit connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    stage(lake, "impressions", valid_table("impressions"))
    assert audit(lake)["passed"]


@pytest.fixture
def deployment(tmp_path: Path, lake: Lake, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """The lake as the process's own settings name it, with the schema in a file."""
    schema = audit_schema().to_dict()
    lines = [f'name = "{schema["name"]}"', "[aggregates]", 'windows = [1, 7]\nitem_keys = ["author_id"]']
    for section in ("features", "sequences"):
        for entry in schema[section]:
            lines += [f"[[{section}]]", *(f"{k} = {json.dumps(v)}" for k, v in entry.items() if v not in (0, [], ""))]
    (tmp_path / "schema.toml").write_text("\n".join(lines))
    monkeypatch.setenv("ONETRANS_LAKE_WAREHOUSE", str(tmp_path / "lake"))
    monkeypatch.setenv("ONETRANS_AUDIT_MAX_QUIET_HOURS", "24")
    monkeypatch.setenv("ONETRANS_SOURCE_SCHEMA", str(tmp_path / "schema.toml"))
    return lake


def test_the_command_reports_success(deployment: Lake, capsys: pytest.CaptureFixture[str]) -> None:
    stage(deployment, "impressions", valid_table("impressions"))
    assert audit_module.main(["impressions", "--ds", str(DS)]) == EXIT_OK
    told = capsys.readouterr().out
    assert told.startswith("impressions 2024-02-29: passed; 24 rows, ")
    assert "/data_docs/validations/impressions/2024-02-29.html" in told


def test_refused_rows_are_told_with_the_command_that_lists_them(
    deployment: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(deployment, "impressions", valid_table("impressions"), quarantined=3)
    assert audit_module.main(["impressions", "--ds", str(DS)]) == EXIT_OK
    told = "3 raw rows refused, see `onetrans quarantine list --table impressions --ds 2024-02-29`"
    out = capsys.readouterr().out
    assert told in out
    page = Path(out.rsplit("file://", 1)[1].strip())
    assert told in page.read_text()


def test_the_command_names_table_day_column_count_and_example(
    deployment: Lake, capsys: pytest.CaptureFixture[str]
) -> None:
    stage(deployment, "impressions", broken_impressions())
    assert audit_module.main(["impressions", "--ds", str(DS)]) == EXIT_BAD_DATA
    told = capsys.readouterr().err
    page, told = told.split("\n", 1)
    assert page.startswith("see: file://")
    assert page.endswith("/data_docs/validations/impressions/2024-02-29.html")
    assert told.startswith("BadDataError: impressions 2024-02-29: 1 critical expectation not met. click: ")
    for part in (
        "click is 0 or 1; not so in 1 of 24 rows, for example (",
        "click = 7",
        "request_id = r1",
        "Published data is as it was. Data Docs: file://",
        "2024-02-29.html (the job that builds it, by hand: python -m jobs.impressions --ds 2024-02-29)",
    ):
        assert part in told, part
    assert told.count("\n") == 1


def test_the_command_tells_warnings(deployment: Lake, caplog: pytest.LogCaptureFixture) -> None:
    stage(deployment, "impressions", valid_table("impressions").append_column("fold", pa.array([1] * ROWS)))
    assert audit_module.main(["impressions", "--ds", str(DS)]) == EXIT_OK
    told = f"impressions {DS}: fold: expected that there is no column besides the declared ones"
    assert [r.getMessage().split(";")[0] for r in caplog.records if r.name == "expectations.audit"] == [told]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["impressions", "--ds", "2024-02-30"], EXIT_BAD_CONFIG, "'2024-02-30' is not a day of the calendar"),
        (["clicks", "--ds", "2024-02-29"], EXIT_BAD_CONFIG, "there is no table 'clicks'"),
        (["quarantine", "--ds", "2024-02-29"], EXIT_BAD_CONFIG, "there is no suite for 'quarantine'"),
        (
            ["behaviors", "--ds", "2024-02-29"],
            EXIT_NOT_READY,
            "behaviors 2024-02-29 is not staged; run: python -m jobs",
        ),
    ],
)
def test_the_command_refuses(
    deployment: Lake, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    stage(deployment, "quarantine", valid_table("impressions"))
    assert audit_module.main(arguments) == code
    assert told in capsys.readouterr().err


def test_the_process_ends_with_65_and_one_paragraph(deployment: Lake) -> None:
    stage(deployment, "impressions", broken_impressions())
    command = [sys.executable, "-m", "expectations.audit", "impressions", "--ds", str(DS)]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == EXIT_BAD_DATA
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if " INFO " not in line]  # progress, where a machine is slow
    assert [line.split(":")[0] for line in said] == ["see", "BadDataError"], done.stderr


def test_a_failed_audit_s_task_ends_with_the_address_of_its_page(
    deployment: Lake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in Airflow's log, of the real process."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path / "airflow"))
    from airflow.sdk.exceptions import AirflowFailException

    from dags.feature_tables import dag

    monkeypatch.setenv("ONETRANS_AUDIT_ADDRESS", "http://127.0.0.1:8088")
    stage(deployment, "impressions", broken_impressions())
    step: Any = dag.get_task("impressions.audit").prepare_for_execution()
    logical = datetime(DS.year, DS.month, DS.day, tzinfo=UTC)
    context = {"params": {}, "logical_date": logical, "ti": SimpleNamespace(try_number=1, max_tries=3)}
    step.render_template_fields(context)
    with pytest.raises(AirflowFailException) as raised:
        step.execute(context)
    text = str(raised.value)
    assert text.startswith(f"impressions.audit of {DS}: BAD DATA. BadDataError: impressions {DS}: 1 critical expect")
    link = f"http://127.0.0.1:8088/validations/impressions/{DS}.html"
    assert text.endswith(f"then clear impressions.build, and what follows it runs too. See {link}")
    assert text.count(UNHARMED) == 1


def test_an_unknown_table_is_refused(lake: Lake) -> None:
    with pytest.raises(BadConfigError, match="there is no suite for 'clicks'"):
        audit(lake, "clicks")


def test_the_command_says_that_it_goes_on(
    deployment: Lake, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onetrans.progress.SAID_AFTER_S", 0.0)
    stage(deployment, "impressions", valid_table("impressions"))
    assert audit_module.main(["impressions", "--ds", str(DS)]) == EXIT_OK
    said = [r.getMessage() for r in caplog.records if r.name == "onetrans.progress"]
    assert said[-1].startswith(f"audit of impressions {DS}: ")
