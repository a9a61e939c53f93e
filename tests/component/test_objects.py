"""Spark without s3a: what a job reads and writes in an object store goes over copies, also where requests fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from infra.production.prepare import PrepareError, make_bucket
from jobs import behaviors, impressions, objects
from jobs.runner import audit_and_publish
from jobs.sources.files import Files
from jobs.workspace import Workspace
from onetrans import object_store as s3
from onetrans import storage
from onetrans.errors import BadConfigError, NotReadyError
from onetrans.lake import QUARANTINE, Lake
from onetrans.settings import AuditSettings, LakeSettings, Settings, SourceSettings, StoreSettings
from tests.component.test_score_candidates import SCHEMA
from tests.faulty_s3 import Faults, before
from tests.raw_log import write_rows
from tests.s3 import ObjectStore

DS = date(2024, 2, 29)
NOON = datetime(DS.year, DS.month, DS.day, 12, tzinfo=UTC)


def _log(folder: Path) -> None:
    shown = [
        {"request_id": f"r{n}", "user_id": f"u{n}", "item_id": f"i{n}", "ts": NOON, "click": 2 if n == 7 else n % 2,
         "conversion": 0}
        for n in range(100)
    ]  # fmt: skip
    happened = [
        {"user_id": f"u{n % 9}", "item_id": f"i{n}", "type": "click", "ts": NOON - timedelta(minutes=n + 1)}
        for n in range(50)
    ]
    write_rows(folder / "impressions" / f"ds={DS}", shown)
    write_rows(folder / "behaviors" / f"ds={DS}", happened)


@pytest.fixture
def work(spark: SparkSession, object_store: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest) -> Workspace:
    """A workspace whose log and lake are in a bucket of the test's own."""
    bucket = object_store.create_bucket(request.node.name.replace("_", "-")[:60])
    _log(tmp_path)
    for file in tmp_path.rglob("*.parquet"):
        storage.write_bytes(f"{bucket}/raw/{file.relative_to(tmp_path)}", file.read_bytes())
    settings = Settings(
        source=SourceSettings(path=f"{bucket}/raw"),
        lake=LakeSettings(f"{bucket}/lake", catalog_uri=f"sqlite:///{tmp_path}/catalog.db", max_quarantine_share=0.1),
        audit=AuditSettings(data_docs=f"{bucket}/docs", max_quiet_hours=24.0),
    )
    return Workspace(settings, spark, Lake(settings.lake), SCHEMA, Files(settings.source.path, SCHEMA))


def test_a_table_is_built_audited_and_published_while_requests_fail(
    work: Workspace, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults({"error": 19, "late": 23, "cut answer": 11, "cut request": 13})
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        staged = impressions.build(work, DS)
        assert storage.list_files(staged.path, ".parquet")
        audit_and_publish(work, "impressions", DS)
        monkeypatch.delenv("ONETRANS_STORE_ENDPOINT")
    assert min(faults.done[fault] for fault in faults.every) > 0, faults.done
    assert {row["request_id"] for row in work.lake.read("impressions").to_pylist()} == {
        f"r{n}" for n in range(100) if n != 7
    }
    # A refused row says which object it came from, not which copy.
    (refused,) = work.lake.read(QUARANTINE).to_pylist()
    assert refused["file"] == f"{work.settings.source.path}/impressions/ds={DS}/part-0.parquet"
    assert object_store.keys(f"{work.settings.audit.data_docs}/index.html") == [""]
    page = object_store.client().head_object(Bucket=work.settings.audit.data_docs.split("/")[2], Key="docs/index.html")
    assert page["ContentType"] == "text/html"
    # What was published is read by Spark, over copies.
    assert work.read("impressions", [DS]).count() == 99


def test_a_file_that_changes_is_fetched_again_and_one_that_is_gone_is_waited_for(work: Workspace) -> None:
    behaviors.build(work, DS)
    file = f"{work.settings.source.path}/behaviors/ds={DS}/part-0.parquet"
    shown = storage.read_bytes(f"{work.settings.source.path}/impressions/ds={DS}/part-0.parquet")
    (copy,) = objects.readable(work.spark, [file])
    assert Path(copy).read_bytes() == storage.read_bytes(file) != shown
    storage.write_bytes(file, shown)
    (again,) = objects.readable(work.spark, [file])
    assert Path(again).read_bytes() == shown
    storage.delete_file(file)
    with pytest.raises(NotReadyError, match=r"part-0\.parquet vanished"):
        objects.readable(work.spark, [file])


def test_a_session_without_the_files_says_so_and_one_on_a_cluster_stops(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert objects.hadoop_version(spark) in objects.JARS  # the pinned PySpark's
    assert objects.found_jars(spark) == {}
    assert not objects.by_itself(spark)
    monkeypatch.setattr(spark.sparkContext, "master", "yarn")
    with pytest.raises(BadConfigError, match=r"hadoop:hadoop-aws:3\.4\.2 is missing.*spark\.jars\.packages"):
        objects.by_itself(spark)


def test_a_file_of_another_version_on_the_class_path_is_named(tmp_path: Path) -> None:
    """The class path is real, the class is empty: only what is looked for and what is said is tested here."""
    source = tmp_path / "org" / "apache" / "hadoop" / "fs" / "s3a" / "S3AFileSystem.java"
    source.parent.mkdir(parents=True)
    source.write_text("package org.apache.hadoop.fs.s3a; public class S3AFileSystem {}", encoding="utf-8")
    subprocess.run(["javac", str(source)], check=True)
    jar = tmp_path / "hadoop-aws-3.3.6.jar"
    subprocess.run(["jar", "cf", str(jar), "-C", str(tmp_path), "org"], check=True)
    code = (
        "from jobs import objects; from jobs.spark import session; from onetrans.settings import SparkSettings\n"
        f"spark = session(SparkSettings(conf={{'spark.jars': {str(jar)!r}}}))\n"
        "print(objects.found_jars(spark))\n"
        "objects.by_itself(spark)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'hadoop-aws': 'hadoop-aws-3.3.6.jar'" in done.stdout
    assert "hadoop-aws-3.3.6.jar is there, but Hadoop 3.4.2 needs org.apache.hadoop:hadoop-aws:3.4.2" in done.stderr
    assert "software.amazon.awssdk:bundle:2.29.52 is missing" in done.stderr


def test_a_place_is_tried_and_what_is_wrong_is_said(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = object_store.create_bucket("tried")
    assert s3.problem_with(f"{bucket}/prod") == ""
    assert [key for key in object_store.keys(bucket) if not key.endswith("/")] == []  # Arrow leaves an empty folder
    assert "create it" in s3.problem_with("s3://absent/prod")
    faults = Faults(down=True)
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        told = s3.problem_with(f"{bucket}/prod")
    assert told.startswith(f"cannot write to {bucket}/prod")
    assert endpoint in told


def test_a_user_who_may_make_no_bucket_prepares_one_that_is_there(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the user of infra/s3/policy.json."""
    bucket = object_store.create_bucket("prepared")
    with before(object_store.endpoint, Faults({}, makes_buckets=False)) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        make_bucket(Settings(store=StoreSettings(root=f"{bucket}/prod")))
        with pytest.raises(PrepareError, match=r"create it.*; making the bucket was refused at .*: AccessDenied"):
            make_bucket(Settings(store=StoreSettings(root="s3://unprepared/prod")))
    monkeypatch.delenv("ONETRANS_STORE_ENDPOINT")
    make_bucket(Settings(store=StoreSettings(root="s3://unprepared/prod")))


def test_looking_is_repeated_where_a_head_is_answered_with_500(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = object_store.create_bucket("heads")
    storage.write_bytes(f"{bucket}/folder/a", b"a")
    faults = Faults({"error": 2})
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        for _ in range(5):
            assert storage.exists(f"{bucket}/folder/a")
            assert storage.read_bytes(f"{bucket}/folder/a") == b"a"
            assert not storage.exists(f"{bucket}/folder/b")
    assert faults.done["error"] > 5


def test_failures_are_repeated_however_many_there_were(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of repetitions that is never filled again would be used up: AWS' standard one holds a hundred."""
    bucket = object_store.create_bucket("often")
    faults = Faults({"error": 2})
    with before(object_store.endpoint, faults) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        for number in range(120):
            storage.write_bytes(f"{bucket}/a", str(number).encode())
    assert faults.done["error"] > 110
    assert object_store.client().get_object(Bucket="often", Key="a")["Body"].read() == b"119"


def test_an_object_is_read_whole_over_a_connection_that_breaks(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = object_store.create_bucket("broken")
    content = bytes(range(256)) * 40_000
    with before(object_store.endpoint, Faults({"cut answer": 2, "cut request": 5})) as endpoint:
        monkeypatch.setenv("ONETRANS_STORE_ENDPOINT", endpoint)
        storage.write_bytes(f"{bucket}/a", content)
        assert storage.read_bytes(f"{bucket}/a") == content
        filesystem, inner = storage.open_filesystem(f"{bucket}/a")
        with filesystem.open_input_file(inner) as file:
            assert file.size() == len(content)
            assert file.read_at(1000, 5_000_000) == content[5_000_000:5_001_000]
            file.seek(-10, 2)
            assert file.read(100) == content[-10:]


def test_a_workspace_is_not_made_for_nothing(object_store: ObjectStore) -> None:
    there = Settings(lake=LakeSettings("s3://a-bucket/lake"))
    assert objects.uses_s3(there)
    assert not objects.uses_s3(Settings())
    assert objects.uses_s3(replace(Settings(), source=SourceSettings(path="s3://log/raw")))
