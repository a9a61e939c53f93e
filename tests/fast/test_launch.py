"""Where a training runs: the pod that is made of the template, what Kubernetes would say of it, how its end is told."""

import os
import tempfile
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from dags.launch import PLACES, LaunchStep
from dags.ranking_model import dag as ranking_model
from tests.images import image_environment
from tests.pod_template import EXAMPLE, own_template

INFRA = Path(__file__).parents[2] / "infra"

SHARED = {
    "ONETRANS_LAUNCH_PLACE": "kubernetes",
    "ONETRANS_TRAINING_RUNS": "s3://bucket/runs",
    "ONETRANS_LAKE_WAREHOUSE": "/shared/lake",
    "ONETRANS_MLFLOW_TRACKING_URI": "http://mlflow:5000",
}


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """Return a function that sets variables in a folder without a configuration file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONETRANS_CONFIG", raising=False)

    def settings(**variables):
        template = {"ONETRANS_LAUNCH_POD_TEMPLATE": str(own_template(tmp_path))}
        for name, value in {**SHARED, **template, **variables}.items():
            monkeypatch.setenv(name, value)

    return settings


def context():
    ti = SimpleNamespace(
        try_number=1, max_tries=3, dag_id="ranking_model", task_id="train_onetrans", run_id="r", map_index=-1,
        start_date=datetime.now(UTC),
    )  # fmt: skip
    logical = datetime(2022, 5, 4, tzinfo=UTC)
    run = SimpleNamespace(run_id="r", run_type="manual", logical_date=logical)
    return {"ti": ti, "dag": ranking_model, "dag_run": run, "run_id": "r", "logical_date": logical, "params": {}}


def step(**kwargs):
    made = LaunchStep(
        task_id="train_onetrans",
        module="onetrans.cli",
        arguments=["train", "--plan", "s3://bucket/runs/x", "--model", "onetrans"],
        environment={"ONETRANS_TRAINING_PRESET": "large"},
        execution_timeout=timedelta(hours=12),
        unharmed="The champion is as it was.",
        **{"parallel": True, **kwargs},
    )
    return made


def template_with(tmp_path, change):
    pod = yaml.safe_load(own_template(tmp_path).read_text(encoding="utf-8"))
    change(pod["spec"]["containers"][0], pod["spec"])
    path = tmp_path / "pod.yaml"
    path.write_text(yaml.safe_dump(pod), encoding="utf-8")
    return str(path)


def test_what_trains_and_scores_may_run_elsewhere_and_nothing_else():
    launched = {task.task_id: task.parallel for task in ranking_model.tasks if isinstance(task, LaunchStep)}
    assert launched == {"train_onetrans": True, "train_dcnv2_din": True, "evaluate": False}


def test_the_places_are_those_of_the_settings():
    from typing import get_args

    from onetrans.settings import LaunchSettings, Place

    assert get_args(Place) == PLACES
    assert LaunchSettings().place == PLACES[0], "what the DAG takes where nobody says"


def test_a_place_that_is_none_is_refused(configure):
    configure(ONETRANS_LAUNCH_PLACE="moon")
    with pytest.raises(AirflowFailException, match=r"BAD CONFIGURATION. launch.place = 'moon' is none of worker, kub"):
        step().execute(context())


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"ONETRANS_TRAINING_RUNS": "var/runs"}, "training.runs = 'var/runs' is a folder of this machine"),
        ({"ONETRANS_LAKE_WAREHOUSE": "var/lake"}, "lake.warehouse = 'var/lake' is a folder of this machine"),
        ({"ONETRANS_MLFLOW_TRACKING_URI": "sqlite:////data/mlflow.db"}, "pods need a server"),
        ({"ONETRANS_LAKE_WAREHOUSE": "s3://bucket/lake"}, "the catalog of tables is a SQLite file of this machine"),
        ({"ONETRANS_LAKE_CATALOG_URI": "sqlite:////data/catalog.db"}, "the catalog of tables is a SQLite file of this"),
        ({"ONETRANS_LAUNCH_POD_TEMPLATE": ""}, "copy infra/kubernetes/training_pod.yaml, change what is marked CHANGE"),
        (
            {"ONETRANS_LAUNCH_POD_TEMPLATE": "/nowhere.yaml"},
            "launch.pod_template = '/nowhere.yaml' cannot be read: No such file",
        ),
        ({"ONETRANS_LAUNCH_POD_TEMPLATE": str(EXAMPLE)}, "still names an image of registry.example.com"),
    ],
)
def test_what_a_pod_could_not_see_is_refused_before_it_is_made(configure, variables, why):
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    configure(**variables)
    with pytest.raises(AirflowFailException, match="BAD CONFIGURATION") as refused:
        step().execute(context())
    assert why in str(refused.value)


@pytest.mark.parametrize(
    ("warehouse", "catalog", "taken"),
    [
        ("/shared/lake", "sqlite:////shared/lake/catalog.db", True),
        ("/shared/lake", "sqlite:////shared/lake/catalog.db?timeout=60", True),
        ("file:///shared/lake/", "sqlite:////shared/lake/of/tables.db", True),
        ("/shared/lake", "sqlite:////shared/lake/../catalog.db", False),
        ("/shared/lake", "sqlite:////shared/lake2/catalog.db", False),
        ("/shared/lake", "sqlite:///catalog.db", False),
        ("/shared/lake", "sqlite+pysqlite:////data/catalog.db", False),
        ("s3://bucket/lake", "sqlite:////shared/lake/catalog.db", False),
        ("s3://bucket/lake", "postgresql+psycopg:///lake", True),
    ],
)
def test_a_sqlite_catalog_is_taken_on_the_volume_of_the_tables(configure, warehouse, catalog, taken):
    """Where nobody names it, it lies there too."""
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    configure(ONETRANS_LAKE_WAREHOUSE=warehouse, ONETRANS_LAKE_CATALOG_URI=catalog)
    if taken:
        assert rendered(step())
        return
    with pytest.raises(AirflowFailException, match=r"BAD CONFIGURATION\. lake.catalog_uri = 'sqlite.*a SQLite file"):
        step().execute(context())


def test_what_makes_no_pod_is_corrected_without_another_plan(configure):
    """The plan pins what the process is given; where and in what it runs is read anew."""
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from dags.pods import how_it_ended

    configure(ONETRANS_LAUNCH_POD_TEMPLATE="")
    made = step(clear="clear plan, and what follows it runs too")
    with pytest.raises(AirflowFailException, match=r"correct it, then clear this task\.$"):
        made.execute(context())
    with pytest.raises(AirflowFailException, match=r"correct it, then clear plan, and what follows it runs too\.$"):
        made._raise_for(context(), how_it_ended(ended_pod(exit_code=78), "base"))


def test_airflow_in_a_cluster_names_the_template_that_is_mounted():
    """The values say that trainings run in pods, so they say of which template: the copy in the ConfigMap."""
    values = yaml.safe_load((INFRA / "kubernetes" / "airflow-values.yaml").read_text(encoding="utf-8"))
    variables = {entry["name"]: entry["value"] for entry in values["env"]}
    (mount,) = values["volumeMounts"]
    assert variables["ONETRANS_LAUNCH_PLACE"] == "kubernetes"
    assert variables["ONETRANS_LAUNCH_POD_TEMPLATE"] == f"{mount['mountPath']}/training_pod.yaml"
    page = (INFRA.parent / "docs" / "production.md").read_text(encoding="utf-8")
    (volume,) = values["volumes"]
    assert f"create configmap {volume['configMap']['name']} --namespace ranking" in page
    assert "--from-file=training_pod.yaml" in page


def rendered(made):
    """Return the pod a step would ask Kubernetes for, as JSON."""
    from kubernetes.client import ApiClient

    return ApiClient().sanitize_for_serialization(
        made._make_pod(context()).build_pod_request_obj(context(), dry_run=True)
    )


def test_the_pod_is_one_kubernetes_takes(configure):
    """The strict schema of Kubernetes: a field it does not know is an error, where its client would drop it."""
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    validate = pytest.importorskip("kubernetes_validate").validate
    configure()
    pod = rendered(step())
    validate(pod, "1.34", strict=True)
    validate(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")), "1.34", strict=True)
    broken = deepcopy(pod)
    broken["spec"]["containers"][0]["resources"]["limit"] = {}
    with pytest.raises(Exception, match="limit"):
        validate(broken, "1.34", strict=True)


def test_the_pod_is_the_template_with_the_step_in_it(configure, tmp_path):
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    configure(ONETRANS_AIRFLOW_NOTIFY="slack", ONETRANS_GATE_SEED="3")
    pod, template = rendered(step()), yaml.safe_load(own_template(tmp_path).read_text(encoding="utf-8"))
    (container,) = pod["spec"]["containers"]
    (described,) = template["spec"]["containers"]
    assert [*container["command"], *container["args"]] == [
        *("python", "-m", "onetrans.cli", "train", "--plan", "s3://bucket/runs/x", "--model", "onetrans")
    ]
    for name in ("image", "resources", "envFrom", "volumeMounts", "securityContext", "terminationMessagePolicy"):
        assert container[name] == described[name], name
    for name in ("nodeSelector", "tolerations", "volumes", "restartPolicy", "terminationGracePeriodSeconds"):
        assert pod["spec"][name] == template["spec"][name], name
    variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert variables["ONETRANS_TRAINING_RUNS"] == "s3://bucket/runs"
    assert variables["ONETRANS_TRAINING_PRESET"] == "large", "what the form says goes before the worker's settings"
    assert variables["ONETRANS_GATE_SEED"] == "3"
    assert not [name for name in variables if name.startswith(("ONETRANS_AIRFLOW", "ONETRANS_LAUNCH"))]
    assert pod["metadata"]["namespace"] == "ranking"
    assert pod["metadata"]["labels"]["task_id"] == "train_onetrans"
    assert pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    shared = next(v for v in pod["spec"]["volumes"] if v["name"] == "shared-memory")
    assert shared["emptyDir"]["medium"] == "Memory"


def test_the_library_reads_the_worker_s_settings_out_of_the_pod_s_variables(configure):
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from onetrans.settings import load_settings

    configure(ONETRANS_GATE_SEED="3", ONETRANS_SOURCE_ABSENT_DAYS="2022-05-01,2022-05-02")
    (container,) = rendered(step())["spec"]["containers"]
    image = image_environment("training")  # names a file that is in no image, and mounted in no pod
    inside = load_settings({**image, **{entry["name"]: entry.get("value", "") for entry in container["env"]}})
    here = load_settings()
    assert (inside.gate, inside.source, inside.mlflow, inside.lake) == (here.gate, here.source, here.mlflow, here.lake)
    assert inside.training.preset == "large"


SECRET_ADDRESS = "postgresql+psycopg://ranking:hunter2@postgres/lake"


def test_an_address_with_a_password_is_read_from_the_secret_of_the_template(configure):
    """Whoever may look at pods reads what stands in their descriptions; without the key, Kubernetes starts no pod."""
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    validate = pytest.importorskip("kubernetes_validate").validate
    mlflow = "http://ann:hunter2@mlflow:5000"
    configure(ONETRANS_LAKE_CATALOG_URI=SECRET_ADDRESS, ONETRANS_MLFLOW_TRACKING_URI=mlflow)
    pod = rendered(step())
    validate(pod, "1.34", strict=True)
    assert "hunter2" not in str(pod)
    (container,) = pod["spec"]["containers"]
    for name in ("ONETRANS_LAKE_CATALOG_URI", "ONETRANS_MLFLOW_TRACKING_URI"):
        (entry,) = (entry for entry in container["env"] if entry["name"] == name)
        assert entry == {"name": name, "valueFrom": {"secretKeyRef": {"name": "onetrans", "key": name}}}
    assert {"name": "ONETRANS_LAKE_WAREHOUSE", "value": "/shared/lake"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "onetrans"}}]


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ([], "names no secret in the envFrom"),
        ([{"prefix": "MY_", "secretRef": {"name": "onetrans"}}], "names no secret in the envFrom"),
        ([{"configMapRef": {"name": "onetrans"}}], "names no secret in the envFrom"),
        ([{"secretRef": {"name": "keys"}}, {"secretRef": {"name": "addresses"}}], "several secrets (keys, addresses)"),
    ],
)
def test_a_password_that_no_secret_is_named_for_is_refused(configure, tmp_path, sources, told):
    pytest.importorskip("airflow.providers.cncf.kubernetes")

    def bring(container, _):
        container["envFrom"] = sources

    configure(ONETRANS_LAKE_CATALOG_URI=SECRET_ADDRESS, ONETRANS_LAUNCH_POD_TEMPLATE=template_with(tmp_path, bring))
    with pytest.raises(AirflowFailException, match=r"BAD CONFIGURATION\. ONETRANS_LAKE_CATALOG_URI holds a pass") as no:
        step().execute(context())
    assert told in str(no.value)
    assert "hunter2" not in str(no.value)


def test_a_variable_that_the_template_names_itself_is_left_to_it(configure, tmp_path):
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    named = {
        "name": "ONETRANS_LAKE_CATALOG_URI",
        "valueFrom": {"secretKeyRef": {"name": "addresses", "key": "catalog"}},
    }

    def by_name(container, _):
        container["env"] = [named]

    configure(ONETRANS_LAKE_CATALOG_URI=SECRET_ADDRESS, ONETRANS_LAUNCH_POD_TEMPLATE=template_with(tmp_path, by_name))
    (container,) = rendered(step())["spec"]["containers"]
    assert [entry for entry in container["env"] if entry["name"] == named["name"]] == [named]
    assert "hunter2" not in str(container)


@pytest.mark.parametrize(("asked", "parallel", "processes"), [(4, True, "4"), (4, False, "1"), (1, True, "1")])
def test_a_training_has_a_process_for_each_gpu_of_the_pod(configure, tmp_path, asked, parallel, processes):
    pytest.importorskip("airflow.providers.cncf.kubernetes")

    def ask(container, _):
        for kind in ("requests", "limits"):
            container["resources"][kind]["nvidia.com/gpu"] = str(asked)

    configure(ONETRANS_LAUNCH_POD_TEMPLATE=template_with(tmp_path, ask), ONETRANS_TRAINING_PROCESSES="2")
    (container,) = rendered(step(parallel=parallel))["spec"]["containers"]
    variables = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    assert variables.get("ONETRANS_TRAINING_PROCESSES") == processes


def ended_pod(**terminated):
    state = SimpleNamespace(terminated=SimpleNamespace(**{"message": None, "reason": "Error", **terminated}))
    status = SimpleNamespace(
        container_statuses=[SimpleNamespace(name="base", state=state)], phase="Failed", reason=None, message=None
    )
    return SimpleNamespace(status=status, metadata=SimpleNamespace(name="train-onetrans-x"))


LAST_WORDS = """see: http://mlflow/#/experiments/1/runs/2
BadDataError: training_requests 2022-05-03: 3 rows have no candidates"""


@pytest.mark.parametrize(
    ("terminated", "kind", "words"),
    [
        ({"exit_code": 65, "message": LAST_WORDS}, AirflowFailException, "BAD DATA. BadDataError: training_requests"),
        ({"exit_code": 65, "message": LAST_WORDS}, AirflowFailException, "See http://mlflow/#/experiments/1/runs/2"),
        ({"exit_code": 78}, AirflowFailException, "BAD CONFIGURATION"),
        ({"exit_code": 75}, AirflowException, "NOT READY"),
        ({"exit_code": 1}, AirflowException, "FAILED with exit code 1"),
        ({"exit_code": 137, "reason": "OOMKilled"}, AirflowException, "ended by SIGKILL"),
        ({"exit_code": 137, "reason": "OOMKilled"}, AirflowException, "raise it in the pod's template"),
        ({"exit_code": 143}, AirflowException, "ended by SIGTERM"),
    ],
)
def test_how_a_pod_ends_decides_as_an_exit_code_does(terminated, kind, words):
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from dags.pods import how_it_ended

    with pytest.raises(AirflowException) as raised:
        step()._raise_for(context(), how_it_ended(ended_pod(**terminated), "base"))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert "train_onetrans of 2022-05-04" in str(raised.value)
    assert "The champion is as it was." in str(raised.value)


def test_a_pod_whose_process_never_began_is_tried_again():
    pytest.importorskip("airflow.providers.cncf.kubernetes")
    from dags.pods import how_it_ended

    pod = ended_pod(exit_code=0)
    pod.status.container_statuses, pod.status.reason, pod.status.message = None, "Evicted", "The node was low on memory"
    with pytest.raises(AirflowException, match=r"Evicted: The node was low on memory.*tries it again") as raised:
        step()._raise_for(context(), how_it_ended(pod, "base"))
    assert type(raised.value) is AirflowException
