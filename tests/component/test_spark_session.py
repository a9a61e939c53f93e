"""The Spark session of a job: nothing of it can be reached from outside this machine."""

from __future__ import annotations

import psutil
from pyspark.sql import SparkSession


def test_a_local_session_listens_on_loopback_alone_and_shows_no_page(spark: SparkSession) -> None:
    assert spark.sparkContext.uiWebUrl is None
    family = {member.pid for member in psutil.Process().children(recursive=True)}
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.net_connections("inet")
        if connection.pid in family and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
