"""The OpenAPI description matches the server: schemathesis sends what it allows and what it forbids."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

CASES = [
    *[("POST /v1/predict", mode) for mode in ("positive", "negative")],
    *[(f"GET {path}", "positive") for path in ("/v1/model", "/healthz", "/readyz", "/metrics")],
]


@pytest.fixture(scope="module")
def routes(serving, planted):
    import schemathesis
    from schemathesis.checks import load_all_checks

    load_all_checks()
    app = serving(planted, run="first", pin=True)
    schema = schemathesis.openapi.from_url(
        f"http://127.0.0.1:{app.port}{app.prefix}/openapi.json", timeout=120
    )
    found = [result.ok() for result in schema.get_all_operations()]
    return {route.label.replace(app.prefix, ""): route for route in found}


def test_every_route_is_tested(routes):
    assert set(routes) == {label for label, _ in CASES}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("label", "mode"), CASES)
def test_every_route_answers_as_the_openapi_page_says(routes, label, mode):
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    @given(case=routes[label].as_strategy(generation_mode=GenerationMode(mode)))
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def ask(case):
        # that the bytes are an image, and which size it has, no schema can say
        case.call_and_validate(timeout=120, excluded_checks=[positive_data_acceptance])

    ask()
