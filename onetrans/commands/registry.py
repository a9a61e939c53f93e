"""``onetrans registry``: what a person does with registered models: look, check, promote, roll back."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from onetrans.errors import BadConfigError, BadDataError
from onetrans.registry import CHAMPION, TAG_ROLLED_BACK, TAG_VERDICT, Registry
from onetrans.settings import load_settings
from onetrans.tracking import CHECK_FOLDER, CHECK_REQUESTS, CHECK_SCORES, SCORE_TOLERANCE, TAG_DAY, TAG_PLAN

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

EXAMPLES = """examples:
  onetrans registry list
  onetrans registry show --alias champion
  onetrans registry verify --version 3
  onetrans registry promote --version 3 --reason "chosen by the ranking team"
  onetrans registry rollback --reason "conversions fell after the swap" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="all versions, newest first")
    listing.add_argument("--json", action="store_true", help="print JSON")
    for name, text in (
        ("show", "one version: card, tags, aliases"),
        ("verify", "load a version and score the batch kept with it"),
    ):
        one = actions.add_parser(name, help=text)
        which = one.add_mutually_exclusive_group()
        which.add_argument("--version", help="version number")
        which.add_argument("--alias", default=CHAMPION, help=f"alias (default: {CHAMPION})")
        if name == "show":
            one.add_argument("--json", action="store_true", help="print JSON")
    promote = actions.add_parser("promote", help="make a version the champion, whatever the gate said")
    promote.add_argument("--version", required=True, help="version number")
    promote.add_argument("--reason", required=True, help="why; kept in the version's tags")
    rollback = actions.add_parser("rollback", help="return to the champion before this one")
    rollback.add_argument("--reason", required=True, help="why; kept in the tags of the version that leaves")


def run(arguments: argparse.Namespace) -> int:
    """Do one action."""
    registry = Registry(load_settings().mlflow)
    if arguments.action == "list":
        versions = [describe(registry, version) for version in registry.versions()]
        print(json.dumps(versions, indent=2) if arguments.json else versions_table(versions))
    elif arguments.action == "show":
        card = describe(registry, _chosen(registry, arguments))
        print(json.dumps(card, indent=2) if arguments.json else version_text(card))
    elif arguments.action == "verify":
        version = _chosen(registry, arguments)
        difference, requests = verify(registry, version)
        print(f"{registry.name} version {version.version}: {requests} requests, largest difference {difference:.2g}")
        if difference > SCORE_TOLERANCE:
            raise BadDataError(
                f"{registry.name} version {version.version} does not score as the trained model did: "
                f"a probability differs by {difference:.2g}, at most {SCORE_TOLERANCE:g} is allowed"
            )
    elif arguments.action == "promote":
        version = registry.promote_by_hand(arguments.version, arguments.reason)
        print(f"{registry.name}: champion is version {version.version}")
    else:
        left, now = registry.roll_back(arguments.reason)
        print(f"{registry.name}: champion is version {now.version}; version {left.version} was rolled back")
    return 0


def describe(registry: Registry, version: ModelVersion) -> dict[str, Any]:
    """Return what is known of a version, as plain data."""
    number = str(version.version)
    return {
        "version": number,
        "aliases": sorted(alias for alias, named in registry.aliases().items() if named == number),
        "created_at": datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat(timespec="seconds"),
        "run_id": version.run_id,
        "tags": dict(version.tags),
        "description": version.description,
    }


def verify(registry: Registry, version: ModelVersion) -> tuple[float, int]:
    """Load a version, score the batch kept with it, and return the largest difference and the number of requests.

    Raises:
        BadDataError: if no batch is kept with the version.
    """
    import mlflow
    import pyarrow as pa

    from onetrans import storage
    from onetrans.tracking import TAG_MODEL_ID, compare_scores, fetch_folder

    uri = f"models:/{registry.name}/{version.version}"
    if TAG_MODEL_ID not in version.tags:
        raise BadDataError(f"{uri} was not registered by this pipeline: it has no tag {TAG_MODEL_ID!r}")
    try:
        folder = fetch_folder(registry.settings, version.tags[TAG_MODEL_ID], CHECK_FOLDER)
        requests = storage.read_json(storage.join(folder, CHECK_REQUESTS))
        scores = pa.Table.from_pylist(storage.read_json(storage.join(folder, CHECK_SCORES)))
    except (FileNotFoundError, mlflow.MlflowException) as error:
        raise BadDataError(f"no batch to check with is kept with {uri}: {error}") from error
    return compare_scores(uri, requests, scores), len(requests)


def versions_table(versions: list[dict[str, Any]]) -> str:
    """Return the versions as text, a line each."""
    lines = [f"{'version':>7}  {'day':<10}  {'plan':<12}  {'gate':<9}  {'created':<25}  aliases"]
    for version in versions:
        tags = version["tags"]
        notes = [*version["aliases"], *(["rolled back"] if TAG_ROLLED_BACK in tags else [])]
        lines.append(
            f"{version['version']:>7}  {tags.get(TAG_DAY, '-'):<10}  {tags.get(TAG_PLAN, '-'):<12}  "
            f"{tags.get(TAG_VERDICT, '-'):<9}  {version['created_at']:<25}  {', '.join(notes)}"
        )
    return "\n".join(lines)


def version_text(version: dict[str, Any]) -> str:
    """Return one version as text."""
    tags = "\n".join(f"  {name} = {value}" for name, value in sorted(version["tags"].items()))
    aliases = ", ".join(version["aliases"]) or "none"
    return f"version {version['version']}, aliases: {aliases}\n\n{version['description']}\n\ntags:\n{tags}"


def _chosen(registry: Registry, arguments: argparse.Namespace) -> ModelVersion:
    if arguments.version:
        return registry.version(arguments.version)
    version = registry.by_alias(arguments.alias)
    if version is None:
        raise BadConfigError(f"{registry.name} has no alias {arguments.alias!r}; see: onetrans registry list")
    return version
