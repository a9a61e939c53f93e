"""The image's entry point as Spark's executor: given what Spark on Kubernetes gives a pod, it joins a real driver.

The driver is one of a standalone cluster without workers, whose tasks nobody else can run; Kubernetes itself, which
would make the pod, is not to be had here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

from tests.images import DOCKERFILE, image_environment
from tests.spark_cluster import spark_cluster

DRIVER = """
import shlex, subprocess, sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.master(sys.argv[1]).config("spark.ui.enabled", "false").config(
    "spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1").getOrCreate()
conf = spark.sparkContext.getConf()
options = shlex.split(conf.get("spark.executor.extraJavaOptions"))
options += [f"-Dspark.driver.port={conf.get('spark.driver.port')}"]
given = {f"SPARK_JAVA_OPT_{number}": option for number, option in enumerate(options)}
given |= {
    "SPARK_DRIVER_URL": f"spark://CoarseGrainedScheduler@127.0.0.1:{conf.get('spark.driver.port')}",
    "SPARK_EXECUTOR_ID": "1", "SPARK_EXECUTOR_CORES": "1", "SPARK_EXECUTOR_MEMORY": "512m",
    "SPARK_APPLICATION_ID": conf.get("spark.app.id"), "SPARK_CONF_DIR": "/opt/spark/conf",
    "SPARK_RESOURCE_PROFILE_ID": "0", "SPARK_EXECUTOR_POD_IP": "127.0.0.1", "SPARK_EXECUTOR_POD_NAME": "executor-1",
}
import os
with open(sys.argv[3], "wb") as log:
    executor = subprocess.Popen([sys.argv[2], "executor"], env={**os.environ, **given}, stdout=log, stderr=log)
try:
    def seen(batches):
        import os, pyarrow, onetrans
        for batch in batches:
            config = os.environ.get("ONETRANS_CONFIG", "none")
            yield pyarrow.record_batch({"config": [config], "rows": [batch.num_rows]})
    print(spark.range(7, numPartitions=1).mapInArrow(seen, "config string, rows long").collect()[0])
finally:
    executor.terminate()
    executor.wait(30)
    spark.stop()
"""


@pytest.mark.nightly
def test_an_executor_joins_its_driver_and_has_the_image_s_python(tmp_path: Path) -> None:
    image = image_environment("airflow")
    assert image["SPARK_HOME"].endswith("/site-packages/pyspark")
    log = tmp_path / "executor.log"
    with spark_cluster(tmp_path, workers=0) as master:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, master, str(DOCKERFILE.parent / "entrypoint"), str(log)],
            env={
                **os.environ, **image, "PYTHONPATH": str(DOCKERFILE.parents[2]), "PYSPARK_PYTHON": sys.executable,
                "SPARK_HOME": str(Path(pyspark.__file__).parent), "SPARK_LOCAL_IP": "127.0.0.1",
            },
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    assert done.stdout.strip() == "Row(config='none', rows=7)", done.stderr[-2000:] + log.read_text()[-2000:]
