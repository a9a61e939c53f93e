"""The feature schema: encoding, sharing, round trip, and what is refused with which words."""

from typing import Any

import numpy as np
import pytest

from onetrans.errors import BadConfigError
from onetrans.schema import Aggregates, Feature, FeatureSchema, Sequence, hash64


def small_schema(**changes: object) -> FeatureSchema:
    values: dict[str, object] = {
        "name": "test",
        "features": (
            Feature("user", "user", "hashed", "user_id", hash_size=10),
            Feature("item", "item", "hashed", "item_id", hash_size=20),
            Feature("event_item_id", "event", "hashed", "item_id", hash_size=20, embedding="item"),
            Feature("price", "item", "bucketized", "price", boundaries=(1.0, 10.0)),
        ),
        "sequences": (Sequence("click", "click", 5), Sequence("cart", "cart", 3)),
    }
    return FeatureSchema(**{**values, **changes})  # type: ignore[arg-type]


def with_features(*features: Feature) -> FeatureSchema:
    schema = small_schema(features=(*small_schema().features, *features))
    schema.source_columns("item")
    return schema


def test_hash64_is_sparks_xxhash64() -> None:
    # Spark: SELECT xxhash64('123'), xxhash64('')
    assert hash64("123") == 3994740064877260556
    assert hash64("") == -7444071767201028348


def test_hashed_rows_skip_row_zero_and_stay_in_the_table() -> None:
    feature = Feature("id", "user", "hashed", "id", hash_size=7)
    hashes = np.array([hash64(str(i)) for i in range(1000)])
    rows = feature.encode(hashes)
    assert rows.min() == 1
    assert rows.max() == 7 == feature.rows - 1
    assert list(rows[:3]) == [h % 7 + 1 for h in hashes[:3].tolist()]


def test_growing_a_table_by_a_whole_factor_keeps_every_id_on_a_copy_of_its_row() -> None:
    hashes = np.array([hash64(str(i)) for i in range(1000)])
    small = Feature("id", "user", "hashed", "id", hash_size=7).encode(hashes)
    grown = Feature("id", "user", "hashed", "id", hash_size=21).encode(hashes)
    assert np.array_equal((grown - 1) % 7 + 1, small)


def test_bucketized_rows_cut_at_boundaries_and_send_missing_to_row_zero() -> None:
    feature = Feature("price", "item", "bucketized", "price", boundaries=(1.0, 10.0))
    values = np.array([-5.0, 1.0, 9.99, 10.0, np.nan, 3.0])
    missing = np.array([False, False, False, False, False, True])
    assert feature.encode(values, missing).tolist() == [1, 2, 2, 3, 0, 0]
    assert feature.rows == 4


def test_a_vectors_row_says_whether_it_is_there() -> None:
    feature = Feature("image", "item", "vector", "image", dim=3)
    assert feature.encode(np.zeros((2, 3)), np.array([False, True])).tolist() == [1, 0]
    assert feature.rows == 2


def test_vectors_are_scaled_to_a_mean_square_of_one_whatever_their_size() -> None:
    direction = np.array([3.0, 0.0, -4.0], dtype=np.float32)
    vectors = np.stack([direction * np.float32(size) for size in (1, 1e-30, 1e37, 0)])
    expected = direction / np.sqrt(25 / 3)
    np.testing.assert_allclose(Feature.normalize(vectors), [expected] * 3 + [np.zeros(3)], rtol=1e-6)
    assert np.isnan(Feature.normalize(np.array([[1, np.nan], [1, -np.inf]], dtype=np.float32))).all()
    assert Feature.normalize(np.zeros((0, 3), dtype=np.float32)).shape == (0, 3)


def test_a_schema_without_vectors_says_what_it_said_before_there_were_any() -> None:
    assert small_schema().fingerprint == "1cf54ea82943"
    with_vector = small_schema(features=(*small_schema().features, Feature("image", "item", "vector", "image", dim=3)))
    assert FeatureSchema.from_dict(with_vector.to_dict()) == with_vector
    longer = small_schema(features=(*small_schema().features, Feature("image", "item", "vector", "image", dim=4)))
    assert len({small_schema().fingerprint, with_vector.fingerprint, longer.fingerprint}) == 3


def test_round_trip_and_fingerprint() -> None:
    schema = small_schema()
    again = FeatureSchema.from_dict(schema.to_dict())
    assert again == schema
    assert again.fingerprint == schema.fingerprint
    assert small_schema(aggregates=Aggregates((1,))).fingerprint == schema.fingerprint
    longer = small_schema(sequences=(Sequence("click", "click", 6), Sequence("cart", "cart", 3)))
    assert longer.fingerprint != schema.fingerprint


def test_features_that_share_a_table_have_one_row_count() -> None:
    assert small_schema().embedding_tables() == {"user": 11, "item": 21, "price": 4}
    with pytest.raises(BadConfigError, match="'item' and 'other' share embedding 'item'"):
        small_schema(
            features=(
                *small_schema().features,
                Feature("other", "item", "hashed", "x", hash_size=9, embedding="item"),
            )
        )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Feature("Bad", "user", "hashed", "c", hash_size=3), "lower-case"),
        (lambda: Feature("a", "user", "hashed", "c", hash_size=3, embedding="x.y"), "embedding = 'x.y' must be lower"),
        (lambda: Feature("a", "user", "hashed", "c"), "hash_size = 0 must be at least 1"),
        (lambda: Feature("a", "user", "bucketized", "c"), "boundaries are missing"),
        (
            lambda: Feature("a", "user", "bucketized", "c", boundaries=(2.0, 1.0)),
            r"\[2.0, 1.0\] must be finite and incr",
        ),
        (lambda: Feature("a", "item", "vector", "c"), "dim = 0 must be a whole number, at least 1"),
        (lambda: Feature("a", "item", "vector", "c", dim=2.0), "dim = 2.0 must be a whole number"),  # type: ignore[arg-type]
        (lambda: Feature("a", "item", "hashed", "c", hash_size=3, dim=2), "dim belongs to a vector feature"),
        (lambda: Feature("a", "item", "bucketized", "c", boundaries=(1.0,), dim=2), "dim belongs to a vector feature"),
        (lambda: Feature("a", "item", "vector", "c", dim=2, hash_size=3), "hash_size does not belong to a vector"),
        (lambda: Feature("a", "item", "vector", "c", dim=2, embedding="b"), "embedding does not belong to a vector"),
        (lambda: Feature("a", "event", "vector", "c", dim=2), "every request would carry it once per past event"),
        (lambda: with_features(Feature("image", "item", "vector", "price", dim=2)), "both as bucketized and as vector"),
        (
            lambda: with_features(
                Feature("a", "item", "vector", "image", dim=2), Feature("b", "item", "vector", "image", dim=3)
            ),
            "column 'image' is read with dim = 2 and with dim = 3",
        ),
        (
            lambda: with_features(
                Feature("a", "item", "vector", "image", dim=2), Feature("b", "event", "hashed", "image", hash_size=9)
            ),
            "feature 'b': column 'image' is a vector of side 'item'; an event cannot read one",
        ),
        (
            lambda: with_features(
                Feature("a", "item", "vector", "image", dim=2),
                Feature("b", "item", "hashed", "c", hash_size=1, embedding="a"),
            ),
            "features 'a' and 'b' share embedding 'a', but a vector has an embedding of its own",
        ),
        (lambda: Feature("a", "who", "hashed", "c", hash_size=3), "side = 'who' is none of user, item"),  # type: ignore[arg-type]
        (lambda: Sequence("a", "click", 0), "max_length = 0 must be at least 1"),
        (
            lambda: small_schema(
                features=(*small_schema().features, Feature("ts", "user", "hashed", "x", hash_size=3))
            ),
            "feature 'ts': the name belongs to a column every table has",
        ),
        (lambda: small_schema(timezone="Mars/Olympus"), "timezone = 'Mars/Olympus' is not known"),
        (lambda: small_schema(features=small_schema().features[:1]), "no feature has side = 'item'"),
        (
            lambda: small_schema(sequences=(Sequence("a", "x", 1), Sequence("a", "y", 1))),
            "sequence 'a' is declared twice",
        ),
        (
            lambda: small_schema(
                features=(
                    *small_schema().features,
                    Feature("leak", "item", "bucketized", "true_ctr", boundaries=(0.5,)),
                )
            ),
            "may not be features",
        ),
    ],
)
def test_what_is_refused(make: object, words: str) -> None:
    with pytest.raises(BadConfigError, match=words):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("side", "column", "why"),
    [
        ("context", "click", "is a label"),
        ("context", "conversion", "is a label"),
        ("context", "position", "is decided by the ranking itself"),
        ("context", "ts", "hour_of_day and day_of_week are computed from it"),
        ("context", "item_id", "belongs to the candidate"),
        ("event", "available_at", "decides which requests see the event"),
        ("event", "ts", "the order of events is known"),
    ],
)
def test_no_feature_reads_what_it_must_not(side: Any, column: str, why: str) -> None:
    feature = Feature("sly", side, "hashed", column, hash_size=3)
    with pytest.raises(BadConfigError, match=f"feature 'sly': column '{column}' .*{why}"):
        small_schema(features=(*small_schema().features, feature))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 3}, r"schema: features = 3 is not a list of tables; write each as \[\[features\]\]"),
        ({"sequences": {"name": "click"}}, r"sequences = {'name': 'click'} is not a list of tables"),
        ({"features": ["user"]}, r"features\[0\] = 'user' is not a table"),
        ({"aggregates": 7}, r"aggregates = 7 is not a table"),
        ({"aggregates": {"windows": [1, "7"]}}, r"aggregates: windows = \[1, '7'\] is not a list, each .*whole number"),
        ({"aggregates": {"windows": 7}}, r"aggregates: windows = 7 is not a list"),
        ({"timezone": 2}, r"schema \(test\): timezone = 2 is not text"),
        ({"day_tolerance_minutes": "10"}, r"day_tolerance_minutes = '10' is not a whole number"),
        ({"day_tolerance_minutes": True}, r"day_tolerance_minutes = True is not a whole number"),
        ({"derived_behaviors": "click"}, r"derived_behaviors = 'click' is not a list, each of it text"),
        ({"columns": {"items": "sku"}}, r"columns = .* is not a table, each value of it a table"),
        ({"columns": {"items": {"item_id": 3}}}, r"columns = .* is not a table, each value of it a table, .*text"),
        ({"sequences": [{"name": "a", "event": "b", "max_length": 2.5}]}, r"sequences\[0\] \(a\): max_length = 2.5 is"),
        ({"features": [{"name": "a", "side": ["user"]}]}, r"features\[0\] \(a\): side = \['user'\] is not text"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfigError, match=words):
        FeatureSchema.from_dict({**small_schema().to_dict(), **change})


def test_a_schema_file_names_its_mistake(tmp_path: object) -> None:
    path = tmp_path / "schema.toml"  # type: ignore[operator]
    with pytest.raises(BadConfigError, match="there is no schema file"):
        FeatureSchema.load(path)
    path.write_text("name = [")
    with pytest.raises(BadConfigError, match="is not valid TOML"):
        FeatureSchema.load(path)
    path.write_text('name = "x"\n[[features]]\nname = "a"\nside = "user"\nkind = "hashed"\ncolum = "a"\n')
    with pytest.raises(BadConfigError, match=r"schema.toml: features\[0\]: unknown key 'colum'; known keys are name"):
        FeatureSchema.load(path)
    path.write_text('name = "x"\n[[features]]\nname = "a"\nside = "user"\nkind = "hashed"\n')
    with pytest.raises(BadConfigError, match=r"features\[0\] \(a\): 'column' must be given"):
        FeatureSchema.load(path)
