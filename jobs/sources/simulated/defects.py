"""Faults that a real log has, put into the simulated one at a given rate: what is refused, dropped, borne or noticed.

A fault is named ``<raw table>.<fault>``.  Each is drawn from a stream of its own, so asking for one more moves none of
the others, and no row gets two.  What becomes of such rows is in ``docs/input.md``; faults that no row shows by itself
are for the audit (``docs/audit.md``).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from jobs.sources.simulated.world import DAY, Integers, microseconds, stream
from onetrans.errors import BadConfigError

Mask = npt.NDArray[np.bool_]
Change = Callable[[pa.Table], pa.Table]

LATEST_DAYS = 3
"""A late event is delivered at most so many days after the day on which it became known."""


@dataclass(frozen=True)
class Defect:
    """One kind of fault."""

    about: str
    """What is wrong with such a row."""
    reason: str
    """Beginning of the reason in the quarantine; empty where the row is good, or is only dropped as a repeat."""
    change: Change
    """Makes rows of it; of rows that are said twice, the second."""
    twice: bool = False
    """Whether the row stays as it is, and a changed copy comes beside it."""
    of: Literal["rows", "day", "files"] = "rows"
    """What the rate is a share of: rows drawn one by one, the day's time from its end, or files, each whole."""


def _set(column: str, value: object) -> Change:
    def change(rows: pa.Table) -> pa.Table:
        kind = rows.schema.field(column).type
        return _with(rows, column, pa.array([value] * rows.num_rows, kind))

    return change


def _with(rows: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(column), column, values)


def _moved(column: str, days: int) -> Change:
    def change(rows: pa.Table) -> pa.Table:
        moved = pc.add(rows[column].cast(pa.int64()), days * DAY)
        return _with(rows, column, moved.cast(rows.schema.field(column).type))

    return change


def _all(*changes: Change) -> Change:
    def change(rows: pa.Table) -> pa.Table:
        for one in changes:
            rows = one(rows)
        return rows

    return change


def _other_user(rows: pa.Table) -> pa.Table:
    return _with(rows, "user_id", pc.binary_join_element_wise(rows["user_id"], "other", "-"))


def _same(rows: pa.Table) -> pa.Table:
    return rows


def _gone(rows: pa.Table) -> pa.Table:
    return rows.slice(0, 0)


def _without_labels(rows: pa.Table) -> pa.Table:
    rows = _all(_set("click", 0), _set("conversion", 0))(rows)
    return _set("conversion_at", None)(rows) if "conversion_at" in rows.column_names else rows


def _times(column: str, factor: float) -> Change:
    return lambda rows: _with(rows, column, pc.multiply(rows[column], factor))


def _minute(rows: pa.Table) -> pa.Table:
    return _with(rows, "ts", pc.floor_temporal(rows["ts"], unit="minute"))


def _one_item(rows: pa.Table) -> pa.Table:
    """Make a request of its own of each row: an item stands in a request once."""
    place = rows["position"].cast(pa.string())
    requests = pc.binary_join_element_wise(rows["request_id"], place, "alone", "-")
    return _set("item_id", "i0")(_with(rows, "request_id", requests))


def _whole_number(column: str) -> Change:
    return lambda rows: _with(rows, column, rows[column].cast(pa.int64()))


DEFECTS: Mapping[str, Defect] = {
    "impressions.missing_key": Defect("item_id is empty", "item_id: missing", _set("item_id", None)),
    "impressions.missing_time": Defect("ts is empty", "ts: missing", _set("ts", None)),
    "impressions.missing_label": Defect("click is empty", "click: missing", _set("click", None)),
    "impressions.wrong_label": Defect("click is 7", "click: not 0 or 1", _set("click", 7)),
    "impressions.conversion_without_click": Defect(
        "conversion is 1 and click 0",
        "conversion: 1 without a click",
        _all(_set("click", 0), _set("conversion", 1)),
    ),
    "impressions.outside_day": Defect("ts lies a day later", "ts: outside the day", _moved("ts", 1)),
    "impressions.conversion_before_request": Defect(
        "conversion_at lies a day before the request; every impression gets this column",
        "conversion_at: before the request",
        _all(
            _set("click", 1),
            _set("conversion", 1),
            lambda rows: _with(rows, "conversion_at", rows["ts"]),
            _moved("conversion_at", -1),
        ),
    ),
    "impressions.negative_position": Defect("position is -1", "position: negative", _set("position", -1)),
    "impressions.several_users": Defect(
        "a row of a request has another user; the whole request is refused",
        "user_id: several users in one request",
        _other_user,
    ),
    "impressions.contradiction": Defect(
        "a second row of the same request and item has another position; both are refused",
        "request_id, item_id: several rows of one key disagree",
        _set("position", 99),
        twice=True,
    ),
    "impressions.repeat": Defect("the row stands there twice; one is dropped", "", _same, twice=True),
    "impressions.tie": Defect("ts is cut to its minute, so that requests tie", "", _minute),
    "impressions.one_item": Defect(
        "item i0 is shown, in a request of its own: 0.5 puts it into half of all impressions", "", _one_item
    ),
    "impressions.lost": Defect("the row was lost", "", _gone),
    "impressions.lost_label": Defect("click and conversion are 0, whatever came of it", "", _without_labels),
    "impressions.wrong_context": Defect("surface is search wherever it was", "", _set("surface", "search")),
    "impressions.cut_off": Defect("rows of the day's last share of time were lost", "", _gone, of="day"),
    "impressions.missing_column": Defect(
        "a file has no column click; the day stops", "", lambda rows: rows.drop_columns(["click"]), of="files"
    ),
    "impressions.wrong_type": Defect(
        "ts is a whole number without a unit in a file; the day stops", "", _whole_number("ts"), of="files"
    ),
    "behaviors.missing_key": Defect("user_id is empty", "user_id: missing", _set("user_id", None)),
    "behaviors.missing_time": Defect("ts is empty", "ts: missing", _set("ts", None)),
    "behaviors.in_future": Defect("ts lies a week later", "ts: after the day", _moved("ts", 7)),
    "behaviors.contradiction": Defect(
        "a second row of the same event has another price; both are refused",
        "event_id: several rows of one key disagree",
        _set("price", -1.0),
        twice=True,
    ),
    "behaviors.repeat": Defect("the row stands there twice; one is dropped", "", _same, twice=True),
    "behaviors.repeat_next_day": Defect("the event is delivered again on the next day", "", _same, twice=True),
    "behaviors.late": Defect(f"the event is delivered 1 to {LATEST_DAYS} days late", "", _same),
    "behaviors.tie": Defect(
        "ts is cut to its minute, so that events tie, and with impressions.tie events and requests", "", _minute
    ),
    "behaviors.one_user": Defect(
        "the event is of user u0, as a crawler's: 0.25 of four million make a million", "", _set("user_id", "u0")
    ),
    "behaviors.at_request": Defect(
        "the event becomes known at the very instant of the shopper's next request, which may not see it", "", _same
    ),
    "behaviors.lost": Defect("the row was lost", "", _gone),
    "behaviors.missing_value": Defect("price is empty", "", _set("price", None)),
    "users.missing_key": Defect("user_id is empty", "user_id: missing", _set("user_id", None), twice=True),
    "users.repeat": Defect("the row stands there twice; one is dropped", "", _same, twice=True),
    "users.contradiction": Defect(
        "a second row of the user has another segment; both are refused",
        "user_id: several rows of one key disagree",
        _set("segment", "segment-x"),
        twice=True,
    ),
    "users.unknown": Defect("the user is not in the table", "", _gone),
    "users.missing_value": Defect("segment is empty", "", _set("segment", None)),
    "items.missing_key": Defect("item_id is empty", "item_id: missing", _set("item_id", None), twice=True),
    "items.infinite_number": Defect("price is infinite", "price: not finite", _set("price", float("inf"))),
    "items.repeat": Defect("the row stands there twice; one is dropped", "", _same, twice=True),
    "items.contradiction": Defect(
        "a second row of the item has another price; both are refused",
        "item_id: several rows of one key disagree",
        _set("price", -1.0),
        twice=True,
    ),
    "items.unknown": Defect("the item is not in the table", "", _gone),
    "items.missing_value": Defect("price is empty", "", _set("price", None)),
    "items.other_unit": Defect("price is a hundred times as large", "", _times("price", 100.0)),
}
"""Every fault by its name."""


@dataclass(frozen=True)
class Faults:
    """Which faults a log gets, and how often."""

    seed: int
    """Seed of the world."""
    rates: Mapping[str, float]
    """Name of a fault -> its share (``Defect.of``); faults that are not here do not happen."""

    @property
    def conversion_times(self) -> bool:
        """Whether impressions say when their conversion came."""
        return self.rates.get("impressions.conversion_before_request", 0.0) > 0

    def chosen(self, table: str, rows: int, ds: date | None, block: int) -> dict[str, Mask]:
        """Return per fault of a raw table that single rows have which rows get it; no row gets two."""
        free = np.ones(rows, dtype=bool)
        found = {}
        for name, rate in self._of(table, "rows"):
            found[name] = free & (stream(self.seed, f"defect {name}", ds, block).random(rows) < rate)
            free &= ~found[name]
        return found

    def spoiled(self, table: str, rows: pa.Table, ds: date | None, block: int) -> pa.Table:
        """Return rows of a file of a raw table with their faults; those of events are in ``delivered``."""
        for name, rate in self._of(table, "day"):
            assert ds is not None  # a snapshot has no such fault
            cut = microseconds(ds) + int((1.0 - rate) * DAY)
            late = pc.greater_equal(rows["ts"].cast(pa.int64()), cut)
            rows = pa.concat_tables([rows.filter(pc.invert(late)), DEFECTS[name].change(rows.filter(late))])
        chosen = self.chosen(table, rows.num_rows, ds, block)
        changed = {name: DEFECTS[name].change(rows.filter(pa.array(mask))) for name, mask in chosen.items()}
        replaced = [mask for name, mask in chosen.items() if not DEFECTS[name].twice]
        kept = rows.filter(pa.array(~np.any(replaced, axis=0))) if replaced else rows
        rows = pa.concat_tables([kept, *changed.values()])
        for name, rate in self._of(table, "files"):
            if stream(self.seed, f"defect {name}", ds, block).random() < rate:
                return DEFECTS[name].change(rows)
        return rows

    def _of(self, table: str, of: str) -> list[tuple[str, float]]:
        """Return the faults of a raw table whose rate is a share of the same, with the rate."""
        rates = [(name, rate) for name, rate in self.rates.items() if name.split(".")[0] == table and rate > 0]
        return [(name, rate) for name, rate in rates if DEFECTS[name].of == of]

    def delivered(
        self, rows: pa.Table, due: Integers, next_request: Integers, ds: date, block: int
    ) -> tuple[pa.Table, Integers]:
        """Return the events of a day with their faults, and when each is delivered, in microseconds since 1970.

        ``due`` is when each would be without faults; ``next_request`` the time of its shopper's next request of the
        day, 0 if there is none.
        """
        chosen = self.chosen("behaviors", rows.num_rows, ds, block)
        kept = np.ones(rows.num_rows, dtype=bool)
        tables, times = [rows], [due]
        for name, mask in chosen.items():
            defect = DEFECTS[name]
            if name == "behaviors.at_request":
                mask = mask & (next_request > 0)
            some, when = defect.change(rows.filter(pa.array(mask))), due[mask]
            if name == "behaviors.late":
                draw = stream(self.seed, "days late", ds, block).integers(1, LATEST_DAYS + 1, rows.num_rows)
                when = when + draw[mask] * DAY
            elif name == "behaviors.repeat_next_day":
                when = when + DAY
            elif name == "behaviors.at_request":
                when = next_request[mask]
                some = _with(some, "available_at", pa.array(when).cast(rows.schema.field("available_at").type))
            if not defect.twice:
                kept &= ~mask
            tables.append(some)
            times.append(when if some.num_rows else when[:0])  # lost ones are never delivered
        tables[0], times[0] = rows.filter(pa.array(kept)), due[kept]
        return pa.concat_tables(tables), np.concatenate(times)


def parse_rates(texts: Sequence[str]) -> dict[str, float]:
    """Return name -> share of ``0.01``, ``late=0.01`` or ``impressions.repeat=0.01``.

    A share alone is for every fault of single rows; those of days and files are asked for by name.

    Raises:
        BadConfigError: for an unknown name, or a share outside 0..1.
    """
    rates: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        names = [full for full in DEFECTS if name in (full, full.split(".")[1])]
        if not equals:
            names = [full for full, defect in DEFECTS.items() if defect.of == "rows"]
        if not names:
            near = difflib.get_close_matches(name, {part for full in DEFECTS for part in (full, full.split(".")[1])})
            meant = f"; did you mean {near[0]}?" if near else ""
            raise BadConfigError(f"--defects {text}: there is no fault {name!r}{meant} `--defects list` names them")
        try:
            rate = float(value)
        except ValueError:
            raise BadConfigError(f"--defects {text}: {value!r} is no share; write 0.01 or NAME=0.01") from None
        if not 0.0 <= rate <= 1.0:
            raise BadConfigError(f"--defects {text}: {rate:g} must be in 0..1")
        rates |= dict.fromkeys(names, rate)
    # In the order of the table above, whatever the order of the arguments: a row gets the first that is drawn.
    return {name: rates[name] for name in DEFECTS if name in rates}


def described() -> str:
    """Return a line per fault."""
    told = {"rows": "", "day": " (NAME=SHARE of the day)", "files": " (NAME=SHARE of the files)"}
    return "\n".join(f"{name:<38} {defect.about}{told[defect.of]}" for name, defect in DEFECTS.items())
