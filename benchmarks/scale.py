"""What a training of a billion samples in N processes needs: reading, arithmetic, exchange and memory, per process.

    python -m benchmarks.scale [--quick] [--json FILE]

Reading is processor time of the loader (a share of every batch against all of it); arithmetic is counted
(``benchmarks/flops.py``); what is exchanged and held is counted in bytes.  So a busy machine disturbs none of it but
the last lines, which train ``small`` on a small log in one process and in two: these want two free cores.
``docs/scale.md`` makes hours of it.

A request has 16 candidates and, for ``base``, up to 1190 events: skewed, a quarter of that on average, and all full as
the other extreme.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Report, parser
from benchmarks.flops import training_flops
from benchmarks.model import SCHEMA_FILE, Shape, random_batch
from onetrans.loader import LoaderConfig, RequestData, Share
from onetrans.models import OneTransConfig, build_model, preset
from onetrans.optim_config import optimizer_preset
from onetrans.plan import FINISHED_FILE
from onetrans.schema import FeatureSchema
from tests.plain_logs import SCHEMA as PLAIN_SCHEMA
from tests.plain_logs import rows, write

CANDIDATES = 16
PER_PROCESS = 2048
"""Impressions of a process's share of a batch, as in the paper."""
PROCESSES = (2, 4, 8, 16)
ROW_GROUP_BYTES = 16 << 20
"""Of the tables that ``jobs.workspace`` writes."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    arguments = parser(__doc__).parse_args(argv)
    report = Report("scale", arguments)
    schema = FeatureSchema.load(SCHEMA_FILE)
    config = preset("onetrans", "base")
    assert isinstance(config, OneTransConfig)
    _arithmetic(report, config, schema)
    _exchange(report, config, schema)
    with tempfile.TemporaryDirectory() as folder:
        _reading(report, schema, Path(folder), requests=2_000 if arguments.quick else 20_000)
        if not arguments.quick:
            _together(report, Path(folder))
    return report.finish()


def _arithmetic(report: Report, config: OneTransConfig, schema: FeatureSchema) -> None:
    requests = PER_PROCESS // CANDIDATES
    for case in ("skewed", "full"):
        shape = Shape(CANDIDATES, config.max_seq_len, requests, skewed=case == "skewed")
        batch = random_batch(schema, shape)
        report.add(f"arithmetic, {case}", "events of a request", batch.num_events / requests)
        flops = training_flops(config, schema, batch)
        report.add(f"arithmetic, {case}", "operations of a sample", flops / PER_PROCESS / 1e9, "GFLOP")


def _exchange(report: Report, config: OneTransConfig, schema: FeatureSchema) -> None:
    model = build_model(config, schema)
    dense = sum(p.numel() for p in model.dense_parameters().values())
    report.add("dense weights", "number", dense / 1e6, "M")
    report.add("dense weights", "exchanged in a step", dense * 4 / 2**20, "MiB")
    # Weights, gradients, the optimizer's squares, and the copy in which gradients are exchanged.
    assert optimizer_preset("base").dense == "rmsprop_v2"
    report.add("dense weights", "held", dense * 4 * 4 / 2**30, "GiB")
    batch = random_batch(schema, Shape(CANDIDATES, config.max_seq_len, PER_PROCESS // CANDIDATES))
    looked_up = sum(rows.numel() for rows in (batch.user_RU, batch.context_RK, batch.item_NI, batch.event_EV))
    row = 8 + 4 * config.embedding_dim
    report.add("rows of tables", "looked up by a process in a step", looked_up / 1e3, "thousand")
    report.add("rows of tables", "gathered in a step, 16 processes, at most", 16 * looked_up * row / 2**20, "MiB")
    report.add("rows of tables", "held, 100 M rows", 1e8 * config.embedding_dim * 4 * 2 / 2**30, "GiB")


def _reading(report: Report, schema: FeatureSchema, folder: Path, requests: int) -> None:
    table = pa.Table.from_batches([random_requests(schema, requests, events=298)])
    group = max(1, int(requests * ROW_GROUP_BYTES / table.nbytes))
    file = folder / "requests.parquet"
    pq.write_table(table, file, row_group_size=group)
    groups = -(-requests // group)
    report.add("file", "row groups", groups)
    config = LoaderConfig(batch_size=requests * CANDIDATES // 8, max_seq_len=1190, window_bytes=16 << 30)
    data = RequestData([str(file)], schema, config)
    alone = min(_read(data, Share()) for _ in range(2))
    report.add("loader, 1 process", "samples in a second of processor time", requests * CANDIDATES / alone, "1/s")
    for processes in PROCESSES:
        slowest = max(_read(data, Share(n, processes)) for n in range(processes))
        report.add(f"loader, {processes} processes", "time of the slowest / of one alone", slowest / alone)


def _together(report: Report, folder: Path) -> None:
    """Train on the same rows in one process of one thread and in two; the faster of two runs each, in turns."""
    log = folder / "log"
    log.mkdir()
    (log / "schema.toml").write_text(PLAIN_SCHEMA)
    write(log / "train.csv", rows(6_000, 1))
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(2):
        for processes, found in rates.items():
            chosen = {"processes": processes, "threads": 1, "preset": "small", "runs": folder / f"{number}-{processes}"}
            variables = {f"ONETRANS_TRAINING_{name}".upper(): str(value) for name, value in chosen.items()}
            command = [sys.executable, "-m", "onetrans.train", "--model", "onetrans", "--data-dir", str(log)]
            environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            record = json.loads((Path(done.stdout.strip().removeprefix("file://")).parent / FINISHED_FILE).read_text())
            found.append(record["samples_per_second"])
    for processes, found in rates.items():
        report.add(f"training, processes: {processes}", "samples in a second on the clock", max(found), "1/s")
    report.add("training, processes: 2", "rate / rate of 1", max(rates[2]) / max(rates[1]))


def _read(data: RequestData, share: Share) -> float:
    """Read everything; return the processor time."""
    began = time.process_time()
    for _ in data.batches(shuffle_seed=1, share=share):
        pass
    return time.process_time() - began


def random_requests(schema: FeatureSchema, requests: int, events: int) -> pa.RecordBatch:
    """Return requests with random features, each with as many events in all its sequences together."""
    rng = np.random.default_rng(3)
    last = 1_650_000_000_000_000
    columns: dict[str, Any] = {"ts": pa.array(np.full(requests, last), pa.timestamp("us", tz="UTC"))}
    for feature in (*schema.of_side("user"), *schema.of_side("context")):
        columns[feature.name] = _values(feature.kind, requests, rng)
    each = events // len(schema.sequences)
    for sequence in schema.sequences:
        ages = np.sort(rng.integers(1, 1 << 40, (requests, each)), axis=1)[:, ::-1].ravel()
        fields = {"ts": pa.array(last - ages, pa.timestamp("us", tz="UTC"))}
        fields |= {f.name: _values(f.kind, requests * each, rng) for f in schema.of_side("event")}
        columns[sequence.column] = _lists(fields, requests, each)
    fields = {f.name: _values(f.kind, requests * CANDIDATES, rng) for f in schema.of_side("item")}
    for label in ("click", "conversion"):
        fields[label] = pa.array(rng.integers(0, 2, requests * CANDIDATES).astype(np.int32))
    columns["candidates"] = _lists(fields, requests, CANDIDATES)
    return pa.RecordBatch.from_pydict(columns)


def _values(kind: str, count: int, rng: np.random.Generator) -> pa.Array:
    if kind == "hashed":
        # Ids repeat as in a log: few are frequent.
        return pa.array((rng.pareto(1.2, count) * 50).astype(np.int64) * 0x9E3779B97F4A7C1 % (1 << 62))
    return pa.array(rng.random(count))


def _lists(fields: dict[str, pa.Array], count: int, each: int) -> pa.Array:
    offsets = pa.array(np.arange(0, (count + 1) * each, each, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(list(fields.values()), names=list(fields)))


if __name__ == "__main__":
    sys.exit(main())
