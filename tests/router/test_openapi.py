"""The served document is valid and true, and no body that anyone can think of makes a 5xx."""

import asyncio

import jsonschema
import jsonschema.validators
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks

from cluster.config import RouterConfig
from router.admission import limits_of
from router.openai_api import ChatCompletionRequest, CompletionRequest
from router.openapi import openapi_document
from router.targeting_api import TargetingRequest
from tests.router.catalogue_support import ITEMS, JSON_LINES, jsonl, store
from tests.router.conftest import MODEL

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
SCHEMATHESIS_CHECKS = (
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.missing_required_header,
    openapi_checks.unsupported_method,
)
"""Not `positive_data_acceptance`: fields that must agree (prompt and max_tokens) are beyond a schema."""


@pytest.fixture(scope="module")
def document(served):
    return msgspec.json.decode(openapi_document(served.card, limits_of(served.card, RouterConfig())))


def validator(document, name):
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    cls = jsonschema.validators.Draft202012Validator
    cls.check_schema(schema)
    return cls(schema)


async def test_the_document_is_served_and_names_every_route(cluster, document):
    response = await cluster.http.get("/openapi.json")
    assert response.status_code == 200
    served_document = response.json()
    assert served_document == document
    routes = {route.path.replace("{id:path}", "{id}") for route in cluster.router.asgi.routes}
    assert set(served_document["paths"]) == routes
    for path in ("/v1/completions", "/v1/chat/completions"):
        operation = served_document["paths"][path]["post"]
        assert set(operation["responses"]) == {"200", "400", "404", "408", "409", "413", "415", "429", "503"}
        assert set(operation["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
        names = {parameter["name"] for parameter in operation["parameters"]}
        assert {"x-session-id", "x-headrace-deadline-ms", "x-request-id"} <= names


def test_every_field_that_is_accepted_is_documented(document):
    for struct in (CompletionRequest, ChatCompletionRequest, TargetingRequest):
        schema = document["components"]["schemas"][struct.__name__]
        assert set(schema["properties"]) == {field.name for field in msgspec.structs.fields(struct)}
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        ("/v1/completions", "CompletionBody", {"prompt": "x", "logprobs": 2}),
        ("/v1/completions", "ErrorBody", {"prompt": ""}),
        (
            "/v1/chat/completions",
            "ChatCompletionBody",
            {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2},
        ),
    ],
)
async def test_answers_follow_their_schemas(cluster, document, path, name, body):
    headers = {"x-headrace-timeline": "1"}
    response = await cluster.http.post(path, json={"model": MODEL, "max_tokens": 2} | body, headers=headers)
    validator(document, name).validate(response.json())
    wanted = validator(document, f"{'Chat' if 'chat' in path else ''}CompletionRequest")
    assert wanted.is_valid({"model": MODEL} | body) == (name != "ErrorBody")


# Anything JSON can say, aimed at the fields there are.
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(["user", "text", "hello", "<|im_end|>", MODEL]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


def bodies(struct):
    names = [field.name for field in msgspec.structs.fields(struct)]
    valid = {
        "model": MODEL,
        "prompt": "hello",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 2,
        "catalogue": "ads",
    }
    start = {name: value for name, value in valid.items() if name in names}
    changes = st.dictionaries(st.sampled_from(names), json_values, max_size=4)
    return changes.map(lambda change: start | change)


@pytest.mark.parametrize(
    ("path", "struct"),
    [
        ("/v1/completions", CompletionRequest),
        ("/v1/chat/completions", ChatCompletionRequest),
        ("/v1/targeting", TargetingRequest),
    ],
)
async def test_no_body_makes_a_5xx(cluster, served, path, struct):
    store(cluster, served)
    loop = asyncio.get_running_loop()
    statuses = []

    @settings(max_examples=250, deadline=None, suppress_health_check=SLOW)
    @given(body=bodies(struct))
    def post(body):
        request = cluster.http.post(path, json=body)
        response = asyncio.run_coroutine_threadsafe(request, loop).result(timeout=20)
        statuses.append(response.status_code)
        assert response.status_code < 500, response.text
        if response.status_code != 200:
            assert response.json()["error"]["message"]

    await asyncio.to_thread(post)
    assert 200 in statuses
    assert 400 in statuses


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/targeting"])
async def test_no_bytes_make_a_5xx(cluster, path):
    loop = asyncio.get_running_loop()

    @settings(max_examples=100, deadline=None)
    @given(body=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "replace")))
    def post(body):
        request = cluster.http.post(path, content=body, headers={"content-type": "application/json"})
        response = asyncio.run_coroutine_threadsafe(request, loop).result(timeout=20)
        assert response.status_code == 400

    await asyncio.to_thread(post)


async def test_targetings_answers_are_as_documented(cluster, served, document):
    asked = {"model": MODEL, "catalogue": "ads", "context": "x"}
    calls = [
        ("PUT", "/v1/catalogues/ads", {"content": jsonl(ITEMS)}, "CatalogueUploadBody"),
        ("PUT", "/v1/catalogues/ads", {"content": b"{}\n"}, "CatalogueUploadErrorBody"),
        ("GET", "/v1/catalogues/ads", {}, "CatalogueBody"),
        ("GET", "/v1/catalogues", {}, "CatalogueListBody"),
        ("POST", "/v1/targeting", {"json": asked}, "TargetingBody"),
        ("POST", "/v1/targeting", {"json": asked | {"filter": {"kind": "x"}}}, "TargetingBody"),
        ("DELETE", "/v1/catalogues/ads", {}, "CatalogueDeletedBody"),
        ("GET", "/v1/catalogues/ads", {}, "ErrorBody"),
    ]
    for method, path, options, name in calls:
        headers = {"x-headrace-timeline": "1"} | (JSON_LINES if method == "PUT" else {})
        response = await cluster.http.request(method, path, headers=headers, **options)
        validator(document, name).validate(response.json())
        assert str(response.status_code) in document_responses(document, method, path)


def document_responses(document, method, path):
    return document["paths"][path.replace("/ads", "/{name}")][method.lower()]["responses"]


async def test_schemathesis_finds_nothing(cluster, serve, served):
    """Requests generated from the document, sent over HTTP, answers held to the document."""
    store(cluster, served)
    url = await serve(cluster)
    document = (await cluster.http.get("/openapi.json")).json()
    problems: list[str] = []

    def run():
        schema = schemathesis.openapi.from_dict(document)
        schema.config.update(base_url=url)
        for result in schema.get_all_operations():
            operation = result.ok()

            max_examples = 8 if operation.label.startswith("PUT ") else 40  # a process each

            @settings(max_examples=max_examples, deadline=None, suppress_health_check=SLOW)
            @given(case=operation.as_strategy())
            def check(case):
                if isinstance(case.body, dict):
                    for key in ("max_tokens", "max_completion_tokens", "n"):
                        if isinstance(case.body.get(key), int):
                            case.body[key] = min(case.body[key], 2)
                case.call_and_validate(timeout=20, checks=SCHEMATHESIS_CHECKS)

            try:
                check()
            except BaseException as error:
                problems.append(f"{operation.label}: {error}")

    await asyncio.to_thread(run)
    print("\n\n".join(problems))
    assert problems == []
