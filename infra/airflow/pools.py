"""Airflow's pools, with the slots that ``[airflow]`` of the settings gives them.

    python -m infra.airflow.pools > pools.json
    airflow pools import pools.json

``make ui`` makes them by itself.  A task whose pool does not exist is never
started, so a new Airflow gets its pools before its DAGs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from onetrans.errors import PipelineError
from onetrans.settings import AirflowSettings, load_settings


def pools(settings: AirflowSettings) -> dict[str, dict[str, Any]]:
    """Return the pools by name, each as ``airflow pools import`` reads it."""
    return {
        "ranking_spark": {
            "slots": settings.spark_slots,
            "description": "Builds of tables, audits, candidate scores: one Spark driver or one day's rows each.",
            "include_deferred": False,
        },
        "ranking_gpu": {
            "slots": settings.gpu_slots,
            "description": "Trainings and evaluations.",
            # A training in a pod is watched by the triggerer and holds its GPU all the while.
            "include_deferred": True,
        },
        "ranking_registry": {
            "slots": 1,
            "description": "Promotions: one at a time.",
            "include_deferred": False,
        },
    }


def main() -> int:
    """Print the pools as JSON."""
    try:
        print(json.dumps(pools(load_settings().airflow), indent=2))
    except PipelineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
