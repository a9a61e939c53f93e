"""One Spark session and one S3 server for all component tests: starting one costs more than most of them."""

from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from jobs.spark import session
from onetrans.settings import SparkSettings
from tests.s3 import ObjectStore, running


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    started = session(SparkSettings(shuffle_partitions=2), "tests")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """Provide an S3 server; the environment names it for the rest of the tests."""
    with running() as store:
        yield store
