"""The ablation's variants: legal, each unlike its base, compared seed by seed."""

from dataclasses import replace

import pytest

from benchmarks.ablation import FIGURES, VARIANTS, markdown, with_bases
from onetrans.models import build_model, preset
from tests.batches import model_schema


def test_every_variant_is_a_model_unlike_its_base() -> None:
    by_name = {variant.name: variant for variant in VARIANTS}
    assert len(by_name) == len(VARIANTS)
    for place, variant in enumerate(VARIANTS):
        config = replace(preset("onetrans", "tiny"), **variant.change)
        build_model(config, model_schema())
        base = by_name[variant.base]
        assert VARIANTS.index(base) <= place
        assert (replace(preset("onetrans", "tiny"), **base.change) == config) == (base is variant)


def test_bases_come_with_their_variants() -> None:
    assert [v.name for v in with_bases(["4 blocks, no pyramid"])] == ["4 blocks", "4 blocks, no pyramid"]
    assert with_bases([]) == list(VARIANTS)
    with pytest.raises(SystemExit, match="there is no variant 'dropout'"):
        with_bases(["dropout"])


def test_differences_are_taken_seed_by_seed() -> None:
    variants = with_bases(["full attention"])
    found = {
        "default": [dict.fromkeys(FIGURES, 0.6), dict.fromkeys(FIGURES, 0.7)],
        "full attention": [dict.fromkeys(FIGURES, 0.59), dict.fromkeys(FIGURES, 0.69)],
    }
    *_, base, row = markdown(variants, found, {"default": [2.0, 4.0], "full attention": [1.0, 1.0]}).splitlines()
    assert base.startswith("| default | 0.6500 ± 0.0707 |  |  | 0.6500 ± 0.0707 |")
    assert "| 0.6400 ± 0.0707 | -0.0100 ± 0.0000 | +0.00 % |" in row
    assert base.endswith("| 3 s |")
