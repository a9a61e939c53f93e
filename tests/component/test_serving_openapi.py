"""The service against its own description: what fits it is answered as described, what does not is refused, no 5xx.

Schemathesis reads ``/openapi.json`` of a running service and derives calls of every route from it, with values that fit
and with values, headers and bodies that do not.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from served import running, save, serve_folder

from onetrans.serving.app import DEADLINE_HEADER

CALLS = 40
ROUTES = ("GET /healthz", "GET /metrics", "GET /readyz", "POST /v1/rank")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("described")
    save(folder)
    return serve_folder(folder)


@pytest.fixture(scope="module")
def client(service):
    with running(service) as found:
        yield found


@pytest.fixture(scope="module")
def described(client):
    return schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


def test_every_route_is_described(described):
    assert sorted(result.ok().label for result in described.get_all_operations()) == sorted(ROUTES)


@pytest.mark.parametrize(("route", "mode"), [*((route, "positive") for route in ROUTES), ("POST /v1/rank", "negative")])
def test_calls_derived_from_the_description_never_break_the_service(client, described, route, mode):
    method, path = route.split()
    operation = described[path][method]
    statuses = set()

    @settings(
        max_examples=CALLS if method == "POST" else 2,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    def ask(case):
        response = case.call()
        hasty = response.status_code == 504 and DEADLINE_HEADER in case.headers
        statuses.add(200 if hasty else response.status_code)
        # A JSON schema cannot say that events lie before their request; a client's own deadline may pass.
        checks = schemathesis.checks
        excused = [checks.positive_data_acceptance, *([checks.not_a_server_error] if hasty else [])]
        case.validate_response(response, excluded_checks=excused)

    ask()
    assert statuses, "no call was made"
    assert max(statuses) < 500
    assert client.get("/healthz").json() == {"status": "alive"}, "the process is alive"
