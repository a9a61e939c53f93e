"""What a deployment needs once before its processes start: the bucket, the databases' schemas, Airflow's pools.

    python -m infra.production.prepare

Everything that is there stays, so it runs at every start.  A bucket is made only
where the service has an address of its own (``store.endpoint`` or
``AWS_ENDPOINT_URL``) and its user may make one; what counts is that it can be
used.  A database that an older version wrote is not upgraded here: that takes
copies first, by ``onetrans upgrade --backup DIR``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import boto3
from botocore.exceptions import ClientError

from infra.airflow.pools import pools
from onetrans import storage
from onetrans.errors import EXIT_OK, PipelineError
from onetrans.object_store import access, export_for_boto, problem_with
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.settings import Settings, load_settings
from onetrans.upgrade import upgrade

logger = logging.getLogger(__name__)


class PrepareError(PipelineError):
    """Something that is needed cannot be made or used."""


def make_bucket(settings: Settings) -> None:
    """Make the bucket of ``store.root`` where an endpoint is set, and try whether it can be used.

    The user of ``infra/s3/policy.json`` may make none, and needs none where the bucket is there.

    Raises:
        PrepareError: if it cannot.
    """
    root = settings.store.root
    if storage.is_local(root):
        return
    export_for_boto()
    found, bucket, refused = access(), root.split("://", 1)[1].split("/", 1)[0], ""
    if found.endpoint:
        client = boto3.client("s3", endpoint_url=found.endpoint, region_name=found.region)
        try:
            client.create_bucket(Bucket=bucket)
            logger.info("made the bucket %s", bucket)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                refused = f"; making the bucket was refused at {found.endpoint}: {code}"
    if problem := problem_with(root):
        raise PrepareError(f"{problem}{refused}")


def make_pools(settings: Settings) -> None:
    """Give Airflow its pools, with the slots of the settings.

    Raises:
        PrepareError: if Airflow does not take them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pools.json"
        file.write_text(json.dumps(pools(settings.airflow)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "pools", "import", str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise PrepareError(f"airflow pools import ended with {done.returncode}: {done.stderr.strip()[-1000:]}")


def main(argv: list[str] | None = None) -> int:
    """Prepare, and say what was done; return the exit code (``onetrans/errors.py``)."""
    parser = Parser(
        prog="python -m infra.production.prepare",
        description=__doc__,
        epilog="examples:\n  python -m infra.production.prepare\n"
        "  docker compose --file infra/compose.yaml run --rm prepare        # as at every start of the others\n\n"
        f"{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)

    def run() -> int:
        parser.parse_args(argv)
        settings = load_settings()
        make_bucket(settings)
        for part in upgrade(settings, ""):
            print(f"{part.name}: {part.found or 'nothing'} -> {part.wanted}")
        if os.environ.get("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"):
            make_pools(settings)
        print("ready")
        return EXIT_OK

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
