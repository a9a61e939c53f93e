"""The wheel, built and installed in empty environments, alone and with all it asks for; it trains a model there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from plain_logs import SCHEMA, rows, write

from onetrans import __version__

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    (built,) = folder.glob("onetrans-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone, which finds the libraries of the tests' own; returns its scripts' folder."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    scripts = folder / "venv" / "bin"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    _run(
        [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index",
         str(wheel)],
        folder,
    )  # fmt: skip
    # Names a folder, in which no further .pth is read: so not the checkout that is installed there to be edited.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def _run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "ONETRANS_CONFIG")}
    done = subprocess.run(
        command, cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def test_it_is_the_installed_one_and_has_its_files(installed: Path, tmp_path: Path) -> None:
    assert _run([str(installed / "onetrans"), "--version"], tmp_path).strip() == f"onetrans {__version__}"
    code = (
        "import onetrans, jobs, expectations, infra, dags, pathlib;"
        "print(pathlib.Path(onetrans.__file__).parents[1]);"
        "root = pathlib.Path(onetrans.__file__).parents[1];"
        "wanted = ['jobs/sources/kuairand/schema.toml', 'jobs/sources/simulated/schema.toml', 'infra/spark/yarn.conf',"
        "'expectations/templates/day.j2', 'infra/kubernetes/training_pod.yaml', 'dags/feature_tables.py',"
        "'infra/airflow/on_scheduler/airflow_local_settings.py', 'infra/local/on_sqlite/airflow_local_settings.py'];"
        "print([name for name in wanted if not (root / name).is_file()])"
    )
    where, missing = _run([str(installed / "python"), "-c", code], tmp_path).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert missing == "[]"
    _run([str(installed / "onetrans"), "doctor", "--only", "python,disk"], tmp_path)


def test_a_model_is_trained_and_measured_from_there(installed: Path, tmp_path: Path) -> None:
    _train_and_measure(installed / "onetrans", tmp_path)


@pytest.mark.timeout(3600)
def test_it_is_installed_with_what_it_asks_for_and_its_extras(wheel: Path, tmp_path: Path) -> None:
    """From the registry into an empty environment: the wheel alone says what is needed, the constraints which version.

    The extra torchrec is not among them: where PyPI's PyTorch is not the build for CPUs, it brings gigabytes of CUDA.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    scripts = tmp_path / "venv" / "bin"
    python = str(scripts / "python")
    wanted = f"{wheel}[postgres,kubernetes]"
    _run([python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), wanted], tmp_path)
    _run([python, "-m", "pip", "check"], tmp_path)
    assert _run([str(scripts / "onetrans"), "--version"], tmp_path).strip() == f"onetrans {__version__}"
    extras = "import psycopg, airflow.providers.cncf.kubernetes as pods; print(pods.__file__)"
    assert str(tmp_path) in _run([python, "-c", extras], tmp_path)
    _run([str(scripts / "onetrans"), "doctor", "--only", "python,versions"], tmp_path)
    _train_and_measure(scripts / "onetrans", tmp_path)


def _train_and_measure(program: Path, folder: Path) -> None:
    data = folder / "data"
    data.mkdir()
    (data / "schema.toml").write_text(SCHEMA)
    write(data / "train.csv", rows(120))
    write(data / "test.csv", rows(40, seed=1, prefix="t", after=120))
    onetrans = str(program)
    _run([onetrans, "schema", "check", str(data / "schema.toml")], folder)
    printed = _run([onetrans, "train", "--config", "tiny", "--batch-size", "64", "--data-dir", str(data)], folder)
    model = printed.splitlines()[-1]
    told = _run([onetrans, "evaluate", "--model-path", model, "--data-dir", str(data), "--split", "test"], folder)
    assert "AUC" in told or "auc" in told
