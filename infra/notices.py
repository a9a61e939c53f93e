"""Licences of what is installed with the pipeline: ``python -m infra.notices > THIRD_PARTY.md``.

Read from the metadata of the installed packages, over everything that the base
and the extras ``postgres`` and ``kubernetes`` bring along; tools of the
development are left out.  Ends with exit code 65 if a licence is among
:data:`FORBIDDEN`.
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

_HEAD = """# Third parties

Written by `python -m infra.notices` from the metadata of the installed packages; do not edit. What `pip install
onetrans` with the extras postgres and kubernetes brings along, with the licence each names. None of it is part of this
repository.

| package | licence | |
|---|---|---|
"""


def main(argv: list[str] | None = None) -> int:
    """Print the page and return the exit code."""
    parser = Parser(
        prog="python -m infra.notices",
        description=__doc__,
        epilog=EXIT_CODES,
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
    """Return the names of all installed packages that a package needs, directly or not, itself left out."""
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
                if needed not in seen:
                    seen.add(needed)
                    waiting.append(needed)
    return found - {canonicalize_name(name)}


def licences() -> dict[str, tuple[str, str]]:
    """Return for every package that is brought along its licence and its home page."""
    packages = sorted(brought_along())
    done = subprocess.run(
        [sys.executable, "-m", "piplicenses", "--python", sys.executable, "--from", "mixed", "--with-urls",
         "--with-system", "--format", "json", "--packages", *packages],
        capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return {entry["Name"]: (entry["License"], entry["URL"]) for entry in json.loads(done.stdout)}


def page(known: Mapping[str, tuple[str, str]]) -> str:
    """Return the page: a line per package."""
    lines = []
    for name, (licence, url) in sorted(known.items(), key=lambda entry: canonicalize_name(entry[0])):
        # Some give the whole text; its first line names it.
        first = next((line.strip() for line in licence.splitlines() if line.strip()), "UNKNOWN")
        first = "not named in its metadata" if first == "UNKNOWN" else first
        lines.append(f"| {name} | {first[:80].replace('|', '/')} | {url if url.startswith('http') else ''} |\n")
    return _HEAD + "".join(lines)


def refuse_forbidden(known: Mapping[str, tuple[str, str]]) -> None:
    """Check that no package is under a forbidden licence alone: where it offers a choice, another may be taken.

    Raises:
        BadDataError: naming each that is.
    """
    refused = []
    for name, (licence, _) in known.items():
        offered = re.split(r"\s+OR\s+|;", licence)
        if licence and all(FORBIDDEN.search(one) for one in offered):
            refused.append(f"{name} ({licence[:80]})")
    if refused:
        raise BadDataError(f"licences that would bind whoever passes the pipeline on: {', '.join(sorted(refused))}")


if __name__ == "__main__":
    raise SystemExit(main())
