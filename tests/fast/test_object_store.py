"""Settings of the object store: one root moves all places, no secret is taken from a file, every client agrees."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.objects import JARS, advice, installed, problems
from onetrans import object_store, storage
from onetrans.commands import config
from onetrans.errors import BadConfigError
from onetrans.settings import as_environment, load_settings

WHOLE = {name.split(":")[1]: f"{name.split(':')[1]}-{name.split(':')[2]}.jar" for name in JARS["3.4.2"]}


def _written(folder: Path, text: str) -> dict[str, str]:
    file = folder / "onetrans.toml"
    file.write_text(text, encoding="utf-8")
    return {"ONETRANS_CONFIG": str(file)}


def test_one_setting_moves_all_places(tmp_path: Path) -> None:
    settings = load_settings(_written(tmp_path, '[store]\nroot = "s3://bucket/prod/"\n'))
    assert settings.lake.warehouse == "s3://bucket/prod/lake"
    assert settings.training.runs == "s3://bucket/prod/runs"
    assert settings.mlflow.artifacts == "s3://bucket/prod/mlflow/artifacts"
    here = load_settings({})
    assert (here.lake.warehouse, here.training.runs, here.mlflow.artifacts) == (
        "var/lake", "var/runs", "var/mlflow/artifacts",
    )  # fmt: skip


def test_a_place_that_is_named_stays_where_it_is(tmp_path: Path) -> None:
    environ = _written(tmp_path, '[store]\nroot = "s3://bucket/prod"\n[lake]\nwarehouse = "/data/lake"\n')
    settings = load_settings(environ | {"ONETRANS_TRAINING_RUNS": "/data/runs"})
    assert (settings.lake.warehouse, settings.training.runs) == ("/data/lake", "/data/runs")
    assert settings.mlflow.artifacts == "s3://bucket/prod/mlflow/artifacts"
    assert load_settings(as_environment(settings)) == settings


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ('[lake]\ncatalog_uri = "postgresql+psycopg://me:hunter2@host/lake"', "PGPASSWORD"),
        ('[mlflow]\ntracking_uri = "https://me:hunter2@host"', "MLFLOW_TRACKING_PASSWORD"),
        ('[airflow]\ndatabase = "postgresql://me:hunter2@host/airflow"', "PGPASSWORD"),
        ('[store]\nendpoint = "https://me:hunter2@host"', "store.endpoint"),
        ('[spark.conf]\n"spark.hadoop.fs.s3a.secret.key" = "hunter2"', "AWS_SECRET_ACCESS_KEY"),
        ('[spark.conf]\n"spark.hadoop.fs.s3a.bucket.log.access.key" = "hunter2"', "AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path: Path, text: str, instead: str) -> None:
    with pytest.raises(BadConfigError) as refused:
        load_settings(_written(tmp_path, text))
    assert instead in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_key_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(BadConfigError) as refused:
        storage.exists("s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/prod")
    assert "AWS_SECRET_ACCESS_KEY" in str(refused.value)
    assert "hunter2" not in str(refused.value)
    with pytest.raises(BadConfigError, match="not the name of a bucket"):
        storage.exists("s3://Bucket_/prod")


def test_a_password_from_the_environment_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", "postgresql+psycopg://me:hunter2@host/lake")
    for as_json in (False, True):
        config.run(argparse.Namespace(markdown=False, json=as_json))
        shown = capsys.readouterr().out
        assert "postgresql+psycopg://me:***@host/lake" in shown
        assert "hunter2" not in shown


def test_an_error_is_told_without_keys() -> None:
    told = object_store.reason(
        OSError("GET https://a:b@host/x?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE/2026&X-Amz-Signature=abcdef failed\nmore")
    )
    assert told == "GET https://host/x?X-Amz-Credential=...&X-Amz-Signature=... failed"
    assert "IOSFODNN7EXAMPLE" not in object_store.reason(OSError("key AKIAIOSFODNN7EXAMPLE does not exist"))


def test_every_client_is_told_the_same_address() -> None:
    found = object_store.access({"ONETRANS_STORE_ENDPOINT": "http://127.0.0.1:9000/", "AWS_REGION": "eu-central-1"})
    assert (found.endpoint, found.region) == ("http://127.0.0.1:9000", "eu-central-1")
    spark, boto = found.spark(), found.boto()
    assert spark["spark.hadoop.fs.s3a.endpoint"] == boto["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:9000"
    assert spark["spark.hadoop.fs.s3a.endpoint.region"] == boto["AWS_DEFAULT_REGION"] == "eu-central-1"
    assert spark["spark.hadoop.fs.s3a.path.style.access"] == "true"
    assert boto["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] == "path"
    # At AWS a client knows the address, and the bucket its region.
    aws = object_store.access({})
    assert not {"spark.hadoop.fs.s3a.endpoint", "spark.hadoop.fs.s3a.endpoint.region"} & set(aws.spark())
    assert not {"MLFLOW_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION"} & set(aws.boto())


def test_what_the_environment_says_to_boto_stays() -> None:
    environ = {"AWS_MAX_ATTEMPTS": "2"}
    object_store.export_for_boto(environ)
    assert environ["AWS_MAX_ATTEMPTS"] == "2"
    assert environ["AWS_RETRY_MODE"] == "standard"


def test_what_spark_has_is_told_without_java() -> None:
    hadoop, found = installed()
    assert hadoop in JARS  # the pinned PySpark's
    assert found == {}
    assert problems(*installed(",".join(JARS[hadoop]))) == []


def test_what_keeps_spark_from_s3a_is_named() -> None:
    assert problems("3.4.2", WHOLE) == []
    assert len(problems("3.4.2", {})) == len(JARS["3.4.2"])
    assert problems("3.4.2", WHOLE | {"bundle": "bundle-2.24.6.jar"}) == [
        "bundle-2.24.6.jar is there, but Hadoop 3.4.2 needs software.amazon.awssdk:bundle:2.29.52"
    ]
    assert problems("3.4.2", WHOLE | {"bundle": "renamed.jar"}) == []  # its version is not known, and it may be right
    assert "hadoop-aws:3.5.0" in problems("3.5.0", {})[0]
    assert all(name in advice("3.4.2") for name in JARS["3.4.2"])
