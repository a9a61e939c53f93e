"""Model configurations: presets, refusals that name field, value and reason, the pyramid's schedule, round trip."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch

from onetrans.errors import BadConfigError
from onetrans.models import OneTransConfig, build_model, config_from_dict, config_to_dict, preset
from onetrans.models.config import ARCHITECTURES
from onetrans.models.tokenizer import feature_groups
from onetrans.schema import Feature, FeatureSchema, Sequence
from tests.batches import model_schema

SIZES = [(model, size) for model in ("onetrans", "dcnv2_din") for size in ("tiny", "small", "base", "large")]


@pytest.mark.parametrize(("model", "size"), SIZES)
def test_config_survives_json(model, size):
    config = preset(model, size)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_both_models_of_a_size_read_the_same_events_and_embeddings(size):
    a, b = preset("onetrans", size), preset("dcnv2_din", size)
    assert (a.embedding_dim, a.max_seq_len) == (b.embedding_dim, b.max_seq_len)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": 0}, "onetrans.num_layers = 0 must be at least 1"),
        ({"num_heads": 3}, "onetrans.hidden_dim = 32 must be a multiple of num_heads = 3"),
        ({"num_heads": 16}, "onetrans.position = 'rotary_time' needs a head width"),
        ({"dropout": 1.0}, "onetrans.dropout = 1.0 must be at least 0 and below 1"),
        ({"merge": "random"}, "onetrans.merge = 'random' is none of 'time_ordered', 'intent_ordered'"),
        ({"separators": True}, "onetrans.separators = True needs merge = 'intent_ordered'"),
        ({"pyramid": False, "first_block": "pruned"}, "onetrans.first_block = 'pruned' needs pyramid = True"),
        ({"pyramid": 1}, "onetrans.pyramid = 1 must be of type bool"),
        ({"max_seq_len": 1.5}, "onetrans.max_seq_len = 1.5 must be of type int"),
        ({"num_kv_heads": -1}, "onetrans.num_kv_heads = -1 must be at least 0"),
        ({"num_kv_heads": 3}, "onetrans.num_kv_heads = 3 must divide num_heads = 2, or be 0"),
        ({"num_kv_heads": 4}, "onetrans.num_kv_heads = 4 must divide num_heads = 2, or be 0"),
        ({"sliding_window": -1}, "onetrans.sliding_window = -1 must be at least 0"),
        ({"sliding_window": 8, "attention": "full"}, "onetrans.sliding_window = 8 needs attention = 'causal'"),
        ({"sliding_window": 64}, "onetrans.sliding_window = 64 must be below max_seq_len = 64: it would hide nothing"),
        ({"gated_attention": 1}, "onetrans.gated_attention = 1 must be of type bool"),
        ({"relative_bias": "hstu"}, "onetrans.relative_bias = 'hstu' must be of type bool"),
    ],
)
def test_onetrans_refusals(change, words):
    with pytest.raises(BadConfigError) as refusal:
        replace(preset("onetrans", "tiny"), **change)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cross_layers": 0}, "dcnv2_din.cross_layers = 0 must be at least 1"),
        ({"cross_rank": -1}, "dcnv2_din.cross_rank = -1 must be at least 0"),
        ({"mlp_hidden": ()}, "dcnv2_din.mlp_hidden = () must list at least one layer"),
        ({"attention_hidden": (4, 0)}, "dcnv2_din.attention_hidden = (4, 0) must list at least one layer"),
        ({"attention_hidden": "64"}, "dcnv2_din.attention_hidden = '64' must be a list of whole numbers"),
        ({"normalization": "group"}, "dcnv2_din.normalization = 'group' is none of 'batch', 'layer', 'none'"),
    ],
)
def test_baseline_refusals(change, words):
    with pytest.raises(BadConfigError) as refusal:
        replace(preset("dcnv2_din", "tiny"), **change)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model": "gpt"}, "model = 'gpt' is none of onetrans, dcnv2_din"),
        ({"model": "onetrans", "depth": 3}, "onetrans has no field 'depth'"),
        ({"model": "onetrans", "hidden_dim": 32}, "missing 5 required positional arguments: 'embedding_dim'"),
    ],
)
def test_config_data_refusals(data, words):
    with pytest.raises(BadConfigError) as refusal:
        config_from_dict(data)
    assert words in str(refusal.value)


def test_unknown_presets_are_refused():
    with pytest.raises(BadConfigError, match="there is no model 'mlp'"):
        preset("mlp", "tiny")
    with pytest.raises(BadConfigError, match="has no preset 'huge'"):
        preset("onetrans", "huge")


def test_sizes_and_schedule_of_the_paper():
    base, large = preset("onetrans", "base"), preset("onetrans", "large")
    assert [(c.num_layers, c.hidden_dim, c.num_heads, c.num_ns_tokens) for c in (base, large)] == [
        (6, 256, 4, 12),
        (8, 384, 4, 16),
    ]
    assert base.query_schedule() == (1190, 960, 704, 480, 256, 0)
    assert large.query_schedule() == (1500, 1280, 1088, 864, 640, 448, 224, 0)


def test_schedule_readings_of_first_and_top_block():
    base = preset("onetrans", "base")
    assert replace(base, top_block="s_tail").query_schedule()[-1] == 12
    pruned = replace(base, first_block="pruned").query_schedule()
    assert pruned == (992, 800, 608, 416, 224, 0)
    assert replace(base, pyramid=False).query_schedule() == (1190,) * 5 + (0,)
    assert replace(base, num_layers=1).query_schedule() == (0,)


def test_schedule_never_grows_nor_ends_before_the_top_block():
    for multiple in (1, 8, 32, 500, 5000):
        for layers in (1, 2, 8, 30):
            config = replace(preset("onetrans", "large"), pyramid_multiple=multiple, num_layers=layers)
            *below, top = config.query_schedule()
            assert below == sorted(below, reverse=True)
            assert min(below, default=16) >= 16
            assert top == 0


def test_groups_cover_every_feature_once_and_never_cross_sides():
    schema = model_schema()
    groups = feature_groups(schema, 4)
    assert groups == [("user", 0, 2), ("context", 0, 1), ("item", 0, 1), ("item", 1, 3)]
    for side in ("user", "context", "item"):
        covered = [i for s, start, stop in groups if s == side for i in range(start, stop)]
        assert covered == list(range(len(schema.of_side(side))))


@pytest.mark.parametrize("count", [2, 7])
def test_group_wise_refuses_too_few_and_too_many_tokens(count):
    config = replace(preset("onetrans", "tiny"), tokenizer="group_wise", num_ns_tokens=count)
    with pytest.raises(BadConfigError, match=rf"onetrans.num_ns_tokens = {count} .* must be in 3\.\.6"):
        build_model(config, model_schema())


def test_a_low_rank_cross_layer_is_thinner_than_its_input():
    """With 8-wide embeddings: 6 features, and 3 sequences of 2 features and recency each."""
    config = replace(preset("dcnv2_din", "tiny"), cross_rank=119)
    build_model(config, model_schema())
    with pytest.raises(BadConfigError, match=r"dcnv2_din.cross_rank = 120 must be below 120, the width .* 'models'"):
        build_model(replace(config, cross_rank=120), model_schema())


def test_separators_need_two_sequences():
    config = replace(preset("onetrans", "tiny"), merge="intent_ordered", separators=True)
    schema = replace(model_schema(), sequences=model_schema().sequences[:1])
    with pytest.raises(BadConfigError, match=r"onetrans.separators = True needs two behaviour sequences .* has 1"):
        build_model(config, schema)


def industrial_schema() -> FeatureSchema:
    """As many features as an industrial ranker has: with 64-wide embeddings the NS input is 6,400 wide."""
    sides = [("user", 50), ("context", 10), ("item", 40), ("event", 4)]
    return FeatureSchema(
        name="industrial",
        features=tuple(
            Feature(f"{side}_{i}", side, "hashed", f"{side}_{i}", hash_size=1) for side, n in sides for i in range(n)
        ),
        sequences=tuple(Sequence(name, name, 500) for name in ("click", "cart", "purchase")),
    )


@pytest.mark.parametrize(
    ("model", "size", "published", "within"),
    [
        ("onetrans", "base", 91e6, 0.05),
        ("onetrans", "large", 330e6, 0.05),
        ("dcnv2_din", "base", 10e6, 0.4),
    ],
)
def test_dense_parameters_are_near_the_published_count(model, size, published, within):
    with torch.device("meta"):
        built = build_model(preset(model, size), industrial_schema())
    count = sum(p.numel() for p in built.dense_parameters().values())
    print(f"\n{model} {size}: {count / 1e6:.1f} M without tables")  # README.md names the command that shows it
    assert abs(count / published - 1) < within, f"{count / 1e6:.1f} M"


def test_a_config_is_frozen():
    config = preset("onetrans", "tiny")
    assert isinstance(config, OneTransConfig)
    with pytest.raises(AttributeError):
        config.num_layers = 3


def layout(model: str) -> str:
    """Digest of the names and shapes of all weights, over configurations that together reach every part."""
    schema = model_schema()
    changes: dict[str, list[dict[str, object]]] = {
        "onetrans": [
            {},
            {"tokenizer": "group_wise", "position": "learned", "gated_attention": True, "top_block": "s_tail"},
            {"merge": "intent_ordered", "separators": True, "relative_bias": True, "num_kv_heads": 1},
            {"ns_parameters": "shared", "position": "none"},
        ],
        "dcnv2_din": [{}, {"cross_rank": 4, "normalization": "layer", "event_rank": "merged"}],
    }
    models = [build_model(replace(preset(model, "tiny"), **change), schema) for change in changes[model]]
    shapes = [sorted((name, list(tensor.shape)) for name, tensor in built.state_dict().items()) for built in models]
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("model", "revision", "digest"),
    [("onetrans", 1, "8e420f8ecd65fd7c"), ("dcnv2_din", 1, "f2e361f7bb66be7f")],
)
def test_the_layout_of_the_weights_belongs_to_a_revision(model, revision, digest):
    """Whoever changes the layout raises ARCHITECTURES, and writes the new revision and digest here."""
    assert (ARCHITECTURES[model], layout(model)) == (revision, digest)
