"""A template of pods as a person has one: a copy of the example, with an image of their own."""

from __future__ import annotations

from pathlib import Path

from infra.local.homes import REPOSITORY

EXAMPLE = REPOSITORY / "infra" / "kubernetes" / "training_pod.yaml"


def own_template(folder: Path, name: str = "training_pod.yaml") -> Path:
    """Write the copy into a folder and return its path."""
    text = EXAMPLE.read_text(encoding="utf-8").replace("registry.example.com", "registry.shop.test")
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path
