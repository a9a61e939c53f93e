"""The loader against plain Python on random requests: encoding, merge, truncation, order, cursor, memory, refusals."""

import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrans.errors import BadConfigError, BadDataError
from onetrans.loader import Cursor, LoaderConfig, RequestData, Share, prefetch
from onetrans.schema import Feature
from tests.worlds import FIRST_DAY, World, small_schema, write_requests

SCHEMA = small_schema()
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(instant):
    return (instant - EPOCH) // timedelta(microseconds=1)


def embedding_row(feature, value):
    if value is None:
        return 0
    if feature.kind == "hashed":
        return value % feature.hash_size + 1
    return 1 + sum(value >= boundary for boundary in feature.boundaries)


def expected_request(row, max_seq_len):
    """One request as plain lists: user, context, events [(rows, sequence, time)], items, labels."""
    events = [
        (microseconds(event["ts"]), number, [embedding_row(f, event[f.name]) for f in SCHEMA.of_side("event")])
        for number, sequence in enumerate(SCHEMA.sequences)
        for event in row[sequence.column] or ()
    ]
    events.sort(key=lambda event: event[:2])
    return {
        "user": [embedding_row(f, row[f.name]) for f in SCHEMA.of_side("user")],
        "context": [embedding_row(f, row[f.name]) for f in SCHEMA.of_side("context")],
        "time": microseconds(row["ts"]),
        "events": events[-max_seq_len:],
        "items": [[embedding_row(f, c[f.name]) for f in SCHEMA.of_side("item")] for c in row["candidates"]],
        "labels": [(c["click"], c["conversion"]) for c in row["candidates"]],
    }


def requests_of(batch):
    """Take a batch apart into the form of :func:`expected_request`."""
    candidates, events = batch.candidate_offsets_O.tolist(), batch.event_offsets_O.tolist()
    for r in range(batch.num_requests):
        n, e = slice(candidates[r], candidates[r + 1]), slice(events[r], events[r + 1])
        yield {
            "user": batch.user_RU[r].tolist(),
            "context": batch.context_RK[r].tolist(),
            "time": int(batch.request_time_R[r]),
            "events": list(
                zip(
                    batch.event_time_E[e].tolist(),
                    batch.event_sequence_E[e].tolist(),
                    batch.event_EV[e].tolist(),
                    strict=True,
                )
            ),
            "items": batch.item_NI[n].tolist(),
            "labels": list(zip(batch.click_N[n].tolist(), batch.conversion_N[n].tolist(), strict=True)),
        }


def write_world(folder, world, files=2, row_group_size=16):
    tables = [
        write_requests(folder / f"part-{n}.parquet", FIRST_DAY, SCHEMA, world, part=n, row_group_size=row_group_size)
        for n in range(files)
    ]
    return [str(folder / f"part-{n}.parquet") for n in range(files)], tables


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_seq_len", [1, 5, 100])
def test_batches_equal_plain_python(tmp_path, seed, max_seq_len):
    files, tables = write_world(tmp_path, World(seed=seed, null_share=0.2))
    config = LoaderConfig(batch_size=40, max_seq_len=max_seq_len, window_batches=2)
    data = RequestData(files, SCHEMA, config)
    assert data.num_windows > 2, "windows must cut row groups"
    found = []
    for loaded in data.batches(shuffle_seed=None):
        loaded.batch.check()
        found += requests_of(loaded.batch)
    rows = [row for table in tables for row in table.to_pylist()]
    assert found == [expected_request(row, max_seq_len) for row in rows]
    assert data.requests == len(rows)
    assert data.impressions == sum(len(row["candidates"]) for row in rows)


def test_events_of_one_instant_are_ordered_by_sequence(tmp_path):
    files, tables = write_world(tmp_path, World(events=12, requests=200), files=1)
    ties = sum(
        len({e["ts"] for e in row["seq_click"] or ()} & {e["ts"] for e in row["seq_purchase"] or ()})
        for row in tables[0].to_pylist()
    )
    assert ties > 20, "the world no longer holds ties"
    for loaded in RequestData(files, SCHEMA, LoaderConfig(64, 100)).batches(shuffle_seed=None):
        batch = loaded.batch
        owner, time, sequence = batch.event_request_E, batch.event_time_E, batch.event_sequence_E
        tied = (owner[1:] == owner[:-1]) & (time[1:] == time[:-1])
        assert bool((sequence[1:][tied] >= sequence[:-1][tied]).all())


def test_batches_are_about_the_asked_size_and_whole_requests(tmp_path):
    files, _ = write_world(tmp_path, World(requests=300))
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=64, max_seq_len=8, window_batches=3))
    sizes = [loaded.batch.num_candidates for loaded in data.batches(shuffle_seed=3)]
    assert sum(sizes) == data.impressions
    assert min(sizes) > 32
    assert max(sizes) < 128


def test_shuffle_moves_requests_within_a_window_only_and_depends_on_seed_and_pass(tmp_path):
    files, _ = write_world(tmp_path, World(requests=300))
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=64, max_seq_len=8, window_batches=3))

    def times(seed, epochs=1):
        found = {}
        for loaded in data.batches(shuffle_seed=seed, epochs=epochs):
            key = (loaded.cursor.epoch, loaded.cursor.window)
            found.setdefault(key, []).extend(loaded.batch.request_time_R.tolist())
        return found

    stored, shuffled = times(None), times(1, epochs=2)
    for (epoch, window), found in shuffled.items():
        assert found != stored[0, window]
        assert sorted(found) == sorted(stored[0, window])
        assert epoch == 0 or found != shuffled[0, window]
    assert times(1) == {key: found for key, found in shuffled.items() if key[0] == 0}
    assert times(2) != times(1)


def test_reading_from_any_cursor_continues_exactly(tmp_path):
    files, _ = write_world(tmp_path, World(requests=120))
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=50, max_seq_len=8, window_batches=3))
    whole = list(data.batches(shuffle_seed=5, epochs=2))
    assert len({(c.cursor.epoch, c.cursor.window) for c in whole}) > 4
    for index in range(len(whole)):
        cursor = Cursor.from_dict(whole[index].following.to_dict())
        again = RequestData(files, SCHEMA, data.config)
        rest = list(again.batches(shuffle_seed=5, start=cursor, epochs=2))
        assert [r.cursor for r in rest] == [w.cursor for w in whole[index + 1 :]]
        for mine, theirs in zip(rest, whole[index + 1 :], strict=True):
            assert list(requests_of(mine.batch)) == list(requests_of(theirs.batch))


def test_a_cursor_of_other_data_is_refused(tmp_path):
    files, _ = write_world(tmp_path, World(requests=120))
    config = LoaderConfig(batch_size=50, max_seq_len=8, window_batches=3)
    cursor = [loaded.following for loaded in RequestData(files, SCHEMA, config).batches(shuffle_seed=5)][-2]
    with pytest.raises(BadConfigError, match="does not belong to this data"):
        next(RequestData(files[:1], SCHEMA, config).batches(shuffle_seed=5, start=cursor))


def test_keys_stand_beside_their_rows(tmp_path):
    files, tables = write_world(tmp_path, World())
    data = RequestData(files, SCHEMA, LoaderConfig(40, 8, window_batches=2), with_keys=True)
    found = pa.concat_tables([loaded.keys for loaded in data.batches(shuffle_seed=None)])
    labels = np.concatenate([loaded.batch.click_N.numpy() for loaded in data.batches(shuffle_seed=None)])
    expected = [
        {
            **{name: row[name] for name in ("request_id", "user_id")},
            "item_id": candidate["item_id"],
            "ts": row["ts"],
            **{name: candidate[name] for name in ("click", "conversion", "true_ctr", "true_cvr")},
        }
        for table in tables
        for row in table.to_pylist()
        for candidate in row["candidates"]
    ]
    assert found.to_pylist() == expected
    assert found["click"].to_pylist() == labels.tolist()


def test_truth_is_optional_and_never_in_a_batch(tmp_path):
    files, _ = write_world(tmp_path, World(truth=False))
    data = RequestData(files, SCHEMA, LoaderConfig(40, 8), with_keys=True)
    assert "true_ctr" not in next(data.batches(shuffle_seed=None)).keys.column_names


def test_memory_does_not_grow_with_the_table(tmp_path):
    world = World(requests=2000, events=20)
    files, _ = write_world(tmp_path, world, files=1, row_group_size=500)
    config = LoaderConfig(batch_size=256, max_seq_len=40, window_batches=4)

    def peak(copies):
        tracemalloc.start()
        arrow = 0
        for _ in RequestData(files * copies, SCHEMA, config).batches(shuffle_seed=1):
            arrow = max(arrow, pa.total_allocated_bytes())
        _, numpy_peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return numpy_peak + arrow

    peak(1)
    assert peak(8) < 1.2 * peak(2)


def test_long_sequences_make_windows_shorter(tmp_path):
    files, _ = write_world(tmp_path, World(requests=400, events=20), files=1, row_group_size=100)
    data = RequestData(files, SCHEMA, LoaderConfig(64, 100, window_batches=1000, window_bytes=64 << 10))
    windows = {}
    for loaded in data.batches(shuffle_seed=None):
        batch = loaded.batch
        size = sum(t.nbytes for t in (batch.event_EV, batch.event_time_E, batch.event_sequence_E, batch.item_NI))
        windows[loaded.cursor.window] = windows.get(loaded.cursor.window, 0) + size
    assert len(windows) == data.num_windows > 3
    assert max(windows.values()) < 1.25 * (64 << 10)


def expected_vectors(features, values):
    """The numbers of some features of one row: scaled to a mean square of 1, zeros where a value is missing."""
    numbers = []
    for feature in features:
        given = values[feature.name] or [0.0] * feature.dim
        size = (sum(x * x for x in given) / feature.dim) ** 0.5 or 1.0
        numbers += [x / size for x in given]
    return numbers


@pytest.mark.parametrize("seed", [None, 3])
def test_vectors_stand_beside_their_rows(tmp_path, seed):
    schema = small_schema(vectors=True)
    table = write_requests(tmp_path / "part.parquet", FIRST_DAY, schema, World(null_share=0.2))
    rows = {microseconds(row["ts"]): row for row in table.to_pylist()}
    data = RequestData([str(tmp_path / "part.parquet")], schema, LoaderConfig(40, 8, window_batches=2), with_keys=True)
    seen = 0
    for loaded in data.batches(shuffle_seed=seed):
        batch = loaded.batch
        batch.check()
        asked = [rows[time] for time in batch.request_time_R.tolist()]
        shown = {
            (row["request_id"], candidate["item_id"]): candidate for row in asked for candidate in row["candidates"]
        }
        keys = loaded.keys.select(["request_id", "item_id"]).to_pydict()
        candidates = [shown[key] for key in zip(*keys.values(), strict=True)]
        for side, rows_MF, numbers_MX, stored in (
            ("user", batch.user_RU, batch.user_vector_RX, asked),
            ("context", batch.context_RK, batch.context_vector_RX, asked),
            ("item", batch.item_NI, batch.item_vector_NX, candidates),
        ):
            features = schema.vectors(side)
            numbers = [expected_vectors(features, values) for values in stored]
            np.testing.assert_allclose(numbers_MX.numpy(), numbers, rtol=1e-6)
            for feature in features:
                there = [int(values[feature.name] is not None) for values in stored]
                assert rows_MF[:, schema.of_side(side).index(feature)].tolist() == there
                seen += there.count(0)
    assert seen > 20, "the world no longer holds missing vectors"


def test_a_schema_without_vectors_has_none_in_its_batches(tmp_path):
    files, _ = write_world(tmp_path, World(), files=1)
    batch = next(RequestData(files, SCHEMA, LoaderConfig(40, 8)).batches(shuffle_seed=None)).batch
    assert (batch.user_vector_RX, batch.context_vector_RX, batch.item_vector_NX) == (None, None, None)


def test_wide_vectors_make_windows_shorter(tmp_path):
    wide = Feature("image", "item", "vector", "image", dim=64)
    schema = replace(SCHEMA, features=(*SCHEMA.features, wide))
    write_requests(tmp_path / "part.parquet", FIRST_DAY, schema, World(requests=200, events=0))
    config = LoaderConfig(64, 8, window_batches=1000, window_bytes=64 << 10)
    data = RequestData([str(tmp_path / "part.parquet")], schema, config)
    windows = {}
    for loaded in data.batches(shuffle_seed=None):
        held = windows.get(loaded.cursor.window, 0)
        windows[loaded.cursor.window] = held + loaded.batch.item_vector_NX.nbytes
    assert len(windows) == data.num_windows > 3
    assert max(windows.values()) < 1.25 * (64 << 10)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0, 3.0], "part-0.parquet, row group 0, from row 0: 1 values of image hold 3 numbers, needed are 4"),
        ([1.0, None, 3.0, 4.0], "1 values of image hold a number that is null, NaN or infinite, needed are 4 finite"),
        ([1.0, 2.0, float("inf"), 4.0], "1 values of image hold a number that is null, NaN or infinite"),
        (None, None),
    ],
)
def test_a_vector_that_is_none_is_refused(tmp_path, value, message):
    schema = small_schema(vectors=True)
    table = write_requests(tmp_path / "part-0.parquet", FIRST_DAY, schema, World(requests=20, null_share=0.0))

    def change(rows):
        rows[3]["candidates"][0]["image"] = value

    pq.write_table(edit(table, change), tmp_path / "part-0.parquet")
    batches = RequestData([str(tmp_path / "part-0.parquet")], schema, LoaderConfig(40, 8)).batches(shuffle_seed=None)
    if message is None:
        assert sum(int((loaded.batch.item_NI[:, 0] == 0).sum()) for loaded in batches) == 1
        return
    with pytest.raises(BadDataError, match=message):
        list(batches)


def rewritten(tmp_path, change):
    """A file of the small world after ``change(rows, arrow_schema) -> table``."""
    files, tables = write_world(tmp_path, World(requests=20), files=1)
    pq.write_table(change(tables[0]), files[0])
    return files


def edit(table, edit_row):
    rows = table.to_pylist()
    edit_row(rows)
    return pa.Table.from_pylist(rows, schema=table.schema)


def late_event(rows):
    rows[7]["seq_click"] = [{"ts": rows[7]["ts"], "event_item": 1, "event_author": 1}]


def bad_label(rows):
    rows[3]["candidates"][0]["click"] = 2


def null_label(rows):
    rows[3]["candidates"][0]["conversion"] = None


def no_candidates(rows):
    rows[4]["candidates"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["user_ctr"]), "part-0.parquet has no column user_ctr; build the day again"),
        (lambda t: t.drop_columns(["seq_click"]), "column seq_click is missing, needed is a list"),
        (
            lambda t: t.set_column(t.schema.get_field_index("user"), "user", t["user"].cast("string")),
            "column user is string, needed is bigint",
        ),
        (lambda t: edit(t, late_event), "1 events are not before their request, first in row 7"),
        (lambda t: edit(t, bad_label), "candidates.click are neither 0 nor 1, for example 2"),
        (lambda t: edit(t, null_label), "candidates.conversion are neither 0 nor 1, for example nan"),
        (lambda t: edit(t, no_candidates), "row 4 has no candidate"),
        (lambda t: t.slice(0, 0), "there are no rows in 1 files"),
    ],
)
def test_refusals_name_file_and_column(tmp_path, change, message):
    files = rewritten(tmp_path, change)
    with pytest.raises(BadDataError, match=message):
        list(RequestData(files, SCHEMA, LoaderConfig(40, 8)).batches(shuffle_seed=None))


def test_a_truncated_file_is_named(tmp_path):
    files, _ = write_world(tmp_path, World(), files=1)
    path = tmp_path / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadDataError, match=r"part-0\.parquet cannot be read"):
        RequestData(files, SCHEMA, LoaderConfig(40, 8))


def test_a_schema_without_sequences_has_no_events(tmp_path):
    files, tables = write_world(tmp_path, World())
    data = RequestData(files, replace(SCHEMA, sequences=()), LoaderConfig(40, 8))
    batches = [loaded.batch for loaded in data.batches(shuffle_seed=None)]
    assert sum(batch.num_requests for batch in batches) == sum(table.num_rows for table in tables)
    assert all(batch.num_events == 0 for batch in batches)


def test_prefetch_keeps_order_passes_errors_on_and_stops_when_left():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))

    def failing():
        yield 1
        raise BadDataError("row 7")

    with pytest.raises(BadDataError, match="row 7"):
        list(prefetch(failing()))

    left = prefetch(iter(range(10**9)))
    assert next(left) == 0
    left.close()  # returns, which it would not if the thread went on


# Several readers


@pytest.mark.parametrize("of", [2, 3, 7])
@pytest.mark.parametrize("seed", [None, 5])
def test_readers_share_every_batch_without_overlap_however_many_they_are(tmp_path, of, seed):
    files, _ = write_world(tmp_path, World(requests=200))
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=64, max_seq_len=8, window_batches=4))
    whole = list(data.batches(shuffle_seed=seed, epochs=2))
    shares = [list(data.batches(shuffle_seed=seed, epochs=2, share=Share(n, of))) for n in range(of)]
    for loaded, *parts in zip(whole, *shares, strict=True):
        assert {part.cursor for part in parts} == {loaded.cursor}
        assert {part.following for part in parts} == {loaded.following}
        together = [request for part in parts for request in requests_of(part.batch)]
        assert sorted(map(str, together)) == sorted(map(str, requests_of(loaded.batch)))
        if seed is None:
            assert together == list(requests_of(loaded.batch))
        sizes = [part.batch.num_candidates for part in parts]
        assert max(sizes) - min(sizes) <= 2 * 8, "a share differs from another by a request at either end"


def test_a_share_goes_on_from_a_cursor_also_with_another_number_of_readers(tmp_path):
    files, _ = write_world(tmp_path, World(requests=120))
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=64, max_seq_len=8, window_batches=3))
    whole = list(data.batches(shuffle_seed=1))
    for number in (1, 4, len(whole) - 1):
        start = whole[number - 1].following
        rest = [list(data.batches(shuffle_seed=1, start=start, share=Share(n, 3))) for n in range(3)]
        for loaded, *parts in zip(whole[number:], *rest, strict=True):
            together = [request for part in parts for request in requests_of(part.batch)]
            assert sorted(map(str, together)) == sorted(map(str, requests_of(loaded.batch)))


def test_more_readers_than_requests_leave_some_with_an_empty_batch(tmp_path):
    files, _ = write_world(tmp_path, World(requests=3), files=1)
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=1000, max_seq_len=8))
    shares = [next(data.batches(shuffle_seed=1, share=Share(n, 8))).batch for n in range(8)]
    (whole,) = data.batches(shuffle_seed=1)
    assert sum(batch.num_requests for batch in shares) == whole.batch.num_requests == 3
    for batch in shares:
        batch.check()
        assert batch.item_NI.shape[1] == whole.batch.item_NI.shape[1]


def test_a_reader_decodes_the_row_groups_of_its_own_stretch_only(tmp_path, monkeypatch):
    files, _ = write_world(tmp_path, World(requests=800), files=1, row_group_size=20)
    data = RequestData(files, SCHEMA, LoaderConfig(batch_size=1500, max_seq_len=8, window_batches=100))
    assert data.num_windows == 1
    decoded = []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self, *arguments, **options):
        if len(options["columns"]) > 1:
            decoded.extend(options["row_groups"])
        return iter_batches(self, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    for number in range(4):
        decoded.clear()
        list(data.batches(shuffle_seed=1, share=Share(number, 4)))
        assert 10 <= len(decoded) <= 16, "a quarter of 40 row groups, and the borders of the batches' stretches"


@pytest.mark.parametrize(("number", "of"), [(-1, 2), (2, 2), (0, 0)])
def test_a_share_that_is_none_is_refused(number, of):
    with pytest.raises(BadConfigError, match=f"share number {number} of {of}"):
        Share(number, of)
