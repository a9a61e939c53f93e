"""Markers by folder: ``tests/fast``, ``tests/component`` and ``tests/day`` are the three layers of the suite."""

from pathlib import Path

import pytest

_LAYERS = ("fast", "component", "day")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        layer = item.path.relative_to(here).parts[0]
        if layer in _LAYERS:
            item.add_marker(getattr(pytest.mark, layer))
