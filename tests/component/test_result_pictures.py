"""The pictures of what a night leaves are taken of a real MLflow and a real verdict."""

from __future__ import annotations

from pathlib import Path

import pytest
from tracked_days import Shop

from expectations.site import Record, add_page, site_path
from infra.local import result_pictures
from infra.local.airflow_page import chromium
from infra.local.newest_day import newest_judged
from onetrans.errors import NotReadyError

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]


def test_three_pictures(tmp_path: Path) -> None:
    if not chromium():
        pytest.skip("there is no Chromium here")
    shop = Shop.open(tmp_path / "shop")
    with pytest.raises(NotReadyError, match="has a verdict"):
        newest_judged(shop.settings)
    plan = shop.candidate(shop.days[-1])
    assert newest_judged(shop.settings).plan_id == plan.plan_id
    with pytest.raises(NotReadyError, match="no day has been audited"):
        result_pictures.take(shop.settings, tmp_path / "out")
    # The shop's tables are written without jobs and audits, so the site gets what an audit would have left.
    site = site_path(shop.settings.lake, shop.settings.audit)
    for ds in shop.days:
        add_page(site, Record("training_requests", str(ds), "passed", 400, 0, 0), "<title>A day</title>")
    taken = result_pictures.take(shop.settings, tmp_path / "out")
    assert [file.name for file in taken] == ["mlflow.png", "verdict.png", "data_docs.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 10_000 for file in taken)
