"""What a vector feature is worth on the simulated shop: the items' pictures, beside what is known of them and instead.

Neither data source has embeddings, so :func:`benchmarks.learning.pictures` makes
them: a mix of an item's facts with some noise, as an encoder of its picture would
give it.  Both models are trained as in :mod:`benchmarks.learning`, on four
versions of the schema: with all columns of the candidate or with its rates
alone, each with and without the picture.  Events keep their columns throughout.

Options: ``--days`` training days, ``--seeds`` how many seeds, ``--batch`` requests of a batch.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from datetime import timedelta
from statistics import mean, stdev

import torch

from benchmarks.common import Report, parser
from benchmarks.learning import PICTURE_DIM, learn, pack
from jobs.sources.simulated.world import WorldConfig
from jobs.sources.simulated.write import SCHEMA_FILE
from onetrans.models import preset
from onetrans.schema import Feature, FeatureSchema

logger = logging.getLogger(__name__)

PICTURE = Feature("picture", "item", "vector", "picture", dim=PICTURE_DIM)


def schemas() -> dict[str, FeatureSchema]:
    """Return the schema's four versions by name."""
    whole = FeatureSchema.load(SCHEMA_FILE)
    known = {f.name for f in whole.of_side("item") if not f.column.endswith("_7d")}
    rates = replace(whole, features=tuple(f for f in whole.features if f.name not in known))
    return {
        f"{name}{told}": replace(schema, features=(*schema.features, *added))
        for name, schema in (("all columns", whole), ("rates alone", rates))
        for told, added in (("", ()), (" + picture", (PICTURE,)))
    }


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--days", type=int, help="training days (default: 4, quick: 1)")
    options.add_argument("--seeds", type=int, help="seeds (default: 3, quick: 1)")
    options.add_argument("--batch", type=int, default=24, help="requests of a batch (default: %(default)s)")
    arguments = options.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    training_days = arguments.days or (1 if arguments.quick else 4)
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    torch.set_num_threads(1)
    report, world = Report("vectors", arguments), WorldConfig()
    for name, schema in schemas().items():
        days = list(pack(world, schema, world.epoch + timedelta(days=training_days)).values())
        for model in ("onetrans", "dcnv2_din"):
            runs, seconds = [], []
            for seed in range(seeds):
                run, took = learn(preset(model, "tiny"), schema, days, arguments.batch, seed)
                logger.info("%s, %s, seed %d: %s, %.0f s", name, model, seed, run, took)
                runs.append(run)
                seconds.append(took)
            for figure in runs[0]:
                values = [run[figure] for run in runs]
                report.add(f"{model}, {name}", figure, mean(values))
                if seeds > 1:
                    report.add(f"{model}, {name}", f"{figure}, spread", stdev(values))
            report.add(f"{model}, {name}", "training, processor time", mean(seconds), "s")
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
