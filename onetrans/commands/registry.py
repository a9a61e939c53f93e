"""``onetrans registry``: what a person does with registered models: look, compare, check, promote, roll back."""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onetrans.errors import BadConfigError, BadDataError, NotReadyError
from onetrans.plan import PLAN_FILE
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.registry import CHAMPION, PREVIOUS, TAG_ROLLED_BACK, TAG_VERDICT, Registry
from onetrans.settings import load_settings
from onetrans.tracking import (
    CHECK_FOLDER,
    CHECK_REQUESTS,
    CHECK_SCORES,
    SCORE_TOLERANCE,
    TAG_DAY,
    TAG_DECISION,
    TAG_PLAN,
    answering,
    require_answer,
    require_store,
    store_is_there,
)

if TYPE_CHECKING:
    from mlflow.entities import RunData
    from mlflow.entities.model_registry import ModelVersion

EXAMPLES = """examples:
  onetrans registry list
  onetrans registry show --alias champion
  onetrans registry diff                 # the champion against the one before it
  onetrans registry diff 3 champion
  onetrans registry verify --version 3
  onetrans registry promote --version 3 --reason "chosen by the ranking team"
  onetrans registry rollback --reason "conversions fell after the swap" """


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    actions = parser.add_subparsers(dest="action", required=True)
    listing = actions.add_parser("list", help="all versions, newest first")
    add_json(listing)
    for name, text in (
        ("show", "one version: card, tags, aliases"),
        ("verify", "load a version and score the batch kept with it"),
    ):
        one = actions.add_parser(name, help=text)
        which = one.add_mutually_exclusive_group()
        which.add_argument("--version", help="version number")
        which.add_argument("--alias", default=CHAMPION, help=f"alias (default: {CHAMPION})")
        add_json(one)
    diff = actions.add_parser("diff", help="what differs between two versions: data, features, settings, figures")
    diff.add_argument("before", nargs="?", default=PREVIOUS, help=f"version number or alias (default: {PREVIOUS})")
    diff.add_argument("after", nargs="?", default=CHAMPION, help=f"version number or alias (default: {CHAMPION})")
    add_json(diff)
    promote = actions.add_parser("promote", help="make a version the champion, whatever the gate said")
    promote.add_argument("--version", required=True, help="version number")
    promote.add_argument("--reason", required=True, help="why; kept in the version's tags")
    add_json(promote)
    rollback = actions.add_parser("rollback", help="return to the champion before this one")
    rollback.add_argument("--reason", required=True, help="why; kept in the tags of the version that leaves")
    add_json(rollback)


def run(arguments: argparse.Namespace) -> int:
    """Do one action."""
    settings = load_settings().mlflow
    if arguments.action == "list" and not store_is_there(settings):
        print_json([]) if arguments.json else print(versions_table([]))
        return 0
    require_store(settings)
    require_answer(settings)
    with answering(settings, look=arguments.action not in ("promote", "rollback")):
        return _do(Registry(settings), arguments)


def _do(registry: Registry, arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        versions = [describe(registry, version) for version in registry.versions()]
        print_json(versions) if arguments.json else print(versions_table(versions))
    elif arguments.action == "show":
        card = describe(registry, _chosen(registry, arguments))
        print_json(card) if arguments.json else print(version_text(card))
    elif arguments.action == "diff":
        found = difference(registry, _named(registry, arguments.before), _named(registry, arguments.after))
        print_json(found) if arguments.json else print(difference_text(found))
    elif arguments.action == "verify":
        version = _chosen(registry, arguments)
        with long_steps(None, f"loading and scoring version {version.version}"):
            largest, requests = verify(registry, version)
        if arguments.json:
            print_json({"version": version.version, "requests": requests, "largest_difference": largest})
        else:
            print(f"{registry.name} version {version.version}: {requests} requests, largest difference {largest:.2g}")
        if largest > SCORE_TOLERANCE:
            raise BadDataError(
                f"{registry.name} version {version.version} does not score as the trained model did: "
                f"a probability differs by {largest:.2g}, at most {SCORE_TOLERANCE:g} is allowed"
            )
    elif arguments.action == "promote":
        with long_steps(None, f"promoting version {arguments.version}"):
            version = registry.promote_by_hand(arguments.version, arguments.reason)
        if arguments.json:
            print_json({"model": registry.name, "champion": version.version})
        else:
            print(f"{registry.name}: champion is version {version.version}")
    else:
        with long_steps(None, "rolling back"):
            left, now = registry.roll_back(arguments.reason)
        if arguments.json:
            print_json({"model": registry.name, "champion": now.version, "rolled_back": left.version})
        else:
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


def difference(registry: Registry, before: ModelVersion, after: ModelVersion) -> dict[str, Any]:
    """Return what differs between two versions: provenance, features, training and figures, each as [before, after].

    Figures are those of each version's own evaluation day: they tell of two days as well as of two models.

    Raises:
        BadDataError: if a version was registered without a run.
    """
    tags = [dict(version.tags) for version in (before, after)]
    runs = [_run_of(registry, version) for version in (before, after)]
    plans = [_plan_of(registry, run) for run in runs]
    features = [{f["name"]: f for f in plan.get("schema", {}).get("features", [])} for plan in plans]
    figures = [{k.removeprefix("eval."): v for k, v in r.metrics.items() if k.startswith("eval.")} for r in runs]
    return {
        "versions": [str(before.version), str(after.version)],
        "provenance": _changed(*tags),
        "training": _changed(*(dict(run.params) for run in runs))
        | _changed(*({k: plan.get(k) for k in ("train_days", "preset", "decision")} for plan in plans)),
        "features": {
            "added": sorted(features[1].keys() - features[0].keys()),
            "removed": sorted(features[0].keys() - features[1].keys()),
            "changed": {
                name: _changed(features[0][name], features[1][name])
                for name in features[0].keys() & features[1].keys()
                if features[0][name] != features[1][name]
            },
        },
        "figures": {name: [f.get(name) for f in figures] for name in sorted({*figures[0], *figures[1]})},
    }


def _run_of(registry: Registry, version: ModelVersion) -> RunData:
    """Return what the run kept that trained a version."""
    if not version.run_id:
        raise BadDataError(
            f"{registry.name} version {version.version} was registered without a run: nothing to compare"
        )
    return registry.client.get_run(version.run_id).data


def _plan_of(registry: Registry, run: RunData) -> dict[str, Any]:
    """Return the plan a version was trained by, as its day's run keeps it; nothing if the version is not of ours."""
    parent = run.tags.get("mlflow.parentRunId")
    if parent is None:
        return {}
    with tempfile.TemporaryDirectory(prefix="onetrans-plan-") as room:  # else MLflow leaves one of its own behind
        path = Path(registry.client.download_artifacts(parent, PLAN_FILE, room))
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    names = [*before, *(name for name in after if name not in before)]
    return {n: [before.get(n), after.get(n)] for n in names if before.get(n) != after.get(n)}


def difference_text(found: dict[str, Any]) -> str:
    """Return a difference as text."""
    before, after = found["versions"]
    lines = [f"version {before} -> version {after}"]
    for part in ("provenance", "training"):
        lines += ["", f"{part}:", *(_arrow(name, *pair) for name, pair in found[part].items())]
    features = found["features"]
    lines += ["", "features:", *(f"  + {name}" for name in features["added"])]
    lines += [f"  - {name}" for name in features["removed"]]
    lines += [
        _arrow(f"{name}.{key}", *pair) for name, changes in features["changed"].items() for key, pair in changes.items()
    ]
    if not any(features.values()):
        lines.append("  the same")
    lines += ["", "figures, each on its own evaluation day:"]
    for name, (old, new) in found["figures"].items():
        change = f"  ({new - old:+.4f})" if old is not None and new is not None else ""
        lines.append(f"{_arrow(name, *(None if v is None else round(v, 4) for v in (old, new)))}{change}")
    return "\n".join(lines)


def _arrow(name: str, before: Any, after: Any) -> str:
    return f"  {name}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{value[0]}..{value[-1]} ({len(value)})" if len(value) > 2 else ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)


def verify(registry: Registry, version: ModelVersion) -> tuple[float, int]:
    """Load a version, score the batch kept with it, and return the largest difference and the number of requests.

    Raises:
        BadDataError: if no batch is kept with the version.
    """
    import mlflow
    import pyarrow as pa

    from onetrans import storage
    from onetrans.tracking import TAG_MODEL_ID, compare_scores, fetched_folder

    uri = f"models:/{registry.name}/{version.version}"
    if TAG_MODEL_ID not in version.tags:
        raise BadDataError(f"{uri} was not registered by this pipeline: it has no tag {TAG_MODEL_ID!r}")
    try:
        with fetched_folder(registry.settings, version.tags[TAG_MODEL_ID], CHECK_FOLDER) as folder:
            requests = storage.read_json(storage.join(folder, CHECK_REQUESTS))
            scores = pa.Table.from_pylist(storage.read_json(storage.join(folder, CHECK_SCORES)))
    except (FileNotFoundError, mlflow.MlflowException) as error:
        raise BadDataError(f"no batch to check with is kept with {uri}: {error}") from error
    return compare_scores(registry.settings, version.tags[TAG_MODEL_ID], uri, requests, scores), len(requests)


def versions_table(versions: list[dict[str, Any]]) -> str:
    """Return the versions as text, a line each under a header; a word where there is none."""
    if not versions:
        return "no version yet: a day's first model that the gate judges is registered"
    lines = [f"{'version':>7}  {'day':<10}  {'plan':<12}  {'decision':<9}  {'created':<25}  aliases"]
    for version in versions:
        tags = version["tags"]
        notes = [*version["aliases"], *(["rolled back"] if TAG_ROLLED_BACK in tags else [])]
        lines.append(
            f"{version['version']:>7}  {tags.get(TAG_DAY, '-'):<10}  {tags.get(TAG_PLAN, '-'):<12}  "
            f"{tags.get(TAG_DECISION, tags.get(TAG_VERDICT, '-')):<9}  {version['created_at']:<25}  {', '.join(notes)}"
        )
    return "\n".join(lines)


def version_text(version: dict[str, Any]) -> str:
    """Return one version as text."""
    tags = "\n".join(f"  {name} = {value}" for name, value in sorted(version["tags"].items()))
    aliases = ", ".join(version["aliases"]) or "none"
    return f"version {version['version']}, aliases: {aliases}\n\n{version['description']}\n\ntags:\n{tags}"


def _named(registry: Registry, name: str) -> ModelVersion:
    """Return a version by its number or an alias."""
    if name.isdigit():
        return registry.version(name)
    version = registry.by_alias(name)
    if version is None and name in (CHAMPION, PREVIOUS):
        raise NotReadyError(f"{registry.name} has no alias {name!r} yet; see: onetrans registry list")
    if version is None:
        raise BadConfigError(f"{registry.name} has no alias {name!r}; see: onetrans registry list")
    return version


def _chosen(registry: Registry, arguments: argparse.Namespace) -> ModelVersion:
    if arguments.version:
        return registry.version(arguments.version)
    return _named(registry, arguments.alias)
