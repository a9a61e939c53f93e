"""Licences of what is installed with the pipeline: ``python -m infra.notices > THIRD_PARTY.md``.

Read from the metadata of the installed packages, over everything that the base
and the extras ``postgres`` and ``kubernetes`` bring along; tools of the
development are left out.  A package whose metadata names no licence is read by
the licence file it ships.  Ends with exit code 65 if a licence is among
:data:`FORBIDDEN`, or if one cannot be told.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Mapping

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from onetrans.errors import EXIT_OK, BadDataError
from onetrans.process import EXIT_CODES, Parser, exit_code_of

EXTRAS = ("postgres", "kubernetes")

FORBIDDEN = re.compile(r"\bA?GPL|(?<!Lesser )General Public License|Affero|SSPL|Business Source|Commons Clause", re.I)
"""Licences that would bind whoever passes the pipeline on.  The Lesser GPL does not: nothing is linked in."""

UNKNOWN = "UNKNOWN"
"""A licence that neither the metadata nor a licence file of known wording tells."""

_MIT = """
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
"""The MIT licence's words, after its title and the lines of copyright."""

_BEFORE_WORDS = re.compile(
    r"\s*(The MIT License|MIT License|Copyright\b.*|All rights reserved\.?)?\s*(\(MIT\))?\s*", re.I
)
"""A line that may stand before a licence's words."""

_OF_ONE_BUILD = re.compile(r"nvidia-.*|cuda-.*|triton")
"""Packages that PyTorch's build for GPUs brings."""

_HEAD = """# Third parties

Written by `python -m infra.notices` from the metadata of the installed packages; do not edit. What `pip install
onetrans` with the extras postgres and kubernetes brings along, with the licence each names; where its metadata names
none, the one whose words its licence file has. None of it is part of this repository. Not listed is what PyTorch's
build for GPUs brings besides, under terms of its maker's: `nvidia-*`, `cuda-*` and `triton`.

| package | licence | |
|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    """Print the page and return the exit code."""
    parser = Parser(
        prog="python -m infra.notices",
        description=__doc__,
        epilog=f"examples:\n  python -m infra.notices > THIRD_PARTY.md\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def run() -> int:
        parser.parse_args(argv)
        known = licences()
        print(page(known), end="")
        refuse_forbidden(known)
        return EXIT_OK

    return exit_code_of(run)


def brought_along(name: str = "onetrans", extras: tuple[str, ...] = EXTRAS) -> set[str]:
    """Return the names of all installed packages that a package needs, directly or not, itself left out.

    So is what one build of PyTorch brings and another does not: the page would differ between machines.
    """
    found: set[str] = set()
    waiting = [(canonicalize_name(name), ("", *extras))]
    seen = set(waiting)
    while waiting:
        package, wanted = waiting.pop()
        try:
            requirements = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(package)
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted):
                needed = (canonicalize_name(requirement.name), ("", *sorted(requirement.extras)))
                if needed not in seen and not _OF_ONE_BUILD.fullmatch(needed[0]):
                    seen.add(needed)
                    waiting.append(needed)
    return found - {canonicalize_name(name)}


def licences() -> dict[str, tuple[str, str]]:
    """Return for every package that is brought along its licence and its home page."""
    packages = sorted(brought_along())
    done = subprocess.run(
        [sys.executable, "-m", "piplicenses", "--python", sys.executable, "--from", "mixed", "--with-urls",
         "--with-license-file", "--with-system", "--format", "json", "--packages", *packages],
        capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    known = {}
    for entry in json.loads(done.stdout):
        licence = entry["License"]
        if licence == UNKNOWN:
            licence = licence_of(entry["LicenseText"])
        known[entry["Name"]] = (licence, entry["URL"])
    return known


def licence_of(text: str) -> str:
    """Return the licence whose words a licence file has and no others; :data:`UNKNOWN`: it is none known here."""
    title, grant, rest = text.partition(_MIT.split(",", 1)[0].strip())
    if (grant + rest).split() == _MIT.split() and all(_BEFORE_WORDS.fullmatch(line) for line in title.splitlines()):
        return "MIT (by its licence file)"
    return UNKNOWN


def page(known: Mapping[str, tuple[str, str]]) -> str:
    """Return the page: a line per package."""
    lines = []
    for name, (licence, url) in sorted(known.items(), key=lambda entry: canonicalize_name(entry[0])):
        # Some give the whole text; its first line names it.
        first = next((line.strip() for line in licence.splitlines() if line.strip()), UNKNOWN)
        lines.append(f"| {name} | {first[:80].replace('|', '/')} | {url if url.startswith('http') else ''} |\n")
    return _HEAD + "".join(lines)


def refuse_forbidden(known: Mapping[str, tuple[str, str]]) -> None:
    """Check that no package is under a forbidden licence alone: where it offers a choice, another may be taken.

    Raises:
        BadDataError: naming each that is, or each whose licence cannot be told.
    """
    untold = sorted(name for name, (licence, _) in known.items() if licence.strip() in ("", UNKNOWN))
    if untold:
        raise BadDataError(
            f"no licence is named by {', '.join(untold)}, and their licence files have no words that infra/notices.py "
            "knows; read them, and add the wording there or leave the package out"
        )
    refused = []
    for name, (licence, _) in known.items():
        offered = re.split(r"\s+OR\s+|;", licence)
        if all(FORBIDDEN.search(one) for one in offered):
            refused.append(f"{name} ({licence[:80]})")
    if refused:
        raise BadDataError(f"licences that would bind whoever passes the pipeline on: {', '.join(sorted(refused))}")


if __name__ == "__main__":
    raise SystemExit(main())
