"""A stranger's log goes through a day with a schema file alone, written as docs/input.md says.

JSON lines, names of its own, milliseconds since 1970, truth values as labels, four types of behaviour, no request ids,
and a day on which nobody buys.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from pyspark.sql import SparkSession

from jobs import raw
from jobs.backfill import publish_all
from jobs.workspace import Workspace
from onetrans import cli
from onetrans.lake import TABLES, Lake
from onetrans.plan import make_plan
from onetrans.schema import load_schema
from onetrans.settings import load_settings

pytestmark = pytest.mark.timeout(1800)  # twelve builds and audits, on a machine that may be busy

ZONE = ZoneInfo("America/Sao_Paulo")
DAYS = [date(2026, 3, 1) + timedelta(days=n) for n in range(2)]
QUIET = DAYS[0]
"""Nobody buys on it."""
USERS, ITEMS, VIEWS, SHOWN = 40, 30, 60, 5

SCHEMA = """
name = "books"
timezone = "America/Sao_Paulo"
epoch = "ms"
request_from = ["user_id", "ts"]

[aggregates]
windows = [1, 3]
item_keys = ["shelf"]

[columns.impressions]
ts = "t"
user_id = "reader"
item_id = "isbn"
position = "slot"
click = "opened"
conversion = "bought"

[columns.behaviors]
ts = "when"
user_id = "reader"
item_id = "isbn"
type = "what"

[columns.users]
user_id = "reader"

[columns.items]
item_id = "isbn"

[[features]]
name = "reader"
side = "user"
kind = "hashed"
column = "user_id"
hash_size = 128

[[features]]
name = "rate"
side = "user"
kind = "bucketized"
column = "user_ctr_3d"
boundaries = [0.05, 0.1, 0.2, 0.4]

[[features]]
name = "book"
side = "item"
kind = "hashed"
column = "item_id"
hash_size = 64

[[features]]
name = "shelf"
side = "item"
kind = "hashed"
column = "shelf"
hash_size = 16

[[features]]
name = "price"
side = "item"
kind = "bucketized"
column = "price"
boundaries = [10, 20, 40]

[[features]]
name = "device"
side = "context"
kind = "hashed"
column = "device"
hash_size = 8

[[features]]
name = "event_book"
side = "event"
kind = "hashed"
column = "item_id"
hash_size = 64
embedding = "book"

[[features]]
name = "event_shelf"
side = "event"
kind = "hashed"
column = "shelf"
hash_size = 16
embedding = "shelf"

[[sequences]]
name = "sample"
event = "read_sample"
max_length = 12

[[sequences]]
name = "wish"
event = "wishlist"
max_length = 6

[[sequences]]
name = "order"
event = "order"
max_length = 6
"""


def _lines(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _millis(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def write_log(folder: Path) -> dict[date, int]:
    """Write the log and return the impressions of each day."""
    rng = np.random.default_rng(11)
    items = [{"isbn": 9000 + n, "shelf": f"shelf {n % 5}", "price": float(5 + 3 * n)} for n in range(ITEMS)]
    _lines(folder / "items" / "all.jsonl", items)
    _lines(folder / "users" / "all.jsonl", [{"reader": f"r-{n}", "unused": n} for n in range(USERS)])
    written = {}
    for ds in DAYS:
        midnight = datetime.combine(ds, datetime.min.time(), ZONE)
        shown, done = [], []
        for view in range(VIEWS):
            at = midnight + timedelta(minutes=20 * view + 5)
            reader = f"r-{rng.integers(USERS)}"
            for slot, book in enumerate(rng.choice(ITEMS, SHOWN, replace=False)):
                opened = bool(rng.random() < (0.6 if book % 5 == 0 else 0.2))
                bought = opened and ds != QUIET and bool(rng.random() < 0.15)
                device = "phone" if view % 3 else "desk"
                shown.append({"t": _millis(at), "reader": reader, "isbn": 9000 + int(book), "slot": slot,
                              "opened": opened, "bought": bought, "device": device})  # fmt: skip
                kinds = ["read_sample", "wishlist", "order", "page_turn"]
                weights = [0.5, 0.2, 0.1, 0.2]
                if opened:
                    # Text in ISO 8601 with an offset stands beside numbers.
                    done.append({"when": (at + timedelta(minutes=3)).astimezone(UTC).isoformat(), "reader": reader,
                                 "isbn": 9000 + int(book), "what": str(rng.choice(kinds, p=weights))})  # fmt: skip
        _lines(folder / "impressions" / f"ds={ds}" / "part.jsonl", shown)
        _lines(folder / "behaviors" / f"ds={ds}" / "part.jsonl", done)
        written[ds] = len(shown)
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    return written


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[date, int]]]:
    """A folder with the log and an onetrans.toml that names it, as the working directory."""
    folder = tmp_path_factory.mktemp("own")
    written = write_log(folder / "log")
    Path(folder, "onetrans.toml").write_text(
        "[source]\npath = 'log'\n[training]\npreset = 'tiny'\nbatch_size = 64\nthreads = 1\ndevice = 'cpu'\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder, written


@pytest.fixture(scope="module")
def lake(spark: SparkSession, place: tuple[Path, dict[date, int]]) -> Lake:
    """All days built, audited and published, as `python -m jobs.backfill` does it."""
    work = Workspace.open(load_settings())
    publish_all(work, DAYS)
    return work.lake


def test_the_schema_is_accepted_and_the_days_are_there(
    place: tuple[Path, dict[date, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["schema", "check"]) == 0
    assert "sequences: sample (12), wish (6), order (6)" in capsys.readouterr().out
    assert all(raw.main(["--ds", str(ds)]) == 0 for ds in DAYS)


def test_every_row_arrives(lake: Lake, place: tuple[Path, dict[date, int]]) -> None:
    _, written = place
    assert {table: lake.days(table) for table in TABLES} == dict.fromkeys(TABLES, DAYS)
    assert {day.ds: day.rows for day in lake.published("impressions")} == written
    shown = lake.read("impressions", [DAYS[0]]).to_pylist()
    requests = {row["request_id"] for row in shown}
    assert len(requests) == VIEWS
    first = min(row["ts"] for row in shown)
    assert first == datetime(2026, 3, 1, 0, 5, tzinfo=ZONE)
    assert {row["click"] for row in shown} == {0, 1}
    assert sum(row["conversion"] for row in lake.read("impressions", [QUIET]).to_pylist()) == 0


def test_requests_see_the_events_before_them_by_type(lake: Lake) -> None:
    requests = lake.read("training_requests", [DAYS[-1]]).to_pylist()
    assert len(requests) == VIEWS
    assert all(len(request["candidates"]) == SHOWN for request in requests)
    for name in ("sample", "wish", "order"):
        events = [event for request in requests for event in request[f"seq_{name}"]]
        assert events, name
        assert all(event["event_shelf"] is not None for event in events)
    assert all(event["ts"] < r["ts"] for r in requests for event in r["seq_sample"])
    assert {event["type"] for event in lake.read("behaviors", [DAYS[0]]).to_pylist()} >= {"page_turn", "order"}


def test_both_models_train_on_it_and_are_judged(
    lake: Lake, place: tuple[Path, dict[date, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings()
    plan = make_plan(settings, DAYS[-1], load_schema(settings.source), track=False)
    for model in ("onetrans", "dcnv2_din"):
        assert cli.main(["train", "--plan", plan.path, "--model", model, "--no-mlflow", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["path"], told["model"], told["plan_id"]) == (plan.model_path(model), model, plan.plan_id)
    assert cli.main(["evaluate", "--plan", plan.path]) == 0
    assert cli.main(["gate", "--plan", plan.path]) == 0
    capsys.readouterr()
    assert cli.main(["report", "--from", str(DAYS[-1]), "--to", str(DAYS[-1])]) == 0
    assert "CTR lift" in capsys.readouterr().out
