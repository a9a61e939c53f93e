"""``onetrans doctor``: is everything here that a day needs, and how is each thing mended that is not?

It looks and changes nothing: no lake, catalog or store is made that was not there.
Only an object store is written to, a few bytes that are removed again, because
nothing else tells whether it may be.  Each check is a line; ``FAIL`` stops a day,
``warn`` may.
"""

from __future__ import annotations

import argparse
import base64
import importlib.metadata
import os
import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import tomllib
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from infra.airflow import reach
from infra.local.homes import REPOSITORY, airflow_home
from onetrans import storage
from onetrans.errors import EXIT_BAD_CONFIG, EXIT_NOT_READY, EXIT_OK, BadConfigError, PipelineError, without_login
from onetrans.lake import CATALOG, Lake
from onetrans.object_store import problem_with
from onetrans.plan import configured_models
from onetrans.pods import PodRefusedError, pod_of
from onetrans.process import add_json, print_json
from onetrans.schema import load_schema
from onetrans.settings import LakeSettings, Settings, config_file, load_settings, setting_variables

EXAMPLES = """examples:
  onetrans doctor
  onetrans doctor --json
  onetrans doctor --only java,mlflow

exit codes: 0 nothing stops a day (warnings may be left), 75 a server or store does not answer,
78 something here has to be changed first; each line says how"""

State = Literal["ok", "warn", "FAIL", "skip"]

_ANSWERS_WITHIN_S = 10.0
_LEAST_DISK_GB, _DISK_GB = 1.0, 10.0
_PYTHON_GIB, _BESIDE_HEAP_GIB = 1.5, 0.5
"""Of a step with pyarrow or torch, and of a JVM beside its heap; `make demo` takes 3.0 GiB in all."""

_CHECKOUT = (REPOSITORY / "Makefile").is_file()
"""A place where `make env` is to be had; an image has constraints.txt, and no Makefile."""
_CORRECT_SETTINGS = "correct the file or the variable; `onetrans config` shows what is read"
_AGAIN = "rm .venv/.ready && make env"
"""`make env` alone does nothing where an environment of the same files is finished."""
_AGAIN_WITH_PYTHON = "rm -rf .venv && PYTHON=/path/to/python3.11 make env"

_JAVA_HINT = (
    "Debian/Ubuntu: sudo apt-get install openjdk-17-jre-headless (openjdk-21-jre-headless where there is no 17); "
    "macOS: brew install openjdk@17; then set JAVA_HOME if another Java stands before it on PATH"
)
"""As infra/setup.sh says it, which runs before there is a Python to ask; a test holds the two together."""

_ILL = {
    "metadatabase": "without its database Airflow starts nothing",
    "scheduler": "no task starts",
    "dag_processor": "changed DAGs are not read",
    "triggerer": "nobody notices when a log arrives, a pod ends or a day that is waited for is there",
}
"""Server of Airflow -> what stands still without it."""


@dataclass(frozen=True)
class Check:
    """What one look found."""

    name: str
    """What was looked at."""
    state: State
    """``ok``, ``warn``, ``FAIL``, or ``skip`` where there was nothing to look at."""
    found: str
    """What was found, in words."""
    mend: str = ""
    """What to do about it."""
    exit_code: int = EXIT_BAD_CONFIG
    """Exit code of the command if this is what failed."""


Look = Callable[[Settings], Check | list[Check]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--only", metavar="NAMES", default="", help=f"some of {', '.join(LOOKS)}; separated by commas")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Look at everything, tell it, and return what is to be done first.

    Raises:
        BadConfigError: if ``--only`` names no check.
    """
    only = [name.strip() for name in arguments.only.split(",") if name.strip()]
    unknown = sorted(set(only) - set(LOOKS))
    if unknown:
        raise BadConfigError(f"--only: there is no check {unknown[0]!r}; there are {', '.join(LOOKS)}")
    checks = []
    for check in examine(only or list(LOOKS)):
        checks.append(check)
        if not arguments.json:
            print(told(check), flush=True)
    failed = [check for check in checks if check.state == "FAIL"]
    if arguments.json:
        print_json({"ok": not failed, "checks": [asdict(check) for check in checks]})
    else:
        warned = sum(check.state == "warn" for check in checks)
        print(f"\n{len(failed)} to mend, {warned} to know of" if failed or warned else "\neverything is here")
    return max((check.exit_code for check in failed), default=EXIT_OK)


def examine(names: list[str]) -> Iterator[Check]:
    """Yield the checks as they are made; settings that are refused are one, and end what rests on them."""
    try:
        settings = load_settings()
        broken = ""
    except PipelineError as error:
        settings, broken = Settings(), str(error)
    for name in names:
        look, needs_settings = LOOKS[name]
        if broken and name == "settings":
            yield Check(name, "FAIL", broken, _CORRECT_SETTINGS)
        elif broken and needs_settings:
            yield Check(name, "skip", "the settings are refused")
        else:
            found = look(settings)
            yield from found if isinstance(found, list) else [found]


def told(check: Check) -> str:
    """Return a check as text: a line, and one more on how to mend it."""
    line = f"{check.state:<5} {check.name:<10} {check.found}"
    return f"{line}\n{'':<17}{check.mend}" if check.mend and check.state in ("warn", "FAIL") else line


# This machine


def _python(_: Settings) -> Check:
    wanted = importlib.metadata.metadata("onetrans")["Requires-Python"]
    version = ".".join(map(str, sys.version_info[:3]))
    fits = SpecifierSet(wanted).contains(version)
    # An environment that is there keeps its Python, whatever PYTHON says.
    mend = f"make the environment again with Python {wanted}: {_AGAIN_WITH_PYTHON}"
    if not _CHECKOUT:
        mend = f"install into an environment of Python {wanted}"
    return Check("python", "ok" if fits else "FAIL", f"{version} in {sys.prefix}, needed {wanted}", mend)


def _java(_: Settings) -> Check:
    home = os.environ.get("JAVA_HOME", "")
    program = str(Path(home) / "bin" / "java") if home else "java"
    if shutil.which(program) is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "java is not on PATH"
        return Check("java", "FAIL", f"{where}; Spark needs Java 17 or newer", _JAVA_HINT)
    done = subprocess.run([program, "-version"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    named = re.search(r'version "([^"]*)"', done.stderr)
    if named is None:
        return Check("java", "FAIL", f"{program} is no working Java: {done.stderr.strip()[:200]}", _JAVA_HINT)
    number = re.match(r"\d+", named[1])
    major = int(number[0]) if number else 0
    return Check("java", "ok" if major >= 17 else "FAIL", f"{named[1]}, needed 17 or newer", _JAVA_HINT)


def _memory(settings: Settings) -> Check:
    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = _group_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, limit)
    need = _heap_gib(settings.spark.driver_memory) + _BESIDE_HEAP_GIB + _PYTHON_GIB
    found = (
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free; one step of a day takes about {need:.1f} "
        f"with spark.driver_memory = {settings.spark.driver_memory}"
    )
    if total < need * 2**30:
        return Check("memory", "FAIL", found, "a larger machine, or a smaller spark.driver_memory")
    mend = "end other programs, lower spark.driver_memory, or run fewer steps at once (airflow.spark_slots)"
    return Check("memory", "ok" if free >= need * 2**30 else "warn", found, mend)


def _group_limit() -> int | None:
    """Return the memory this process's control group may use, in bytes; None: as much as there is."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def _heap_gib(written: str) -> float:
    """Return the GiB of a heap as Spark writes it (``900m``, ``4g``; a number alone is MiB)."""
    found = re.fullmatch(r"(\d+)\s*([kmgt]?)b?", written.strip().lower())
    if found is None:
        return 1.0  # Spark itself will refuse it
    return int(found[1]) * {"k": 2.0**-20, "m": 2.0**-10, "g": 1.0, "t": 2.0**10}[found[2] or "m"]


def _disk(settings: Settings) -> list[Check]:
    folders = {
        "lake.warehouse": settings.lake.warehouse,
        "training.runs": settings.training.runs,
        "mlflow.artifacts": settings.mlflow.artifacts,
        "audit.data_docs": settings.audit.data_docs,
    }
    checks = []
    for setting, path in folders.items():
        if not path or not storage.is_local(path):
            continue  # the store's own check
        folder = _nearest(storage.local_path(path))
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            # Of the setting's own folder: above it may lie what belongs to others, the root of the disk among it.
            own = shlex.quote(str(storage.local_path(path).absolute()))
            command = f"sudo mkdir -p {own} && sudo chown -R $(id -un) {own}"
            mend = f"choose another folder, or give this one to the user that runs the steps: {command}"
            checks.append(Check("disk", "FAIL", f"{setting} = {path}: {folder} cannot be written", mend))
            continue
        free = shutil.disk_usage(folder).free / 1e9
        state: State = "FAIL" if free < _LEAST_DISK_GB else "warn" if free < _DISK_GB else "ok"
        mend = "free some (`onetrans retain --dry-run` says what of the lake may go), or name a folder on another disk"
        checks.append(Check("disk", state, f"{setting} = {path}: {free:,.0f} GB free", mend))
    return checks


def _nearest(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _ports(settings: Settings) -> list[Check]:
    wanted = {8080: "Airflow's page", 5000: "MLflow's page", 8088: "Data Docs", settings.serving.port: "serving.port"}
    checks = []
    for port, what in wanted.items():
        if port == 0 or _free(port):
            continue
        holder = _holder(port)
        if what == "serving.port":
            mend = "if that is not `onetrans serve` itself, set serving.port"
            checks.append(Check("ports", "warn", f"{port} ({what}) is taken by {holder}", mend))
        else:
            checks.append(Check("ports", "ok", f"{port} ({what}) is taken by {holder}; `make ui` takes another"))
    return checks or [Check("ports", "ok", f"{', '.join(map(str, wanted))} are free on loopback")]


def _free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass  # of another user: the system does not say whose
    return "another program"


def _versions(settings: Settings) -> list[Check]:
    wanted = [Requirement(text) for text in importlib.metadata.requires("onetrans") or ()]
    extras = {"", *_extras_in_use(settings)}
    wrong = []
    for requirement in wanted:
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        version = _installed(requirement.name)
        if version is None:
            wrong.append(f"{requirement.name} is not installed")
        elif not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, needed {requirement.specifier}")
    if wrong:
        needed = ",".join(sorted(extras - {""}))
        return [Check("versions", "FAIL", "; ".join(wrong), _install(needed))]
    checks = [Check("versions", "ok", f"onetrans {_installed('onetrans')}: every dependency is in its range")]
    other = _unlike_constraints()
    if other:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        mend = _AGAIN if _CHECKOUT else "build the image again"
        checks.append(Check("versions", "warn", f"not the versions that are tested: {shown}", mend))
    return checks


def _install(extras: str) -> str:
    """Return how this package is installed again: from the checkout, or from its wheel, for it is on no index."""
    if not _CHECKOUT:
        named = f"'PATH/TO/onetrans.whl[{extras}]'" if extras else "PATH/TO/onetrans.whl"
        return f"pip install --force-reinstall {named} (`make wheel` in a checkout builds it)"
    # `make env` brings the extras but this one.
    return f"{_AGAIN}{' && make torchrec' if 'torchrec' in extras.split(',') else ''}"


def _extras_in_use(settings: Settings) -> Iterator[str]:
    if settings.launch.place == "kubernetes":
        yield "kubernetes"
    if any(
        address.startswith("postgresql")
        for address in (settings.airflow.database, settings.lake.catalog_uri, settings.mlflow.tracking_uri)
    ):
        yield "postgres"
    if settings.training.shard_rows:
        yield "torchrec"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unlike_constraints() -> list[str]:
    """Return the installed packages whose version is not that of ``constraints.txt``, where there is that file."""
    file = REPOSITORY / "constraints.txt"
    if not file.is_file():
        return []
    pinned = dict(
        line.split("==", 1)
        for line in (text.split("#")[0].strip() for text in file.read_text(encoding="utf-8").splitlines())
        if "==" in line
    )
    unlike = []
    for name, version in pinned.items():
        found = _installed(canonicalize_name(name))
        if found is not None and found.split("+")[0] != version.split("+")[0]:
            unlike.append(f"{name} {found} instead of {version}")
    return unlike


def _gpu(settings: Settings) -> Check:
    device = settings.training.device
    if not device.startswith("cuda"):
        return Check("gpu", "skip", f"training.device = {device!r} asks for none")
    import torch  # seconds, so only where a GPU is asked for

    from onetrans.models.compute import choose_device

    try:
        found = choose_device("training.device", device)
    except BadConfigError as error:
        mend = "install a CUDA build of PyTorch and the driver, or set training.device = 'auto'"
        return Check("gpu", "FAIL", str(error), mend)
    return Check("gpu", "ok", f"{torch.cuda.device_count()}: {torch.cuda.get_device_name(found)}")


def _pods(settings: Settings) -> list[Check]:
    """Ask what a step asks before it makes a pod; what its secrets hold, the cluster alone knows."""
    if settings.launch.place != "kubernetes":
        found = f"launch.place = {settings.launch.place!r}: trainings are processes of the worker"
        return [Check("pods", "skip", found)]
    try:
        pod = pod_of(settings)
    except PodRefusedError as error:
        return [Check("pods", "FAIL", found, mend) for found, mend in error.refusals]
    wanted = "".join(f"; the secret {secret!r} has to hold {name}" for name, secret in pod.secrets.items())
    return [Check("pods", "ok", f"{pod.template}, image {pod.image}{wanted}")]


# What the settings name


def _settings(settings: Settings) -> Check:
    try:
        configured_models(settings.training)
    except BadConfigError as error:
        return Check("settings", "FAIL", str(error), _CORRECT_SETTINGS)
    path = config_file()
    variables = len(setting_variables())
    where = str(path.resolve()) if path else "no file, defaults"
    return Check("settings", "ok", f"{where}; {_counted(variables, 'variable')} ONETRANS_..." if variables else where)


def _log(settings: Settings) -> list[Check]:
    path = settings.source.path
    there = _in_time(lambda: storage.exists(path))
    if isinstance(there, str):
        return [Check("log", "FAIL", f"source.path = {path}: {there}", _reach_hint(path), EXIT_NOT_READY)]
    if not there:
        mend = "put the log there or name its folder in source.path (docs/input.md); without one, try: make demo"
        state: State = "FAIL" if _is_set("source", "path") else "warn"
        return [Check("log", state, f"source.path = {path}: there is nothing", mend)]
    try:
        schema = load_schema(settings.source)
    except PipelineError as error:
        mend = "onetrans schema check FILE explains every mistake with its line"
        return [Check("log", "FAIL", str(error), mend)]
    return [Check("log", "ok", f"{path}, schema {schema.name!r} with {_counted(len(schema.features), 'feature')}")]


def _is_set(section: str, name: str) -> bool:
    """Tell whether a setting of an accepted configuration stands in the file or the environment."""
    file = config_file()
    written = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    return f"ONETRANS_{section}_{name}".upper() in os.environ or name in written.get(section, {})


def look_at_catalog(settings: Settings) -> Check:
    """Ask the catalog of tables once, for seconds; none is made."""
    lake = settings.lake
    if not Lake(lake).exists():
        return Check("catalog", "ok", f"none yet; {Lake(lake).catalog_file} is made with the first day")
    where = Lake(lake).catalog_shown
    tables = _in_time(lambda: _tables(lake))
    if isinstance(tables, str):
        mend = f"is the {lake.catalog_type} catalog up, lake.catalog_uri its address, and the password in PGPASSWORD?"
        return Check("catalog", "FAIL", f"{where}: {tables}", mend, EXIT_NOT_READY)
    return Check("catalog", "ok", f"{where}: {_counted(len(tables), 'table')} in {lake.namespace!r}")


def _tables(lake: LakeSettings) -> list[Any]:
    from pyiceberg.catalog import load_catalog
    from pyiceberg.exceptions import NoSuchNamespaceError

    properties = Lake(lake).catalog_properties | {"init_catalog_tables": "false"}  # a look makes none
    try:
        return list(load_catalog(CATALOG, **properties).list_tables(lake.namespace))
    except NoSuchNamespaceError:
        return []


def _store(settings: Settings) -> list[Check]:
    from jobs.objects import uses_s3

    remote = {
        "lake.warehouse": settings.lake.warehouse,
        "training.runs": settings.training.runs,
        "audit.data_docs": settings.audit.data_docs,
    }
    checks = []
    for setting, path in remote.items():
        if not path or storage.is_local(path):
            continue
        problem = _in_time(lambda path=path: problem_with(path))  # type: ignore[misc]
        if problem:
            checks.append(Check("store", "FAIL", f"{setting} = {path}: {problem}", _reach_hint(path), EXIT_NOT_READY))
        else:
            checks.append(Check("store", "ok", f"{setting} = {path}: written, read, listed and removed"))
    if checks or uses_s3(settings):  # the log alone may lie there
        return [*checks, _spark_in_store(settings)]
    return [Check("store", "skip", "every folder is on the local disk")]


def _spark_in_store(settings: Settings) -> Check:
    """Tell whether Spark reaches S3 by itself: an answer without Java, by the names of files."""
    from jobs.objects import advice, installed, problems

    hadoop, found = installed(settings.spark.conf.get("spark.jars.packages", ""))
    lacking = problems(hadoop, found)
    if not lacking:
        return Check("store", "ok", f"Spark reaches S3 by s3a: {', '.join(sorted(found.values()))}")
    if found or not settings.spark.master.startswith("local"):
        return Check("store", "FAIL", f"Spark cannot reach S3: {'; '.join(lacking)}", advice(hadoop))
    return Check("store", "warn", "Spark reads and writes S3 over copies on this disk: it has no s3a", advice(hadoop))


def look_at_mlflow(settings: Settings) -> Check:
    """Ask MLflow's store or server once, for seconds: its own client would try for minutes."""
    uri = settings.mlflow.tracking_uri
    if (file := storage.sqlite_file(uri)) is not None:
        if not file.exists():
            return Check("mlflow", "ok", f"none yet; {file} is made with the first plan")
        found = _in_time(lambda: _sqlite_revision(file))
        if not isinstance(found, tuple):
            return Check(
                "mlflow", "FAIL", f"{file}: {found}", "restore it from a backup, or name another in mlflow.tracking_uri"
            )
        return Check("mlflow", "ok", f"{file}, schema {found[0]}")
    if not uri.startswith(("http://", "https://")):
        known = _in_time(lambda: _database_answers(uri))
        if isinstance(known, str):
            return Check(
                "mlflow",
                "FAIL",
                f"{without_login(uri)}: {known}",
                "is the database up, and the address right?",
                EXIT_NOT_READY,
            )
        return Check("mlflow", "ok", f"{without_login(uri)} answers")
    answer = _in_time(lambda: (_get(f"{uri.rstrip('/')}/version", _login(uri)),))
    if isinstance(answer, str):
        mend = "start it (mlflow server), or correct mlflow.tracking_uri; a password goes into MLFLOW_TRACKING_PASSWORD"
        return Check("mlflow", "FAIL", f"{without_login(uri)}: {answer}", mend, EXIT_NOT_READY)
    ours, theirs = _installed("mlflow") or "", answer[0].strip()
    same = ours.split(".")[:1] == theirs.split(".")[:1]
    mend = f"use the same major version on both sides: pip install mlflow=={theirs}"
    return Check("mlflow", "ok" if same else "warn", f"{without_login(uri)} is MLflow {theirs}, here is {ours}", mend)


def _sqlite_revision(file: Path) -> tuple[str]:
    with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=5) as connection:
        return (str(connection.execute("select version_num from alembic_version").fetchone()[0]),)


def _database_answers(uri: str) -> bool:
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    with engine.connect():
        return True


def _airflow(_: Settings) -> Check:
    where = reach.address()
    if where is None:
        mend = "make ui starts one; of another, name the address in AIRFLOW__API__BASE_URL"
        return Check("airflow", "skip", f"none is set up here: {mend}")
    found = _in_time(lambda: reach.health(where))
    if isinstance(found, str):
        return Check("airflow", "warn", f"{where}: {found}", "if it should run: make ui, or start your own")
    ill = {part: state for part, state in found.items() if state != "healthy"}
    if not ill:
        return Check("airflow", "ok", f"{where}: all servers are healthy")
    told = ", ".join(f"{part} is {state} ({_ILL[part]})" for part, state in ill.items())
    return Check("airflow", "warn", f"{where}: {told}", _mend_airflow(where, list(ill)))


def _mend_airflow(where: str, ill: list[str]) -> str:
    """Return what to do about servers of Airflow that are not healthy."""
    if "metadatabase" in ill:
        return "is the database up that [database] sql_alchemy_conn names? The others are ill without it"
    names = [part.replace("_", "-") for part in ill]
    if reach.address({name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}) == where:
        own = config_file()
        home = airflow_home(own and own.resolve())
        logs = ", ".join(str(home / "logs" / f"{name}.log") for name in names)
        return f"read {logs}; then stop `make ui` and start it again"
    return f"where it runs, read the log of {', '.join(f'`airflow {name}`' for name in names)} and start it again"


def _in_time(ask: Callable[[], Any]) -> Any:
    """Return what ``ask`` returns, or a sentence if it fails or has not answered in time.

    A library that hangs is left behind in its thread, which ends with the process.
    """
    answer: list[Any] = []

    def work() -> None:
        try:
            answer.append(ask())
        except Exception as error:  # whatever the library raises is what there is to say
            text = str(error).strip().splitlines() or [""]
            answer.append(f"{type(error).__name__}: {without_login(text[0])[:300]}")

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_ANSWERS_WITHIN_S)
    return answer[0] if answer else f"no answer in {_ANSWERS_WITHIN_S:.0f} s"


def _get(address: str, headers: Mapping[str, str]) -> str:
    """Return what an address answers; its user's name and password belong into the headers."""
    local = "127.0.0.1" in address or "localhost" in address
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))
    question = urllib.request.Request(without_login(address), headers=dict(headers))
    with opener.open(question, timeout=_ANSWERS_WITHIN_S / 2) as answer:
        return str(answer.read(1000).decode(errors="replace"))


def _login(uri: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the header by which MLflow's client logs in: by the variables it reads, or a name in the address."""
    if token := environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    written = urllib.parse.urlsplit(uri)
    user = urllib.parse.unquote(written.username or "") or environ.get("MLFLOW_TRACKING_USERNAME", "")
    password = urllib.parse.unquote(written.password or "") or environ.get("MLFLOW_TRACKING_PASSWORD", "")
    if not user:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def _counted(number: int, what: str) -> str:
    """Return how many there are, in words: ``1 table``, ``2 tables``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _reach_hint(path: str) -> str:
    if path.startswith("s3://"):
        return "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION; AWS_ENDPOINT_URL for a store of your own"
    return "is the path right, and may this user read it?"


LOOKS: dict[str, tuple[Look, bool]] = {
    "python": (_python, False),
    "java": (_java, False),
    "versions": (_versions, False),
    "settings": (_settings, False),
    "memory": (_memory, True),
    "disk": (_disk, True),
    "ports": (_ports, True),
    "gpu": (_gpu, True),
    "pods": (_pods, True),
    "log": (_log, True),
    "catalog": (look_at_catalog, True),
    "store": (_store, True),
    "mlflow": (look_at_mlflow, True),
    "airflow": (_airflow, True),
}
"""Name of a check -> the look, and whether it needs settings that were accepted."""
