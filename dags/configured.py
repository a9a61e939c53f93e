"""Settings that Airflow itself needs, read with the standard library alone, as ``onetrans/settings.py`` reads them.

A DAG file is parsed every minute and must not load the library for it.  The
order is the library's: the variable ``ONETRANS_<SECTION>_<FIELD>``, the
configuration file, the default.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path


def configured(section: str, field: str, default: str) -> str:
    """Return a setting as text.

    Args:
        section: of the configuration file.
        field: in that section.
        default: what it is where nobody says.

    Raises:
        tomllib.TOMLDecodeError: if the configuration file is no TOML.
    """
    variable = os.environ.get(f"ONETRANS_{section}_{field}".upper())
    if variable is not None:
        return variable
    path = Path(os.environ.get("ONETRANS_CONFIG") or "onetrans.toml")
    if not path.is_file():
        return default
    values = tomllib.loads(path.read_text(encoding="utf-8")).get(section)
    return str(values.get(field, default)) if isinstance(values, dict) else default


def configured_number(section: str, field: str, default: float, most: float) -> float:
    """Return a setting that is a number from 0 to ``most``.

    Args:
        section: of the configuration file.
        field: in that section.
        default: what it is where nobody says.
        most: the largest value the library takes.

    Raises:
        ValueError: naming the setting and its value, which Airflow then shows as the import error of the DAG.
    """
    text = configured(section, field, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise ValueError(f"{section}.{field} = {text!r} must be a number from 0 to {most:g}")
    return value
