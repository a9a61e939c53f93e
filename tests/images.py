"""What ``infra/images/Dockerfile`` says, as a builder reads it: the stages, their instructions, their variables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DOCKERFILE = Path(__file__).parents[1] / "infra" / "images" / "Dockerfile"


def stages() -> dict[str, list[str]]:
    """Return the instructions of each stage of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, list[str]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if head := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            name = head[2]
            found[name] = [line]
        elif line.strip() and name:
            found[name].append(line.strip())
    return found


def image_environment(stage: str, before: str = "") -> dict[str, str]:
    """Return the variables of a stage, those of the stages it is made from included.

    Args:
        stage: its name.
        before: an instruction of the stage; what is set after it is left out.
    """
    every = stages()
    parent = every[stage][0].split()[1]
    variables = image_environment(parent) if parent in every else {}
    for line in every[stage]:
        if before and line == before:
            break
        if line.startswith("ENV "):
            variables |= dict(word.split("=", 1) for word in shlex.split(line.removeprefix("ENV ")))
    return variables
