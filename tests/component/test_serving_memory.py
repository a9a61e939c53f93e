"""A service that answers 100,000 requests of users it has never seen needs no more memory at the end."""

import json

import psutil
import pytest
from served import SCHEMA, rows_of, running, save, serve_folder

from onetrans.requests import from_rows
from tests.worlds import World

CALLS, REQUESTS = 3_200, 32
MAY_GROW_MIB = 24


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_new_users(tmp_path):
    save(tmp_path)
    world = World(requests=REQUESTS, candidates=4, events=12)
    requests = from_rows(rows_of(tmp_path, world), SCHEMA)
    texts = [json.dumps(request)[:-1] for request in requests]
    process, sizes = psutil.Process(), []
    with running(serve_folder(tmp_path, cache_mib=16)) as client:
        for call in range(CALLS):
            users = (f'{text}, "user_id": "{call}-{n}"}}' for n, text in enumerate(texts))
            answer = client.post("/v1/rank", content=f'{{"requests": [{", ".join(users)}]}}')
            assert answer.status_code == 200
            if call % (CALLS // 20) == 0:
                sizes.append(process.memory_info().rss / 2**20)
        page = client.get("/metrics").text
    kept = {line.split()[0]: float(line.split()[1]) for line in page.splitlines() if not line.startswith("#")}
    assert kept["onetrans_user_cache_evicted_total"] > 50_000
    assert kept["onetrans_user_cache_bytes"] <= 16 * 2**20
    settled, last = max(sizes[2:7]), max(sizes[-5:])
    assert last < settled + MAY_GROW_MIB, f"resident memory in MiB, over time: {[round(size) for size in sizes]}"
