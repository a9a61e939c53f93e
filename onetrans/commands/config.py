"""``onetrans config``: the file and variables in force, every setting with its value, where it is set, its meaning.

The meanings are the docstrings under the fields of ``onetrans/settings.py``;
``docs/configuration.md`` is this command's ``--markdown`` output.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from onetrans.settings import OWN_FILE, Settings, config_file, load_settings, setting_variables

EXAMPLES = """examples:
  onetrans config
  ONETRANS_SPARK_MASTER=yarn onetrans config --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the values as JSON")
    form.add_argument("--markdown", action="store_true", help="print the reference page with the defaults")


def run(arguments: argparse.Namespace) -> int:
    """Print the settings of this process, or the reference page.

    Raises:
        BadConfigError: if a setting is refused; one of a model's fields when all are printed, as it may be read there.
    """
    if arguments.markdown:
        print(reference_page(), end="")
        return 0
    settings = load_settings()
    if arguments.json:
        print(json.dumps(json.loads(_toml(asdict(settings))), indent=2))
    else:
        _print(settings)
    from onetrans.plan import configured_models  # with the lake's libraries, which take half a second

    configured_models(settings.training)
    return 0


def _print(settings: Settings) -> None:
    path = config_file()
    print(f"# file: {path.resolve() if path else f'none ({OWN_FILE} is not here, ONETRANS_CONFIG is not set)'}")
    print(f"# environment: {', '.join(setting_variables()) or 'none'}")
    print(f"# relative paths are taken from the working directory, {Path.cwd()}")
    for section in fields(Settings):
        print(f"[{section.name}]")
        for name, value in vars(getattr(settings, section.name)).items():
            print(f"  {name} = {_toml(value)}")


def field_meanings(cls: type[Any]) -> dict[str, str]:
    """Return the docstring under each field of a dataclass."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    if not isinstance(body, ast.ClassDef):
        raise TypeError(f"{cls} is not a class")
    meanings: dict[str, str] = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            meanings[statement.target.id] = " ".join(str(following.value.value).split())
    return meanings


def settings_help(cls: type[Any]) -> str:
    """Return a section's fields with default and meaning as the end of a command's help."""
    meanings = field_meanings(cls)
    lines: list[str] = []
    for name, value in vars(cls()).items():
        lines += textwrap.wrap(
            f"{name} = {_toml(value)}: {meanings[name].replace('`', '')}",
            118,
            initial_indent="  ",
            subsequent_indent="      ",
        )
    return "\n".join(lines)


def reference_page() -> str:
    """Return the text of ``docs/configuration.md``."""
    lines = [
        "# Configuration",
        "",
        "Written by `onetrans config --markdown` from `onetrans/settings.py`; do not edit.",
        "",
        "A value is taken from the environment variable, else from the TOML file that `ONETRANS_CONFIG` names",
        "(or `onetrans.toml` in the working directory), else it is the default.",
        "`onetrans config` prints what is in force.",
        "Relative paths are taken from the working directory, which for steps that Airflow starts is its worker's",
        "(`make ui` and `make demo`: the checkout): on a machine that runs every night, name absolute paths.",
        "Secrets have no setting: they come from the environment of the library that needs them",
        "(`AWS_ACCESS_KEY_ID`, `MLFLOW_TRACKING_PASSWORD`, ...) or from an Airflow connection.",
    ]
    for section in fields(Settings):
        cls = get_type_hints(Settings)[section.name]
        meanings = field_meanings(cls)
        lines += ["", f"## [{section.name}]", "", " ".join((cls.__doc__ or "").split()), ""]
        lines += ["| field | default | variable | meaning |", "|---|---|---|---|"]
        for name, value in vars(cls()).items():
            variable = (
                f"`ONETRANS_{section.name}_{name}`".upper() if not isinstance(value, Mapping) else "in the file only"
            )
            lines.append(f"| `{name}` | `{_toml(value)}` | {variable} | {meanings[name].replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    return re.sub(r"(?<=://)([^/@\s\"]*):[^/@\s\"]+@", r"\1:***@", json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
