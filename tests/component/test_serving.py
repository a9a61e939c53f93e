"""The service as clients see it: the scores of the offline path, refusals, overload, and clients that misbehave."""

import copy
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import SCHEMA, rows_of, running, save, serve_folder, settings_of

from onetrans.errors import EXIT_BAD_CONFIG, EXIT_NOT_READY, BadConfigError, BadDataError
from onetrans.requests import from_rows, score
from onetrans.serving import OneTransInferenceEngine, app
from onetrans.serving.cache import UserCache

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    save(path)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return rows_of(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def requests(rows):
    users = rows["user_id"].to_pylist()
    return [{**request, "user_id": user} for request, user in zip(from_rows(rows, SCHEMA), users, strict=True)]


@pytest.fixture(scope="module")
def service(folder):
    return serve_folder(folder)


@pytest.fixture(scope="module")
def client(service):
    with running(service) as found:
        yield found


@pytest.fixture(scope="module")
def expected(folder, requests):
    """Scores of the offline path, by request and place among its candidates."""
    engine = OneTransInferenceEngine(str(folder), settings_of(folder))
    table = score(engine.model, requests)
    found, start = {}, 0
    for request in requests:
        part = table.slice(start, len(request["candidates"]))
        found[request["request_id"]] = np.stack([part["ctr"].to_numpy(), part["cvr"].to_numpy()], axis=1)
        start += len(request["candidates"])
    return found


def _scores(result):
    items = sorted(result["items"], key=lambda item: item["index"])
    return np.array([[item["ctr"], item["cvr"]] for item in items])


def test_published_rows_sent_as_json_get_the_scores_of_the_offline_path(client, requests, expected):
    """Twice: at first nothing is kept of a user, then everything is."""
    for _ in range(2):
        for start in range(0, len(requests), 7):
            sent = requests[start : start + 7]
            answer = client.post("/v1/rank", json={"requests": sent} if start else sent[0])
            assert answer.status_code == 200, answer.text
            results = answer.json()["results"]
            for request, result in zip(sent, results, strict=False):
                np.testing.assert_allclose(_scores(result), expected[request["request_id"]], atol=1e-5)
                ctcvr = [item["ctcvr"] for item in result["items"]]
                assert ctcvr == sorted(ctcvr, reverse=True)
                named = [request["candidates"][item["index"]]["item_id"] for item in result["items"]]
                assert named == [item["item_id"] for item in result["items"]]
    page = client.get("/metrics").text
    kept = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if line.startswith("onetrans_user")}
    assert kept['onetrans_user_cache_requests_total{result="equal"}'] > 0
    assert kept['onetrans_user_cache_requests_total{result="encoded"}'] > 0
    assert kept["onetrans_user_cache_bytes"] > 0


def test_events_are_appended_to_what_is_kept(folder, requests):
    engine = OneTransInferenceEngine(str(folder), settings_of(folder))
    without = OneTransInferenceEngine(str(folder), settings_of(folder, cache_mib=0))
    longest = max(requests, key=lambda request: sum(map(len, request["sequences"].values())))
    times = sorted(event["ts"] for events in longest["sequences"].values() for event in events)
    for seen in (times[2], times[4], times[-1], times[-1] + 1):
        request = copy.deepcopy(longest)
        for name, events in request["sequences"].items():
            request["sequences"][name] = [event for event in events if event["ts"] < seen]
        for ours, theirs in zip(engine.rank(request), without.rank(request), strict=True):
            assert ours["ctr"] == pytest.approx(theirs["ctr"], abs=1e-6)
            assert ours["cvr"] == pytest.approx(theirs["cvr"], abs=1e-6)
    assert engine.cache.counts.appended >= 2
    assert engine.cache.counts.encoded == 1
    assert len(without.cache) == 0


def test_what_is_kept_changes_no_score_whatever_becomes_of_histories(tmp_path):
    """Events are appended, come late and push others out; users are dropped for room and come back."""
    save(tmp_path, max_seq_len=16, num_layers=4, pyramid_multiple=4)
    engine = OneTransInferenceEngine(str(tmp_path), settings_of(tmp_path))
    without = OneTransInferenceEngine(str(tmp_path), settings_of(tmp_path, cache_mib=0))
    requests = from_rows(rows_of(tmp_path), SCHEMA)
    longest = sorted(requests, key=lambda request: -sum(map(len, request["sequences"].values())))[:5]
    engine.rank({**longest[0], "user_id": "a"})
    engine.cache = UserCache(3 * engine.cache.bytes)
    rng, reached, truncated = np.random.default_rng(0), [3] * 5, 0
    for _ in range(150):
        user = int(rng.integers(5))
        request = copy.deepcopy({**longest[user], "user_id": f"u{user}"})
        times = sorted(event["ts"] for events in request["sequences"].values() for event in events)
        reached[user] = 3 if reached[user] == len(times) else min(reached[user] + int(rng.integers(3)), len(times))
        late = times[reached[user] - 2] if rng.random() < 0.1 else None
        for name, events in request["sequences"].items():
            request["sequences"][name] = [e for e in events if e["ts"] <= times[reached[user] - 1] and e["ts"] != late]
        truncated += reached[user] > 16
        for ours, theirs in zip(engine.rank(request), without.rank(request), strict=True):
            assert ours["ctr"] == pytest.approx(theirs["ctr"], abs=1e-6)
            assert ours["cvr"] == pytest.approx(theirs["cvr"], abs=1e-6)
    counts = engine.cache.counts
    assert min(truncated, counts.equal, counts.appended, counts.encoded, counts.evicted) >= 5, (truncated, counts)


def test_events_in_the_same_text_are_not_read_again_and_others_are(client, service, requests, expected):
    request = {**max(requests, key=lambda r: sum(map(len, r["sequences"].values()))), "user_id": "reader"}
    counts = service.served.engine.cache.counts

    def ask(asked):
        before = counts.equal, counts.encoded
        found = client.post("/v1/rank", json=asked)
        return found, (counts.equal - before[0], counts.encoded - before[1])

    for known in ((0, 1), (1, 0)):
        found, counted = ask(request)
        assert counted == known
        np.testing.assert_allclose(_scores(found.json()["results"][0]), expected[request["request_id"]], atol=1e-5)
    name = max(request["sequences"], key=lambda name: len(request["sequences"][name]))
    changed = copy.deepcopy(request)
    changed["sequences"][name].pop()
    found, counted = ask(changed)
    assert counted == (0, 1)
    assert np.abs(_scores(found.json()["results"][0]) - expected[request["request_id"]]).max() > 1e-7
    assert ask(changed)[1] == (1, 0)
    latest = max(event["ts"] for events in changed["sequences"].values() for event in events)
    found, _ = ask({**changed, "ts": latest})
    assert found.status_code == 422, "a kept history is held against the time of the request, too"


def test_single_inference_is_one_candidate_of_a_request(folder, requests, expected):
    engine = OneTransInferenceEngine(str(folder), settings_of(folder))
    request = requests[0]
    for number, item in enumerate(request["candidates"]):
        found = engine.single_inference(
            request["user"], item, request["context"], request["sequences"], ts=request["ts"], user_id="u"
        )
        ctr, cvr = expected[request["request_id"]][number]
        assert found["ctr"] == pytest.approx(ctr, abs=1e-5)
        assert found["ctcvr"] == pytest.approx(ctr * cvr, abs=1e-5)
    now = engine.single_inference(request["user"], request["candidates"][0], request["context"], request["sequences"])
    assert 0 < now["ctr"] < 1


def test_bfloat16_scores_nearly_the_same_also_from_what_is_kept(folder, requests, expected):
    engine = OneTransInferenceEngine(str(folder), settings_of(folder, precision="bfloat16"))
    assert 0 < engine.difference < 0.02
    for _ in range(2):
        for request in requests[:20]:
            found = _scores({"items": engine.rank(request)})
            np.testing.assert_allclose(found, expected[request["request_id"]], atol=0.02)
    assert engine.cache.counts.equal > 5


def test_a_gpu_that_is_not_there_is_told_with_its_setting(tmp_path):
    save(tmp_path)
    for device in (f"cuda:{torch.cuda.device_count()}", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(BadConfigError, match=rf"serving\.device = '{device}', but PyTorch .* sees \d+ GPUs"):
            OneTransInferenceEngine(str(tmp_path), settings_of(tmp_path, device=device))


def test_a_model_that_scores_otherwise_is_refused(tmp_path):
    save(tmp_path)
    kept = tmp_path / "check" / "scores.json"
    scores = json.loads(kept.read_text())
    scores[3]["cvr"] += 0.001
    kept.write_text(json.dumps(scores))
    with pytest.raises(BadDataError, match=r"does not score as it did when it was logged.*differs by 0.001"):
        OneTransInferenceEngine(str(tmp_path), settings_of(tmp_path))
    with pytest.raises(BadConfigError, match="names no model"):
        OneTransInferenceEngine(str(tmp_path / "nothing"), settings_of(tmp_path))


def _with(request, change):
    changed = copy.deepcopy(request)
    change(changed)
    return changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["user"].pop("user_ctr"), "user: feature 'user_ctr' is absent; write null"),
        (lambda r: r["user"].update(age=3), "'age' is not known"),
        (lambda r: r.update(contexts={}), "'contexts' is not known; its fields are request_id"),
        (lambda r: r.update(user_id=7), "user_id is 7, needed is text or null"),
        (lambda r: r.update(user=[1]), "user is [1], needed are names and values"),
        (lambda r: r.update(candidates={}), "candidates: {} is not a list"),
        (lambda r: r["candidates"].__setitem__(0, 3), "candidate 0 is 3, needed are names and values"),
        (lambda r: r["candidates"][0].update(item_ctr="high"), "feature 'item_ctr' is 'high', needed is a number"),
        (lambda r: r.update(ts="noon"), "ts is 'noon', needed are microseconds"),
        (lambda r: r.update(ts=10**30), "needed are microseconds"),
        (lambda r: r.update(ts=r["ts"] // 10**6, sequences={name: [] for name in r["sequences"]}), "seconds and milli"),
        (lambda r: r.update(candidates=r["candidates"][:1] * 1001), "there are 1001 candidates, serving.max_cand"),
        (lambda r: r["sequences"].update(click=[{}] * 4001), "events, serving.max_events allows 4000"),
        (lambda r: r["sequences"].pop("purchase"), "sequence purchase is absent"),
        (lambda r: r["sequences"]["click"].append({"ts": r["ts"], "event_item": "i", "event_author": "a"}),
         "sequence click: an event has ts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(client, requests, change, words):
    answer = client.post("/v1/rank", json=_with(requests[0], change))
    assert answer.status_code == 422
    assert words in answer.json()["error"]["message"]


def test_the_requests_of_a_call_are_limited(client, requests):
    answer = client.post("/v1/rank", json={"requests": [requests[0]] * 33})
    assert answer.status_code == 422
    assert "there are 33 requests, serving.max_requests allows 32" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"3", b'{"requests": []}', b'{"requests": 3}', b"\xff", b"[" * 100_000, b'{"ts": NaN}'),
        b'{"request_id": "\\ud800", "ts": 1, "user": {}, "context": {}, "sequences": {}, "candidates": []}',
    ],
)
def test_a_body_that_is_no_request_is_refused(client, body):
    answer = client.post("/v1/rank", content=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"]


def test_text_and_time_as_a_person_writes_them(client, requests):
    request = _with(requests[0], lambda r: r.update(ts="2026-01-31T12:00:00+01:00"))
    same = _with(requests[0], lambda r: r.update(ts=1_769_857_200_000_000))
    for changed in (request, same):
        changed["user"]["user"] = "u7"
        for events in changed["sequences"].values():
            events.clear()
    answers = [client.post("/v1/rank", json=changed).json() for changed in (request, same)]
    assert answers[0] == answers[1]


# Fuzzing


def _values(schema):
    """Return a strategy of values that fit a JSON schema of the kind the service describes itself with."""
    if "oneOf" in schema or "anyOf" in schema:
        return st.one_of([_values(part) for part in schema.get("oneOf") or schema["anyOf"]])
    kind = schema["type"]
    if kind == "object":
        return st.fixed_dictionaries(
            {name: _values(part) for name, part in schema["properties"].items() if name in schema["required"]},
            optional={name: _values(p) for name, p in schema["properties"].items() if name not in schema["required"]},
        )
    if kind == "array":
        least = schema.get("minItems", 0)
        return st.lists(_values(schema["items"]), min_size=least, max_size=min(schema.get("maxItems", 3), least + 2))
    return {
        "string": st.text(max_size=8),
        "null": st.none(),
        "integer": st.integers(schema.get("minimum"), schema.get("maximum")),
        "number": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
    }[kind]


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def _damaged(draw, whole):
    """Return a value with one part of it replaced by anything, or taken away."""
    value = draw(whole)
    parent, part = None, value
    for _ in range(draw(st.integers(1, 6))):
        if not isinstance(part, dict | list) or not part:
            break
        key = draw(st.sampled_from(sorted(part))) if isinstance(part, dict) else draw(st.integers(0, len(part) - 1))
        parent, part = (part, key), part[key]
    if parent is None:
        return draw(_ANYTHING)
    if draw(st.booleans()):
        parent[0][parent[1]] = draw(_ANYTHING)
    else:
        del parent[0][parent[1]]
    return value


@pytest.fixture(scope="module")
def described(client):
    document = client.get("/openapi.json").json()
    body = document["paths"]["/v1/rank"]["post"]["requestBody"]["content"]["application/json"]
    return _values(body["schema"]), body["examples"]


@pytest.mark.parametrize("damaged", [False, True])
def test_fuzzed_requests_never_break_the_service(client, described, damaged):
    """Values that fit the service's own description, and such with one part damaged."""
    whole, _ = described

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(_damaged(whole) if damaged else whole)
    def ask(value):
        try:
            body = json.dumps(value).encode()
        except (UnicodeEncodeError, ValueError):
            return
        answer = client.post("/v1/rank", content=body)
        assert answer.status_code in (200, 422), answer.text
        if answer.status_code == 200:
            assert all(np.isfinite(_scores(result)).all() for result in answer.json()["results"])

    ask()
    assert client.get("/healthz").status_code == 200


def test_the_examples_of_the_description_are_answered(client, described):
    for example in described[1].values():
        answer = client.post("/v1/rank", json=example["value"])
        assert answer.status_code == 200
        rounded = json.loads(json.dumps(example["value"]), parse_int=lambda digits: int(float(digits)))
        browser = client.post("/v1/rank", json=rounded)
        assert browser.json() == answer.json(), "a browser's numbers are doubles"


# Limits, clients that misbehave, overload


def test_a_token_is_asked_for(folder, requests):
    with running(serve_folder(folder, token="secret")) as client:
        assert client.post("/v1/rank", json=requests[0]).status_code == 401
        wrong = client.post("/v1/rank", json=requests[0], headers={"Authorization": "Bearer public"})
        assert wrong.status_code == 401
        assert wrong.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        right = client.post("/v1/rank", json=requests[0], headers={"Authorization": "Bearer secret"})
        assert right.status_code == 200


def _send(client, head, body=b""):
    """Open a connection by hand and send the beginning of a call."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    connection.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n" + body)
    return connection


def test_slow_and_vanished_clients_harm_no_other(folder, requests):
    service = serve_folder(folder, body_timeout_s=0.5, max_body_kib=64)
    whole = json.dumps(requests[0]).encode()
    head = b"Content-Length: " + str(len(whole)).encode()
    with running(service) as client:
        slow = [_send(client, head, whole[:100]) for _ in range(30)]
        gone = [_send(client, head, whole) for _ in range(10)]
        for connection in gone:
            connection.close()
        large = _send(client, b"Content-Length: 100000000")
        assert large.recv(100).startswith(b"HTTP/1.1 413")
        chunked = _send(client, b"Transfer-Encoding: chunked", b"20000\r\n" + b" " * 0x20000)
        assert chunked.recv(100).startswith(b"HTTP/1.1 413")
        assert client.post("/v1/rank", json=requests[0]).status_code == 200
        assert all(connection.recv(100).startswith(b"HTTP/1.1 408") for connection in slow)
        assert client.post("/v1/rank", json=requests[0]).status_code == 200
        assert service.batcher.waiting == 0
        for connection in (*slow, large, chunked):
            connection.close()


def _answer_to(client, *parts, wait_s=0.0):
    """Send bytes by hand, and return status and error of what comes back before the connection is closed."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    with connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(wait_s)
        got = b""
        while part := connection.recv(65536):
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def test_a_head_that_does_not_end_is_cut_off(folder, requests):
    with running(serve_folder(folder, body_timeout_s=0.5)) as client:
        began = time.monotonic()
        begun = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\n"
        slow = [threading.Thread(target=_answer_to, args=(client, begun)) for _ in range(20)]
        for thread in slow:
            thread.start()
        assert client.post("/v1/rank", json=requests[0]).status_code == 200
        assert _answer_to(client, begun, b"A: 1\r\n", b"B", wait_s=0.1) == (
            408,
            "the head of the request did not arrive within 0.5 s",
        )
        for thread in slow:
            thread.join()
        assert time.monotonic() - began < 20
        for _ in range(10):
            with suppress(ConnectionResetError):  # an answer may be lost to who still sends when it comes
                assert _answer_to(client, begun, *[b"A: " + b"x" * 60_000 + b"\r\n"] * 3)[0] == 431
                break
        else:
            pytest.fail("every connection was reset")
        assert _answer_to(client, b"nonsense\r\n\r\n")[0] == 400
        # On a connection that was in use, too.
        whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
        with connection:
            connection.sendall(whole)
            connection.sendall(whole + begun)
            got = b""
            while part := connection.recv(1000):
                got += part
        assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"200", b"408"]


def test_errors_of_all_routes_have_one_shape(client):
    for method, path, status in (("GET", "/v2/rank", 404), ("GET", "/v1/rank", 405), ("POST", "/healthz", 405)):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"].keys() == {"code", "message"}
    assert answer.headers["allow"] == "GET"
    assert "/v2/rank" in client.get("/v2/rank").json()["error"]["message"]


class SlowEngine:
    """The engine of a service, made to take its time."""

    def __init__(self, engine, seconds):
        self.engine, self.seconds, self.turns = engine, seconds, []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def score(self, batch, users, *others):
        self.turns.append(len(users))
        time.sleep(self.seconds)
        return self.engine.score(batch, users, *others)


def _at_once(client, count, request, **kwargs):
    answers = [None] * count

    def ask(number):
        answers[number] = client.post("/v1/rank", json=request, **kwargs)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_overload_is_turned_away_and_the_rest_is_answered_together(folder, requests):
    service = serve_folder(folder, queue_requests=8, batch_ms=10_000)
    with running(service) as client:
        slow = service.served.engine = SlowEngine(service.served.engine, 0.5)
        answers = _at_once(client, 30, requests[0])
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 8
        assert max(slow.turns) > 1, "what waits is scored together"
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/rank", json=requests[0]).status_code == 200, "it recovers"


def test_a_body_that_is_too_large_is_told_so_under_load_too(folder, requests):
    """Not to come again later: it would be too large then as well."""
    service = serve_folder(folder)
    with running(service) as client:
        service.served.engine = SlowEngine(service.served.engine, 2)
        busy = threading.Thread(target=_at_once, args=(client, 1, requests[0]))
        busy.start()
        until = time.monotonic() + 30
        while not service.batcher.wait_s:
            assert time.monotonic() < until
            time.sleep(0.01)
        head = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000000\r\n\r\n"
        assert _answer_to(client, head)[0] == 413
        assert service.batcher.wait_s, "something waited all the while"
        busy.join()


def test_what_is_scored_together_is_bounded_in_time(folder, requests):
    service = serve_folder(folder, batch_ms=20)
    with running(service) as client:
        slow = service.served.engine = SlowEngine(service.served.engine, 0.1)
        assert client.post("/v1/rank", json=requests[0]).status_code == 200
        assert {answer.status_code for answer in _at_once(client, 5, requests[0])} == {200}
        assert slow.turns == [1] * 6, "two would take longer, by how long the first took"


def test_a_deadline_is_kept(folder, requests):
    service = serve_folder(folder)
    with running(service) as client:
        service.served.engine = SlowEngine(service.served.engine, 0.4)
        late = client.post("/v1/rank", json=requests[0], headers={"X-Deadline-Ms": "150"})
        assert late.status_code == 504
        assert "not scored within 150 ms" in late.json()["error"]["message"]
        assert client.post("/v1/rank", json=requests[0]).status_code == 200
        assert client.post("/v1/rank", json=requests[0], headers={"X-Deadline-Ms": "soon"}).status_code == 400


def test_a_deadline_covers_the_body_and_its_reading(folder, requests, monkeypatch):
    """Large calls, more than can be read in time: all are answered by their deadline, most of them at once."""
    read, taken = app.read_call, []

    def slowly(body, *others):
        if len(body) > 100_000:
            taken.append(time.monotonic())
            time.sleep(0.2)
        return read(body, *others)

    monkeypatch.setattr(app, "read_call", slowly)
    large = {**requests[0], "candidates": requests[0]["candidates"] * 250}
    with running(serve_folder(folder, max_candidates=10_000, body_timeout_s=20)) as client:
        took = []

        def ask():
            began = time.monotonic()
            answer = client.post("/v1/rank", json=large, headers={"X-Deadline-Ms": "1000"})
            took.append((time.monotonic() - began, answer.status_code))

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {status for _, status in took} <= {200, 429, 504}
        assert {status for _, status in took} >= {429} or len(taken) < 40
        assert max(seconds for seconds, _ in took) < 4, "without the bound the last one waits for 8 seconds"
        assert client.post("/v1/rank", json=requests[0]).status_code == 200

        # A body that does not arrive: the deadline is what comes first.
        begun = b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\nX-Deadline-Ms: 200\r\n\r\n{"
        began = time.monotonic()
        assert _answer_to(client, begun) == (504, "not scored within 200 ms; nothing was done")
        assert time.monotonic() - began < 10


def test_one_bad_call_of_a_batch_fails_alone(folder, requests):
    """What the check of a call lets through and the model does not take."""
    service = serve_folder(folder, batch_wait_ms=300)

    class Picky(SlowEngine):
        def score(self, batch, users, *others):
            if "bad" in users:
                raise BadDataError("request bad: refused")
            return super().score(batch, users, *others)

    with running(service) as client:
        service.served.engine = Picky(service.served.engine, 0)
        found, spoiled = [], {**requests[0], "user_id": "bad"}
        bad = threading.Thread(target=lambda: found.append(client.post("/v1/rank", json=spoiled)))
        bad.start()
        good = _at_once(client, 3, requests[0])
        bad.join()
        assert [answer.status_code for answer in good] == [200] * 3
        assert found[0].status_code == 422


def test_the_command_serves_until_it_is_told_to_end(folder, requests, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ONETRANS_SERVING_DEADLINE_MS": "20000"}
    command = [sys.executable, "-m", "onetrans.cli", "serve"]

    def refused(*arguments):
        done = subprocess.run(
            [*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr.splitlines()[-1]

    service = subprocess.Popen(
        [*command, "--model", str(folder), "--port", "0"],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        address = service.stdout.readline().strip()
        assert httpx.post(f"{address}/v1/rank", json=requests[0], timeout=60).status_code == 200
        port = address.rsplit(":", 1)[1]
        code, told = refused("--model", str(folder), "--port", port)
        assert code == EXIT_BAD_CONFIG
        assert f"serving.port = {port}: cannot listen there" in told
    finally:
        service.terminate()
    assert service.wait(timeout=60) == -signal.SIGTERM, "it ends by the signal it was sent, as a supervisor expects"
    code, told = refused("--port", "0")
    assert code == EXIT_NOT_READY
    assert "no day was promoted" in told
