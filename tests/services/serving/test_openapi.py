"""The OpenAPI page tells the truth: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def api(serving, planted):
    app = serving(planted, run="first", pin=True)
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{app.port}{app.prefix}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_every_route_answers_as_the_openapi_page_says(case):
    case.call_and_validate(timeout=30)
