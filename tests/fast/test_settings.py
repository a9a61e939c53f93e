"""Settings: precedence, types, and what a wrong value is told."""

from datetime import date
from pathlib import Path

import pytest

from onetrans.errors import BadConfigError
from onetrans.settings import Settings, as_environment, load_settings


def test_defaults_without_file_or_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings({}) == Settings()


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[spark]\nmaster = "local[4]"\ndriver_memory = "3g"\n[spark.conf]\n"spark.x" = 1\n')
    settings = load_settings({"ONETRANS_CONFIG": str(path), "ONETRANS_SPARK_MASTER": "yarn"})
    assert settings.spark.master == "yarn"
    assert settings.spark.driver_memory == "3g"
    assert settings.spark.conf == {"spark.x": "1"}
    assert settings.spark.shuffle_partitions == 4


def test_devices_that_are_taken() -> None:
    for device in ("auto", "cpu", "cuda", "cuda:3"):
        assert load_settings({"ONETRANS_SERVING_DEVICE": device}).serving.device == device


def test_a_list_of_days_from_file_or_variable(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[source]\nabsent_days = ["2026-01-05", 2026-01-03]\n')
    days = (date(2026, 1, 3), date(2026, 1, 5))
    settings = load_settings({"ONETRANS_CONFIG": str(path)})
    assert settings.source.absent_days == days
    assert load_settings(as_environment(settings)).source.absent_days == days
    variables = {"ONETRANS_CONFIG": str(path), "ONETRANS_SOURCE_ABSENT_DAYS": ""}
    assert load_settings(variables).source.absent_days == ()


def test_settings_survive_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"ONETRANS_GATE_CONFIDENCE": "0.95", "ONETRANS_TRAINING_RECOMPUTE": "true"})
    assert settings.training.recompute is True
    assert load_settings(as_environment(settings)) == settings


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"ONETRANS_SPARK_SHUFFLE_PARTITIONS": "many"}, "ONETRANS_SPARK_SHUFFLE_PARTITIONS = 'many' is not a number"),
        ({"ONETRANS_SPARK_SHUFFLE_PARTITIONS": "0"}, "spark.shuffle_partitions = 0 must be at least 1"),
        ({"ONETRANS_TRAINING_RECOMPUTE": "yes"}, "ONETRANS_TRAINING_RECOMPUTE = 'yes' is neither true nor false"),
        ({"ONETRANS_TRAINING_PRECISION": "half"}, "'half' is none of auto, float32, bfloat16"),
        # Nothing here finds a table in it: `Lake.exists` takes an empty address for a file on this disk.
        ({"ONETRANS_LAKE_CATALOG_TYPE": "glue"}, "'glue' is none of sql, rest"),
        ({"ONETRANS_LAKE_CATALOG_TYPE": "rest"}, "needs the server's address in lake.catalog_uri"),
        ({"ONETRANS_TRAINING_DEVICE": "gpu"}, "training.device = 'gpu' must be auto, cpu, cuda or cuda:N"),
        ({"ONETRANS_SERVING_DEVICE": "gpu"}, "serving.device = 'gpu' must be auto, cpu, cuda or cuda:N"),
        ({"ONETRANS_TRAINING_DEVICE": "cuda:"}, "training.device = 'cuda:' must be"),
        ({"ONETRANS_TRAINING_PRESET": "huge"}, "'huge' is none of tiny, small, base, large"),
        ({"ONETRANS_SPARK_MASTR": "x"}, "ONETRANS_SPARK_MASTR names no setting"),
        ({"ONETRANS_GATE_CONFIDENCE": "1.5"}, "gate.confidence = 1.5 must be"),
        ({"ONETRANS_GATE_REPLICATES": "1"}, "gate.replicates = 1 must be at least 100"),
        (
            {"ONETRANS_GATE_REPLICATES": "999", "ONETRANS_GATE_CONFIDENCE": "0.99"},
            "gate.replicates = 999 must be at least 1000 with gate.confidence = 0.99",
        ),
        ({"ONETRANS_GATE_MIN_LIFT_CTR_AUC": "nan"}, "gate.min_lift_ctr_auc = nan must be in"),
        ({"ONETRANS_GATE_MAX_CALIBRATION_ERROR": "nan"}, "gate.max_calibration_error = nan must be at least 0"),
        ({"ONETRANS_GATE_MAX_CALIBRATION_ERROR": "inf"}, "gate.max_calibration_error = inf must be finite"),
        ({"ONETRANS_SOURCE_ABSENT_DAYS": "2026-1-3"}, "ONETRANS_SOURCE_ABSENT_DAYS: expected a day written YYYY-MM-DD"),
        ({"ONETRANS_CONFIG": "no/such.toml"}, "which is not a file"),
    ],
)
def test_what_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(BadConfigError, match=words):
        load_settings(environ)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sparc]\n", r"unknown section \[sparc\]"),
        ("[spark]\nmastr = 'x'\n", r"\[spark\] has no field 'mastr'"),
        ("[spark]\nmaster = 3\n", "spark.master = 3 is not of type str"),
        ("[training]\nseed = true\n", "training.seed = True is not of type int"),
        ("[source]\nabsent_days = 3\n", "source.absent_days = 3 is not a list of days"),
        ("spark = 3\n", r"spark must be a section"),
        ("[spark\n", "is not valid TOML"),
    ],
)
def test_what_a_file_is_told(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(BadConfigError, match=words):
        load_settings({"ONETRANS_CONFIG": str(path)})


def test_the_folder_of_the_demo_is_passed_on_to_its_steps(tmp_path):
    """Every process that it starts reads the settings with the variable still set."""
    from infra.local.airflow import LocalAirflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONETRANS_DEMO_HOME", str(tmp_path))
        airflow = LocalAirflow(tmp_path / "airflow", {})
    assert airflow.environment["ONETRANS_DEMO_HOME"] == str(tmp_path)
    load_settings(airflow.environment)
