"""The service's description has examples that are answered, with a fixed batch or without; no page calls outside."""

from __future__ import annotations

import shutil

import pytest
from served import SCHEMA, running, save, serve_folder


@pytest.mark.parametrize("fixed_batch", [True, False])
def test_the_description_has_examples_that_are_answered_and_no_page(tmp_path, fixed_batch):
    save(tmp_path)
    if not fixed_batch:
        shutil.rmtree(tmp_path / "check")
    with running(serve_folder(tmp_path)) as client:
        document = client.get("/openapi.json").json()
        media = document["paths"]["/v1/rank"]["post"]["requestBody"]["content"]["application/json"]
        assert set(media["examples"]) == {"one request", "several requests"}
        for name, example in media["examples"].items():
            answer = client.post("/v1/rank", json=example["value"])
            assert answer.status_code == 200, answer.text
            asked = example["value"].get("requests", [example["value"]])
            assert len(asked) == (1 if name == "one request" else 2)
            assert [len(result["items"]) for result in answer.json()["results"]] == [2] * len(asked)
            for request in asked:
                assert set(request["candidates"][0]) == {"item_id", *(f.name for f in SCHEMA.of_side("item"))}
                assert set(request["sequences"]) == {s.name for s in SCHEMA.sequences}
        for page in ("/docs", "/redoc", "/docs/oauth2-redirect"):
            absent = client.get(page)
            assert absent.status_code == 404
            assert "see /openapi.json" in absent.json()["error"]["message"]
            assert "http" not in absent.text
