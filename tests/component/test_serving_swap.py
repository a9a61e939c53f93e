"""The champion moves while requests are answered: the new version takes over, a bad one is refused, none fails."""

import json
import threading
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from served import SERVING, running
from tracked_days import SCHEMA, Shop, kept_folder

from onetrans import storage
from onetrans.errors import NotReadyError
from onetrans.registry import Registry, promote
from onetrans.requests import from_rows
from onetrans.serving import OneTransInferenceEngine
from onetrans.serving.app import RankingService
from onetrans.serving.watch import ServedModel
from onetrans.tracking import TAG_MODEL_ID

CHAMPION = "models:/onetrans-ranker@champion"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    opened = Shop.open(tmp_path_factory.mktemp("shop"), days=5)
    return replace(opened, settings=replace(opened.settings, serving=SERVING))


@pytest.fixture(scope="module")
def requests(shop):
    plan = shop.plan(shop.days[2], track=False)
    return from_rows(pq.read_table(storage.local_path(plan.evaluation_files[0]), partitioning=None), SCHEMA)


def test_the_champion_is_followed_without_a_failed_request(shop, requests):
    with pytest.raises(NotReadyError, match="has no alias 'champion' yet: no day was promoted"):
        OneTransInferenceEngine(CHAMPION, shop.settings)
    promote(shop.settings, shop.candidate(shop.days[2]))
    served = ServedModel(CHAMPION, shop.settings)
    first = served.engine
    assert first.source.version == "1"
    assert first.difference < 1e-5
    assert not served.look(), "the alias has not moved"

    candidate = shop.candidate(shop.days[3])
    answers, stop = [], threading.Event()
    kept = {**max(requests, key=lambda request: sum(map(len, request["sequences"].values()))), "user_id": "kept"}
    with running(RankingService(served)) as client:
        before = client.post("/v1/rank", json=kept).json()
        assert first.cache.get("kept") is not None

        def ask(number):
            while not stop.is_set():
                request = {**requests[number % len(requests)], "user_id": "u"}
                answers.append(client.post("/v1/rank", json=request))

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in asking:
            thread.start()
        promote(shop.settings, candidate)
        assert served.look()
        after = client.post("/v1/rank", json=kept).json()
        stop.set()
        for thread in asking:
            thread.join()
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.json()["model_version"] for answer in answers} == {"1", "2"}
        assert after["model_version"] == "2"
        ready = client.get("/readyz").json()
        assert (ready["version"], ready["day"]) == ("2", str(shop.days[3]))
        assert f'onetrans_model{{day="{shop.days[3]}",version="2"}} 1' in client.get("/metrics").text
    # What the first version kept of a user is not used by the second, though the events came in the same text.
    offline = OneTransInferenceEngine("models:/onetrans-ranker/2", shop.settings).rank(kept)
    of_first = {item["index"]: item["ctr"] for item in before["results"][0]["items"]}
    for ours, theirs in zip(after["results"][0]["items"], offline, strict=True):
        assert ours["ctr"] == pytest.approx(theirs["ctr"], abs=1e-5)
    assert max(abs(item["ctr"] - of_first[item["index"]]) for item in offline) > 1e-4, "the versions differ"

    # Addresses of one and the same model
    model_id = Registry(shop.settings.mlflow).version("2").tags[TAG_MODEL_ID]
    run_id = Registry(shop.settings.mlflow).version("2").run_id
    folder = str(kept_folder(shop.settings.mlflow, model_id, "model"))
    for address in (f"models:/{model_id}", f"runs:/{run_id}", folder):
        engine = OneTransInferenceEngine(address, shop.settings)
        assert engine.rank(kept)[0]["ctr"] == pytest.approx(offline[0]["ctr"], abs=1e-6)

    # A version whose scores are not those that were logged, then one that does not load, then a good one
    third = shop.candidate(shop.days[4])
    promote(shop.settings, third)
    version = Registry(shop.settings.mlflow).version("3")
    check = kept_folder(shop.settings.mlflow, version.tags[TAG_MODEL_ID], "check") / "scores.json"
    good = check.read_text()
    scores = json.loads(good)
    scores[0]["ctr"] += 0.01
    check.write_text(json.dumps(scores))
    assert not served.look()
    assert (served.engine.source.version, served.refused, served.refusals) == ("2", "3", 1)
    assert not served.look()
    assert served.refusals == 1, "it is not tried again and again"
    check.write_text(good)
    # A person goes back, mends the files, and promotes it again: it is tried again.
    registry = Registry(shop.settings.mlflow)
    registry.roll_back("its check fails")
    assert not served.look()
    assert (served.engine.source.version, served.refused) == ("2", None)
    registry.promote_by_hand("3", "its files are mended")
    weights = next(kept_folder(shop.settings.mlflow, version.tags[TAG_MODEL_ID], "model").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert not served.look()
    assert (served.engine.source.version, served.refusals) == ("2", 2)
    weights.write_bytes(whole)
    served.refused = None
    assert served.look()
    assert served.engine.source.version == "3"
    Registry(shop.settings.mlflow).roll_back("a test")
    assert served.look()
    assert served.engine.source.version == "2", "a rollback is followed too"


def test_a_registry_that_is_away_does_not_matter(shop, monkeypatch):
    served = ServedModel(CHAMPION, shop.settings)
    away = replace(shop.settings.mlflow, tracking_uri="http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("onetrans.tracking._TRIES", 1)
    served.settings = replace(shop.settings, mlflow=away)
    assert not served.look()
    assert served.failed_looks == 1


def test_a_disk_that_fails_refuses_no_version(tmp_path):
    shop = Shop.open(tmp_path, days=4)
    settings = replace(shop.settings, serving=SERVING)
    promote(settings, shop.candidate(shop.days[2]))
    served = ServedModel(CHAMPION, settings)
    promote(settings, shop.candidate(shop.days[3]))
    version = Registry(settings.mlflow).version("2")
    check = kept_folder(settings.mlflow, version.tags[TAG_MODEL_ID], "check") / "scores.json"
    whole = check.rename(tmp_path / "whole.json")
    check.symlink_to("/proc/self/mem")  # which opens, and ends each read in an error of input and output
    assert not served.look()
    assert (served.engine.source.version, served.refused, served.refusals, served.failed_looks) == ("1", None, 0, 1)
    check.unlink()
    whole.rename(check)
    assert served.look(), "the next look tries again"
    assert served.engine.source.version == "2"
