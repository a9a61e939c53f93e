"""Where the time of a training goes, and with it what to make faster next.

    python -m benchmarks.profile [--quick] [--preset NAME] [--threads N] [--json FILE]

Both models train on requests of the KuaiRand schema with random features, 16
candidates and 60 events each, through :class:`onetrans.train.Training` as on any
night; the shares are those a training writes to ``profile.json`` and to MLflow
(:mod:`onetrans.step_profile`).  *rest* is what lies between: heads, losses,
checks, the loop itself.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path

import torch

from benchmarks.common import Report, parser
from benchmarks.loader import write_file
from benchmarks.model import SCHEMA_FILE
from benchmarks.scale import CANDIDATES
from onetrans import storage
from onetrans.freed_memory import keep_freed_memory
from onetrans.plan import Plan, Recipe, git_revision, preset_models
from onetrans.schema import FeatureSchema
from onetrans.settings import Settings
from onetrans.train import SilentTracker, Training

_BATCH_SIZE = 512


def plan_of(folder: Path, schema: FeatureSchema, file: str, preset: str) -> Plan:
    """Return a plan that trains on one file."""
    return Plan(
        plan_id="profile",
        path=storage.resolve(str(folder / "plan")),
        ds=date(2022, 5, 1),
        preset=preset,
        decision="fresh weights",
        train_days=(),
        warm_start_ds=None,
        snapshot_id=0,
        train_files=(file,),
        evaluation_files=(),
        schema=schema,
        recipe=Recipe(_BATCH_SIZE, 1, 17, 1.0, 1.0),
        models=preset_models(preset),
        git_revision=git_revision(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    ).save()


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--preset", default="small", help="size of both models (default: small)")
    options.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    arguments = options.parse_args(argv)
    keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    report = Report("profile", arguments)
    schema = FeatureSchema.load(SCHEMA_FILE)
    settings = Settings()
    settings = replace(settings, training=replace(settings.training, checkpoint_seconds=1e6))
    requests = 320 if arguments.quick else 2_400
    with tempfile.TemporaryDirectory(prefix="onetrans-profile-") as folder:
        plan = plan_of(Path(folder), schema, write_file(schema, Path(folder), requests), arguments.preset)
        for name in plan.models:
            training = Training(plan, name, settings)
            training.run(SilentTracker())
            figures = training.profile.to_dict()
            report.add(name, "samples in a second", requests * CANDIDATES / training.seconds, "1/s")
            report.add(name, "time of a step", figures["seconds_per_step"] * 1e3, "ms")
            for part, share in figures["shares"].items():
                expected = "< 5" if part == "loading" else ""
                report.add(name, part, 100 * share, "%", expected=expected)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
