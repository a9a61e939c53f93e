"""A step in a pod, from its creation to its end, by Airflow's own Kubernetes provider against an API on loopback."""

import asyncio
import json
import os
import shutil
import tempfile
import textwrap
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import torch

# Airflow writes a configuration file into its home as soon as it is imported.
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))

from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred
from cluster import Cluster

from dags.launch import LaunchStep
from dags.ranking_model import dag as ranking_model
from infra.local.airflow import REPOSITORY
from onetrans import storage
from onetrans.artifact import load_model
from onetrans.plan import Plan
from onetrans.settings import as_environment
from onetrans.train import train
from tests.images import image_environment
from tests.pod_template import own_template
from tests.tracked_days import Shop

pytest.importorskip("airflow.providers.cncf.kubernetes")

PROGRAM = """
import os, pathlib, sys, time
from onetrans.settings import load_settings
load_settings()
checkpoint = pathlib.Path(os.environ["ONETRANS_TRAINING_RUNS"]) / "checkpoint"
print("goes on from", checkpoint.read_text() if checkpoint.exists() else "fresh weights", flush=True)
if sys.argv[1] == "catalog":
    print("the tables are in", load_settings().lake.catalog_uri, flush=True)
if sys.argv[1] == "killed" and not checkpoint.exists():
    checkpoint.write_text("step 7")
    time.sleep(600)
if sys.argv[1] == "ended":
    print("see: http://mlflow/#/experiments/1/runs/2", file=sys.stderr)
    print("BadDataError: training_requests 2022-05-03: 3 rows have no candidates", file=sys.stderr)
    sys.exit(int(sys.argv[2]))
print("done")
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger  # noqa: F401  (seconds, once)

    cluster = Cluster(tmp_path, image={"ONETRANS_CONFIG": image_environment("training")["ONETRANS_CONFIG"]})
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ONETRANS_CONFIG", raising=False)
    for name, value in {
        "PYTHONPATH": str(REPOSITORY),
        "AIRFLOW_CONN_KUBERNETES_DEFAULT": cluster.connection(),
        "ONETRANS_LAUNCH_PLACE": "kubernetes",
        "ONETRANS_LAUNCH_POD_TEMPLATE": str(own_template(tmp_path)),
        "ONETRANS_TRAINING_RUNS": str(tmp_path),
        "ONETRANS_LAKE_WAREHOUSE": str(tmp_path / "lake"),
        "ONETRANS_MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.close()


@pytest.fixture
def step():
    return lambda *arguments, at_most=timedelta(hours=1): LaunchStep(
        task_id="train_onetrans",
        module="program",
        arguments=arguments,
        parallel=True,
        execution_timeout=at_most,
    )


def context(this_try=1):
    ti = SimpleNamespace(
        try_number=this_try, max_tries=3, dag_id="ranking_model", task_id="train_onetrans", run_id="r", map_index=-1,
        start_date=datetime.now(UTC), xcom_push=lambda **_: None,
    )  # fmt: skip
    logical = datetime(2022, 5, 4, tzinfo=UTC)
    run = SimpleNamespace(run_id="r", run_type="manual", logical_date=logical)
    return {"ti": ti, "dag": ranking_model, "dag_run": run, "run_id": "r", "logical_date": logical, "params": {}}


def run(step, this_try=1, meanwhile=lambda: None):
    """Do what worker and triggerer do with a step."""
    with pytest.raises(TaskDeferred) as deferred:
        step.execute(context(this_try))
    assert deferred.value.method_name == "trigger_reentry"

    async def watched():
        trigger = deferred.value.trigger
        trigger.poll_interval = 0.2
        events = trigger.run()
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.to_thread(meanwhile)
        return (await waiting).payload

    return step.trigger_reentry(context(this_try), asyncio.run(watched()))


def test_a_pod_that_succeeds_is_deleted_and_its_output_is_in_the_log(cluster, step, capsys):
    run(step("fine"))
    assert len(cluster.made) == 1
    assert cluster.pods == {}
    assert "goes on from fresh weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (65, AirflowFailException, "BAD DATA. BadDataError: training_requests 2022-05-03: 3 rows have no candidates."),
        (78, AirflowFailException, "BAD CONFIGURATION"),
        (75, AirflowException, "NOT READY"),
        (1, AirflowException, "FAILED with exit code 1"),
    ],
)
def test_the_exit_code_of_the_pod_s_process_decides(cluster, step, code, kind, words):
    with pytest.raises(AirflowException) as raised:
        run(step("ended", str(code)))
    assert type(raised.value) is kind
    assert words in str(raised.value)
    assert str(raised.value).endswith("See http://mlflow/#/experiments/1/runs/2")
    assert cluster.pods == {}


def test_a_pod_that_is_lost_is_tried_again_and_goes_on_from_its_checkpoint(cluster, step, capsys, tmp_path):
    def lose_the_node():
        while not ((tmp_path / "checkpoint").exists() and (tmp_path / "checkpoint").read_text()):
            time.sleep(0.05)
        cluster.kill(cluster.made[0])

    with pytest.raises(AirflowException, match=r"2022-05-04: POD LOST.*was try 1 of 4") as raised:
        run(step("killed"), meanwhile=lose_the_node)
    assert type(raised.value) is AirflowException
    run(step("killed"), this_try=2)
    assert "goes on from step 7" in capsys.readouterr().out
    assert len(cluster.made) == 2


@pytest.mark.parametrize(
    ("at_most", "words"),
    [
        (timedelta(hours=1), "POD NOT STARTED. Pod took too long to be scheduled on the cluster"),
        (timedelta(seconds=1), "TOO SLOW. It ran for longer than 0:00:01"),
    ],
)
def test_a_pod_that_no_node_takes_is_not_told_of_as_slow(cluster, step, monkeypatch, at_most, words):
    """Airflow's event says "timeout" of both: a wait for a node that was in vain, and a step that ran too long."""
    monkeypatch.setattr("dags.pods.START_S", 2)
    cluster.full = at_most > timedelta(minutes=1)
    with pytest.raises(AirflowException, match="was try 1 of 4") as raised:
        run(step("killed", at_most=at_most))
    assert type(raised.value) is AirflowException
    assert f"train_onetrans of 2022-05-04: {words}" in str(raised.value)
    assert cluster.pods == {}


SECRET_ADDRESS = "postgresql+psycopg://ranking:hunter2@postgres/lake"


def test_a_pod_reads_an_address_with_a_password_from_the_secret(cluster, step, monkeypatch, capsys):
    monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", SECRET_ADDRESS)
    cluster.secrets["onetrans"] = {"ONETRANS_LAKE_CATALOG_URI": SECRET_ADDRESS}
    run(step("catalog"))
    assert f"the tables are in {SECRET_ADDRESS}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("secrets", "says"),
    [
        (
            {"onetrans": {"AWS_ACCESS_KEY_ID": "x"}},
            "couldn't find key ONETRANS_LAKE_CATALOG_URI in Secret ranking/onetrans",
        ),
        ({}, 'secret "onetrans" not found'),
    ],
)
def test_a_secret_that_lacks_the_address_ends_the_step_and_the_pod_never_takes_the_default(
    cluster, step, monkeypatch, secrets, says
):
    monkeypatch.setattr("dags.pods.CREATE_S", 1)
    monkeypatch.setenv("ONETRANS_LAKE_CATALOG_URI", SECRET_ADDRESS)
    cluster.secrets = secrets
    with pytest.raises(AirflowFailException) as raised:
        run(step("catalog"))
    told = str(raised.value)
    assert told.startswith("train_onetrans of 2022-05-04: BAD CONFIGURATION. Kubernetes does not make pod train-onetr")
    assert f"(CreateContainerConfigError): {says}. " in told
    assert told.endswith("Airflow does not retry this: correct it, then clear this task.")
    assert cluster.processes == {}
    assert cluster.pods == {}


FORBIDDEN = "pods is forbidden: User airflow cannot create resource pods in the namespace ranking"
QUOTA = "pods train is forbidden: exceeded quota: gpus, requested: 1, used: 4, limited: 4"


@pytest.mark.parametrize(
    ("refuses", "kind", "words"),
    [
        ((403, FORBIDDEN), AirflowFailException, f"BAD CONFIGURATION. Kubernetes answered 403 Forbidden: {FORBIDDEN}."),
        ((403, QUOTA), AirflowException, f"NOT READY. Kubernetes answered 403 Forbidden: {QUOTA}."),
        ((422, "no such field"), AirflowFailException, "422 Unprocessable Entity: no such field."),
        ((500, "etcd is away"), AirflowException, "NOT READY. Kubernetes answered 500"),
    ],
)
def test_what_a_cluster_refuses_is_told_in_a_paragraph(cluster, step, monkeypatch, refuses, kind, words):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)  # the provider's own tries
    cluster.refuses = refuses
    with pytest.raises(AirflowException) as raised:
        step("fine").execute(context())
    assert isinstance(raised.value, AirflowFailException) is (kind is AirflowFailException)
    assert words in str(raised.value)
    assert str(raised.value).startswith("train_onetrans of 2022-05-04: ")


def test_a_cluster_that_does_not_answer_is_asked_by_the_next_try(cluster, step, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    monkeypatch.setattr("urllib3.util.retry.Retry.sleep", lambda *_: None)
    cluster.server.shutdown()
    cluster.server.server_close()
    with pytest.raises(AirflowException, match=r"NOT READY. Kubernetes does not answer: .*was try 1 of 4") as raised:
        step("fine").execute(context())
    assert not isinstance(raised.value, AirflowFailException)


def test_a_wait_that_breaks_off_in_the_triggerer_ends_with_a_paragraph(step):
    with pytest.raises(AirflowException, match=r"train_onetrans of 2022-05-04: WAIT BROKE OFF\. .*was try 1 of 4"):
        step("fine").resume_execution("__fail__", {"error": "Trigger failure"}, context())


@pytest.mark.parametrize("text", ["a: [", "kind: Pod", "- 1"])
def test_a_template_that_describes_no_pod_is_bad_configuration(cluster, step, monkeypatch, tmp_path, text):
    (tmp_path / "pod.yaml").write_text(text)
    monkeypatch.setenv("ONETRANS_LAUNCH_POD_TEMPLATE", str(tmp_path / "pod.yaml"))
    with pytest.raises(AirflowFailException, match=r"BAD CONFIGURATION\. launch.pod_template = .* describes no pod"):
        step("fine").execute(context())


def test_a_worker_that_was_lost_finds_the_pod_it_had_started(cluster, step, tmp_path):
    with pytest.raises(TaskDeferred):
        step("killed").execute(context())
    with pytest.raises(TaskDeferred) as again:
        step("killed").execute(context())
    assert len(cluster.made) == 1
    assert again.value.trigger.pod_name == cluster.made[0]


def test_a_task_that_is_ended_takes_its_pod_along(cluster, step):
    made = step("killed")
    with pytest.raises(TaskDeferred):
        made.execute(context())
    made.on_kill()
    assert cluster.pods == {}


@pytest.mark.nightly
def test_a_training_whose_pod_is_lost_comes_to_the_same_weights(cluster, monkeypatch, tmp_path, capsys):
    """A real training, lost in mid-epoch: the next pod goes on from the checkpoint, as if nothing had happened."""
    shop = Shop.open(tmp_path / "shop", days=6)
    plan = shop.plan(shop.days[4], track=False)
    unbroken = tmp_path / "unbroken"
    shutil.copytree(storage.local_path(plan.path), unbroken)
    train(replace(Plan.load(str(unbroken)), mlflow_run_id=""), "onetrans", shop.settings)
    often = replace(shop.settings, training=replace(shop.settings.training, checkpoint_seconds=0.0))
    unlike_a_file = replace(often, mlflow=replace(often.mlflow, tracking_uri="http://127.0.0.1:1"))
    for name, value in as_environment(unlike_a_file).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ONETRANS_LAUNCH_PLACE", "kubernetes")
    monkeypatch.setenv("ONETRANS_LAUNCH_POD_TEMPLATE", str(own_template(tmp_path)))
    checkpoint = storage.local_path(plan.model_path("onetrans")) / "checkpoint" / "checkpoint.json"

    def training():
        return LaunchStep(
            task_id="train_onetrans",
            module="onetrans.cli",
            arguments=["train", "--plan", plan.path, "--model", "onetrans"],
            parallel=True,
            execution_timeout=timedelta(hours=1),
        )

    def lose_the_node():
        deadline = time.monotonic() + 120
        while not (checkpoint.exists() and json.loads(checkpoint.read_bytes())["step"] >= 2):
            assert time.monotonic() < deadline, "the pod saved no checkpoint"
            time.sleep(0.005)
        cluster.kill(cluster.made[0])

    with pytest.raises(AirflowException, match=r"2022-05-04: POD LOST"):
        run(training(), meanwhile=lose_the_node)
    assert not storage.exists(storage.join(plan.model_path("onetrans"), "finished.json")), "it was lost too late"
    run(training(), this_try=2)
    assert "goes on from its own checkpoint, after step" in capsys.readouterr().out
    resumed, reference = (
        load_model(storage.join(made.model_path("onetrans"), "model"))[0].state_dict()
        for made in (plan, Plan.load(str(unbroken)))
    )
    assert resumed.keys() == reference.keys()
    assert all(torch.equal(resumed[name], reference[name]) for name in reference)
