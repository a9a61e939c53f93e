"""Airflow, MLflow and Data Docs on this machine, all on loopback, until Ctrl-C: ``make ui``.

The settings are those that ``$ONETRANS_CONFIG`` names, else of ``onetrans.toml`` in
the checkout's folder, else the demo's (``var/demo/onetrans.toml``) if there was one,
else the defaults.  Other commands go by the first two alone; what to export for them
is printed.
Airflow's home is ``airflow`` beside the demo's configuration file, else ``var/airflow``
beside the file.  Everything runs in the checkout's folder, so relative paths in the
settings are relative to it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from expectations.site import site_path
from infra.local import pages
from infra.local.airflow import REPOSITORY, LocalAirflow
from infra.local.homes import airflow_home, chosen_config
from infra.local.newest_day import comparison, newest_judged, verdict_page
from infra.local.processes import stop
from onetrans.errors import EXIT_OK, NotReadyError
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.settings import OWN_FILE, Settings, load_settings


def main(argv: list[str] | None = None) -> int:
    """Start the servers, print their addresses, and wait for Ctrl-C."""
    parser = Parser(
        prog="python -m infra.local",
        description=__doc__,
        epilog="examples:\n  python -m infra.local\n  ONETRANS_CONFIG=var/demo/onetrans.toml python -m infra.local\n\n"
        f"{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    signal.signal(signal.SIGTERM, _interrupt)

    def started() -> int:
        parser.parse_args(argv)
        try:
            run()
        except KeyboardInterrupt:
            print("stopped")
        return EXIT_OK

    return exit_code_of(started)


def run() -> None:
    """Start the servers and keep them until interrupted; one of Airflow's that ends is started again.

    Raises:
        PipelineError: if a server cannot start, ends again and again, or shows another page and ends.
    """
    path = chosen_config()
    os.chdir(REPOSITORY)
    print(f"configuration: {path or 'none, so every setting has its default'}", flush=True)
    if path and path != REPOSITORY / OWN_FILE:
        print(f"  for commands in another shell: export ONETRANS_CONFIG={shlex.quote(str(path))}", flush=True)
    environment = {"ONETRANS_CONFIG": str(path)} if path else {}
    settings = load_settings({**os.environ, **environment})
    airflow = LocalAirflow(
        airflow_home(path),
        environment,
        database=settings.airflow.database,
        schedule=settings.airflow.schedule,
    )
    others = _other_pages(settings, airflow.home / "logs")
    airflow.environment.update(_links(settings, others))
    servers = [page.server for page in others if page.server]
    try:
        print(f"starting Airflow ({airflow.parallelism} tasks at once), home {airflow.home}", flush=True)
        for server in servers:
            server.start()
        airflow.start()
        for page in others:
            pages.wait_for(page)
        for title, address in [("Airflow", airflow.address), *((page.title, page.address) for page in others)]:
            print(f"  {title:<10} {address}")
        print("\n".join(_newest_day(settings, others)))
        print("Ctrl-C stops them.", flush=True)
        while True:
            time.sleep(1)
            for name in airflow.revive():
                print(f"{name} had ended and was started again; its log is in {airflow.home / 'logs'}", flush=True)
            for server in servers:
                server.check()
    finally:
        print("\nstopping", flush=True)
        airflow.stop()
        stop(servers)


def _newest_day(settings: Settings, others: Sequence[pages.Page]) -> list[str]:
    """Return where to look at the newest day that has a verdict, or why there is nothing to look at."""
    mlflow = settings.mlflow.address or next(page.address for page in others if page.title == "MLflow")
    try:
        plan = newest_judged(settings)
        found = [("Verdict", verdict_page(plan)), ("Models", comparison(settings, plan, mlflow))]
    except NotReadyError as error:
        return [f"no verdict to show yet: {error}"]
    except Exception as error:  # whatever it is, the servers run and are what was asked for
        return [f"where the newest verdict is, cannot be told: {error}"]
    return [f"{plan.ds}, the newest day with a verdict:", *(f"  {title:<10} {address}" for title, address in found)]


def _other_pages(settings: Settings, logs: Path) -> list[pages.Page]:
    docs = pages.docs_page(site_path(settings.lake, settings.audit), logs, settings.audit.address)
    return [page for page in (pages.mlflow_page(settings, logs), docs) if page is not None]


def _links(settings: Settings, others: Sequence[pages.Page]) -> dict[str, str]:
    """Return the variables by which steps learn where a person opens these pages, unless the settings say it."""
    said = {"MLflow": settings.mlflow.address, "Data Docs": settings.audit.address}
    names = {"MLflow": "ONETRANS_MLFLOW_ADDRESS", "Data Docs": "ONETRANS_AUDIT_ADDRESS"}
    return {names[page.title]: page.address for page in others if not said[page.title]}


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
