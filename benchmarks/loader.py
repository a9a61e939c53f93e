"""How fast and in how much memory published rows become batches.

    python -m benchmarks.loader [--quick] [--json FILE]

Requests of the KuaiRand schema with random features, 16 candidates and 60 events
each, in a file as the jobs write it (zstd, row groups of 16 MiB).

* *rate*: samples in a second on the clock, in shuffled batches that are dropped at
  once, against ``pyarrow.parquet.ParquetFile`` that decodes the same columns and
  does nothing with them; both with the threads they take by themselves, in turns,
  the best of each.  Processor time is given beside it: encoding and shuffling run
  while another thread decodes.
* *memory*: the most a process of its own has held while it read everything once,
  against one that read ten times as much.
* *waiting*: the share of a training's time in which the model (``small``, one
  thread) waits for the next batch; the first one is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.common import Report, parser
from benchmarks.model import SCHEMA_FILE
from benchmarks.scale import CANDIDATES, ROW_GROUP_BYTES, random_requests
from onetrans.loader import LoaderConfig, RequestData, _leaves, prefetch
from onetrans.models import build_model, preset
from onetrans.optim import build_optimizers
from onetrans.optim_config import optimizer_preset
from onetrans.plan import Recipe
from onetrans.schema import FeatureSchema
from onetrans.train import compute_losses

_MIB = 2**20
_EVENTS = 60
_BATCH_SIZE = 2048
_TIMES_AS_MUCH = 10


def write_file(schema: FeatureSchema, folder: Path, requests: int) -> str:
    """Write random requests as the jobs do; return the file."""
    table = pa.Table.from_batches([random_requests(schema, requests, events=_EVENTS)])
    file = folder / "requests.parquet"
    group = max(1, int(requests * ROW_GROUP_BYTES / table.nbytes))
    pq.write_table(table, file, row_group_size=group, compression="zstd")
    return str(file)


def load(files: list[str], schema: FeatureSchema) -> None:
    """Read everything as a training does, and drop it."""
    config = LoaderConfig(_BATCH_SIZE, max_seq_len=128)
    for _ in prefetch(RequestData(files, schema, config).batches(shuffle_seed=1)):
        pass


def decode(files: list[str], schema: FeatureSchema) -> None:
    """Read the same columns, and drop them."""
    for file in files:
        parquet = pq.ParquetFile(file)
        for _ in parquet.iter_batches(columns=_leaves(parquet, schema, with_keys=False)):
            pass


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Return the time of some work on the clock and on the processors, in seconds."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def rates(report: Report, file: str, schema: FeatureSchema, requests: int, times: int) -> None:
    """Compare loading with decoding."""
    loads, decodes = [], []
    for _ in range(times):
        decodes.append(timed(lambda: decode([file], schema)))
        loads.append(timed(lambda: load([file], schema)))
    samples = requests * CANDIDATES
    for number, what in enumerate(("on the clock", "of processor time")):
        loaded, decoded = min(t[number] for t in loads), min(t[number] for t in decodes)
        report.add("decoding", f"samples in a second {what}", samples / decoded, "1/s")
        report.add("loading", f"samples in a second {what}", samples / loaded, "1/s")
        expected = ">= 0.7" if number == 0 else ""
        report.add("loading / decoding", f"rate {what}", decoded / loaded, expected=expected)


def memory(report: Report, file: str) -> None:
    """Compare the memory of reading once and ten times as much, each in a process of its own."""
    peaks = []
    for times in (1, _TIMES_AS_MUCH):
        command = [sys.executable, "-m", "benchmarks.loader", "--only", file, "--times", str(times)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        before, peak = json.loads(done.stdout.splitlines()[-1])
        report.add(f"{times} x the data", "most held", peak / _MIB, "MiB")
        report.add(f"{times} x the data", "most held, beyond the libraries", (peak - before) / _MIB, "MiB")
        peaks.append(peak)
    report.add("memory", f"{_TIMES_AS_MUCH} x the data / 1 x", peaks[1] / peaks[0], expected="<= 1.1")


def waiting(report: Report, file: str, schema: FeatureSchema, steps: int) -> None:
    """Train for some steps and measure how long the model waits for data."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = preset("onetrans", "small")
    model = build_model(config, schema).train()
    optimizers = build_optimizers(model, optimizer_preset("small"))
    data = RequestData([file], schema, LoaderConfig(512, config.max_seq_len))
    batches = prefetch(data.batches(shuffle_seed=1, epochs=1000))
    loaded = next(batches)
    began, waited = time.perf_counter(), 0.0
    for _ in range(steps):
        optimizers.zero_grad()
        compute_losses(model(loaded.batch), loaded.batch, Recipe(512, 1, 0, 1.0, 1.0)).total.backward()
        optimizers.step()
        asked = time.perf_counter()
        loaded = next(batches)
        waited += time.perf_counter() - asked
    batches.close()
    taken = time.perf_counter() - began
    report.add("training of small", "time of a step", taken / steps * 1e3, "ms")
    report.add("training of small", "time spent waiting for data", 100 * waited / taken, "%", expected="< 5")


def read_and_tell(file: str, times: int) -> None:
    """Print what this process held before it read a file so many times, and at most."""
    schema = FeatureSchema.load(SCHEMA_FILE)
    before = _status("VmRSS")
    load([file] * times, schema)
    print(json.dumps([before, _status("VmHWM")]))


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) << 10


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--only", help=argparse.SUPPRESS)
    options.add_argument("--times", type=int, default=1, help=argparse.SUPPRESS)
    arguments = options.parse_args(argv)
    if arguments.only:
        read_and_tell(arguments.only, arguments.times)
        return 0
    report = Report("loader", arguments)
    schema = FeatureSchema.load(SCHEMA_FILE)
    requests = 10_000 if arguments.quick else 40_000
    with tempfile.TemporaryDirectory(prefix="onetrans-loader-") as folder:
        file = write_file(schema, Path(folder), requests)
        rates(report, file, schema, requests, times=2 if arguments.quick else 5)
        memory(report, file)
        waiting(report, file, schema, steps=4 if arguments.quick else 60)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
