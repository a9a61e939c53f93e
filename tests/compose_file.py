"""What ``infra/compose.yaml`` says, as Docker Compose itself reads it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "infra" / "compose.yaml"
SECRETS = ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AIRFLOW_JWT_SECRET", "AIRFLOW_API_SECRET_KEY",
           "AIRFLOW_FERNET_KEY", "ONETRANS_SERVING_TOKEN")  # fmt: skip
"""What the file takes from ``infra/.env``."""


def compose(secrets: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Docker Compose on the file with these secrets."""
    spec = find_spec("compose")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = Path(spec.submodule_search_locations[0]) / "docker-compose"
    return subprocess.run(
        [str(program), "--env-file", os.devnull, "--file", str(FILE), *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **secrets}, capture_output=True, text=True,
    )  # fmt: skip


def services(secrets: Mapping[str, str]) -> dict[str, Any]:
    """Return the services of the file."""
    done = compose(secrets, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found
