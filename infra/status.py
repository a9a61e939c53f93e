"""``onetrans status``: the last days of every table, the trainings, the champion and why, what failed, what runs now.

Trainings of no day, on plain files or next-batch, are listed after those of the days.

It reads and starts nothing.  A part that cannot be read is one line that says so,
and the others are shown.
"""

from __future__ import annotations

import argparse
import fcntl
import os
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import psutil

from infra.airflow import reach
from infra.airflow.api import AirflowApiError
from infra.doctor import look_at_catalog
from infra.local.homes import DEMO_CONFIG, REPOSITORY
from onetrans import storage
from onetrans.errors import EXIT_OK, BadConfigError, NotReadyError, PipelineError, without_login
from onetrans.lake import SCORES, TABLES, Lake
from onetrans.plan import FINISHED_FILE, LOCK_FILE, NEXT_BATCH_FOLDER, PLAIN_FOLDER, PLAN_FILE
from onetrans.process import TRACEBACK, add_json, print_json
from onetrans.report import planned_days, report
from onetrans.settings import OWN_FILE, Settings, config_file, load_settings, setting_variables

EXAMPLES = """examples:
  onetrans status
  onetrans status --days 14
  onetrans status --json"""

_STEPS = ("onetrans", "jobs", "expectations")
"""Packages whose modules are steps, as ``python -m`` names them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "--days",
        type=int,
        default=7,
        metavar="N",
        help="days, and trainings of no day, that are shown (default: %(default)s)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what is known.

    Raises:
        BadConfigError: if ``--days`` is less than 1.
    """
    if arguments.days < 1:
        raise BadConfigError(f"--days = {arguments.days} must be at least 1")
    found = status(load_settings(), arguments.days)
    print_json(found) if arguments.json else print(screen(found))
    return EXIT_OK


def status(settings: Settings, days: int) -> dict[str, Any]:
    """Return all of it as plain data; a part that cannot be read holds ``{"error": why}``.

    Args:
        settings: the deployment.
        days: how many of the latest days, and of the latest trainings of no day, are told.
    """
    own = config_file()
    tables = _part(lambda: _tables(settings, days))
    return {
        "configuration": str(own.resolve()) if own else None,
        "tables": tables,
        "models": _part(lambda: _models(settings, days)),
        "others": _part(lambda: _others(settings, days)),
        "champion": _part(lambda: _champion(settings)),
        "running": _part(lambda: _running(settings)),
        "airflow": _part(lambda: _airflow(days)),
    }


def _part(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # of the library that was asked: the other parts are shown all the same
        if os.environ.get(TRACEBACK):
            raise
        text = str(error).strip()
        # Those of the pipeline are written for people; others may name an address with its login, or go on for pages.
        told = text if isinstance(error, PipelineError) else without_login(text.split("\n", 1)[0])
        return {"error": f"{type(error).__name__}: {told}"}


# Tables


def _tables(settings: Settings, days: int) -> dict[str, Any]:
    """Return ``{"days": {day: {table: entry}}, "others": n}``; an entry has a state, rows and the audit's outcome."""
    lake = Lake(settings.lake)
    if not lake.exists():
        return {"days": {}, "earlier": 0}
    if settings.lake.catalog_uri:
        asked = look_at_catalog(settings)  # once, for seconds, where the lake asks again
        if asked.state == "FAIL":
            raise NotReadyError(f"the catalog {asked.found}; {asked.mend}")
    tables = (*TABLES, SCORES) if lake.snapshot_id(SCORES) is not None else TABLES
    rows = {table: {day.ds: day.rows for day in lake.published(table)} for table in tables}
    known = sorted(lake.staged_days().union(*rows.values()))
    shown = known[-days:]
    entries: dict[str, dict[str, Any]] = {str(ds): {} for ds in shown}
    for table in tables:
        folders = lake.folders(table, [ds for ds in shown if ds in rows[table]])
        for ds in shown:
            entries[str(ds)][table] = _entry(lake, table, ds, rows[table].get(ds), folders.get(ds))
    return {"days": entries, "earlier": len(known) - len(shown)}


def _entry(lake: Lake, table: str, ds: date, rows: int | None, folder: str | None) -> dict[str, Any]:
    """Return one day of one table: what is published, and what a later attempt came to."""
    latest = None
    if storage.exists(lake.staged_manifest(table, ds)):
        latest = lake.staged(table, ds)
    entry: dict[str, Any] = {"state": "none", "rows": rows, "audit": None}
    if folder is not None:
        entry |= {"state": "published", "audit": _outcome(lake.verdict_in(folder))}
    if latest is not None and _plain(latest.path) != _plain(folder or ""):
        verdict = lake.verdict(latest)
        outcome = _outcome(verdict)
        entry["attempt"] = {"rows": latest.rows, "audit": outcome, "built_at": latest.created_at}
        if verdict is not None and outcome == "failed":
            entry["attempt"] |= {"why": _first_broken(verdict), "data_docs": verdict["data_docs"]}
        if folder is None:
            entry |= {"state": "failed" if outcome == "failed" else "staged", "rows": latest.rows, "audit": outcome}
    return entry


def _first_broken(verdict: Mapping[str, Any]) -> str:
    broken = [finding for finding in verdict["findings"] if finding["severity"] == "critical"]
    more = f", and {len(broken) - 1} more" if broken[1:] else ""
    return f"{broken[0]['column']}: expected that {broken[0]['expected']}; {broken[0]['observed']}{more}"


def _plain(path: str) -> str:
    return path.removeprefix("file://").rstrip("/")


def _outcome(verdict: Mapping[str, Any] | None) -> str | None:
    if verdict is None:
        return None
    if not verdict["passed"]:
        return "failed"
    return "warning" if verdict.get("warnings") else "passed"


# Models


def _models(settings: Settings, days: int) -> list[dict[str, Any]]:
    return [report(settings, ds, ds)[0] for ds in planned_days(settings)[-days:]]


def _others(settings: Settings, most: int) -> list[dict[str, Any]]:
    """Return the newest trainings of no day, oldest first: what they read, and which models are finished."""
    runs = storage.resolve(settings.training.runs)
    folders = [storage.join(runs, kind) for kind in (PLAIN_FOLDER, NEXT_BATCH_FOLDER)]
    plans = [
        (storage.read_json(path), path.rsplit("/", 1)[0]) for f in folders for path in storage.list_files(f, PLAN_FILE)
    ]
    plans.sort(key=lambda found: str(found[0]["created_at"]))
    return [
        {
            "plan_id": plan["plan_id"],
            "path": path,
            "created_at": plan["created_at"],
            "preset": plan["preset"],
            "reads": plan["decision"],
            "finished": {
                name: storage.read_json(file)["finished_at"]
                for name in plan["models"]
                if storage.exists(file := storage.join(path, name, FINISHED_FILE))
            },
        }
        for plan, path in plans[-most:]
    ]


def _champion(settings: Settings) -> dict[str, Any] | None:
    """Return the version that serves, since when and why; None: there is none, or no registry yet."""
    from onetrans.tracking import require_answer, store_is_there

    if not store_is_there(settings.mlflow):
        return None
    require_answer(settings.mlflow)
    from onetrans.commands.registry import describe
    from onetrans.registry import CHAMPION, Registry, came_to_serve
    from onetrans.tracking import TAG_DAY, TAG_PLAN, answering

    registry = Registry(settings.mlflow)
    with answering(settings.mlflow, look=True):
        version = registry.by_alias(CHAMPION)
        if version is None:
            return None
        card = describe(registry, version)
    tags = card["tags"]
    since, person = came_to_serve(tags)
    verdict = [line for line in (card["description"] or "").splitlines() if line.startswith("Gate: ")]
    return {
        "model": registry.name,
        "version": card["version"],
        "day": tags.get(TAG_DAY),
        "plan_id": tags.get(TAG_PLAN),
        "since": since,
        "why": f"a person: {person}" if person else " ".join(verdict).replace("**", "") or "set in MLflow by hand",
    }


# What runs now


def _running(settings: Settings) -> list[dict[str, Any]]:
    """Return the steps that run on this machine for this deployment, and trainings whose lock is held."""
    found = [*_processes(settings), *_held_locks(settings)]
    return sorted(found, key=lambda entry: str(entry["what"]))


def _processes(settings: Settings) -> list[dict[str, Any]]:
    ours, me = os.path.realpath(storage.resolve(settings.lake.warehouse)), os.getpid()
    entries = []
    for process in psutil.process_iter():
        try:
            step = step_of(process.cmdline())
            if step is None or process.pid == me or _warehouse(process) != ours:
                continue
            started = datetime.fromtimestamp(process.create_time(), UTC)
            entries.append({"what": step, "pid": process.pid, "started": started.isoformat(timespec="seconds")})
        except (psutil.Error, BadConfigError, OSError):
            continue  # ended meanwhile, of another user, or of a deployment whose settings cannot be read from here
    return entries


def step_of(command: list[str]) -> str | None:
    """Return a command line as a step of the pipeline, without Python and its options; None if it is none."""
    if not command:
        return None
    if "-m" in command[:4]:
        rest = command[command.index("-m") + 1 :]
        if rest and rest[0].split(".")[0] in _STEPS:
            return " ".join(rest).replace("onetrans.cli", "onetrans", 1)
    for place, word in enumerate(command[:2]):
        if Path(word).name == "onetrans":
            return " ".join(["onetrans", *command[place + 1 :]])
    return None


def _warehouse(process: psutil.Process) -> str:
    """Return the lake another process works on: by its own variables, file and folder."""
    variables, folder = process.environ(), Path(process.cwd())
    named = variables.get("ONETRANS_LAKE_WAREHOUSE")
    if named is None:
        file = folder / variables.get("ONETRANS_CONFIG", OWN_FILE)
        known = {"ONETRANS_CONFIG": str(file)} if file.is_file() else {}
        known |= {name: value for name, value in variables.items() if name == "ONETRANS_STORE_ROOT"}
        named = load_settings(known).lake.warehouse if known else Settings().lake.warehouse
    return os.path.realpath(storage.resolve(named if "://" in named else str(folder / named)))


def _held_locks(settings: Settings) -> list[dict[str, Any]]:
    if not storage.is_local(settings.training.runs):
        return []
    entries = []
    for file in sorted(storage.local_path(settings.training.runs).glob(f"*/*/*/{LOCK_FILE}")):
        with file.open("rb") as lock:
            try:
                # Shared and for an instant: a training that wants it just then looks again half a second later.
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                entries.append({"what": f"training in {file.parent}", "pid": None, "started": None})
    return entries


def _airflow(days: int) -> dict[str, Any] | None:
    """Return where Airflow is, how it is, what it runs, and what of it failed in the last days."""
    where = reach.address()
    if where is None:
        return None
    try:
        health = reach.health(where)
        return {
            "address": where,
            "health": health,
            "running": reach.running(where),
            "troubled": _part(lambda: reach.troubled(where, days, shown=reach.pages())),
        }
    except (OSError, AirflowApiError) as error:
        return {"address": where, "error": f"does not answer ({error})"}


# As text


def screen(found: Mapping[str, Any]) -> str:
    """Return :func:`status` as text of one screen."""
    parts = {
        "Tables": _tables_text(found["tables"]),
        "Models": "\n".join([_models_text(found["models"]), *_others_lines(found["others"])]),
        "Champion": _champion_text(found["champion"]),
        **_troubled_part(found["airflow"]),
        "Running": _running_text(found["running"], found["airflow"]),
    }
    return "\n\n".join([_by_what(found["configuration"]), *(f"{t}\n{_indented(text)}" for t, text in parts.items())])


def _by_what(configuration: str | None) -> str:
    """Return which settings all of it goes by: another shell may have others in force."""
    variables = " and variables ONETRANS_..." if setting_variables() else ""
    if configuration:
        return f"by {configuration}{variables}"
    demo = REPOSITORY / DEMO_CONFIG
    other = f"\nfor the demo's: export ONETRANS_CONFIG={demo}" if demo.is_file() else ""
    return f"by default settings{variables}: there is no {OWN_FILE} here, and ONETRANS_CONFIG is not set{other}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _tables_text(tables: Mapping[str, Any]) -> str:
    if "error" in tables:
        return str(tables["error"])
    days = tables["days"]
    if not days:
        return "no day yet; build one: python -m jobs.backfill --from DAY --to DAY"
    names = list(next(iter(days.values())))
    widths = [max(len(name), *(len(_cell(day[name])) for day in days.values())) for name in names]
    lines = [f"{'day':<10}" + "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))]
    for ds, entries in days.items():
        cells = (f"  {_cell(entries[name]):>{width}}" for name, width in zip(names, widths, strict=True))
        lines.append(f"{ds:<10}{''.join(cells)}")
    earlier = f"; {tables['earlier']} earlier days" if tables["earlier"] else ""
    lines.append(f"rows of published days; ! audit warns, + a later attempt is not published, ~ staged{earlier}")
    for ds, entries in days.items():
        for name, entry in entries.items():
            if why := entry.get("attempt", {}).get("why"):
                lines += [
                    f"{name} {ds}: its audit failed, so it is not published: {why}",
                    f"  {entry['attempt']['data_docs']}",
                ]
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any]) -> str:
    if entry["state"] == "none":
        return "-"
    if entry["state"] == "failed":
        return "FAILED"
    mark = "~" if entry["state"] == "staged" else "+" if "attempt" in entry else ""
    return f"{mark}{entry['rows']:,}{'!' if entry['audit'] == 'warning' else ''}"


def _models_text(models: Any) -> str:
    if isinstance(models, Mapping):
        return str(models["error"])
    if not models:
        return "no training of a day yet; plan one: onetrans plan --ds DAY"
    lines = [f"{'day':<10}  {'preset':<6}  {'CTR lift':>8}  {'CVR lift':>8}  outcome"]
    for day in models:
        lifts = (day["lifts"].get(f"{task}_auc", {}).get("lift") for task in ("ctr", "cvr"))
        shown = "  ".join(f"{'-' if lift is None else format(lift, '+.4f'):>8}" for lift in lifts)
        lines.append(f"{day['ds']:<10}  {day['preset']:<6}  {shown}  {_became(day)}")
    return "\n".join(lines)


def _others_lines(others: Any) -> list[str]:
    if isinstance(others, Mapping):
        return [f"trainings of no day: {others['error']}"]
    if not others:
        return []
    lines = [f"{'of no day':<10}  {'preset':<6}  {'plan':<12}  {'finished':<19}"]
    for training in others:
        finished = ", ".join(training["finished"]) or "none yet"
        begun, preset, plan = training["created_at"][:10], training["preset"], training["plan_id"]
        lines.append(f"{begun:<10}  {preset:<6}  {plan:<12}  {finished:<19}  {training['reads']}")
    return lines


def _became(day: Mapping[str, Any]) -> str:
    if day["verdict"] is None:
        return str(day["state"])
    failed = f" ({', '.join(day['failed'])})" if day["failed"] else ""
    version = f", version {day['version']}" if day["version"] else ", not registered yet"
    return f"{day['decision'] or day['verdict']}{failed}{version}"


def _champion_text(champion: Mapping[str, Any] | None) -> str:
    if champion is None:
        return "none yet: the first candidate that passes the gate"
    if "error" in champion:
        return str(champion["error"])
    since = f", since {champion['since']}" if champion["since"] else ""
    return f"{champion['model']} version {champion['version']}, of {champion['day']}{since}\n{champion['why']}"


def _troubled_part(airflow: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the part that tells of failed tasks; none where there is none, or nobody says."""
    lines: list[str] = []
    troubled = (airflow or {}).get("troubled") or {"tasks": (), "more": 0}
    if "error" in troubled:
        return {"Failed, or tried again": f"not known: {troubled['error'].partition(': ')[2]}"}
    for task in troubled["tasks"]:
        final = task["state"] == "failed"  # bad data has tries that are never made
        outcome = "FAILED" if final else "is tried again by itself"
        tried = (
            [f"after try {task['try']}" if final else f"try {task['try']} of {task['tries']}"]
            if task["task_id"]
            else []
        )
        when = ", ".join([*tried, *([f"{task['ended'][:16]}Z"] if task["ended"] else [])])
        lines.append(f"{task['dag_id']} {task['run_id']}: {task['task_id'] or 'the run'} {outcome} ({when})")
        lines.append(f"  {task['link']}")
    if troubled["more"]:
        lines.append(f"and {troubled['more']} more")
    return {"Failed, or tried again": "\n".join(lines)} if lines else {}


def _running_text(running: Any, airflow: Mapping[str, Any] | None) -> str:
    if isinstance(running, Mapping):
        lines = [str(running["error"])]
    else:
        lines = [
            f"{entry['what']}" + (f" (process {entry['pid']}, since {entry['started']})" if entry["pid"] else "")
            for entry in running
        ]
    if airflow is not None:
        if "error" in airflow:
            lines.append(f"Airflow at {airflow['address']}: {airflow['error']}")
        else:
            ill = [f"{part} {state}" for part, state in airflow["health"].items() if state != "healthy"]
            lines.append(f"Airflow at {airflow['address']}: {', '.join(ill) or 'healthy'}")
            lines += (
                airflow["running"]
                if airflow["running"] is not None
                else [f"its runs are shown to who logs in: {reach.TOKEN}"]
            )
    return "\n".join(lines) or "nothing on this machine; no Airflow is set up here"
