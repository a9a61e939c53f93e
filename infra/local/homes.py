"""Which configuration a local deployment goes by, where its Airflow keeps its database and logs; and a small one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from onetrans.settings import OWN_FILE

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_CONFIG = Path("var", "demo", "onetrans.toml")


def airflow_home(config: Path | None) -> Path:
    """Return the folder of Airflow's database and logs, always in one that version control and ``make clean`` know."""
    if config is None:
        return REPOSITORY / "var" / "airflow"
    inside_var = REPOSITORY / "var" in config.parents
    return (config.parent if inside_var else config.parent / "var") / "airflow"


def chosen_config(environ: Mapping[str, str] = os.environ, folder: Path = REPOSITORY) -> Path | None:
    """Return the configuration file to use, the demo's only where a user has none of their own.

    Args:
        environ: environment.
        folder: the checkout.
    """
    own, demo = folder / OWN_FILE, folder / DEMO_CONFIG
    if environ.get("ONETRANS_CONFIG"):
        return Path(environ["ONETRANS_CONFIG"]).resolve()
    return next((path.resolve() for path in (own, demo) if path.is_file()), None)


def small_config(folder: Path) -> Path:
    """Write the configuration of a deployment that lies in one folder, log included, with the smallest models."""
    config = folder / "onetrans.toml"
    config.write_text(
        f"""
[source]
path = "{folder / "raw"}"
[lake]
warehouse = "{folder / "lake"}"
[training]
preset = "tiny"
runs = "{folder / "runs"}"
threads = 1
[mlflow]
tracking_uri = "sqlite:///{folder / "mlflow" / "mlflow.db"}"
artifacts = "{folder / "mlflow" / "artifacts"}"
""",
        encoding="utf-8",
    )
    return config
