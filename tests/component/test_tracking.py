"""MLflow on a SQLite store: runs that are found again, two processes at once, models without pickle."""

import dataclasses
import json
import os
import re
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from tracked_days import Shop, kept_folder

from onetrans import storage
from onetrans.artifact import load_model, save_model
from onetrans.errors import BadConfigError, NotReadyError, PipelineError
from onetrans.evaluate import evaluate
from onetrans.gate import run_gate
from onetrans.models import build_model
from onetrans.requests import score
from onetrans.tracking import (
    TAG_MODEL_DIGEST,
    TAG_MODEL_ID,
    connect,
    experiment_id,
    find_model_run,
    recorded_step,
    start_day,
    start_model,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Shop.open(tmp_path_factory.mktemp("shop"), days=4)


def test_a_step_that_fails_ends_the_run_of_the_day_and_the_next_attempt_opens_it(shop):
    plan = shop.plan(shop.days[1], seed=23)
    with pytest.raises(NotReadyError, match="is not trained"):
        evaluate(plan, shop.settings)
    day = _client(shop).get_run(plan.mlflow_run_id)
    assert day.info.status == "FAILED"
    assert day.data.tags["error.evaluate"].startswith(f"NotReadyError: onetrans of {plan.ds} is not trained")
    with pytest.raises(NotReadyError, match="run: onetrans evaluate"):
        run_gate(shop.settings, plan)
    assert "error.gate" in _client(shop).get_run(plan.mlflow_run_id).data.tags
    with recorded_step(shop.settings, plan, "gate"):
        assert _client(shop).get_run(plan.mlflow_run_id).info.status == "FAILED"  # the evaluation's error still stands
    with recorded_step(shop.settings, plan, "evaluate"):
        day = _client(shop).get_run(plan.mlflow_run_id)
        assert day.info.status == "RUNNING"
        assert not any(tag.startswith("error") for tag in day.data.tags)


@pytest.fixture(scope="module")
def tracked(shop):
    """A day with both models logged, evaluated and judged."""
    plan = shop.plan(shop.days[2])
    models = shop.save_models(plan)
    shop.write_scores(plan, better=True)
    run_gate(shop.settings, plan)
    return plan, models


def _client(shop):
    return connect(shop.settings.mlflow)


def _artifact(shop, run_id, name):
    return json.loads(Path(_client(shop).download_artifacts(run_id, name)).read_text())


def _python(code, *arguments, **kwargs):
    """Start a process that knows the package and the tests' helpers, nothing of this process's environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "ONETRANS_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs,
    )  # fmt: skip


def _finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def test_a_day_has_one_parent_run_however_often_a_step_asks(shop, tracked):
    plan, _ = tracked
    assert start_day(shop.settings, plan) == start_day(shop.settings, plan) == plan.mlflow_run_id
    run = _client(shop).get_run(plan.mlflow_run_id)
    assert run.data.tags["ds"] == str(plan.ds)
    assert run.data.tags["plan_id"] == plan.plan_id
    assert run.data.tags["snapshot.training_requests"] == str(plan.snapshot_id)
    assert run.data.tags["git_revision"] == plan.git_revision
    assert run.data.tags["audit"] == "3 of 3 days passed"
    assert _artifact(shop, plan.mlflow_run_id, "plan.json")["plan_id"] == plan.plan_id
    audits = _artifact(shop, plan.mlflow_run_id, "audit.json")
    assert list(audits.values()) == [{"passed": True}] * 3
    told = Path(_client(shop).download_artifacts(plan.mlflow_run_id, "audit.csv")).read_text().splitlines()
    assert [line.split(",")[:3] for line in told[1:]] == [
        ["training_requests", str(ds), "passed"] for ds in shop.days[:3]
    ]


def test_the_run_of_a_day_shows_both_models_figures_and_the_verdict(shop, tracked):
    plan, _ = tracked
    parent = _client(shop).get_run(plan.mlflow_run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["decision"] == "promoted"
    assert "onetrans beats dcnv2_din" in parent.data.tags["mlflow.note.content"]
    gate = _artifact(shop, plan.mlflow_run_id, "gate.json")
    assert parent.data.metrics["gate.ctr_auc.low"] == gate["lifts"]["ctr_auc"]["low"]
    assert parent.data.metrics["onetrans.ctr_auc"] == gate["models"]["onetrans"]["ctr_auc"]
    assert parent.data.metrics["truth.ctr_auc"] >= parent.data.metrics["dcnv2_din.ctr_auc"]
    for name in ("onetrans", "dcnv2_din"):
        child = find_model_run(shop.settings, plan, name)
        assert child.data.tags["mlflow.parentRunId"] == plan.mlflow_run_id
        assert child.data.metrics["eval.cvr_auc"] == gate["models"][name]["cvr_auc"]
        assert child.info.status == "FINISHED"


def test_a_training_that_fails_says_so_and_the_next_attempt_goes_on_in_the_same_run(shop, monkeypatch):
    monkeypatch.setattr("onetrans.tracking.SYSTEM_METRICS_S", 0.05)
    plan = shop.plan(shop.days[1])
    with pytest.raises(ZeroDivisionError), start_model(shop.settings, plan, "onetrans") as run:  # noqa: PT012
        run.log_metrics({"loss": 1.0}, step=1)
        raise ZeroDivisionError("division by zero")
    failed = _client(shop).get_run(run.run_id)
    assert (failed.info.status, failed.data.tags["error"]) == ("FAILED", "ZeroDivisionError: division by zero")
    day = _client(shop).get_run(plan.mlflow_run_id)
    assert (day.info.status, day.data.tags["error.onetrans"]) == ("FAILED", "ZeroDivisionError: division by zero")
    with start_model(shop.settings, plan, "dcnv2_din"):  # the other one goes on, and the day stays failed
        assert _client(shop).get_run(plan.mlflow_run_id).info.status == "FAILED"
    with start_model(shop.settings, plan, "onetrans") as again:
        assert again.run_id == run.run_id
        day = _client(shop).get_run(plan.mlflow_run_id)
        assert (day.info.status, "error.onetrans" in day.data.tags) == ("RUNNING", False)
        again.log_params({"config": {"hidden_dim": 32}})
        again.log_tags({"restarted": "the checkpoint is damaged"})
        for step in range(1200):
            again.log_metrics({"loss": 1.0 / (step + 1)}, step=step)
    done = _client(shop).get_run(run.run_id)
    assert done.info.status == "FINISHED"
    assert "error" not in done.data.tags
    assert done.data.params["config.hidden_dim"] == "32"
    assert done.data.tags["restarted"] == "the checkpoint is damaged"
    assert 0 <= done.data.metrics["system/cpu_utilization_percentage"] <= 100
    assert done.data.metrics["system/system_memory_usage_megabytes"] > 100
    curve = _client(shop).get_metric_history(run.run_id, "loss")
    assert [m.step for m in curve if m.value < 1.0] == list(range(1, 1200))


def test_the_logged_model_has_no_pickle_and_carries_signature_example_and_requirements(shop, tracked):
    plan, _ = tracked
    model_id = find_model_run(shop.settings, plan, "onetrans").data.tags[TAG_MODEL_ID]
    folder = kept_folder(shop.settings.mlflow, model_id, "model").parents[1]
    kinds = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".py", ".yaml", ".txt", ""}
    assert {path.name for path in folder.rglob("*") if path.suffix == "" and path.is_file()} <= {
        "MLmodel",
        "registered_model_meta",
    }
    described = (folder / "MLmodel").read_text()
    assert "python_model.pkl" not in described
    assert "mlflow.pyfunc.loaders.code_model" in described
    assert json.loads((folder / "input_example.json").read_text())["columns"][:2] == ["request_id", "ts"]
    requirements = (folder / "requirements.txt").read_text().split()
    assert any(line.startswith("onetrans==") for line in requirements)
    assert f"torch=={torch.__version__.split('+')[0]}" in {line.split("+")[0] for line in requirements}


def test_the_example_answers_as_it_does_over_http(shop, tracked):
    """The way a scoring server reads JSON keeps 64-bit hashes and nulls whole."""
    import mlflow
    from mlflow.pyfunc.scoring_server import infer_and_parse_data

    plan, _ = tracked
    model_id = find_model_run(shop.settings, plan, "onetrans").data.tags[TAG_MODEL_ID]
    folder = kept_folder(shop.settings.mlflow, model_id, "model").parents[1]
    model = mlflow.pyfunc.load_model(f"models:/{model_id}")
    body = json.loads((folder / "serving_input_example.json").read_text())
    answer = model.predict(infer_and_parse_data(body, model.metadata.get_input_schema())).to_dict("records")
    kept = json.loads((folder / "artifacts" / "check" / "scores.json").read_text())
    assert answer == [pytest.approx(row, abs=1e-6) for row in kept[: len(answer)]]
    assert answer

    def scores_of(image):
        asked = json.loads((kept_folder(shop.settings.mlflow, model_id, "check") / "requests.json").read_text())[:1]
        for candidate in asked[0]["candidates"]:
            candidate["image"] = image
        sent = {"dataframe_records": json.loads(json.dumps(asked))}
        return model.predict(infer_and_parse_data(sent, model.metadata.get_input_schema()))["ctr"].tolist()

    assert scores_of([3, 0, -4, 0]) == scores_of([3.0, 0.0, -4.0, 0.0]) != scores_of(None)


def test_models_loaded_in_another_process_score_the_fixed_batch_as_the_trained_ones_did(shop, tracked):
    plan, models = tracked
    ids = [find_model_run(shop.settings, plan, name).data.tags[TAG_MODEL_ID] for name in models]
    batches = [kept_folder(shop.settings.mlflow, model_id, "check") / "requests.json" for model_id in ids]
    out, _ = _finish(
        _python(
            """
            import json, sys, mlflow, pandas
            mlflow.set_tracking_uri(sys.argv[1])
            for model_id, batch in zip(sys.argv[2:4], sys.argv[4:6]):
                model = mlflow.pyfunc.load_model(f"models:/{model_id}")
                answer = model.predict(pandas.DataFrame(json.load(open(batch))))
                print(json.dumps(answer.to_dict("list")))
            """,
            shop.settings.mlflow.tracking_uri, *ids, *batches,
            cwd=shop.settings.mlflow.artifacts,
        )
    )  # fmt: skip
    for name, batch, line in zip(models, batches, out.splitlines()[-2:], strict=True):
        answer, expected = json.loads(line), score(models[name], json.loads(batch.read_text())).to_pydict()
        assert answer["item_id"] == expected["item_id"]
        assert len(answer["item_id"]) >= 8
        for task in ("ctr", "cvr"):
            assert answer[task] == pytest.approx(expected[task], abs=1e-6)


def test_logging_the_same_model_again_adds_nothing(shop, tracked):
    plan, models = tracked
    before = find_model_run(shop.settings, plan, "onetrans").data.tags[TAG_MODEL_ID]
    with start_model(shop.settings, plan, "onetrans") as run:
        again = run.log_model(models["onetrans"], storage.join(plan.model_path("onetrans"), "model"))
    assert again == before
    logged = _client(shop).search_logged_models([experiment_id(shop.settings.mlflow)])
    assert [m.model_id for m in logged if m.source_run_id == run.run_id] == [before]


def test_a_saved_model_that_is_not_the_trained_one_is_not_accepted(shop):
    plan = shop.plan(shop.days[1], seed=99)
    config = plan.models["onetrans"].config
    trained, other = (build_model(config, plan.schema).eval() for _ in range(2))
    folder = storage.join(plan.model_path("onetrans"), "model")
    save_model(folder, other, plan.schema, config)
    with (
        pytest.raises(PipelineError, match=r"differs from the trained one by .* on 8 requests"),
        start_model(shop.settings, plan, "onetrans") as run,
    ):
        run.log_model(trained, folder)
    tags = _client(shop).get_run(run.run_id).data.tags
    assert TAG_MODEL_DIGEST not in tags
    assert tags["error"].startswith("PipelineError: onetrans of")
    with start_model(shop.settings, plan, "onetrans") as run:
        run.log_model(load_model(folder)[0], folder)
    assert TAG_MODEL_ID in _client(shop).get_run(run.run_id).data.tags


def test_artifacts_may_lie_in_a_folder_of_any_name(shop, tmp_path):
    root = tmp_path / "My Projects é 5%20 #1"
    settings = dataclasses.replace(shop.settings.mlflow, experiment="oddly named", artifacts=str(root))
    client = connect(settings)
    run = client.create_run(experiment_id(settings)).info
    client.log_text(run.run_id, "found", "a b.txt")
    assert (root / run.run_id / "artifacts" / "a b.txt").read_text() == "found"
    assert [path.name for path in tmp_path.iterdir()] == [root.name]


_TRAIN_AND_LOG = """
    import socket, sys
    from pathlib import Path
    attempts = []
    def refuse(self, address):
        attempts.append(address)
        raise OSError("no network here")
    socket.socket.connect = socket.socket.connect_ex = refuse

    from worlds import settings_in
    from onetrans.plan import Plan
    from onetrans.tracking import start_model
    root, path, name = sys.argv[1:]
    with start_model(settings_in(Path(root)), Plan.load(path), name) as run:
        run.log_params({"name": name})
        for step in range(60):
            run.log_metrics({"loss": 1.0, "norm": 2.0}, step=step)
            run.flush()
    assert not attempts, attempts
"""


def test_two_trainings_make_and_write_one_store_at_the_same_time_quietly_and_offline(tmp_path):
    """Connections are refused and counted, also those whose failure a library would swallow."""
    shop = Shop.open(tmp_path, days=2)
    plan = shop.plan(shop.days[1], track=False)
    assert not (tmp_path / "mlflow.db").exists()
    together = [_python(_TRAIN_AND_LOG, tmp_path, plan.path, name) for name in plan.models]
    errors = [_finish(process)[1] for process in together]
    link = re.compile(r"see: run [0-9a-f]{32} of experiment onetrans in MLflow\n")
    assert all(link.fullmatch(error) for error in errors), f"a task's log holds nothing but the link: {errors}"
    client = _client(shop)
    runs = client.search_runs([experiment_id(shop.settings.mlflow)])
    kinds = sorted(run.data.tags["onetrans.kind"] for run in runs)
    assert kinds == ["day", "model", "model"]
    parent = next(run for run in runs if run.data.tags["onetrans.kind"] == "day")
    for name in plan.models:
        child = find_model_run(shop.settings, plan, name)
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert [len(client.get_metric_history(child.info.run_id, metric)) for metric in ("loss", "norm")] == [60, 60]


def test_a_store_that_is_locked_for_a_while_is_waited_for(shop, tracked):
    plan, _ = tracked
    file = shop.settings.mlflow.tracking_uri.removeprefix("sqlite:///")
    other = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(1.5, lambda: other.execute("ROLLBACK"))
    release.start()
    with start_model(shop.settings, plan, "dcnv2_din") as run:
        run.log_metrics({"patience": 1.0}, step=7)
    release.join()
    other.close()
    assert _client(shop).get_run(run.run_id).data.metrics["patience"] == 1.0


def test_a_deleted_experiment_is_named_with_the_way_out(shop, tracked):
    gone = dataclasses.replace(shop.settings.mlflow, experiment="gone")
    connect(gone).delete_experiment(experiment_id(gone))
    with pytest.raises(BadConfigError, match="experiment 'gone' was deleted; restore it with"):
        experiment_id(gone)
