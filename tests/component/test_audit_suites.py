"""Every expectation of every suite: data broken in just that way makes it fire, and a valid day fires none.

The cases double as a list of what the audit notices.  ``test_every_expectation_has_a_case`` keeps it complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from expectations import rules
from expectations.audit import audit_staged
from expectations.day import AuditDay
from expectations.suites import SUITES
from onetrans import storage
from onetrans.lake import Lake, PublishedDay, Staged
from onetrans.schema import hash64
from onetrans.settings import AuditSettings, LakeSettings
from tests.audit_tables import (
    DS,
    FACTORIES,
    INPUTS,
    LABELS,
    NOON,
    ROWS,
    SECOND,
    Row,
    audit_schema,
    publish,
    publish_inputs,
    repeated,
    stage,
    usual_distributions,
)

DAY = timedelta(days=1)
Rows = list[Row]


@dataclass(frozen=True)
class Case:
    """One way to break one table."""

    table: str
    """The table."""
    name: str
    """What is broken."""
    fires: str
    """The whole sentence, or its beginning, of the one expectation that must fire."""
    column: str
    """Column the finding names."""
    rows: Callable[[Rows], Any] = lambda rows: None
    """Changes the rows in place."""
    columns: Callable[[pa.Table], pa.Table] = lambda data: data
    """Changes the columns."""
    manifest: dict[str, Any] = field(default_factory=dict)
    """Fields of the manifest that differ."""
    earlier: tuple[int, ...] = ()
    """Row counts of the days before, published first; their values are spread like those of a valid day."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ."""
    severity: str = "critical"
    """Severity of the finding."""
    also: tuple[str, ...] = ()
    """Beginnings of the expectations that cannot but fire with it."""
    example: str = ""
    """Part of the first example, as it is told."""
    observed: str = ""
    """What was seen, as it is told."""


def put(column: str, value: Any, row: int = 3) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[row][column] = value

    return change


def put_all(column: str, value: Any) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        for row in rows:
            row[column] = value

    return change


def put_nested(column: str, name: str, value: Any, row: int = 2, element: int = 0) -> Callable[[Rows], None]:
    def change(rows: Rows) -> None:
        rows[row][column][element][name] = value

    return change


def again(row: int = 0) -> Callable[[Rows], None]:
    return lambda rows: rows.append(dict(rows[row]))


def swap_events(column: str, row: int = 2) -> Callable[[Rows], None]:
    return lambda rows: rows[row][column].reverse()


def as_many(times: int, **ones: int) -> Callable[[Rows], None]:
    """Repeat the rows of the day; every n-th row, as ``label=n`` says, has a label of 1."""

    def change(rows: Rows) -> None:
        rows[:] = [{**row, "request_id": f"{row['request_id']} {n}"} for n in range(times) for row in rows]
        for number, row in enumerate(rows):
            row.update({label: int(number % n == 0) for label, n in ones.items()})

    return change


def drop(column: str) -> Callable[[pa.Table], pa.Table]:
    return lambda data: data.drop_columns([column])


def retype(column: str, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(data: pa.Table) -> pa.Table:
        return data.set_column(data.schema.get_field_index(column), column, data[column].cast(kind))

    return change


def add(column: str) -> Callable[[pa.Table], pa.Table]:
    return lambda data: data.append_column(column, pa.array([1] * data.num_rows))


KEYS = {
    "impressions": "request_id",
    "behaviors": "type",
    "user_features": "user_id",
    "item_features": "item_id",
    "behavior_sequences": "user_id",
    "training_requests": "request_id",
    "candidate_scores": "item_id",
}
NUMBERS = {
    "impressions": "true_ctr",
    "behaviors": "price",
    "user_features": "user_ctr_7d",
    "item_features": "item_ctr_7d",
    "training_requests": "user_ctr",
    "candidate_scores": "ctr",
}
FEATURES = {
    "impressions": "surface",
    "behaviors": "price",
    "user_features": "segment",
    "item_features": "price",
    "training_requests": "segment",
}
ALSO_TWICE = {"candidate_scores": ("there is one row per (user_id, rank)",)}
"""What else fires when a row stands twice."""
ALSO_NOT_A_NUMBER = {"candidate_scores": ("ctcvr is ctr times cvr",)}
"""What else fires when the number is not one."""
DECLARED = "every declared column is in every file, with its type"
EXTRA = "there is no column besides the declared ones"
REQUIRED = "keys, times, labels and the numbers of a list are never missing or empty"
MISSING = "no feature is missing from more rows than allowed"
FINITE = "numbers are finite"
SHIFT = "no feature's values are spread otherwise than on the days before"
FOUR_DAYS = (ROWS,) * 4
MANY = 40
SMALLEST = "no number is below the smallest one its column allows"
LARGEST = "no number is above the largest one its column allows"


def shared_cases(table: str) -> Iterator[Case]:
    """What can be broken in every table."""
    key = SUITES[table].key
    yield Case(table, "a key is null", REQUIRED, KEYS[table], put(KEYS[table], None), example="missing = 1")
    one_row = f"there is one row per ({', '.join(key)})"
    yield Case(table, "a row twice", one_row, ", ".join(key), again(), also=ALSO_TWICE.get(table, ()))
    yield Case(
        table, "another day's row", f"ds is {DS} in every row", "ds", put("ds", DS - DAY), example=f"ds = {DS - DAY}"
    )
    yield Case(table, "a column is missing", DECLARED, "ds", columns=drop("ds"), example="found = missing")
    if table in NUMBERS:
        column = NUMBERS[table]
        also = ALSO_NOT_A_NUMBER.get(table, ())
        yield Case(table, "not a number", FINITE, column, put(column, np.nan), also=also, example="not_finite = 1")
    if table in FEATURES:
        column = FEATURES[table]
        yield Case(
            table,
            "a feature is lost",
            MISSING,
            column,
            put_all(column, None),
            severity="warning",
            example="missing_share = 1",
        )


SHARED = [
    # Rules all suites share, broken in one table; test_every_expectation_has_a_case finds them in every suite.
    Case("impressions", "rows were lost", "the files hold the", "the table", manifest={"rows": ROWS + 1}),
    Case(
        "impressions",
        "no rows",
        "the day is not empty",
        "the table",
        list.clear,
        also=("between 0.05%", "some impression converted", "the latest ts"),
    ),
    Case(
        "behaviors", "no rows", "the day is not empty", "the table", list.clear, also=("every event type", "the latest")
    ),
    Case("impressions", "far fewer rows", "130 to", "the table", earlier=(1300,) * 3, also=("650 to",)),
    Case("impressions", "far more rows", "0 to 11", "the table", earlier=(1,) * 3, also=("0 to 3",)),
    Case("impressions", "fewer rows", "25 to", "the table", earlier=(50, 50, 51), severity="warning"),
    Case("impressions", "more rows", "5 to 21", "the table", earlier=(9, 10, 11), severity="warning"),
    Case("impressions", "an undeclared column", EXTRA, "fold", columns=add("fold"), severity="warning"),
    Case("impressions", "a key is empty", REQUIRED, "user_id", put("user_id", ""), example="missing = 1"),
    Case("impressions", "a mistyped day", DECLARED, "ds", columns=retype("ds", pa.string()), example="found = text"),
    Case("item_features", "a short vector", SMALLEST, "image.length", put("image", [1.0, 2.0]), example="smallest = 2"),
    Case("item_features", "an empty vector", SMALLEST, "image.length", put("image", []), example="smallest = 0"),
    Case(
        "item_features",
        "a long vector",
        LARGEST,
        "image.length",
        put("image", [1.0] * 4),
        example="largest_allowed = 3",
    ),
    Case("item_features", "a hole in a vector", REQUIRED, "image.element", put("image", [1.0, None, 2.0])),
    Case("item_features", "a vector with NaN", FINITE, "image.element", put("image", [1.0, np.nan, 2.0])),
    Case("item_features", "lost vectors", MISSING, "image", put_all("image", None), severity="warning"),
    Case(
        "item_features",
        "a vector of doubles",
        DECLARED,
        "image, image.element, image.length",
        columns=retype("image", pa.list_(pa.float64())),
        example="list<element: double>",
    ),
    Case(
        "training_requests",
        "a candidate's short vector",
        SMALLEST,
        "candidates.image.length",
        put_nested("candidates", "image", [1.0]),
        example="smallest = 1",
    ),
    Case(
        "training_requests",
        "an infinite number in a candidate's vector",
        FINITE,
        "candidates.image.element",
        put_nested("candidates", "image", [1.0, np.inf, 0.0]),
        example="not_finite = 1",
    ),
    Case("user_features", "an infinite rate", FINITE, "user_ctr_7d", put("user_ctr_7d", np.inf)),
    *(
        Case(table, "another spread", SHIFT, column, change, earlier=FOUR_DAYS, severity="warning", example="shift = ")
        for table, column, change in (
            ("impressions", "surface", put_all("surface", "search")),
            ("behaviors", "price", put_all("price", 100.0)),
            ("user_features", "segment", put_all("segment", "old")),
            ("item_features", "price", put_all("price", 100.0)),
            ("training_requests", "surface", put_all("surface", hash64("search"))),
            (
                "training_requests",
                "candidates.price",
                lambda rows: [candidate.update(price=100.0) for row in rows for candidate in row["candidates"]],
            ),
        )
    ),
    *(
        Case(
            table,
            "cut off early",
            f"the latest {time} lies in",
            "hours_to_end",
            settings={"max_quiet_hours": 11},
            severity="warning",
        )
        for table, time in (("impressions", "ts"), ("behaviors", "available_at"), ("training_requests", "ts"))
    ),
]


CASES = [
    *SHARED,
    *(case for table in FACTORIES for case in shared_cases(table)),
    Case("impressions", "before the day", "ts lies in", "ts", put("ts", NOON - DAY), example="request_id = r0"),
    Case("impressions", "at the day's end", "ts lies in", "ts", put("ts", NOON + DAY / 2), example="item_id = i3"),
    Case("impressions", "click is 2", "click is 0 or 1", "click", put("click", 2), example="click = 2"),
    Case("impressions", "click is null", REQUIRED, "click", put("click", None), example="missing = 1"),
    Case("impressions", "time is null", REQUIRED, "ts", put("ts", None)),
    Case(
        "impressions",
        "conversion is -1",
        "conversion is 0 or 1",
        "conversion",
        put("conversion", -1),
        example="request_id = r0",
    ),
    Case(
        "impressions",
        "converted without a click",
        "a conversion has a click",
        "click, conversion",
        put("conversion", 1),
        example="request_id = r0",
    ),
    Case(
        "impressions",
        "everything is clicked",
        "between 0.05% and 95.00%",
        "click",
        put_all("click", 1),
        observed="seen: 100.00%",
    ),
    Case(
        "impressions",
        "nothing converted",
        "some impression converted",
        "conversion",
        put_all("conversion", 0),
        severity="warning",
        observed="seen: 0",
    ),
    Case(
        "impressions",
        "fewer clicks",
        "the rate of click is near",
        "click",
        as_many(MANY, click=4, conversion=4),
        earlier=(ROWS * MANY,) * 3,
        severity="warning",
    ),
    Case(
        "impressions",
        "hardly any clicks",
        "the rate of click is not far from",
        "click",
        as_many(MANY, click=12, conversion=12),
        earlier=(ROWS * MANY,) * 3,
        also=("the rate of click is near", "the rate of conversion is near"),
    ),
    Case(
        "impressions",
        "fewer conversions",
        "the rate of conversion is near",
        "conversion",
        as_many(MANY, conversion=12),
        earlier=(ROWS * MANY,) * 3,
        severity="warning",
    ),
    Case(
        "impressions",
        "hardly any conversions",
        "the rate of conversion is not far from",
        "conversion",
        as_many(MANY, conversion=48),
        earlier=(ROWS * MANY,) * 3,
        also=("the rate of conversion is near",),
    ),
    Case("impressions", "a negative position", SMALLEST, "position", put("position", -1), example="smallest = -1"),
    Case("impressions", "a true rate above 1", LARGEST, "true_ctr", put("true_ctr", 1.5), example="largest = 1.5"),
    Case("impressions", "click is text", DECLARED, "click", columns=retype("click", pa.string()), example="int"),
    Case("impressions", "click is wider", DECLARED, "click", columns=retype("click", pa.int64()), example="bigint"),
    Case(
        "impressions",
        "times without a zone",
        DECLARED,
        "ts",
        columns=retype("ts", pa.timestamp("us")),
        example="timestamp[us]",
    ),
    Case(
        "behaviors",
        "known before it happened",
        "an event is not known before it happened",
        "delay_s",
        put("available_at", NOON - SECOND),
        example="event_id",
    ),
    Case(
        "behaviors",
        "from the future",
        "an event delivered on",
        "ts",
        lambda rows: rows[3].update(ts=NOON + DAY, available_at=NOON + DAY),
        example="event_id",
    ),
    Case(
        "behaviors",
        "no purchases",
        "every event type that feeds a sequence occurs",
        "type",
        put_all("type", "click"),
        severity="warning",
    ),
    Case("behaviors", "an event without a time", REQUIRED, "ts", put("ts", None)),
    Case(
        "user_features",
        "more clicks than impressions",
        "clicks are at most impressions",
        "impossible_counts",
        lambda rows: rows[3].update(user_clicks_7d=51.0),
        example="user_id = u3",
    ),
    Case(
        "user_features",
        "more in a day than in a week",
        "a count is not larger in a shorter window",
        "shrinking_windows",
        lambda rows: rows[3].update(user_impressions_1d=51.0),
        example="user_id = u3",
    ),
    Case("user_features", "a negative count", SMALLEST, "user_conversions_1d", put("user_conversions_1d", -1.0)),
    *(
        Case(
            table,
            "an impression is not counted",
            f"every published impression of 7 days is counted for one {key}",
            "counted",
            manifest={"window": ROWS * 50 + 1},
        )
        for table, key in (("user_features", "user"), ("item_features", "item"))
    ),
    Case("user_features", "a rate above 1", LARGEST, "user_cvr_1d", put("user_cvr_1d", 1.01)),
    Case(
        "item_features",
        "more conversions than clicks",
        "clicks are at most impressions",
        "impossible_counts",
        lambda rows: rows[3].update(author_id_conversions_1d=5.0, author_id_conversions_7d=5.0),
        example="item_id = i3",
    ),
    Case(
        "item_features",
        "more in a day than in a week",
        "a count is not larger in a shorter window",
        "shrinking_windows",
        lambda rows: rows[3].update(item_clicks_1d=10.0, item_clicks_7d=9.0),
        example="item_id = i3",
    ),
    Case("item_features", "a negative rate", SMALLEST, "author_id_ctr_7d", put("author_id_ctr_7d", -0.1)),
    Case("item_features", "a rate above 1", LARGEST, "author_id_ctr_7d", put("author_id_ctr_7d", 2.0)),
    Case(
        "behavior_sequences",
        "a user is lost",
        f"no user of the day before is lost: at least {ROWS + 1} rows",
        "the table",
        earlier=(ROWS + 1,),
    ),
    Case(
        "behavior_sequences",
        "events out of order",
        "events of seq_click rise strictly",
        "seq_click_unordered",
        swap_events("seq_click"),
        example="user_id = u2",
    ),
    Case(
        "behavior_sequences",
        "an event twice",
        "events of seq_purchase rise strictly",
        "seq_purchase_unordered",
        lambda rows: rows[2].update(seq_purchase=[rows[2]["seq_purchase"][0]] * 2),
        example="user_id = u2",
    ),
    Case(
        "behavior_sequences",
        "known too early",
        "no event of seq_click is known before",
        "seq_click_known_too_early",
        put_nested("seq_click", "available_at", NOON - DAY),
        example="user_id = u2",
    ),
    Case(
        "behavior_sequences",
        "known too early",
        "no event of seq_purchase is known before",
        "seq_purchase_known_too_early",
        put_nested("seq_purchase", "available_at", NOON - DAY),
    ),
    Case(
        "behavior_sequences",
        "too many settled clicks",
        "of the events of seq_click known before",
        "seq_click_settled",
        lambda rows: rows[2]["seq_click"].insert(0, older(rows[2]["seq_click"][0])),
        example="seq_click_settled = 4",
    ),
    Case(
        "behavior_sequences",
        "too many settled purchases",
        "of the events of seq_purchase known before",
        "seq_purchase_settled",
        lambda rows: rows[2]["seq_purchase"].insert(0, older(rows[2]["seq_purchase"][0])),
        example="seq_purchase_settled = 3",
    ),
    Case(
        "behavior_sequences",
        "an infinite number in an event",
        FINITE,
        "seq_click.event_price",
        put_nested("seq_click", "event_price", np.inf),
    ),
    Case(
        "behavior_sequences",
        "an event feature is lost",
        MISSING,
        "seq_purchase.event_price",
        lambda rows: [event.update(event_price=None) for row in rows for event in row["seq_purchase"] or ()],
        severity="warning",
    ),
    Case(
        "behavior_sequences",
        "an event without an id",
        REQUIRED,
        "seq_click.event_id",
        lambda rows: rows[2]["seq_click"][0].update(event_id=None),
    ),
    Case("training_requests", "at the day's end", "ts lies in", "ts", put("ts", NOON + DAY / 2)),
    Case(
        "training_requests",
        "a click at the request's instant",
        "every event of seq_click lies strictly before",
        "seq_click_not_before_request",
        lambda rows: rows[2]["seq_click"][-1].update(ts=rows[2]["ts"]),
        example="request_id = r2",
    ),
    Case(
        "training_requests",
        "a purchase after the request",
        "every event of seq_purchase lies strictly before",
        "seq_purchase_not_before_request",
        lambda rows: rows[2]["seq_purchase"][-1].update(ts=rows[2]["ts"] + SECOND),
        example="request_id = r2",
    ),
    Case(
        "training_requests",
        "clicks out of order",
        "events of seq_click are in order",
        "seq_click_unordered",
        swap_events("seq_click"),
    ),
    Case(
        "training_requests",
        "purchases out of order",
        "events of seq_purchase are in order",
        "seq_purchase_unordered",
        swap_events("seq_purchase"),
    ),
    Case(
        "training_requests",
        "a click too many",
        "seq_click has at most 3 events",
        "seq_click_length",
        lambda rows: rows[3]["seq_click"].insert(0, rows[3]["seq_click"][0]),
        example="seq_click_length = 4",
    ),
    Case(
        "training_requests",
        "a purchase too many",
        "seq_purchase has at most 2 events",
        "seq_purchase_length",
        lambda rows: rows[2]["seq_purchase"].insert(0, rows[2]["seq_purchase"][0]),
    ),
    Case(
        "training_requests",
        "no candidates",
        "a request has at least one candidate",
        "candidates_count",
        put("candidates", []),
        example="request_id = r3",
    ),
    Case(
        "training_requests",
        "an item listed twice",
        "no item stands twice",
        "candidates_repeated",
        put_nested("candidates", "item_id", "i1"),
        example="request_id = r2",
    ),
    Case(
        "training_requests",
        "a label of 2",
        "click and conversion of every candidate",
        "candidates_bad_labels",
        put_nested("candidates", "click", 2, row=3),
        example="request_id = r3",
    ),
    Case(
        "training_requests",
        "converted without a click",
        "a candidate's conversion has a click",
        "candidates_unclicked_conversions",
        put_nested("candidates", "conversion", 1, element=1),
    ),
    Case(
        "training_requests",
        "a label is lost",
        REQUIRED,
        "candidates.click",
        put_nested("candidates", "click", None, element=1),
    ),
    Case(
        "training_requests",
        "a negative position",
        SMALLEST,
        "candidates.position",
        put_nested("candidates", "position", -1),
    ),
    Case(
        "training_requests",
        "a true rate above 1",
        LARGEST,
        "candidates.true_cvr",
        put_nested("candidates", "true_cvr", 1.5),
    ),
    Case(
        "training_requests",
        "an impression is lost",
        f"each of the {ROWS * 3 + 1} published impressions",
        "candidates_count",
        manifest={"impressions": ROWS * 3 + 1},
    ),
    Case(
        "training_requests",
        "a click is lost",
        "the candidates have the clicks of the published impressions, 25",
        "candidates_clicks",
        manifest={"impressions": ROWS * 3, "labels": (25, 12)},
    ),
    Case(
        "training_requests",
        "a conversion is lost",
        "the candidates have the conversions of the published impressions, 13",
        "candidates_conversions",
        manifest={"impressions": ROWS * 3, "labels": (24, 13)},
    ),
    Case(
        "training_requests",
        "users without features",
        "the user has no row in user_features",
        "user_unknown",
        manifest={"user_features": 3},
        severity="warning",
    ),
    Case(
        "training_requests",
        "items without features",
        "a candidate has no row in item_features",
        "candidates_unknown",
        manifest={"item_features": 1},
        severity="warning",
    ),
    Case(
        "candidate_scores",
        "two items of one rank",
        "there is one row per (user_id, rank)",
        "user_id, rank",
        put("rank", 1),
    ),
    Case("candidate_scores", "a rank of 0", SMALLEST, "rank", put("rank", 0), example="smallest = 0"),
    Case(
        "candidate_scores",
        "a rate above 1",
        LARGEST,
        "cvr",
        lambda rows: rows[3].update(cvr=1.5, ctcvr=0.75),
        example="largest = 1.5",
    ),
    Case("candidate_scores", "another product", "ctcvr is ctr times cvr", "not_the_product", put("ctcvr", 0.25)),
    Case(
        "candidate_scores",
        "two models",
        "all scores of a day are of one model version",
        "model_version",
        put("model_version", "8"),
    ),
]


def older(event: Row) -> Row:
    """An event just before another."""
    return {**event, "ts": event["ts"] - SECOND, "available_at": event["ts"] - SECOND, "event_id": 5}


@pytest.fixture
def lake(tmp_path: Any) -> Lake:
    return Lake(LakeSettings(warehouse=str(tmp_path / "lake")))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.table}: {case.name} ({case.column})")
def test_broken_data_fires_its_expectation(case: Case, lake: Lake) -> None:
    verdict = _audit(case, lake)
    found = {finding["expected"]: finding for finding in verdict["findings"]}
    expected = [next((text for text in found if text.startswith(start)), None) for start in (case.fires, *case.also)]
    assert None not in expected, f"{case.fires!r} did not fire; fired: {list(found)}"
    assert len(found) == len(expected), f"besides {case.fires!r} fired: {list(found)}"
    finding = found[expected[0]]
    assert finding["severity"] == case.severity
    assert finding["column"] == case.column
    if case.example:
        assert case.example in ", ".join(f"{k} = {v}" for k, v in finding["examples"][0].items())
    if case.observed:
        assert finding["observed"] == case.observed
    assert verdict["passed"] == (case.severity == "warning")
    assert lake.verdict(lake.staged(case.table, DS)) == verdict


@pytest.mark.parametrize("rate", ["low", "high"])
@pytest.mark.parametrize("window", ["none", "open", "closed"])
def test_only_few_conversions_of_an_open_window_are_forgiven(window: str, rate: str, lake: Lake) -> None:
    change = as_many(MANY, conversion=48) if rate == "low" else mostly
    _prepare(Case("impressions", rate, "", "conversion", change, earlier=(ROWS * MANY,) * 3), lake)
    schema = audit_schema(attribution_hours=0.0 if window == "none" else 48.0)
    staged = lake.staged("impressions", DS)
    built = schema.labels_close(DS) + (-SECOND if window == "open" else 0 * SECOND)
    manifest = {**staged.to_dict(), "created_at": built.isoformat()}
    storage.write_json(lake.staged_manifest("impressions", DS), manifest)
    verdict = audit_staged(lake, schema, "impressions", DS, settings=AuditSettings(max_quiet_hours=12.0))
    found = {f["severity"] for f in verdict["findings"] if f["expected"].startswith("the rate of conversion is ")}
    assert found == ({"warning"} if (window, rate) == ("open", "low") else {"warning", "critical"})


def mostly(rows: Rows) -> None:
    """Nine of ten impressions are clicked, and convert."""
    as_many(MANY)(rows)
    for number, row in enumerate(rows):
        row.update(dict.fromkeys(LABELS, int(number % 10 > 0)))


@pytest.mark.parametrize("table", SUITES)
def test_a_valid_day_fires_nothing(table: str, lake: Lake) -> None:
    verdict = _audit(Case(table, "valid", "", "", earlier=FOUR_DAYS, manifest=INPUTS.get(table, {})), lake)
    judged = {str(rule.description).split(":")[0] for rule in SUITES[table].expectations(_day(table))}
    assert verdict["evaluated"] == len(judged) + len(rules.columns_as_declared()), "every rule was in force"
    assert verdict["findings"] == []
    assert verdict["passed"]
    assert verdict["rows"] == ROWS
    assert verdict["rows_judged"]


def test_what_is_not_judged_is_said(lake: Lake) -> None:
    """A small day of requests beside feature tables whose ids do not fit in memory: no Spark is started for it."""
    case = Case(
        "training_requests", "many ids", "", "", manifest={"user_features": ROWS + 1, "item_features": ROWS},
        settings={"max_rows_in_memory": ROWS},
    )  # fmt: skip
    verdict = _audit(case, lake)
    assert (verdict["engine"], verdict["findings"], verdict["passed"]) == ("pandas", [], True)
    assert verdict["not_judged"] == [
        "whether each user_id has a row in user_features, which holds more rows than audit.max_rows_in_memory = 24"
    ]
    page = storage.read_bytes(verdict["data_docs"]).decode()
    assert f"; not judged: {verdict['not_judged'][0]}" in page
    judged = _audit(replace(case, settings={}), lake)
    assert (judged["not_judged"], judged["evaluated"]) == ([], verdict["evaluated"] + 1)


@pytest.mark.parametrize("table", SUITES)
def test_every_expectation_has_a_case(table: str) -> None:
    day = _day(table)
    assert day.trailing
    starts = [case.fires for case in CASES if case.table == table]
    shared = {rule.description for rule in rules.row_count(day)}
    for rule in SUITES[table].expectations(day):
        known = rule.description in shared or any(str(rule.description).startswith(start) for start in starts)
        assert known, f"no case breaks {rule.description!r}"
    assert shared <= {rule.description for rule in SUITES[table].expectations(day)}


def test_every_rule_of_the_columns_has_a_case() -> None:
    for rule in rules.columns_as_declared():
        assert any(str(rule.description).startswith(case.fires) for case in CASES), rule.description


def _day(table: str) -> AuditDay:
    """A day of which everything is known, so that every rule of its suite is in force."""
    earlier = tuple(PublishedDay(table, DS - back * DAY, ROWS + 1, 1, 1) for back in (4, 3, 2, 1))
    usual = {path: tuple(counts) for path, counts in usual_distributions(table).items()}
    ids = {"user_id": pa.array(["u0"]), "item_id": pa.array(["i0"])}
    return AuditDay(
        Staged(table, DS, "", ROWS), audit_schema(), AuditSettings(), earlier, trailing=(usual,) * 4,
        **{"training_requests": {"impressions": ROWS * 3 + 1, "labels": (25, 13), "known": ids},
           "user_features": {"window_impressions": ROWS * 50},
           "item_features": {"window_impressions": ROWS * 50}}.get(table, {}),
    )  # fmt: skip


def _prepare(case: Case, lake: Lake) -> None:
    usual = {"distributions": usual_distributions(case.table)}
    for back, count in enumerate(reversed(case.earlier), start=1):
        publish(lake, case.table, repeated(case.table, count, DS - back * DAY), DS - back * DAY, **usual)
    manifest = {name: value for name, value in case.manifest.items() if name == "rows"}
    manifest["inputs"] = publish_inputs(lake, case.manifest)
    kinds, rows = FACTORIES[case.table]()
    case.rows(rows)
    stage(lake, case.table, case.columns(pa.Table.from_pylist(rows, schema=kinds)), **manifest)


def _audit(case: Case, lake: Lake) -> dict[str, Any]:
    _prepare(case, lake)
    # The rows of a valid day lie around noon.
    settings = AuditSettings(**{"max_quiet_hours": 12.0, **case.settings})
    return audit_staged(lake, audit_schema(), case.table, DS, settings=settings)
