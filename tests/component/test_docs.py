"""The pages: every link and heading they point to is there, as a site and in the files that lie outside it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
_LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<heading>[^)\s]+))?\)")
_SOURCE = re.compile(r'(?:src|srcset)="(?!https?:)(?P<path>[^"]+)"')


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Sphinx warns of a link, a heading or a picture that is not there, and of a page that no list names."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", "-d", str(tmp_path / "trees"), ".",
         str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {file.stem for file in (tmp_path / "site" / "docs").glob("*.html")}
    assert pages == {file.stem for file in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_of_the_files_outside_the_site(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    found = [*_LINK.finditer(text), *_SOURCE.finditer(text)]
    assert name == "CHANGELOG.md" or found
    for link in found:
        target = ROOT / link["path"] if link["path"] else ROOT / name
        assert target.exists(), f"{name} points to {link['path']}"
        heading = link.groupdict().get("heading")
        if heading:
            assert heading in _headings(target.read_text(encoding="utf-8")), f"{name} points to {link[0]}"


def _headings(text: str) -> set[str]:
    """Return the anchors that a forge gives the headings of a page."""
    lines = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_package_that_is_brought_along_is_named_with_its_licence() -> None:
    from infra.notices import brought_along, licences, page, refuse_forbidden

    known = licences()
    refuse_forbidden(known)
    assert len(known) == len(brought_along())
    written = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    names = re.compile(r"^\| ([\w.\-]+) \|", re.M)
    assert set(names.findall(page(known))) == set(names.findall(written)), "run: make notices"


def test_the_notices_are_the_same_beside_pytorchs_build_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what `make env` installs on Linux unless it is told where the build for CPUs is."""
    from infra import notices

    without = notices.brought_along()
    requires = importlib.metadata.requires

    def of_gpus(name: str) -> list[str] | None:
        more = ["nvidia-cublas; platform_system == 'Linux'", "cuda-bindings", "triton==3.7"] if name == "torch" else []
        return [*(requires(name) or []), *more]

    monkeypatch.setattr(importlib.metadata, "requires", of_gpus)
    assert notices.brought_along() == without


@pytest.mark.parametrize(
    ("licence", "refused"),
    [
        ("MIT", False),
        ("LGPL-3.0-only", False),
        ("GNU Lesser General Public License v3", False),
        ("GPL-3.0-only", True),
        ("GNU Affero General Public License v3", True),
        ("Artistic License; GNU General Public License (GPL)", False),
        ("GPL-2.0-only OR MIT", False),
    ],
)
def test_a_licence_that_would_bind_users_is_refused(licence: str, refused: bool) -> None:
    from infra.notices import refuse_forbidden
    from onetrans.errors import BadDataError

    known = {"some-package": (licence, "")}
    if refused:
        with pytest.raises(BadDataError, match="some-package"):
            refuse_forbidden(known)
    else:
        refuse_forbidden(known)


def test_a_licence_without_a_name_is_told_by_its_file_or_refused() -> None:
    from importlib.metadata import distribution

    from infra.notices import UNKNOWN, licence_of, refuse_forbidden
    from onetrans.errors import BadDataError

    shipped = distribution("huey").read_text("licenses/LICENSE")
    assert shipped is not None
    assert licence_of(shipped).startswith("MIT")
    for other in (
        "",
        shipped + "\nThe Software shall be used for Good, not Evil.\n",
        "Commons Clause\n\n" + shipped,
        shipped.replace("sublicense, ", ""),
        (ROOT / "LICENSE").read_text(encoding="utf-8"),
    ):
        assert licence_of(other) == UNKNOWN
    with pytest.raises(BadDataError, match="no licence is named by some-package"):
        refuse_forbidden({"some-package": (UNKNOWN, ""), "other": ("MIT", "")})


def test_the_picture_of_a_day_is_readable_in_light_and_dark() -> None:
    """Text and its ground differ enough in both schemes (contrast of 4.5, as WCAG asks of small text)."""
    svg = (ROOT / "docs" / "day.svg").read_text(encoding="utf-8")
    light, dark = svg.split("@media (prefers-color-scheme:dark){")
    for style in (light, dark):
        colours = dict(re.findall(r"[.,]?(\w+)\{fill:(#[0-9a-f]{6})", style))
        ground = [colours["page"], colours["band"], colours["box"], colours["data"]]
        for text in (colours["text"], re.search(r"\.note[^{]*\{[^}]*fill:(#\w+)", style)[1]):  # type: ignore[index]
            assert min(_contrast(text, colour) for colour in ground) >= 4.5


def _contrast(one: str, other: str) -> float:
    lightness = sorted(_luminance(colour) for colour in (one, other))
    return (lightness[1] + 0.05) / (lightness[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
