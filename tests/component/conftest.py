"""One Spark session for all component tests: starting one costs more than most of them."""

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from jobs.spark import session
from onetrans.settings import SparkSettings


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    started = session(SparkSettings(shuffle_partitions=2), "tests")
    yield started
    started.stop()
