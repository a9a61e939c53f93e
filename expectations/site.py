"""The Data Docs site: where it lies, what it remembers of each audited day, and its index.

Beside every page lies a small record of its outcome.  The index is made from
these records, so audits that run at the same time share no file but the index,
which any of them can write again.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape

from onetrans import storage
from onetrans.lake import SCORES, TABLES
from onetrans.settings import AuditSettings, LakeSettings

TEMPLATES = Path(__file__).with_name("templates")

_PAGES = "validations"
_DAYS_SHOWN = 31
_INDEX_TRIES = 3


@dataclass(frozen=True)
class Record:
    """The outcome of one audited day, as the index shows it."""

    table: str
    """Table name."""
    ds: str
    """Logical date."""
    outcome: str
    """``passed``, ``warning`` or ``failed``."""
    rows: int
    """Rows audited."""
    critical: int
    """Critical expectations that were not met."""
    warnings: int
    """Warnings."""

    @property
    def page(self) -> str:
        """Address of the day's page, seen from the index."""
        return f"{_PAGES}/{self.table}/{self.ds}.html"


def site_path(lake: LakeSettings, audit: AuditSettings) -> str:
    """Return the folder of the site: the setting, or ``data_docs`` beside the warehouse."""
    if audit.data_docs:
        return storage.resolve(audit.data_docs)
    warehouse = storage.resolve(lake.warehouse)
    scheme, inside = warehouse.split("://", 1)
    parent = inside.rpartition("/")[0]
    return f"{scheme}://{parent or inside}/data_docs"


def page_path(site: str, table: str, ds: date) -> str:
    """Return where the page of an audited day lies."""
    return storage.join(site, _PAGES, table, f"{ds}.html")


def page_address(site: str, address: str, table: str, ds: date) -> str:
    """Return where a person opens a day's page: under the site's address if it has one, else its file."""
    return f"{address.rstrip('/')}/{_PAGES}/{table}/{ds}.html" if address else page_path(site, table, ds)


def add_page(site: str, record: Record, html: str) -> None:
    """Write a day's page and record, and bring the index up to date."""
    folder = storage.join(site, _PAGES, record.table)
    storage.write_bytes(storage.join(folder, f"{record.ds}.html"), html.encode())
    storage.write_json(storage.join(folder, f"{record.ds}.json"), asdict(record))
    for _ in range(_INDEX_TRIES):
        listed = _list_records(site)
        storage.write_bytes(storage.join(site, "index.html"), _index(listed).encode())
        if _list_records(site) == listed:
            return


def _list_records(site: str) -> list[Record]:
    folder = storage.join(site, _PAGES)
    paths = storage.list_files(folder, ".json")
    shown = sorted({path.rsplit("/", 1)[-1] for path in paths}, reverse=True)[:_DAYS_SHOWN]
    return [Record(**storage.read_json(path)) for path in paths if path.rsplit("/", 1)[-1] in shown]


def _index(records: list[Record]) -> str:
    templates = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["j2"]))
    present = {record.table for record in records}
    return templates.get_template("index.j2").render(
        tables=[table for table in (*TABLES, SCORES) if table in present],
        days=sorted({record.ds for record in records}, reverse=True),
        records={(record.table, record.ds): record for record in records},
    )
