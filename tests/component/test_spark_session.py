"""The Spark session of a job: nothing of it can be reached from outside this machine."""

from __future__ import annotations

import psutil
import pytest
from pyspark.sql import SparkSession

from jobs.spark import _local_jvm


def test_a_local_session_listens_on_loopback_alone_and_shows_no_page(spark: SparkSession) -> None:
    assert spark.sparkContext.uiWebUrl is None
    family = {member.pid for member in psutil.Process().children(recursive=True)}
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.pid in family and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.parametrize(("memory", "quick"), [("1g", True), ("3072m", True), ("4g", False), ("4096M", False)])
def test_a_small_driver_keeps_to_the_quick_compiler(memory: str, quick: bool) -> None:
    assert ("-XX:TieredStopAtLevel=1" in _local_jvm(memory)) == quick
