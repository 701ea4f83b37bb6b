"""The served OpenAPI schema, fuzzed through the whole cluster: no 5xx, and answers as the schema says."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.e2e.local_cluster import FASTEST

pytestmark = pytest.mark.e2e

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
EXAMPLES, UPLOADS = 25, 5
"""Of an operation; an upload may start a process that compiles it."""
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]


def _shorten(body: object) -> None:
    """Long generations say nothing more about the schema."""
    if isinstance(body, dict):
        for key in ("max_tokens", "max_completion_tokens", "n"):
            if isinstance(body.get(key), int):
                body[key] = min(body[key], 2)


@pytest.mark.slow
def test_no_server_error_and_answers_conform(own_cluster):
    # Without a model: what is fuzzed is everything else, and a generation costs nothing.
    cluster = own_cluster
    cluster.up(*FASTEST)
    document = httpx.get(f"{cluster.http_url}/openapi.json", timeout=30).json()
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=cluster.http_url)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 7
    for operation in operations:
        examples = UPLOADS if operation.method.lower() == "put" else EXAMPLES

        @settings(max_examples=examples, deadline=None, suppress_health_check=SLOW)
        @given(case=operation.as_strategy())
        def check(case):
            _shorten(case.body)
            case.call_and_validate(checks=CHECKS, timeout=60)

        check()
