"""The demo against what is promised of it: ``python -m benchmarks.demo [--data DIR] [--days N]``.

It runs :mod:`examples.demo` to its end, which empties the demo's folder, and holds
against the promises:

* time and memory of all of it, on generated data;
* the time of a day's two DAG runs on the real log.  With ``--days 1`` that day has the
  machine to itself; with more, days share it and the figure holds the waiting too;
* on generated data OneTrans is promoted within the days, and on each of them its AUC
  lies between the baseline's and that of the true probabilities, for both tasks.

``--quick`` measures one day of the generated log.  It takes minutes all the same, so
``make bench`` leaves it out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Report, parser
from examples.demo import kuairand, run, simulated
from onetrans.plan import TRUTH
from onetrans.report import report as days_of
from onetrans.scores import BASELINE, CANDIDATE, TASKS
from onetrans.settings import load_settings


def main(argv: list[str] | None = None) -> int:
    """Run the demo and report."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, metavar="DIR", help="folder of the KuaiRand release (default: generate)")
    options.add_argument("--days", type=int, choices=(1, 2, 3), help="days run through Airflow (default: 3, quick: 1)")
    arguments = options.parse_args(argv)
    report = Report("demo", arguments)
    log = kuairand(arguments.data) if arguments.data else simulated()
    log = replace(log, days=log.days[: arguments.days or (1 if arguments.quick else 3)])
    costs = run(log)
    whole, real = len(log.days) == 3, bool(arguments.data)
    report.add("in all", "time", costs.total_s / 60, "min", "<= 10" if whole and not real else "")
    report.add("in all", "peak memory", costs.peak_bytes / 2**30, "GiB", "<= 6")
    for ds, seconds in costs.pairs_s.items():
        alone = real and len(log.days) == 1
        report.add(str(ds), "both DAG runs", seconds / 60, "min", "<= 6" if alone else "")
    promoted = 0
    for day in days_of(load_settings({**os.environ, "ONETRANS_CONFIG": str(costs.config)}), log.days[0], log.days[-1]):
        promoted += day["decision"] == "promoted"
        for task in TASKS:
            auc = {name: figures[f"{task}_auc"] for name, figures in day["models"].items()}
            for name in (BASELINE, CANDIDATE, TRUTH):
                if name in auc:
                    report.add(day["ds"], f"{task.upper()} AUC, {name}", auc[name])
            if TRUTH in auc:
                report.add(
                    day["ds"], f"{task.upper()} AUC over the baseline", auc[CANDIDATE] - auc[BASELINE], "", "> 0"
                )
                report.add(day["ds"], f"{task.upper()} AUC below the truth", auc[TRUTH] - auc[CANDIDATE], "", ">= 0")
    report.add("in all", "days that promote", promoted, "", ">= 1" if not real else "")
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
