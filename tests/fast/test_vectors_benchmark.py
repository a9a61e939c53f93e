"""What benchmarks.vectors compares: four versions of one schema, and pictures that say what they should."""

import numpy as np

from benchmarks.learning import pictures
from benchmarks.vectors import PICTURE, schemas
from jobs.sources.simulated.world import WorldConfig, build_catalog


def test_the_four_schemas_differ_in_the_item_alone():
    versions = schemas()
    assert list(versions) == ["all columns", "all columns + picture", "rates alone", "rates alone + picture"]
    for side in ("user", "context", "event"):
        assert len({schema.of_side(side) for schema in versions.values()}) == 1
    for name, schema in versions.items():
        assert (PICTURE in schema.features) == name.endswith("picture")
    left = [f.column for f in versions["rates alone"].of_side("item")]
    assert left
    assert all(column.endswith("_7d") for column in left)


def test_pictures_are_fixed_and_tell_items_apart_by_their_facts():
    config = WorldConfig()
    catalog = build_catalog(config)
    shown = pictures(config, catalog)
    assert np.array_equal(shown, pictures(config, catalog))
    assert len(np.unique(shown, axis=0)) == config.items
    from_picture = np.linalg.lstsq(shown, np.eye(config.categories)[catalog.category_M], rcond=None)[0]
    assert ((shown @ from_picture).argmax(1) == catalog.category_M).mean() > 0.5
