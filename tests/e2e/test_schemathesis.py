"""The served OpenAPI schema, fuzzed: no 5xx, and every answer as the schema says."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

pytestmark = pytest.mark.e2e


@pytest.fixture
def api_schema(cluster):
    document = httpx.get(f"{cluster.http_url}/openapi.json", timeout=30).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=cluster.http_url)
    return schema


schema = schemathesis.pytest.from_fixture("api_schema")


@schema.parametrize()
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_no_server_error_and_answers_conform(case):
    if isinstance(case.body, dict):
        # Long generations say nothing more about the schema.
        for key in ("max_tokens", "max_completion_tokens"):
            if isinstance(case.body.get(key), int):
                case.body[key] = min(case.body[key], 2)
    case.call_and_validate(
        checks=(not_a_server_error, status_code_conformance, content_type_conformance), timeout=60
    )
