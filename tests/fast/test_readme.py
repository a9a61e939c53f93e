"""What the pages promise and a file can be asked about: commands beside figures, what `make test` runs, statuses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onetrans.serving import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_each_measured_figure_has_its_command() -> None:
    table = README.split("## Measured", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for row in rows:
        commands = re.findall(r"`(?:ONETRANS_CONFIG=\S+ )?python -m ([\w.]+)", row.rsplit(" | ", 1)[1])
        assert commands, f"no command beside: {row[:80]}"
        for module in commands:
            assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_what_make_test_leaves_out_is_said() -> None:
    assert '-m "not nightly"' in (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^make test .*", README, re.M)
    assert "nightly" in line


def test_statuses_of_the_service_are_told_as_it_describes_them() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = {int(status): text for status, text in re.findall(r"^\| (\d{3}) \| (.*) \|$", page, re.M)}
    assert told == app.STATUSES
    described = (app.__doc__ or "").split("\n", 1)[0]
    assert "/docs" not in described


def _modules(folder: Path) -> list[str]:
    """Return the modules of a folder and of those in it; a package that is nothing else by its name."""
    modules = [path.relative_to(folder) for path in folder.rglob("*.py")]
    holding = {path.parent for path in modules if path.stem != "__init__"}
    named = [str(path.with_suffix("")) for path in modules if path.stem != "__init__"]
    return named + [f"{path.parent}/" for path in modules if path.stem == "__init__" and path.parent not in holding]


@pytest.mark.parametrize("folder", ["onetrans", "jobs", "expectations", "infra"])
def test_every_module_has_its_place_in_the_map(folder: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.split(r"\n##+ ", page.split(f"### The modules of `{folder}/`", 1)[1], maxsplit=1)[0]
    told = re.findall(r"`([\w/]+)`", "\n".join(line for line in table.splitlines() if line.startswith("| ")))
    if folder == "onetrans":  # the modules of its packages are told where their subject is
        found = [path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
        found += [f"{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")]
    else:
        found = _modules(ROOT / folder)
    assert sorted(told) == sorted(found)


def test_jobs_and_audits_know_of_the_library_only_what_the_page_of_the_architecture_says() -> None:
    lake = "lake lineage outdated storage object_store days"
    known = set(f"{lake} settings schema toml_lines progress process errors".split())
    also = {
        "score_candidates": {
            "loader",
            "models",
            "artifact",
            "serving",
            "requests",
            "batch",
            "registry",
            "champion",
            "tracking",
            "scores",
        },
        "quarantine": {"cli"},
    }
    for path in [*(ROOT / "jobs").rglob("*.py"), *(ROOT / "expectations").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        used = set(re.findall(r"(?:from|import) onetrans\.(\w+)", text))
        used |= {name for names in re.findall(r"from onetrans import ([\w, ]+)", text) for name in names.split(", ")}
        assert used <= known | also.get(path.stem, set()), path
