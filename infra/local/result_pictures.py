"""Pictures of what a night leaves to look at: ``python -m infra.local.result_pictures [--out DIR]``.

MLflow's comparison of the two models of the newest judged day, that day's verdict,
and the Data Docs of its audits, of the deployment that ``make ui`` would show: after
``make demo`` the demo's.  Nothing is run or changed; the two servers are stopped again.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from expectations.site import site_path
from infra.local import pages
from infra.local.airflow_page import chromium
from infra.local.homes import REPOSITORY, chosen_config
from infra.local.newest_day import comparison, newest_judged, verdict_page
from onetrans import storage
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError
from onetrans.process import EXIT_CODES, Parser, exit_code_of
from onetrans.settings import Settings, load_settings

IMAGES = REPOSITORY / "docs" / "images"
_SIZE = {"width": 1440, "height": 800}
_PATIENCE_MS = 120_000
_DRAWN_MS = 4000
"""Charts draw themselves after the page says that it is loaded."""


def main(argv: list[str] | None = None) -> int:
    """Take the pictures and return the exit code."""
    parser = Parser(
        prog="python -m infra.local.result_pictures",
        description=__doc__,
        epilog="examples:\n  python -m infra.local.result_pictures\n"
        "  ONETRANS_CONFIG=var/demo/onetrans.toml python -m infra.local.result_pictures --out /tmp/pictures\n\n"
        f"{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=IMAGES, metavar="DIR", help="folder of the pictures")

    def run() -> int:
        arguments = parser.parse_args(argv)
        path = chosen_config()
        os.chdir(REPOSITORY)
        settings = load_settings({**os.environ, **({"ONETRANS_CONFIG": str(path)} if path else {})})
        for file in take(settings, arguments.out.resolve()):
            print(file)
        return EXIT_OK

    return exit_code_of(run)


def take(settings: Settings, out: Path) -> list[Path]:
    """Write ``mlflow.png``, ``verdict.png`` and ``data_docs.png`` and return them.

    Raises:
        BadConfigError: if there is no Chromium.
        NotReadyError: if no day was judged yet, or none audited.
    """
    if not chromium():
        raise BadConfigError("there is no Chromium here; install one (Debian: apt-get install chromium)")
    plan = newest_judged(settings)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="onetrans-pictures-") as logs:
        site = site_path(settings.lake, settings.audit)
        if not storage.exists(storage.join(site, "index.html")):
            raise NotReadyError(f"{site} holds no Data Docs: no day has been audited yet")
        docs = pages.docs_page(site, Path(logs), settings.audit.address)
        if docs is None:
            raise BadConfigError(f"the Data Docs are in {site}; name where a browser finds them in audit.address")
        shown = [pages.mlflow_page(settings, Path(logs)), docs]
        wanted = {
            "mlflow.png": (comparison(settings, plan, shown[0].address), re.compile("Comparing", re.I)),
            "verdict.png": (verdict_page(plan), re.compile(str(plan.ds))),
            "data_docs.png": (shown[1].address, re.compile("Data Docs|audit", re.I)),
        }
        with pages.served(shown), _browser() as browser:
            return [_picture(browser, address, text, out / name) for name, (address, text) in wanted.items()]


@contextmanager
def _browser() -> Iterator[Page]:
    with sync_playwright() as driver:
        # Without its sandbox: Chromium refuses to start as root with it, and only loopback is shown.
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=_SIZE, locale="en-US", timezone_id="UTC", color_scheme="light")  # type: ignore[arg-type]
        page.set_default_timeout(_PATIENCE_MS)
        try:
            yield page
        finally:
            browser.close()


def _picture(page: Page, address: str, text: re.Pattern[str], file: Path) -> Path:
    """Take a picture of a page once it shows a text."""
    page.goto(address)
    expect(page.get_by_text(text).first).to_be_visible(timeout=_PATIENCE_MS)
    page.wait_for_timeout(_DRAWN_MS)
    if file.name == "mlflow.png":
        close = page.get_by_role("button", name=re.compile("close", re.I))
        if close.count():  # MLflow's assistant, which needs a model of its own, takes a quarter of the page
            close.last.click()
        # Below charts of whatever parameters come first stand the figures, one model beside the other.
        page.get_by_text("Metrics", exact=True).last.scroll_into_view_if_needed()
        page.mouse.wheel(0, 500)
        page.wait_for_timeout(_DRAWN_MS)
    page.screenshot(path=file)
    return file


if __name__ == "__main__":
    raise SystemExit(main())
