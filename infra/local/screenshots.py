"""The pictures of Airflow's page in ``docs/images``: ``python -m infra.local.screenshots [--out DIR]``.

A small simulated shop is run for two days through a local Airflow, the days
backfilled from the page itself.  The log of the second is spoilt, so its first
step fails.  Everything but the pictures is written to a temporary folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import expect

from infra.airflow.api import AirflowApi, Run
from infra.local.airflow import REPOSITORY, LocalAirflow
from infra.local.airflow_page import AirflowPage, chromium
from infra.local.homes import small_config
from onetrans.errors import BadConfigError, PipelineError
from onetrans.process import EXIT_CODES, Parser, exit_code_of

IMAGES = REPOSITORY / "docs" / "images"
FIRST = date(2026, 1, 1)
HISTORY, GOOD, SPOILT = DAYS = [FIRST + timedelta(days=offset) for offset in range(3)]
DAGS = ("feature_tables", "ranking_model")
_PATIENCE_S = 2400.0


def main(argv: list[str] | None = None) -> int:
    """Take the pictures and return the exit code."""
    parser = Parser(
        prog="python -m infra.local.screenshots",
        description=__doc__,
        epilog="examples:\n  python -m infra.local.screenshots\n"
        f"  python -m infra.local.screenshots --out /tmp/pictures\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR", help="folder of the pictures")

    def run() -> int:
        out = parser.parse_args(argv).out
        with tempfile.TemporaryDirectory(prefix="onetrans-pictures-") as folder:
            take(Path(folder), out)
        return 0

    return exit_code_of(run)


def take(folder: Path, out: Path) -> None:
    """Run the days in ``folder`` and write the pictures to ``out``.

    Raises:
        BadConfigError: if there is no Chromium.
        PipelineError: if a day does not end as it should.
    """
    if not chromium():
        raise BadConfigError("there is no Chromium here; install one (Debian: apt-get install chromium)")
    out.mkdir(parents=True, exist_ok=True)
    airflow = _shop(folder)
    with airflow:
        with AirflowPage(airflow.address, width=1280, height=1060) as page:
            _form(page, out)
        with AirflowPage(airflow.address, width=1280, height=720) as page:
            page.backfill_form("feature_tables", GOOD, SPOILT, "Missing Runs")
            page.picture(out / "backfill.png")
            for dag_id in DAGS:
                page.backfill(dag_id, GOOD, SPOILT, "Missing Runs")
            ended = {dag_id: _ended(airflow.api, dag_id) for dag_id in DAGS}
            _check([run.state for run in ended["feature_tables"]], ["success", "failed"])
            _grid(page, out)
            _graph(page, ended["ranking_model"][0], out)
            _failed(page, ended["feature_tables"][1], out)


def _shop(folder: Path) -> LocalAirflow:
    """Write a log of three days, build the first and spoil the last; return the Airflow, not yet started."""
    config = small_config(folder)
    airflow = LocalAirflow(folder / "airflow", {"ONETRANS_CONFIG": str(config), "ONETRANS_AIRFLOW_DEADLINE_HOURS": "0"})
    _process(
        airflow.environment,
        *("onetrans.cli", "simulate", "--out", str(folder / "raw"), "--from", str(FIRST), "--epoch", str(FIRST)),
        *("--days", str(len(DAYS)), "--users", "400", "--items", "120", "--history-days", "3"),
    )
    _process(airflow.environment, "jobs.backfill", "--ds", str(HISTORY))
    spoilt = folder / "raw" / "impressions" / f"ds={SPOILT}" / "part-0.parquet"
    rows = pq.read_table(spoilt)
    click = rows["click"].to_numpy().copy()
    click[: len(click) // 2] = 7
    pq.write_table(rows.set_column(rows.schema.get_field_index("click"), "click", pa.array(click)), spoilt)
    return airflow


def _process(environment: Mapping[str, str], module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=dict(environment),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PipelineError(f"{module} ended with exit code {done.returncode}: {done.stderr[-2000:]}")


def _ended(api: AirflowApi, dag_id: str) -> list[Run]:
    deadline = time.monotonic() + _PATIENCE_S
    while not all(run.finished for run in api.runs(dag_id)):
        if time.monotonic() > deadline:
            raise PipelineError(f"{dag_id} has not ended after {_PATIENCE_S:.0f} s: {api.runs(dag_id)}")
        time.sleep(1.0)
    return api.runs(dag_id)


def _check(found: list[str], wanted: list[str]) -> None:
    if found != wanted:
        raise PipelineError(f"the days ended as {found}, which is not what the pictures are to show: {wanted}")


def _form(page: AirflowPage, out: Path) -> None:
    form = page.trigger_form("ranking_model")
    expect(form.get_by_text("Reason for a forced promotion")).to_be_visible()
    page.page.wait_for_timeout(1500)
    page.picture(out / "form.png")


def _grid(page: AirflowPage, out: Path) -> None:
    shown = page.open("/dags/feature_tables")
    shown.get_by_test_id("expand-all-button").click()
    shown.wait_for_timeout(1500)
    page.picture(out / "grid.png")


def _graph(page: AirflowPage, run: Run, out: Path) -> None:
    shown = page.open(f"/dags/{run.dag_id}/runs/{quote(run.run_id)}")
    shown.keyboard.press("g")
    expect(shown.get_by_test_id("rf__wrapper")).to_be_visible()
    shown.wait_for_timeout(1500)
    page.picture(out / "graph.png")
    shown.keyboard.press("g")


def _failed(page: AirflowPage, run: Run, out: Path) -> None:
    shown = page.open(f"/dags/{run.dag_id}/runs/{quote(run.run_id)}/tasks/impressions.build")
    told = shown.get_by_text("BAD DATA").last
    told.scroll_into_view_if_needed()
    shown.wait_for_timeout(1500)
    box = told.bounding_box()
    if box is None:
        raise PipelineError("the page does not show what the failed task says")
    # Not what follows: the stack's frames name this machine's folders.
    page.picture(out / "failed.png", height=box["y"] + box["height"])


if __name__ == "__main__":
    sys.exit(main())
