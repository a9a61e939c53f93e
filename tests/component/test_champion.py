"""The champion as an opponent: scored on the candidate's rows, or skipped or refused with the reason; never ignored."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tracked_days import SCHEMA, Shop, kept_folder

from onetrans import storage
from onetrans.artifact import load_model, save_model
from onetrans.errors import BadDataError, NotReadyError
from onetrans.evaluate import compare_again, evaluate, score_files
from onetrans.gate import run_gate
from onetrans.models import build_model
from onetrans.plan import FINISHED_FILE, decision_in
from onetrans.registry import CHAMPION, Registry, promote
from onetrans.report import report
from onetrans.schema import Feature
from onetrans.scores import champion_of, read_scores
from onetrans.tracking import TAG_FORCED, TAG_MODEL_ID, start_model
from onetrans.trial import results_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return Shop.open(tmp_path_factory.mktemp("shop"), days=5)


@pytest.fixture(scope="module")
def days(base):
    """Judged candidates of two days, and one more of the second day; each is better than its baseline."""
    return {
        "first": base.candidate(base.days[2]),
        "second": base.candidate(base.days[3]),
        "other": base.candidate(base.days[3], seed=5),
    }


@pytest.fixture
def shop(base, request):
    """The same days with a registered model of its own."""
    mlflow = dataclasses.replace(base.settings.mlflow, registered_model=request.node.name)
    return Shop(dataclasses.replace(base.settings, mlflow=mlflow), base.days)


def _finish(plan):
    for name in plan.models:
        storage.write_json(storage.join(plan.model_path(name), FINISHED_FILE), {})


def _promote(shop, plan, **options):
    storage.delete_file(storage.join(plan.path, "promotion.json"))
    return promote(shop.settings, plan, **options)


def _evaluate(shop, plan):
    """Score a day for real; what other tests wrote there is put back."""
    _finish(plan)
    metrics = evaluate(plan, shop.settings)
    table, _ = read_scores(plan, results_folder(shop.settings, plan))
    return metrics, table, champion_of(table)


@pytest.fixture(autouse=True)
def _scores_as_they_were(shop, days):
    yield
    for plan in days.values():
        shop.write_scores(plan, better=True)
        run_gate(shop.settings, plan)


def test_the_champion_scores_the_same_rows_and_the_file_says_which_version(shop, days):
    _promote(shop, days["first"])
    metrics, table, record = _evaluate(shop, days["second"])
    assert (record.state, record.version, record.ds) == ("scored", "1", str(days["first"].ds))
    assert metrics["champion_version"] == "1"
    assert metrics["champion"]["rows"] == metrics["onetrans"]["rows"] == table.num_rows
    model, schema, _ = load_model(storage.join(days["first"].model_path("onetrans"), "model"))
    own = score_files(days["second"].evaluation_files, schema, 64, {"m": model}, shop.settings, "test")
    np.testing.assert_allclose(own["m_ctr"].to_numpy(), table["champion_ctr"].to_numpy(), atol=1e-6)
    assert not np.allclose(table["champion_cvr"].to_numpy(), table["onetrans_cvr"].to_numpy())
    again = compare_again(days["second"], shop.settings)
    assert again["champion"] == metrics["champion"]


def test_it_is_skipped_with_the_reason_where_there_is_nothing_fair_to_compare(shop, days):
    assert _evaluate(shop, days["other"])[2].state == "none"
    _promote(shop, days["second"])
    itself = _evaluate(shop, days["second"])[2]
    assert (itself.state, itself.note) == ("candidate", "the candidate is the champion already, version 1")
    later = _evaluate(shop, days["first"])[2]
    assert later.state == "later"
    assert "has seen the rows of" in later.note
    off = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="off"))
    assert _evaluate(dataclasses.replace(shop, settings=off), days["first"])[2].state == "off"
    untracked = dataclasses.replace(days["first"], mlflow_run_id="")
    metrics, table, record = _evaluate(shop, untracked)
    assert record.state == "untracked"
    assert "champion" not in metrics
    assert "champion_ctr" not in table.column_names


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(storage.local_path(folder)).iterdir() if path.is_file()}


@pytest.mark.parametrize("mode", ["dry_run", "off"])
def test_a_trial_of_a_decided_day_leaves_its_record(shop, days, mode):
    """Also where it would decide otherwise: the champion is this very model by now, so nothing is compared with it."""
    plan = days["second"]
    promotion = _promote(shop, plan)
    _finish(plan)
    client = Registry(shop.settings.mlflow).client
    record, run = _files(plan.path), client.get_run(plan.mlflow_run_id).data
    trial = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode=mode))

    evaluate(plan, trial)
    verdict = run_gate(trial, plan)
    told = promote(trial, plan)

    assert _files(plan.path) == record
    found = _files(storage.join(plan.path, "trial", mode))
    assert set(found) == {"scores.parquet", "metrics.json", "gate.json", "gate.html"}
    assert (json.loads(found["gate.json"])["mode"], verdict["verdict"]) == (mode, "declined")
    after = client.get_run(plan.mlflow_run_id).data
    assert (after.tags, after.metrics) == (run.tags, run.metrics)
    kept = {file.path for file in client.list_artifacts(plan.mlflow_run_id, f"trial/{mode}")}
    assert kept == {f"trial/{mode}/{name}" for name in ("metrics.json", "gate.json", "gate.html")}
    assert (told["decision"], told["version"]) == ("promoted", promotion["version"])
    assert told["reason"].startswith(f"gate.mode = {mode} leaves what was decided at {promotion['finished_at']} (")
    assert verdict["reason"] in told["reason"]

    assert promote(shop.settings, plan) == promotion, "the decision stands when the gate is enabled again"

    storage.delete_tree(storage.join(plan.path, "trial"))
    assert run_gate(trial, plan)["rows"] == verdict["rows"], "without scores of its own, it judges the decision's"
    assert _files(plan.path) == record
    evaluate(plan, shop.settings)
    assert not Path(storage.local_path(storage.join(plan.path, "trial"))).exists(), "they were of other scores"


def test_a_trial_with_another_plan_leaves_the_day_to_the_one_that_decided_it(shop, days):
    """Another preset, fresh weights or tables that were built again make another plan."""
    decided, other = days["second"], days["other"]
    storage.delete_file(storage.join(other.path, "promotion.json"))
    _promote(shop, decided)
    _finish(other)
    dry = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="dry_run"))
    record, client = _files(decided.path), Registry(shop.settings.mlflow).client
    run = client.get_run(decided.mlflow_run_id).data
    client.update_run(other.mlflow_run_id, status="RUNNING")
    evaluate(other, dry)
    assert run_gate(dry, other)["mode"] == "dry_run"
    told = promote(dry, other)
    assert _files(decided.path) == record
    assert client.get_run(decided.mlflow_run_id).data.tags == run.tags
    assert client.get_run(other.mlflow_run_id).info.status == "FINISHED", "it is a run of its own, with its figures"
    assert json.loads(_files(other.path)["gate.json"])["mode"] == "dry_run"
    assert (told["decision"], told["plan_id"], told["version"]) == ("promoted", decided.plan_id, "1")
    assert f"by plan {decided.plan_id} (" in told["reason"]
    registry = Registry(shop.settings.mlflow)
    assert [str(version.version) for version in registry.versions()] == ["1"]
    assert registry.aliases()["challenger"] == "1"
    (day,) = report(shop.settings, decided.ds, decided.ds)
    assert (day["plan_id"], day["decision"]) == (decided.plan_id, "promoted")


def test_a_dry_run_that_was_recorded_without_its_mode_is_no_decision(shop, days):
    """Version 0.1.0 wrote the mode into the verdict alone."""
    plan = days["first"]
    dry = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="dry_run"))
    storage.delete_file(storage.join(plan.path, "promotion.json"))
    run_gate(dry, plan)
    path = storage.join(plan.path, "promotion.json")
    storage.write_json(path, {name: value for name, value in promote(dry, plan).items() if name != "mode"})
    assert decision_in(plan.path) is None
    run_gate(shop.settings, plan)
    assert decision_in(plan.path) is not None


def test_a_day_that_a_dry_run_judged_first_is_decided_later(shop, days):
    plan = days["second"]
    _finish(plan)
    storage.delete_file(storage.join(plan.path, "promotion.json"))
    dry = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="dry_run"))
    run_gate(dry, plan)
    assert promote(dry, plan)["decision"] == "declined"
    run_gate(dry, plan)
    assert json.loads(_files(plan.path)["gate.json"])["mode"] == "dry_run", "there is no record to keep"
    run_gate(shop.settings, plan)
    assert promote(shop.settings, plan)["decision"] == "promoted"


def test_a_champion_of_a_smaller_schema_reads_the_features_it_knows(shop, days):
    """The tables have gained features since; the champion reads those it was trained with."""
    fewer = dataclasses.replace(
        SCHEMA, features=tuple(f for f in SCHEMA.features if f.name not in ("image", "hour", "event_author"))
    )
    model = _champion_of(shop, days["first"], fewer)
    metrics, table, record = _evaluate(shop, days["second"])
    assert (record.state, metrics["champion"]["rows"]) == ("scored", metrics["onetrans"]["rows"])
    own = score_files(days["second"].evaluation_files, fewer, 64, {"m": model}, shop.settings, "test")
    for task in ("ctr", "cvr"):
        np.testing.assert_allclose(own[f"m_{task}"].to_numpy(), table[f"champion_{task}"].to_numpy(), atol=1e-6)


def test_a_champion_that_needs_a_feature_which_is_gone_is_never_replaced_by_itself(shop, days):
    more = dataclasses.replace(
        SCHEMA, features=(*SCHEMA.features, Feature("brand", "item", "hashed", "b", hash_size=5))
    )
    _champion_of(shop, days["first"], more)
    _, _, record = _evaluate(shop, days["second"])
    assert record.state == "incomparable"
    assert "champion version 1 cannot score the rows" in record.note
    assert "brand" in record.note
    verdict = run_gate(shop.settings, days["second"])
    assert verdict["verdict"] == "declined"
    assert "champion_comparable" in {c["name"] for c in verdict["criteria"] if not c["passed"]}


def _champion_of(shop, plan, schema):
    """Make a model of another schema the champion; return it."""
    torch.manual_seed(1)
    config = plan.models["onetrans"].config
    model = build_model(config, schema).eval()
    other = shop.plan(plan.ds, seed=sum(map(ord, shop.settings.mlflow.registered_model)))
    folder = storage.join(other.model_path("onetrans"), "model")
    save_model(folder, model, schema, config)
    from onetrans.tracking import TAG_MODEL_DIGEST, folder_digest

    with start_model(shop.settings, other, "onetrans") as run:
        model_id = _log_without_example(run, folder)
    registry = Registry(shop.settings.mlflow)
    tags = {"ds": str(plan.ds), "plan_id": "other", TAG_MODEL_DIGEST: folder_digest(folder)}
    version = registry.register(model_id, run.run_id, tags, "of another schema")
    registry.set_champion(version)
    return model


def _log_without_example(run, folder):
    from onetrans.tracking import experiment_id

    logged = run._client.create_logged_model(experiment_id(run.settings.mlflow), name="onetrans")
    local = storage.local_path(folder).parent / "upload"
    shutil.copytree(storage.local_path(folder), local / "artifacts" / "model")
    run._client.log_model_artifacts(logged.model_id, str(local))
    run._client.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id


def test_a_champion_whose_files_are_gone_stops_the_evaluation_and_the_promotion(shop, days):
    _promote(shop, days["first"])
    registry = Registry(shop.settings.mlflow)
    model_id = registry.by_alias(CHAMPION).tags[TAG_MODEL_ID]
    folder = kept_folder(shop.settings.mlflow, model_id, "model")
    aside = folder.with_name("aside")
    folder.rename(aside)
    try:
        for step in (lambda: _evaluate(shop, days["second"]), lambda: _promote(shop, days["second"])):
            with pytest.raises(BadDataError, match=r"champion version 1 .* cannot be loaded: .*Nothing was promoted"):
                step()
        assert registry.aliases()[CHAMPION] == "1"
        assert len(registry.versions()) == 1
        shutil.copytree(aside, folder)
        weights = next(folder.glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(BadDataError, match="its files are not those that were registered"):
            _evaluate(shop, days["second"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)


def test_a_registry_that_does_not_answer_is_a_refusal_that_may_be_tried_again(shop, days, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow = dataclasses.replace(shop.settings.mlflow, tracking_uri="http://127.0.0.1:9")
    silent = dataclasses.replace(shop.settings, mlflow=mlflow)
    for step in (lambda: promote(silent, days["second"]), lambda: evaluate(days["second"], silent)):
        with pytest.raises(NotReadyError, match=r"http://127.0.0.1:9 does not answer .* nothing was promoted"):
            step()


def test_a_champion_that_moved_is_compared_with_before_the_swap(shop, days):
    """Two candidates of a day are judged without a champion; the second meets the first as champion at its turn."""
    for plan in (days["second"], days["other"]):
        _evaluate(shop, plan)
        shop.write_scores(plan, better=True)
        assert run_gate(shop.settings, plan)["champion"]["version"] is None
    assert _promote(shop, days["other"])["decision"] == "promoted"
    promotion = _promote(shop, days["second"])
    assert (promotion["compared_with"]["state"], promotion["compared_with"]["version"]) == ("scored", "1")
    gate = storage.read_json(storage.join(days["second"].path, "gate.json"))
    assert gate["comparisons"]["onetrans over champion"]["ctr_auc"]["lift"] > 0
    assert promotion["decision"] == "promoted"
    assert promotion["gate_decided_at"] == gate["decided_at"]


def test_a_refusal_for_the_sake_of_a_champion_that_has_left_is_looked_at_again(shop, days):
    _promote(shop, days["first"])
    _evaluate(shop, days["second"])
    shop.write_scores(days["second"], better=True)
    run_gate(shop.settings, days["second"])
    path = storage.join(days["second"].path, "gate.json")
    verdict = storage.read_json(path)
    for criterion in verdict["criteria"]:
        criterion["passed"] = "champion" not in criterion["name"]
    lost = {"name": "ctr_auc_not_below_champion", "passed": False}
    left = verdict["champion"] | {"state": "scored", "version": "9", "digest": "of a version that was rolled back"}
    declined = {"verdict": "declined", "passed": False, "champion": left, "criteria": [*verdict["criteria"], lost]}
    storage.write_json(path, verdict | declined)
    promotion = _promote(shop, days["second"])
    assert (promotion["decision"], promotion["compared_with"]["version"]) == ("promoted", "1")


def test_a_candidate_worse_than_the_champion_it_met_at_the_swap_is_refused(shop, days, monkeypatch):
    _promote(shop, days["first"])
    shop.write_scores(days["second"], better=True)
    assert run_gate(shop.settings, days["second"])["verdict"] == "promoted"

    def knows_all(plan, settings):
        """Stand in for the champion's forward pass alone: its scores become the truth, the candidate's are blurred."""
        table, _ = read_scores(plan)
        from onetrans.champion import current_champion
        from onetrans.scores import with_champion, write_scores

        for task in ("ctr", "cvr"):
            truth = table[f"true_{task}"].to_numpy()
            table = table.append_column(f"champion_{task}", pa.array(truth))
            blurred = 0.5 * truth + 0.5 * np.random.default_rng(3).random(truth.shape[0])
            table = table.set_column(
                table.column_names.index(f"onetrans_{task}"), f"onetrans_{task}", pa.array(blurred)
            )
        write_scores(plan.path, with_champion(table, current_champion(settings, plan).record))

    monkeypatch.setattr("onetrans.evaluate.compare_again", knows_all)
    promotion = _promote(shop, days["second"])
    assert (promotion["decision"], promotion["champion_after"]) == ("declined", "1")
    assert "against champion 1's" in promotion["reason"]


def test_an_older_day_may_be_forced_with_a_reason_which_is_recorded(shop, days):
    _promote(shop, days["second"])
    assert _promote(shop, days["first"])["decision"] == "held"
    forced = promote(shop.settings, days["first"], force="the later day's log was wrong")
    assert (forced["decision"], forced["forced"]) == ("promoted", "the later day's log was wrong")
    assert forced["compared_with"]["state"] == "later"
    registry = Registry(shop.settings.mlflow)
    champion = registry.by_alias(CHAMPION)
    assert champion.tags["ds"] == str(days["first"].ds)
    assert champion.tags[TAG_FORCED].endswith(": the later day's log was wrong")
    assert json.loads(storage.read_bytes(storage.join(days["first"].path, "promotion.json"))) == forced
