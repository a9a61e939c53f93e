"""Airflow's pools, with the slots that ``[airflow]`` of the settings gives them.

    python -m infra.airflow.pools > pools.json
    airflow pools import pools.json

``make ui`` makes them by itself.  A task whose pool does not exist is never
started, so a new Airflow gets its pools before its DAGs.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from onetrans.errors import EXIT_OK
from onetrans.process import EXIT_CODES, Parser, exit_code_of, print_json
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


def main(argv: list[str] | None = None) -> int:
    """Print the pools as JSON."""
    parser = Parser(
        prog="python -m infra.airflow.pools",
        description="Print Airflow's pools, with the slots of the settings, as `airflow pools import` reads them.",
        epilog="examples:\n  python -m infra.airflow.pools > pools.json && airflow pools import pools.json\n\n"
        f"{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def run() -> int:
        parser.parse_args(argv)
        print_json(pools(load_settings().airflow))
        return EXIT_OK

    return exit_code_of(run)


if __name__ == "__main__":
    sys.exit(main())
