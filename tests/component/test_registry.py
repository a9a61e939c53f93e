"""The registry: what becomes champion, what never does, and the way back; on SQLite and on a server."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tracked_days import Shop, kept_folder

from onetrans import cli, progress, storage
from onetrans.commands.registry import describe, verify, versions_table
from onetrans.errors import EXIT_BAD_DATA, BadConfigError, BadDataError, NotReadyError
from onetrans.gate import run_gate
from onetrans.registry import CHALLENGER, CHAMPION, PREVIOUS, TAG_ROLLED_BACK, Registry, came_to_serve, promote
from onetrans.report import report, table
from onetrans.settings import as_environment
from onetrans.tracking import TAG_FORCED, TAG_MODEL_DIGEST, TAG_MODEL_ID, one_at_a_time, see_run
from tests import mlflow_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a real MLflow server on loopback, and the folder it keeps artifacts in."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server.running(folder) as server:
        yield server.name, folder / "artifacts"


@pytest.fixture(scope="module", params=["sqlite", "server"])
def shop(tmp_path_factory, request):
    """Every test runs against a SQLite store and against a server."""
    shop = Shop.open(tmp_path_factory.mktemp("shop"), days=6)
    if request.param == "sqlite":
        return shop
    address, _ = request.getfixturevalue("server")
    mlflow = dataclasses.replace(shop.settings.mlflow, tracking_uri=address)
    return Shop(dataclasses.replace(shop.settings, mlflow=mlflow), shop.days)


@pytest.fixture
def registry(shop, request):
    """A registered model of its own for each test; runs and models are shared."""
    return _registry(shop, request.node.name)


def _registry(shop, name):
    return Registry(dataclasses.replace(shop.settings.mlflow, registered_model=name.replace("[", "-").strip("]")))


def _promote(shop, registry, plan, force=""):
    settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
    _file(plan, "promotion.json").unlink(missing_ok=True)  # another test may have promoted this plan elsewhere
    return promote(settings, plan, force)


def _file(plan, name):
    return storage.local_path(storage.join(plan.path, name))


@pytest.fixture(scope="module")
def better(shop):
    """Candidates of three days that the gate promotes, by day number."""
    return {number: shop.candidate(shop.days[number], better=True) for number in (2, 3, 4)}


@pytest.fixture(scope="module")
def worse(shop):
    """A candidate of the last day that the gate declines."""
    return shop.candidate(shop.days[5], better=False)


def _champion(registry):
    version = registry.by_alias(CHAMPION)
    return version and str(version.version)


def test_a_winner_becomes_champion_with_its_provenance(shop, registry, better):
    plan = better[2]
    promotion = _promote(shop, registry, plan)
    assert (promotion["decision"], promotion["version"], promotion["champion_after"]) == ("promoted", "1", "1")
    assert promotion["aliases"] == [CHALLENGER, CHAMPION]
    assert json.loads(_file(plan, "promotion.json").read_text()) == promotion
    version = registry.by_alias(CHAMPION)
    assert version.tags["ds"] == str(plan.ds)
    assert version.tags["plan_id"] == plan.plan_id
    assert version.tags["gate_verdict"] == "promoted"
    assert version.tags["parent_version"] == "none: fresh weights"
    assert version.tags["snapshot.training_requests"] == str(plan.snapshot_id)
    assert version.tags["git_revision"] == plan.git_revision
    assert f"Evaluated on {plan.ds}" in version.description
    assert "| dcnv2_din |" in version.description
    parent = registry.client.get_run(plan.mlflow_run_id)
    assert parent.data.tags["registered_version"] == "1"


def test_a_step_names_the_run_where_people_see_it(shop, registry, better, capsys):
    _promote(shop, registry, better[2])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("see: ")]
    if registry.settings.tracking_uri.startswith("http"):
        experiment = registry.client.get_run(better[2].mlflow_run_id).info.experiment_id
        here = f"{registry.settings.tracking_uri}/#/experiments/{experiment}/runs/{better[2].mlflow_run_id}"
        assert line == f"see: {here}"
    else:
        assert line == f"see: run {better[2].mlflow_run_id} of experiment {registry.settings.experiment} in MLflow"
    see_run(dataclasses.replace(registry.settings, address="https://me:password@mlflow.example.com/"), "abc")
    assert capsys.readouterr().err.startswith("see: https://mlflow.example.com/#/experiments/")


def test_a_repeated_step_registers_nothing_twice(shop, registry, better):
    settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
    first = _promote(shop, registry, better[2])
    _promote(shop, registry, better[3])
    repeated = promote(settings, better[2])
    assert repeated == promote(settings, better[2])
    assert (repeated["decision"], repeated["champion_after"]) == ("promoted", "2")
    assert "another has taken its place since" in repeated["reason"]
    _file(better[2], "promotion.json").unlink()  # as after a crash between the registry and the file
    assert promote(settings, better[2])["version"] == first["version"]
    assert [str(v.version) for v in registry.versions()] == ["2", "1"]
    assert _champion(registry) == "2"
    again = _promote(shop, registry, better[3])
    assert (again["decision"], again["champion_after"]) == ("promoted", "2")
    assert again["reason"].startswith("is the champion since ")
    assert again["reason"].endswith("; nothing was changed")


def test_one_that_is_declined_is_challenger_and_the_champion_stays(shop, registry, better, worse):
    _promote(shop, registry, better[3])
    promotion = _promote(shop, registry, worse)
    assert (promotion["decision"], promotion["verdict"]) == ("declined", "declined")
    assert promotion["reason"].startswith("Not promoted")
    assert registry.aliases() == {CHAMPION: "1", CHALLENGER: "2"}


def test_an_older_day_never_replaces_a_later_champion(shop, registry, better):
    _promote(shop, registry, better[4])
    backfilled = _promote(shop, registry, better[2])
    assert (backfilled["verdict"], backfilled["decision"]) == ("promoted", "held")
    assert backfilled["reason"].startswith(f"champion 1 was trained for a later day, {better[4].ds}; to replace it")
    assert registry.aliases() == {CHAMPION: "1", CHALLENGER: "1"}
    # Whatever a person looks at says so: the page, the run, the list of versions.
    page = _file(better[2], "gate.html").read_text()
    assert ">PASSED, NOT PROMOTED</span>" in page
    assert ">PROMOTED</span>" not in page
    assert page.count("Passed, not promoted: champion 1 was trained for a later day") == 1
    run = registry.client.get_run(better[2].mlflow_run_id)
    assert run.data.tags["decision"] == "held"
    assert "held: champion 1 was trained for a later day" in run.data.tags["mlflow.note.content"]
    assert "held" in versions_table([describe(registry, registry.version("2"))])


def test_the_champion_is_read_right_before_the_swap(shop, registry, better):
    """A backfill waits for its turn; the promotion it waits for puts a later day there first."""
    begun = time.monotonic()
    _promote(shop, registry, better[4])
    one_takes = time.monotonic() - begun
    registry.client.delete_registered_model_alias(registry.name, CHAMPION)
    with ThreadPoolExecutor(1) as other:
        with one_at_a_time(registry.settings.tracking_uri):
            waiting = other.submit(_promote, shop, registry, better[2])
            time.sleep(2 * one_takes)
            assert not waiting.done()
            registry.client.set_registered_model_alias(registry.name, CHAMPION, "1")
        promotion = waiting.result(timeout=60)
    assert (promotion["decision"], promotion["champion_after"]) == ("held", "1")


def test_rolling_back_walks_back_and_the_pipeline_does_not_undo_it(shop, registry, better):
    for plan in better.values():
        _promote(shop, registry, plan)
    assert registry.aliases() == {CHAMPION: "3", CHALLENGER: "3", PREVIOUS: "2"}
    left, now = registry.roll_back("conversions fell")
    assert (str(left.version), str(now.version)) == ("3", "2")
    assert left.tags[TAG_ROLLED_BACK].endswith(": conversions fell")
    since, person = came_to_serve(now.tags)
    assert since >= left.tags["promoted_at"] >= now.tags["promoted_at"]  # whole seconds
    assert person == "version 3 was rolled back: conversions fell"
    assert registry.aliases() == {CHAMPION: "2", CHALLENGER: "3", PREVIOUS: "1"}

    settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
    for again in (
        promote(settings, better[4]),
        promote(settings, better[4], "I know better"),
        _promote(shop, registry, better[4]),
    ):
        assert (again["decision"], again["champion_after"], again["forced"]) == ("held", "2", None)
        assert "a person rolled this version back" in again["reason"]
        assert "onetrans registry promote --version 3" in again["reason"]
    assert _champion(registry) == "2"

    registry.promote_by_hand("3", "it was the campaign")
    assert TAG_ROLLED_BACK not in registry.by_alias(CHAMPION).tags
    assert came_to_serve(registry.by_alias(CHAMPION).tags)[1] == "it was the campaign"
    assert _promote(shop, registry, better[4])["decision"] == "promoted"
    registry.roll_back("it was not")
    registry.client.set_registered_model_alias(registry.name, PREVIOUS, "1")

    registry.roll_back("this one too")
    assert registry.aliases() == {CHAMPION: "1", CHALLENGER: "3"}
    with pytest.raises(BadConfigError, match="no champion before version 1 that was not rolled back"):
        registry.roll_back("once more")


def test_a_rollback_never_returns_to_what_was_rolled_back(shop, registry, better):
    for plan in better.values():
        _promote(shop, registry, plan)
    registry.promote_by_hand("1", "the older one was better")
    assert registry.version("3").tags[TAG_ROLLED_BACK].endswith("for version 1: the older one was better")
    # The day of the version that was set aside is cleared and judged again: it stays set aside.
    _file(better[4], "promotion.json").unlink()
    run_gate(shop.settings, better[4])
    assert _promote(shop, registry, better[4])["decision"] == "held"
    left, now = registry.roll_back("it was not")
    assert (str(left.version), str(now.version)) == ("1", "2")
    with pytest.raises(BadConfigError, match="no champion before version 2 that was not rolled back"):
        registry.roll_back("nor this")
    assert _champion(registry) == "2"


@pytest.mark.parametrize("kill_at", ["set_model_version_tag", "delete_registered_model_alias",
                                     "set_registered_model_alias"])  # fmt: skip
def test_a_rollback_that_is_killed_is_repeated(shop, registry, better, monkeypatch, kill_at):
    for number in (2, 3):
        _promote(shop, registry, better[number])

    def dies(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(registry.client), kill_at, dies)
        with pytest.raises(KeyboardInterrupt):
            registry.roll_back("conversions fell")
    assert _champion(registry) == "2", "the champion moves last"
    left, now = registry.roll_back("conversions fell")
    assert (str(left.version), str(now.version)) == ("2", "1")
    assert TAG_ROLLED_BACK not in now.tags
    assert registry.aliases() == {CHAMPION: "1", CHALLENGER: "2"}


def test_a_promotion_that_is_killed_leaves_a_rollback_its_way(shop, registry, better, monkeypatch):
    for number in (2, 3):
        _promote(shop, registry, better[number])
    real = type(registry.client).set_registered_model_alias

    def dies(client, name, alias, version):
        if alias == CHAMPION:
            raise KeyboardInterrupt
        real(client, name, alias, version)

    with monkeypatch.context() as patched:
        patched.setattr(type(registry.client), "set_registered_model_alias", dies)
        with pytest.raises(KeyboardInterrupt):
            _promote(shop, registry, better[4])
    assert registry.aliases() == {CHAMPION: "2", PREVIOUS: "2", CHALLENGER: "3"}
    left, now = registry.roll_back("conversions fell")
    assert (str(left.version), str(now.version)) == ("2", "1")


def test_a_rollback_to_files_that_are_gone_moves_nothing(shop, registry, better):
    for number in (2, 3):
        _promote(shop, registry, better[number])
    registry.client.set_model_version_tag(registry.name, "1", TAG_MODEL_DIGEST, "0" * 64)
    with pytest.raises(BadDataError, match=r"version 1: its files are not those that were registered .* stays\. Name"):
        registry.roll_back("conversions fell")
    registry.client.set_model_version_tag(registry.name, "1", TAG_MODEL_ID, "m-" + "0" * 32)
    with pytest.raises(BadDataError, match=r"version 1: its files cannot be read"):
        registry.roll_back("conversions fell")
    assert _champion(registry) == "2"
    assert TAG_ROLLED_BACK not in registry.version("2").tags
    with pytest.raises(BadDataError, match="version 1: its files cannot be read"):
        registry.promote_by_hand("1", "it was better")


def test_a_person_may_promote_what_the_gate_declined_and_has_to_say_why(shop, registry, better, worse):
    _promote(shop, registry, better[3])
    _promote(shop, registry, worse)
    with pytest.raises(BadConfigError, match="a reason is needed"):
        registry.promote_by_hand("2", " ")
    with pytest.raises(BadConfigError, match="has no version 7"):
        registry.promote_by_hand("7", "typo")
    version = registry.promote_by_hand("2", "an experiment")
    assert version.tags["promoted_by_hand"].endswith(": an experiment")
    assert registry.aliases() == {CHAMPION: "2", CHALLENGER: "2", PREVIOUS: "1"}


def test_a_reason_promotes_what_the_gate_declined_once(shop, registry, better, worse):
    _promote(shop, registry, better[3])
    assert _promote(shop, registry, worse)["decision"] == "declined"
    reason = "the baseline was trained on a broken log"
    forced = promote(dataclasses.replace(shop.settings, mlflow=registry.settings), worse, reason)
    assert (forced["verdict"], forced["decision"], forced["forced"]) == ("declined", "promoted", reason)
    assert forced["reason"].startswith(f"forced, though the gate declined it: {reason}. The gate: Not promoted")
    assert registry.aliases() == {CHAMPION: "2", CHALLENGER: "2", PREVIOUS: "1"}
    assert registry.by_alias(CHAMPION).tags[TAG_FORCED].endswith(f": {reason}")
    assert registry.client.get_run(worse.mlflow_run_id).data.tags[TAG_FORCED] == reason

    # Another version takes the place; the forced run is cleared and runs again, with the reason it was given then.
    registry.set_champion(registry.version("1"))
    again = _promote(shop, registry, worse, reason)
    assert (again["decision"], again["forced"], _champion(registry)) == ("held", None, "1")
    assert "it was forced before" in again["reason"]
    registry.promote_by_hand("2", "a second look")
    registry.roll_back("no")
    again = _promote(shop, registry, worse, reason)
    assert (again["decision"], _champion(registry)) == ("held", "1")
    assert "onetrans registry promote --version 2" in again["reason"]


@pytest.mark.parametrize(
    ("kill_at", "against"), [("promoted", "the gate"), ("forced", "the gate"), ("forced", "a later day")]
)
def test_a_forced_promotion_that_is_killed_keeps_its_reason(
    shop, registry, better, worse, monkeypatch, kill_at, against
):
    """The next try finds its version as the champion already."""
    first, plan = (better[3], worse) if against == "the gate" else (better[3], better[2])
    _promote(shop, registry, first)

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Registry, f"tag_{kill_at}", dies)
        with pytest.raises(KeyboardInterrupt):
            _promote(shop, registry, plan, "the log was wrong")
    assert _champion(registry) == "2"
    promoted = registry.version("2").tags.get("promoted_at")
    if kill_at == "promoted":  # a person repeats the step by hand, without the reason
        without = _promote(shop, registry, plan)
        assert without["reason"].startswith("is the champion, though the gate declined it: it was set in MLflow, or by")
        assert "promoted_at" not in registry.version("2").tags
        settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
        assert promote(settings, plan)["forced"] is None
        promotion = promote(settings, plan, "the log was wrong")
    else:
        promotion = _promote(shop, registry, plan, "the log was wrong")
    assert (registry.version("2").tags["promoted_at"] == promoted) is (kill_at == "forced")
    assert (promotion["decision"], promotion["forced"]) == ("promoted", "the log was wrong")
    assert promotion["reason"].startswith("forced, though ")
    assert came_to_serve(registry.by_alias(CHAMPION).tags)[1] == "the log was wrong"
    assert _promote(shop, registry, plan, "the log was wrong")["reason"].endswith("; nothing was changed")
    registry.set_champion(registry.version("1"))
    _promote(shop, registry, plan, "the log was wrong")
    assert _champion(registry) == "1", "it was forced once"


def test_a_promotion_that_is_killed_is_noted_by_the_next_try(shop, registry, better, monkeypatch):
    """Else a later run of its day, with another champion by then, would say that it was held."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "tag_promoted", dies)
        with pytest.raises(KeyboardInterrupt):
            _promote(shop, registry, better[2])
    assert _champion(registry) == "1"
    promotion = _promote(shop, registry, better[2])
    assert (promotion["decision"], promotion["forced"]) == ("promoted", None)
    assert not promotion["reason"].startswith("is the champion")
    _promote(shop, registry, better[3])
    assert _promote(shop, registry, better[2])["reason"].startswith("was promoted at ")


def test_a_champion_of_the_gate_stays_so_when_a_later_verdict_declines_it(shop, registry, better, monkeypatch):
    """A stricter threshold, and the gate is cleared in a run that had a reason for the case that it declines."""
    _promote(shop, registry, better[2], "whatever it says")
    assert came_to_serve(registry.by_alias(CHAMPION).tags)[1] is None
    path = storage.join(better[2].path, "gate.json")
    before = storage.read_bytes(path)
    try:
        later = {"verdict": "declined", "reason": "Not promoted: stricter.", "decided_at": "2999-01-01T00:00:00+00:00"}
        storage.write_json(path, {**json.loads(before), **later})
        again = _promote(shop, registry, better[2], "whatever it says")
    finally:
        storage.write_bytes(path, before)
    assert again["reason"].endswith("; nothing was changed")
    assert came_to_serve(registry.by_alias(CHAMPION).tags)[1] is None


def test_a_champion_of_unknown_day_is_left_alone(shop, registry, better):
    _promote(shop, registry, better[2])
    registry.client.delete_model_version_tag(registry.name, "1", "ds")
    promotion = _promote(shop, registry, better[3])
    assert (promotion["decision"], _champion(registry)) == ("held", "1")
    assert "no tag 'ds'" in promotion["reason"]


def test_dry_run_leaves_the_champion(shop, registry, better):
    _promote(shop, registry, better[2])
    dry = dataclasses.replace(shop.settings, gate=dataclasses.replace(shop.settings.gate, mode="dry_run"))
    _file(better[3], "promotion.json").unlink(missing_ok=True)  # a day that was decided would have a trial
    try:
        run_gate(dry, better[3])
        promotion = _promote(shop, registry, better[3])
    finally:
        run_gate(shop.settings, better[3])
    assert (promotion["decision"], _champion(registry)) == ("declined", "1")
    assert "dry_run" in promotion["reason"]


def test_only_what_was_evaluated_and_judged_is_registered(shop, registry):
    plan = shop.plan(shop.days[1])
    with pytest.raises(NotReadyError, match="onetrans gate --plan"):
        _promote(shop, registry, plan)
    scores = shop.write_scores(plan, better=True)
    run_gate(shop.settings, plan)
    with pytest.raises(NotReadyError, match=r"onetrans of .* is not in MLflow; run: onetrans train"):
        _promote(shop, registry, plan)
    shop.save_models(plan)

    pq.write_table(scores.slice(0, 5), _file(plan, "scores.parquet"))
    with pytest.raises(NotReadyError, match="speaks of other scores"):
        _promote(shop, registry, plan)
    shop.write_scores(plan, better=True)

    weights = next((_file(plan, "onetrans") / "model").glob("*.safetensors"))
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-4] + b"\0\0\0\1")
    with pytest.raises(BadDataError, match="the model in the run folder is not the one that was trained"):
        _promote(shop, registry, plan)
    weights.write_bytes(sound)
    assert registry.versions() == []
    assert _promote(shop, registry, plan)["version"] == "1"


def test_a_plan_without_mlflow_has_nothing_to_register(shop, registry):
    with pytest.raises(BadConfigError, match="made without MLflow"):
        _promote(shop, registry, shop.plan(shop.days[1], track=False, seed=3))


def test_verify_scores_the_batch_kept_with_a_version(shop, registry, better, monkeypatch, capsys):
    _promote(shop, registry, better[2])
    version = registry.by_alias(CHAMPION)
    difference, requests = verify(registry, version)
    assert (difference <= 1e-6, requests) == (True, 8)

    for name, value in as_environment(dataclasses.replace(shop.settings, mlflow=registry.settings)).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["registry", "verify"]) == 0
    if registry.settings.tracking_uri.startswith("http"):
        return  # what is fetched from a server is a copy, so there is nothing to damage
    kept = kept_folder(registry.settings, version.tags[TAG_MODEL_ID], "check") / "scores.json"
    sound = kept.read_text()
    scores = json.loads(sound)
    scores[0]["ctr"] += 0.01
    kept.write_text(json.dumps(scores))
    assert cli.main(["registry", "verify", "--version", "1"]) == EXIT_BAD_DATA
    assert "a probability differs by 0.01" in capsys.readouterr().err
    kept.write_text(sound)

    assert cli.main(["registry", "list"]) == 0
    assert f"{better[2].ds}  {better[2].plan_id}  promoted" in capsys.readouterr().out
    assert cli.main(["registry", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == describe(registry, version)
    assert cli.main(["registry", "show", "--alias", "nobody"]) == 78
    assert "no alias 'nobody'" in capsys.readouterr().err


def test_one_command_in_a_process_of_its_own_rolls_back(shop, registry, better):
    for number in (2, 3):
        _promote(shop, registry, better[number])
    settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
    command = [sys.executable, "-m", "onetrans.cli", "registry", "rollback", "--reason", "too slow"]
    done = subprocess.run(
        command, env={**os.environ, **as_environment(settings)}, capture_output=True, text=True, timeout=240, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{registry.name}: champion is version 1; version 2 was rolled back\n"
    assert registry.aliases() == {CHAMPION: "1", CHALLENGER: "2"}


def test_promotions_and_rollbacks_say_that_they_go_on(shop, registry, better, monkeypatch, capsys, caplog):
    """Each compares the files of a model with its hash, which takes as long as they are large."""
    monkeypatch.setattr(progress, "SAID_AFTER_S", 0.0)
    caplog.set_level(logging.INFO)
    for name, value in as_environment(dataclasses.replace(shop.settings, mlflow=registry.settings)).items():
        monkeypatch.setenv(name, value)
    for number in (2, 3):
        _file(better[number], "promotion.json").unlink(
            missing_ok=True
        )  # another test may have promoted this plan elsewhere
        assert cli.main(["promote", "--plan", better[number].path]) == 0
    assert cli.main(["registry", "rollback", "--reason", "too slow"]) == 0
    assert cli.main(["registry", "promote", "--version", "2", "--reason", "fast enough"]) == 0
    assert "champion is version 2" in capsys.readouterr().out
    ended = [text.partition(": done in ")[0] for text in caplog.messages if ": done in " in text]
    assert ended == [
        f"promotion of {better[2].ds}",
        f"promotion of {better[3].ds}",
        "rolling back",
        "promoting version 2",
    ]


def test_the_report_shows_figures_lift_verdict_and_champion(shop, better, worse):
    registry = Registry(shop.settings.mlflow)
    for plan in (better[4], worse):
        _promote(shop, registry, plan)
    days = report(shop.settings, shop.days[4], shop.days[5] + timedelta(days=1))
    assert [day["decision"] for day in days[:2]] == ["promoted", "declined"]
    assert [day["champion"] for day in days[:2]] == ["1", "1"]
    assert days[2] == {"ds": str(shop.days[5] + timedelta(days=1)), "state": "no run"}
    gate = json.loads(_file(better[4], "gate.json").read_text())
    assert days[0]["models"]["onetrans"]["ctr_auc"] == gate["models"]["onetrans"]["ctr_auc"]
    assert days[0]["lifts"] == gate["lifts"]
    assert days[0]["models"]["truth"]["cvr_auc"] > days[0]["models"]["dcnv2_din"]["cvr_auc"]
    text = table(days)
    assert "promoted: version 1; champion is version 1" in text
    assert "declined (ctr_auc_lift, cvr_auc_lift" in text
    assert f"{gate['lifts']['ctr_auc']['lift']:+.4f}" in text


def test_the_server_keeps_the_artifacts(shop, registry, better, server):
    _promote(shop, registry, better[2])
    if not shop.settings.mlflow.tracking_uri.startswith("http"):
        pytest.skip("a SQLite store has a folder of its own")
    assert any(server[1].rglob("*.safetensors"))
    assert verify(registry, registry.by_alias(CHAMPION))[0] <= 1e-6


def test_promotions_in_several_processes_take_turns(shop, registry, better):
    """Whatever their order, the latest day ends as champion, and each swap names the one it replaced."""
    plans = [better[3], better[4]]
    for plan in plans:
        _file(plan, "promotion.json").unlink(missing_ok=True)
    settings = dataclasses.replace(shop.settings, mlflow=registry.settings)
    environment = {**os.environ, **as_environment(settings)}
    command = [sys.executable, "-m", "onetrans.cli", "promote", "--plan"]
    running = [subprocess.Popen([*command, plan.path], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
               for plan in plans]  # fmt: skip
    assert [process.wait(timeout=240) for process in running] == [0, 0]
    promotions = [json.loads(_file(plan, "promotion.json").read_text()) for plan in plans]
    champion = registry.by_alias(CHAMPION)
    assert champion.tags["ds"] == str(better[4].ds)
    decided = {p["version"]: p for p in promotions if p["decision"] == "promoted"}
    assert decided[str(champion.version)]["champion_before"] == champion.tags.get("replaced")


def test_a_diff_names_what_changed_between_two_versions(shop, registry, better, monkeypatch, capsys):
    for number in (2, 3):
        _promote(shop, registry, better[number])
    for name, value in as_environment(dataclasses.replace(shop.settings, mlflow=registry.settings)).items():
        monkeypatch.setenv(name, value)
    assert cli.main(["registry", "diff", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"] == ["1", "2"]
    assert found["provenance"]["ds"] == [str(better[2].ds), str(better[3].ds)]
    assert found["training"]["train_days"][0] == [str(day) for day in better[2].train_days]
    assert found["features"] == {"added": [], "removed": [], "changed": {}}
    gates = [json.loads(_file(better[n], "gate.json").read_text()) for n in (2, 3)]
    assert found["figures"]["ctr_auc"] == [g["models"]["onetrans"]["ctr_auc"] for g in gates]
    assert cli.main(["registry", "diff", "2", "1"]) == 0
    text = capsys.readouterr().out
    assert f"  ds: {better[3].ds} -> {better[2].ds}" in text
    assert "features:\n  the same" in text
    assert cli.main(["registry", "diff", "9", CHAMPION]) == 78
    assert "has no version 9" in capsys.readouterr().err
