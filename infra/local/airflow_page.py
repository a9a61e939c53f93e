"""Airflow's web page in a headless Chromium: what a person clicks, for tests and for the pictures in ``docs/``.

Needs the development environment (Playwright drives the browser) and a Chromium
of the system, found on the search path or named by ``CHROMIUM``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from playwright.sync_api import FloatRect, Locator, Page, Response, expect, sync_playwright

from infra.airflow.api import AirflowApiError

Reprocess = Literal["Missing Runs", "Missing and Errored Runs", "All Runs"]
"""Choices of the form under *Reprocess Behavior*, as the page writes them."""

_PATIENCE_MS = 60_000
"""How long the page may take: a busy machine draws slowly."""


def chromium() -> str:
    """Return the path of a Chromium; empty if there is none."""
    named = os.environ.get("CHROMIUM", "")
    return named or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


class AirflowPage:
    """A browser on one Airflow, signed in as everybody on loopback is; use as a context manager."""

    def __init__(self, address: str, width: int = 1280, height: int = 800) -> None:
        """Describe a browser; nothing starts yet.

        Args:
            address: address of the API server.
            width: width of the window in pixels.
            height: its height.
        """
        self.address = address.rstrip("/")
        self.size = (width, height)

    def __enter__(self) -> Self:
        self._driver = sync_playwright().start()
        # Without its sandbox: Chromium refuses to start as root with it, and only loopback is shown.
        self._browser = self._driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        self.page: Page = self._browser.new_page(
            viewport={"width": self.size[0], "height": self.size[1]}, locale="en-US", timezone_id="UTC"
        )
        self.page.set_default_timeout(_PATIENCE_MS)
        expect.set_options(timeout=_PATIENCE_MS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._browser.close()
        self._driver.stop()

    def open(self, path: str) -> Page:
        """Open a page, for example ``/dags/feature_tables``, and wait until it has drawn itself."""
        self.page.goto(f"{self.address}{path}")
        expect(self.page.get_by_test_id("nav-home-link")).to_be_visible()
        return self.page

    def trigger_form(self, dag_id: str) -> Locator:
        """Open the form that starts one run of a DAG; return the dialog."""
        page = self.open(f"/dags/{dag_id}")
        page.get_by_test_id("trigger-dag-button").first.click()
        dialog = page.get_by_role("dialog").filter(has_text=dag_id)
        expect(dialog.get_by_text("Run Parameters")).to_be_visible()
        return dialog

    def trigger(
        self, dag_id: str, texts: Mapping[str, str], choices: Mapping[str, str], switched_on: Sequence[str] = ()
    ) -> str:
        """Start one run as a person does; return its id.

        Args:
            dag_id: the DAG.
            texts: by field of the form, what is typed.
            choices: by field, what is chosen from its list.
            switched_on: fields that are switched on.

        Raises:
            AirflowApiError: if Airflow refuses; the text is its answer.
        """
        dialog, page = self.trigger_form(dag_id), self.page
        for field, text in texts.items():
            dialog.locator(f"#element_{field}").fill(text)
        for field, choice in choices.items():
            dialog.locator(f"#element_{field}").click()
            page.get_by_role("option", name=choice, exact=True).click()
        for field in switched_on:
            dialog.locator(f"label:has([name=element_{field}])").click()
        with page.expect_response(_creates_a_run) as answer:
            dialog.get_by_role("button", name="Trigger", exact=True).click()
        if not answer.value.ok:
            raise AirflowApiError(f"the page's run of {dag_id} was answered {answer.value.status}")
        return str(answer.value.json()["dag_run_id"])

    def backfill_form(
        self, dag_id: str, first: date, last: date, reprocess: Reprocess, at_once: int | None = None
    ) -> Locator:
        """Open the form of a backfill and fill it in; return the dialog."""
        dialog, page = self.trigger_form(dag_id), self.page
        dialog.get_by_text("Backfill", exact=True).click()
        for number, day in enumerate((first, last)):
            dialog.get_by_test_id("datetime-input").nth(number).click()
            entry = page.get_by_placeholder("YYYY/MM/DD").filter(visible=True)
            entry.fill(f"{day:%Y/%m/%d}")
            page.keyboard.press("Escape")
            expect(entry).to_have_count(0)
        dialog.get_by_text(reprocess, exact=True).click()
        if at_once is not None:
            dialog.get_by_role("spinbutton").fill(str(at_once))
        return dialog

    def backfill(self, dag_id: str, first: date, last: date, reprocess: Reprocess, at_once: int | None = None) -> int:
        """Backfill a range of days as a person does; return how many runs the form announces.

        Args:
            dag_id: the DAG.
            first: first day.
            last: last day.
            reprocess: what is to happen to days that were run before.
            at_once: *Max Active Runs*; None leaves what the form begins with, 1.

        Raises:
            AirflowApiError: if Airflow refuses; the text is its answer.
        """
        dialog = self.backfill_form(dag_id, first, last, reprocess, at_once)
        told = dialog.get_by_text("will be triggered")
        announced = int(told.inner_text().split()[0])
        with self.page.expect_response(_creates_a_backfill) as answer:
            dialog.get_by_role("button", name="Run Backfill").click()
        if not answer.value.ok:
            raise AirflowApiError(
                f"the page's backfill of {dag_id} was answered {answer.value.status}: {answer.value.text()}"
            )
        expect(dialog).to_be_hidden()
        return announced

    def picture(self, path: Path, height: float | None = None) -> None:
        """Write what the window shows as a PNG, or its uppermost ``height`` pixels."""
        shown = min(height or self.size[1], self.size[1])
        clip: FloatRect = {"x": 0, "y": 0, "width": self.size[0], "height": shown}
        self.page.screenshot(path=path, animations="disabled", clip=clip)


def _creates_a_run(answer: Response) -> bool:
    return answer.request.method == "POST" and answer.url.endswith("/dagRuns")


def _creates_a_backfill(answer: Response) -> bool:
    return answer.request.method == "POST" and answer.url.endswith("/backfills")
