"""Every file of a deployment by its own linter or schema: images, compose, Kubernetes, settings, permissions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from onetrans.settings import load_settings
from onetrans.upgrade import parts

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILE = INFRA / "images" / "Dockerfile"
SECRETS = ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AIRFLOW_JWT_SECRET", "AIRFLOW_FERNET_KEY",
           "ONETRANS_SERVING_TOKEN")  # fmt: skip


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


def _stages() -> dict[str, list[str]]:
    """Return the instructions of each stage of the Dockerfile, continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, list[str]] = {}
    name = ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if found := re.fullmatch(r"FROM (\S+) AS (\w+)", line):
            name = found[2]
            stages[name] = [line]
        elif line.strip() and name:
            stages[name].append(line.strip())
    return stages


def test_images_are_pinned_and_run_as_nobody_with_rights() -> None:
    stages = _stages()
    for name, instructions in stages.items():
        image = instructions[0].split()[1]
        assert image in stages or re.search(r":\d+\.\d+\.\d+", image), f"{name}: {image} has no exact version"
    for name in ("airflow", "training", "serving"):
        users = [line for line in stages[name] if line.startswith("USER ")]
        assert users == ["USER 50000"], name
        after = stages[name][stages[name].index("USER 50000") :]
        assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in after), f"{name}: made by a user"
        assert any(line.startswith("HEALTHCHECK") for line in stages[name]), name
    for line in (line for instructions in stages.values() for line in instructions if "pip install" in line):
        assert "--constraint constraints.txt" in line


def test_what_the_images_copy_is_there_and_reaches_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    assert "infra/.env" in ignored
    for instructions in _stages().values():
        for line in instructions:
            if line.startswith("COPY ") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source
                    assert source.split("/")[0] in sent, f"{source} is kept from the builder"


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


# Compose


def _compose(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    spec = find_spec("compose")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    program = Path(spec.submodule_search_locations[0]) / "docker-compose"
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **changed}
    return subprocess.run(
        [str(program), "--env-file", os.devnull, "--file", str(INFRA / "compose.yaml"), *arguments],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def system() -> dict[str, Any]:
    done = _compose("config", "--format", "json", **dict.fromkeys(SECRETS, "a-secret"))
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def test_compose_reads_its_file_and_refuses_to_begin_without_secrets(system: dict[str, Any]) -> None:
    wanted = {"postgres", "store", "prepare", "mlflow", "serving"}
    wanted |= {f"airflow-{name}" for name in ("api-server", "scheduler", "dag-processor", "triggerer")}
    assert set(system) == wanted
    assert set(_env_file(INFRA / "production" / ".env.example")) == set(SECRETS)
    for name in SECRETS:
        done = _compose("config", "--quiet", **{other: "a-secret" for other in SECRETS if other != name})
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


def test_no_secret_stands_in_a_file(system: dict[str, Any]) -> None:
    for name, service in system.items():
        for variable, value in (service.get("environment") or {}).items():
            if re.search(r"PASSWORD|SECRET|TOKEN|FERNET|ACCESS_KEY", variable):
                assert value == "a-secret", f"{name}: {variable}"
    assert ROOT.joinpath(".gitignore").read_text(encoding="utf-8").splitlines().count("infra/.env") == 1


# Settings


def test_settings_of_the_deployment_are_read_and_name_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings({"ONETRANS_CONFIG": str(INFRA / "production" / "onetrans.toml")})
    places = (settings.lake.warehouse, settings.training.runs, settings.mlflow.artifacts)
    assert all(place.startswith(settings.store.root) for place in places)
    assert settings.lake.catalog_uri.startswith("postgresql+psycopg://")
    assert parts  # what `onetrans upgrade` looks at takes its addresses from the same settings


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


@pytest.mark.parametrize("name", ["serving.yaml", "training_pod.yaml"])
def test_kubernetes_takes_the_manifests(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate").validate
    documents = list(yaml.safe_load_all((INFRA / "kubernetes" / name).read_text(encoding="utf-8")))
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
