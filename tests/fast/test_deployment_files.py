"""Every file of a deployment by its own linter or schema: images, compose, Kubernetes, settings, permissions."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from jobs.objects import JARS
from onetrans import __version__
from onetrans.lake import Lake
from onetrans.settings import Settings, load_settings
from onetrans.upgrade import mlflow_database
from tests.compose_file import SECRETS, compose, services
from tests.images import DOCKERFILE, image_environment, stages

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def _env_file(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def _airflow_options() -> set[str]:
    """Return the variables of all of Airflow's options, from the description that it ships."""
    spec = find_spec("airflow")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    described = Path(spec.submodule_search_locations[0], "config_templates", "config.yml")
    sections = yaml.safe_load(described.read_text(encoding="utf-8"))
    return {
        f"AIRFLOW__{section}__{option}".upper() for section, found in sections.items() for option in found["options"]
    }


# Images


def test_hadolint_has_nothing_to_say_of_the_images() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run(
        [str(hadolint), "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned_and_run_as_nobody_with_rights() -> None:
    every = stages()
    for name, instructions in every.items():
        image = instructions[0].split()[1]
        assert image in every or re.search(r":\d+\.\d+\.\d+", image), f"{name}: {image} has no exact version"
    for name in ("airflow", "training", "serving"):
        users = [line for line in every[name] if line.startswith("USER ")]
        assert users == ["USER 50000"], name
        after = every[name][every[name].index("USER 50000") :]
        assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in after), f"{name}: made by a user"
        assert any(line.startswith("HEALTHCHECK") for line in every[name]), name
    for line in (line for instructions in every.values() for line in instructions if "pip install" in line):
        assert "--constraint constraints.txt" in line


def test_what_the_images_copy_is_there_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert "infra/.env" in ignored
    for instructions in stages().values():
        for line in instructions:
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source
                    assert source.split("/")[0] in sent, f"{source} is kept from the builder"


def _reaches_the_builder(path: str) -> bool:
    """Tell by .dockerignore, whose last pattern that fits a file or a folder above it decides."""
    above = ["/".join(path.split("/")[: n + 1]) for n in range(path.count("/") + 1)]
    sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line.startswith("#") or not line:
            continue
        anywhere = pattern.startswith("**/")
        names = [part.rsplit("/", 1)[-1] for part in above] if anywhere else above
        depth = 0 if anywhere else pattern.count("/")
        if any(fnmatchcase(name, pattern.removeprefix("**/")) and name.count("/") == depth for name in names):
            sent = line.startswith("!")
    return sent


def test_every_command_begins_with_what_the_image_of_airflow_has(tmp_path: Path) -> None:
    assert not _reaches_the_builder("infra/.env")
    assert not _reaches_the_builder("infra/.env.airflow")
    assert not _reaches_the_builder("onetrans/__pycache__/cli.cpython-311.pyc")
    for line in (line for stage in ("base", "airflow") for line in stages()[stage] if line.startswith("COPY ")):
        *sources, target = line.split()[1:]
        if "--from" in line or target == "/":
            continue
        for source in sources:
            files = [ROOT / source] if (ROOT / source).is_file() else list((ROOT / source).rglob("*"))
            for file in (f for f in files if f.is_file() and _reaches_the_builder(str(f.relative_to(ROOT)))):
                copy = tmp_path / target / (file.relative_to(ROOT / source) if (ROOT / source).is_dir() else file.name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    code = (
        "import importlib, sys\n"
        "from onetrans import cli\n"
        "for module, _ in cli.COMMANDS.values(): importlib.import_module(module)\n"
        f"own = {tuple(folder.name for folder in ROOT.iterdir() if (folder / '__init__.py').is_file())}\n"
        "files = [m.__file__ for n, m in list(sys.modules.items()) if n.split('.')[0] in own and m.__file__]\n"
        f"lacking = [f for f in files if not f.startswith({str(tmp_path)!r})]\n"
        "assert not lacking, f'the image lacks {lacking}'\n"
        "assert not sys.modules['infra.doctor']._CHECKOUT, 'it takes itself for a checkout, where make env helps'"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("stage", ["airflow", "training", "serving"])
def test_what_runs_while_an_image_is_built_finds_its_settings(stage: str, tmp_path: Path) -> None:
    """The file that ONETRANS_CONFIG names is mounted later: a module that reads it ends the build."""
    ran = []
    for line in stages()[stage]:
        for command in line.removeprefix("RUN ").split("&&") if line.startswith("RUN ") else ():
            words = shlex.split(command)
            given = [word for word in words if re.match(r"[A-Z_]+=", word)]
            if words[len(given) : len(given) + 2] != ["python", "-m"]:
                continue
            variables = image_environment(stage, before=line) | dict(word.split("=", 1) for word in given)
            done = subprocess.run(
                [sys.executable, "-c", "from onetrans.settings import load_settings; load_settings()"],
                env={**variables, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
                cwd=tmp_path, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{command.strip()}: {done.stderr[-500:]}"
            ran.append(words[len(given) + 2])
    assert ran == (["jobs.spark"] if stage == "airflow" else [])


def test_the_entrypoint_runs_what_compose_and_airflows_chart_give_it(system: dict[str, Any]) -> None:
    entrypoint = INFRA / "images" / "entrypoint"
    assert 'ENTRYPOINT ["/entrypoint"]' in stages()["airflow"]
    assert "COPY infra/images/entrypoint infra/images/decommission /" in stages()["airflow"]
    for script in (entrypoint, INFRA / "images" / "decommission"):
        assert os.access(script, os.X_OK), f"{script} is copied as it is, and has to be executable"

    def ends(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([str(entrypoint), *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout

    # The forms of the chart: its containers, its probes, the pods of its steps.
    assert ends("bash", "-c", "exec printf '%s' scheduler") == (0, "scheduler")
    assert ends("sh", "-c", f"exec {entrypoint} \\\n  sh -c 'exit 7'") == (7, "")
    assert (
        ends("python3", "-c", "import sys; print(sys.argv[1:])", "--json-string", "{}")[1]
        == "['--json-string', '{}']\n"
    )
    scripts = Path(sysconfig.get_path("scripts"))
    for name, service in system.items():
        if service["image"].startswith("onetrans-airflow"):
            assert not service.get("entrypoint"), name
            assert (scripts / service["command"][0]).exists(), (
                f"{name}: {service['command']} is no program of the image"
            )


def test_lists_of_packages_are_parts_of_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.split(r"[\[<>=~ ]", text)[0]
        for text in (*project["dependencies"], *project["optional-dependencies"]["postgres"])
    }
    for name in ("serving.txt", "training.txt"):
        lines = (INFRA / "images" / name).read_text(encoding="utf-8").splitlines()
        listed = {re.split(r"[\[<>=~ ]", line)[0] for line in lines if line and not line.startswith("#")}
        assert listed <= declared, listed - declared


def test_the_image_of_trainings_takes_torchrec_by_an_argument() -> None:
    """What a pod's message and the page name is a list of packages, of the version that is tested with CPUs."""
    (file,) = {
        name
        for path in ("onetrans/sharding.py", "docs/production.md", "infra/images/Dockerfile")
        for name in re.findall(r"PACKAGES=([\w-]+-\w+\.txt)", (ROOT / path).read_text(encoding="utf-8"))
    }
    lines = (INFRA / "images" / file).read_text(encoding="utf-8").splitlines()
    assert "--requirement training.txt" in lines
    (version,) = (line.partition("==")[2] for line in lines if line.startswith("fbgemm-gpu=="))
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"fbgemm-gpu-cpu=={version}" in pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (wanted,) = (r for r in map(Requirement, project["optional-dependencies"]["torchrec"]) if r.name == "fbgemm-gpu")
    assert version in wanted.specifier


def test_the_files_of_s3a_are_the_same_everywhere() -> None:
    """A job stops where another version lies there than it looks for: image, settings and page name the same."""
    (wanted,) = JARS.values()
    copied = [found for line in stages()["jars"] for found in re.findall(r"-Dartifact=(\S+)", line)]
    assert copied == list(wanted)
    spark = (INFRA / "spark" / "kubernetes.conf").read_text(encoding="utf-8")
    assert re.findall(r"spark\.jars\.packages\s+(\S+)", spark) == [",".join(wanted)]
    page = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `([a-z0-9.-]+:[a-z0-9-]+)` \| ([0-9.]+) \|$", page, re.MULTILINE)
    assert [":".join(row) for row in told] == list(wanted)
    assert f"Hadoop {next(iter(JARS))}" in page


# Compose


@pytest.fixture(scope="module")
def system() -> dict[str, Any]:
    return services(dict.fromkeys(SECRETS, "a-secret"))


def test_compose_reads_its_file_and_refuses_to_begin_without_secrets(system: dict[str, Any]) -> None:
    wanted = {"postgres", "store", "prepare", "mlflow", "data-docs", "serving"}
    wanted |= {f"airflow-{name}" for name in ("api-server", "scheduler", "dag-processor", "triggerer")}
    assert set(system) == wanted
    assert set(_env_file(INFRA / "production" / ".env.example")) == set(SECRETS)
    for name in SECRETS:
        done = compose({other: "a-secret" for other in SECRETS if other != name}, "config", "--quiet")
        assert done.returncode != 0, name
        assert f'"{name}"' in done.stderr or name in done.stderr


def test_services_listen_on_loopback_alone_and_are_watched(system: dict[str, Any]) -> None:
    for name, service in system.items():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ())), name
        assert re.search(r":[A-Za-z.]*\d", service["image"]), f"{name}: {service['image']} is not pinned"
        built = DOCKERFILE.read_text(encoding="utf-8") if "build" in service else ""
        assert "healthcheck" in service or f"AS {service['build']['target']}" in built, name
        if "build" in service:
            assert service["cap_drop"] == ["ALL"], name
            for mount in service.get("volumes", ()):
                assert mount["type"] == "volume" or Path(mount["source"]).exists(), mount
    assert system["prepare"]["restart"] == "no"


def test_links_in_messages_name_where_a_browser_opens_airflow(system: dict[str, Any]) -> None:
    """Those of tasks, of runs (the DAG processor tells) and of deadlines (the triggerer); unset, they lead nowhere."""
    (port,) = system["airflow-api-server"]["ports"]
    for name in ("scheduler", "dag-processor", "triggerer"):
        given = system[f"airflow-{name}"]["environment"]["AIRFLOW__API__BASE_URL"]
        assert given == f"http://{port['host_ip']}:{port['published']}", name
    written = (INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8")
    given = yaml.safe_load(written)["config"]["api"]["base_url"]
    assert re.fullmatch(r"https://[\w.-]+", given), given
    (line,) = (line for line in written.splitlines() if given in line)
    assert "# CHANGE" in line


def test_links_in_logs_name_what_a_browser_of_the_machine_reaches(system: dict[str, Any]) -> None:
    """A container's own name is known to containers alone, and nobody opens an object of the store without a key."""
    published = {
        f"http://{port['host_ip']}:{port['published']}": service
        for service in system.values()
        for port in service.get("ports", ())
    }
    steps = system["airflow-scheduler"]["environment"]
    assert "server" in published[steps["ONETRANS_MLFLOW_ADDRESS"]]["command"]
    folder, docs = steps["ONETRANS_AUDIT_DATA_DOCS"], published[steps["ONETRANS_AUDIT_ADDRESS"]]
    assert docs["command"][-2:] == ["--directory", folder]

    def volume(service: dict[str, Any]) -> tuple[str, bool]:
        (mount,) = (mount for mount in service["volumes"] if mount["target"] == folder)
        return mount["source"], mount.get("read_only", False)

    assert volume(docs) == (volume(system["airflow-scheduler"])[0], True)
    assert not volume(system["airflow-scheduler"])[1]
    (made,) = (line for line in stages()["base"] if "install --directory --owner 50000" in line)
    assert folder in made.split()  # a new volume takes its owner from the image


def test_a_container_tells_nobody_outside_that_it_runs() -> None:
    for stage in ("airflow", "training", "serving"):
        variables = image_environment(stage)
        assert (variables["MLFLOW_DISABLE_TELEMETRY"], variables["DO_NOT_TRACK"]) == ("true", "true")


def test_the_database_is_ready_only_once_it_was_made(system: dict[str, Any]) -> None:
    """While the image makes databases its server listens on the socket alone, and then starts again."""
    test = system["postgres"]["healthcheck"]["test"]
    assert test[test.index("--host") + 1] == "127.0.0.1"


def test_no_secret_stands_in_a_file(system: dict[str, Any]) -> None:
    for name, service in system.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|FERNET|ACCESS_KEY", variable):
                assert value == "a-secret", f"{name}: {variable}"
    ignored = ROOT.joinpath(".gitignore").read_text(encoding="utf-8").splitlines()
    assert {"infra/.env", "infra/.env.airflow"} <= set(ignored)


def test_processes_of_airflow_know_each_other_by_one_key(system: dict[str, Any]) -> None:
    """The log of a running task is asked of the scheduler that runs it, by the key that signed the question."""
    for name in ("api-server", "scheduler", "dag-processor", "triggerer"):
        assert system[f"airflow-{name}"]["environment"]["AIRFLOW__API__SECRET_KEY"] == "a-secret"


def test_serving_knows_no_password_of_the_database(system: dict[str, Any]) -> None:
    """It asks MLflow and the store; who breaks into it changes no catalog."""
    assert not {name for name in system["serving"]["environment"] if name.startswith("PG")}
    assert system["mlflow"]["environment"]["PGPASSWORD"] == "a-secret"


def test_the_image_can_copy_the_database_of_compose(system: dict[str, Any]) -> None:
    """pg_dump refuses a server newer than itself, so without its client an upgrade ends before it begins."""
    (client,) = {int(found) for line in stages()["airflow"] for found in re.findall(r"postgresql-client-(\d+)", line)}
    server = re.match(r"postgres:(\d+)\.\d+", system["postgres"]["image"])
    assert server is not None
    assert client >= int(server[1])
    (backups,) = (m for m in system["airflow-scheduler"]["volumes"] if m["target"] == "/backups")
    assert backups["type"] == "volume"
    (made,) = (line for line in stages()["base"] if "install --directory --owner 50000" in line)
    assert made.endswith(" /backups")  # a new volume takes its owner from the image


def test_each_secret_has_a_command_that_makes_one() -> None:
    from cryptography.fernet import Fernet

    example = (INFRA / "production" / ".env.example").read_text(encoding="utf-8")
    made = {}
    for command, name in re.findall(r"^#   (.+)\n([A-Z_]+)=$", example, re.MULTILINE):
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        made[name] = done.stdout.strip()
    assert set(made) == set(SECRETS)
    assert all(len(value) >= 16 for value in made.values())
    assert len(set(made.values())) == len(made)
    Fernet(made["AIRFLOW_FERNET_KEY"].encode())
    assert len(made["AIRFLOW_JWT_SECRET"]) >= 64  # HS512 asks for as much
    assert len(made["AIRFLOW_API_SECRET_KEY"]) >= 64


# Settings


def _deployed() -> Settings:
    return load_settings({"ONETRANS_CONFIG": str(INFRA / "production" / "onetrans.toml")})


def test_settings_of_the_deployment_are_read_and_name_one_place(system: dict[str, Any]) -> None:
    settings = _deployed()
    places = (settings.lake.warehouse, settings.training.runs, settings.mlflow.artifacts)
    assert all(place.startswith(settings.store.root) for place in places)
    # Where MLflow is a server, its own root is what counts.
    assert f"--default-artifact-root={settings.mlflow.artifacts}" in system["mlflow"]["command"]


def test_an_upgrade_looks_at_the_databases_that_are_made_and_used(system: dict[str, Any]) -> None:
    settings, variables = _deployed(), system["airflow-scheduler"]["environment"]
    mlflow = mlflow_database(settings, variables)
    assert f"--backend-store-uri={mlflow}" in system["mlflow"]["command"]
    addresses = (variables["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"], mlflow, Lake(settings.lake).catalog_address)
    assert all(address.startswith("postgresql+psycopg:///") for address in addresses)
    made = re.findall(r"CREATE DATABASE (\w+);", (INFRA / "production" / "databases.sql").read_text(encoding="utf-8"))
    assert sorted(address.rsplit("/", 1)[1] for address in addresses) == sorted(made)


def test_airflow_knows_every_option_that_is_set(system: dict[str, Any]) -> None:
    known = _airflow_options()
    given = {name for name in system["airflow-scheduler"]["environment"] if name.startswith("AIRFLOW__")}
    assert set(_env_file(INFRA / "production" / "airflow.env")) <= given
    assert given <= known, given - known
    values = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    for section, options in values["config"].items():
        for option in options:
            assert f"AIRFLOW__{section}__{option}".upper() in known, f"{section}.{option}"


# Kubernetes and S3


MANIFESTS = ("serving.yaml", "training_pod.yaml", "rights.yaml", "upgrade_job.yaml", "history_job.yaml")


def _documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    documents = _documents(name)
    for document in documents:
        validate(document, "1.34", strict=True)
    if name == "serving.yaml":
        kinds = {document["kind"]: document for document in documents}
        assert set(kinds) == {
            "Deployment",
            "Service",
            "HorizontalPodAutoscaler",
            "PodDisruptionBudget",
            "NetworkPolicy",
        }
        labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert kinds["Service"]["spec"]["selector"].items() <= labels.items()
        assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert (
            kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
            == kinds["Deployment"]["metadata"]["name"]
        )
        spec = kinds["Deployment"]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert 0 < pause < spec["terminationGracePeriodSeconds"]


def _pods(name: str) -> list[dict[str, Any]]:
    """Return the descriptions of pods in a manifest."""
    return [
        document["spec"] if document["kind"] == "Pod" else document["spec"]["template"]["spec"]
        for document in _documents(name)
        if document["kind"] in ("Pod", "Job", "Deployment")
    ]


def test_no_service_puts_settings_into_other_pods() -> None:
    """Kubernetes gives every pod the addresses of earlier Services as NAME_PORT and the like, unless told not to."""
    chart = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    assert chart["enableServiceLinks"] is False
    pods = [pod for name in MANIFESTS for pod in _pods(name)]
    assert len(pods) == 4
    assert all(pod["enableServiceLinks"] is False for pod in pods)
    services = [d["metadata"]["name"] for name in MANIFESTS for d in _documents(name) if d["kind"] == "Service"]
    assert services
    for service in services:
        variable = f"{service.replace('-', '_').upper()}_SERVICE_HOST"
        load_settings({variable: "10.0.0.1", variable.replace("SERVICE_HOST", "PORT"): "tcp://10.0.0.1:80"})


def test_the_manifests_name_images_that_are_built() -> None:
    built = {f"onetrans-{target}" for target in stages()} & {
        "onetrans-airflow",
        "onetrans-training",
        "onetrans-serving",
    }
    assert len(built) == 3
    chart = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    named = [f"{chart['defaultAirflowRepository']}:{chart['defaultAirflowTag']}"]
    for pod in (pod for name in MANIFESTS for pod in _pods(name)):
        named += [container["image"] for container in (*pod.get("initContainers", ()), *pod["containers"])]
    named += [container["image"] for container in chart["apiServer"]["extraInitContainers"]]
    spark = (INFRA / "spark" / "kubernetes.conf").read_text(encoding="utf-8")
    named += re.findall(r"^spark\.kubernetes\.container\.image\s+(\S+)", spark, re.MULTILINE)
    assert len(named) == 8
    for image in named:
        host, name = image.split("/")
        assert host == "registry.example.com", image
        assert name.split(":")[0] in built, image


def test_every_file_names_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == __version__
    chart = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    assert chart["defaultAirflowTag"] == __version__
    named: dict[str, set[str]] = {}
    for folder in ("infra", "docs"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".png", ".svg"):
                tags = re.findall(r"\bonetrans-(?:\$?\w+):([\w.-]+)", file.read_text(encoding="utf-8"))
                if tags:
                    named[file.name] = set(tags)
    assert {"compose.yaml", "Dockerfile", "serving.yaml", "kubernetes.conf", "production.md"} <= set(named)
    assert {name: tags for name, tags in named.items() if tags != {__version__}} == {}


def test_who_serves_has_a_secret_of_its_own() -> None:
    secrets = {
        name: {
            source["secretRef"]["name"]
            for pod in _pods(name)
            for container in (*pod.get("initContainers", ()), *pod["containers"])
            for source in container["envFrom"]
        }
        for name in ("serving.yaml", "training_pod.yaml", "upgrade_job.yaml", "history_job.yaml")
    }
    assert not secrets.pop("serving.yaml") & set.union(*secrets.values())


def test_who_drives_spark_may_make_executors_and_is_reached_by_them() -> None:
    """In client mode the driver makes a ConfigMap and pods with its own account."""
    (pod,) = _pods("history_job.yaml")
    (container,) = pod["containers"]
    (binding,) = (
        found
        for found in _documents("rights.yaml")
        if found["kind"] == "RoleBinding" and found["roleRef"]["name"] == "ranking-spark-driver"
    )
    assert pod["serviceAccountName"] in {subject["name"] for subject in binding["subjects"]}
    assert pod.get("automountServiceAccountToken", True)
    (address,) = (given for given in container["env"] if given["name"] == "SPARK_LOCAL_HOSTNAME")
    assert address["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    chart = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    assert container["resources"] == chart["workers"]["kubernetes"]["resources"]


def test_the_page_makes_what_the_manifests_name() -> None:
    page = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    files = [path.read_text(encoding="utf-8") for path in (INFRA / "kubernetes").glob("*.yaml")]
    kinds = {"secret generic": r"(?:secretName|[sS]ecretKeySecretName|secretRef:\n\s+name): ([\w-]+)",
             "configmap": r"configMap:\n\s+name: ([\w-]+)"}  # fmt: skip
    for kind, pattern in kinds.items():
        named = {name for text in files for name in re.findall(pattern, text)}
        assert named == set(re.findall(rf"kubectl create {kind} ([\w-]+) --namespace ranking", page)), kind
    assert "kubectl create namespace ranking\n" in page
    for name in re.findall(r"--filename (infra/\S+)", page):
        assert (ROOT / name).is_file(), name
    commands = {line.lstrip("# ") for text in (*files, page) for line in text.splitlines() if "helm upgrade --" in line}
    assert len(commands) == 1, commands


def test_the_page_waits_for_a_jobs_end_and_not_for_its_success_alone() -> None:
    lines = (ROOT / "docs" / "production.md").read_text(encoding="utf-8").splitlines()
    made = [n for n, line in enumerate(lines) if line.startswith("job=$(kubectl create ")]
    assert len(made) == 2
    for n in made:
        assert lines[n + 1].startswith("until kubectl get --namespace ranking $job ")
        assert "grep -E 'Complete|Failed'; do sleep 10; done" in lines[n + 1]
        assert lines[n + 2].startswith("kubectl logs --namespace ranking $job ")


def test_what_the_page_pauses_it_lets_go_on() -> None:
    """A paused DAG makes no run, and tells nobody."""
    page = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    pauses = re.findall(r"airflow dags (pause|unpause) ", page[page.index("## Upgrades") :])
    assert pauses == ["pause", "unpause"]


def test_commands_of_the_pages_name_what_runs(system: dict[str, Any]) -> None:
    """Services of the compose file, and what the chart makes of a release with the page's name."""
    pages = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("production.md", "operations.md"))
    services = re.findall(r"docker compose --file infra/compose\.yaml (?:exec|run)(?: --\S+)* (\S+) ", pages)
    assert len(services) >= 6
    assert set(services) <= set(system)
    (release,) = set(re.findall(r"helm upgrade --install (\S+) ", pages))
    deployments = re.findall(r"kubectl exec --namespace ranking deployment/(\S+) -- ", pages)
    assert len(deployments) >= 5
    assert set(deployments) == {f"{release}-scheduler"}
    for before in ("airflow-scheduler", "deployment/airflow-scheduler --"):
        assert f"{before} onetrans registry rollback --reason " in pages


def test_airflows_chart_asks_the_image_for_nothing_it_lacks() -> None:
    chart = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    for process in ("scheduler", "dagProcessor", "triggerer"):
        assert chart[process]["logGroomerSidecar"]["enabled"] is False, (
            f"{process}: /clean-logs is the official image's"
        )
    (asynchronous,) = (s for s in chart["secret"] if s["envName"] == "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC")
    assert asynchronous["secretName"] == chart["data"]["metadataSecretName"]
    assert asynchronous["secretKey"] == "connection"
    module, manager = chart["config"]["core"]["auth_manager"].rsplit(".", 1)
    assert find_spec(module.rsplit(".", 1)[0]) is not None, f"{manager} is of no package of the image"
    # Airflow's own migration has no copy before it; and FAB's users are made by a job that this manager has no use for.
    assert chart["migrateDatabaseJob"]["enabled"] is False
    assert chart["createUserJob"]["enabled"] is False


def test_airflows_chart_takes_the_values() -> None:
    schema = os.environ.get("AIRFLOW_CHART_SCHEMA", "")
    if not schema:
        pytest.skip("AIRFLOW_CHART_SCHEMA names no values.schema.json of Airflow's chart")
    import jsonschema

    values = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(values, json.loads(Path(schema).read_text(encoding="utf-8")))


def test_the_policy_gives_what_is_needed_and_no_more() -> None:
    policy = json.loads((INFRA / "s3" / "policy.json").read_text(encoding="utf-8"))
    actions = {action for statement in policy["Statement"] for action in statement["Action"]}
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"} <= actions
    assert not any("*" in action or action.startswith(("s3:CreateBucket", "s3:DeleteBucket")) for action in actions)
    for statement in policy["Statement"]:
        wide = statement["Resource"] in ("*", "arn:aws:s3:::*")
        assert not wide
        writes = {"s3:PutObject", "s3:DeleteObject"} & set(statement["Action"])
        assert not writes or "/PREFIX/" in statement["Resource"]
