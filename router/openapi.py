"""The OpenAPI 3.1 document, generated from the structs that validate: every route, header and error."""

from typing import Any

import msgspec

from cluster.model_card import ModelCard
from cluster.placement.choose import HopPolicy
from router.admission import MAX_SESSION_ID_CHARS, Limits
from router.http import (
    CAMPAIGN_HEADER,
    DEADLINE_HEADER,
    HOP_HEADER,
    REQUEST_ID_HEADER,
    SESSION_HEADER,
    TIMELINE_HEADER,
)
from router.openai_answers import (
    ChatCompletionBody,
    ChatCompletionChunk,
    CompletionBody,
    ErrorBody,
    HealthBody,
    ModelBody,
    ModelListBody,
    ReadyBody,
)
from router.openai_api import (
    MAX_CAMPAIGN_CHARS,
    MAX_DEADLINE_MS,
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
)
from router.openapi_targeting import TARGETING_SCHEMAS, targeting_paths
from router.targeting_api import TargetingRequest

Json = dict[str, Any]

REF = "#/components/schemas/{name}"
SCHEMAS = (
    CompletionRequest,
    ChatCompletionRequest,
    CompletionBody,
    ChatCompletionBody,
    ChatCompletionChunk,
    ErrorBody,
    HealthBody,
    ModelBody,
    ModelListBody,
    ReadyBody,
    *TARGETING_SCHEMAS,
)

ERRORS = {
    "400": "The request is wrong; `param` names the field, the message what it may be",
    "404": "No such model, catalogue or route",
    "405": "No such method here",
    "408": "The body did not arrive in time",
    "409": "An upload of the catalogue is under way; or it was compiled for another model",
    "413": "The body is too large",
    "415": "The body is of another type than those here",
    "429": "Too much is being served",
    "503": "No worker can serve the request now",
}
RETRYABLE = ("429", "503")
PRINTABLE = "^[!-~]+$"


def openapi_document(card: ModelCard, limits: Limits) -> bytes:
    _, schemas = msgspec.json.schema_components(SCHEMAS, ref_template=REF)
    for request in (CompletionRequest, ChatCompletionRequest, TargetingRequest):
        _describe_model(schemas[request.__name__]["properties"], limits)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Headrace",
            "version": "1",
            "description": "Small language models inside a deadline, by OpenAI's API. "
            "`null` is the same as leaving a field out.",
        },
        "paths": {
            "/v1/completions": _completion_path(
                "Complete a prompt", "createCompletion", CompletionRequest, CompletionBody, CompletionBody
            ),
            "/v1/chat/completions": _completion_path(
                "Answer a conversation",
                "createChatCompletion",
                ChatCompletionRequest,
                ChatCompletionBody,
                ChatCompletionChunk,
            ),
            **targeting_paths(_json_content, _response, _errors, _request_headers()),
            "/v1/models": _get_path("List models", "listModels", ModelListBody),
            "/v1/models/{id}": _model_path(card),
            "/health": _get_path("Whether the process lives", "health", HealthBody),
            "/ready": _ready_path(),
            "/metrics": _text_path("Prometheus metrics of router and workers", "metrics", "text/plain"),
            "/openapi.json": _document_path(),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _describe_model(properties: Json, limits: Limits) -> None:
    """What is true of this model alone."""
    properties["model"] = {"type": "string", "enum": [limits.model]}
    most = limits.max_context_tokens - 1
    for name in ("max_tokens", "max_completion_tokens"):
        if name in properties:
            properties[name]["anyOf"][0]["maximum"] = most
    if "prompt" in properties:
        properties["prompt"] = _prompt_schema(limits.vocab_size)


def _prompt_schema(vocab_size: int) -> Json:
    text = {"type": "string", "minLength": 1}
    token_ids = _array({"type": "integer", "minimum": 0, "maximum": vocab_size - 1})
    return {
        "description": f"A text, its token ids, or 1 to {MAX_PROMPTS} of either",
        "anyOf": [text, token_ids, _array(text, MAX_PROMPTS), _array(token_ids, MAX_PROMPTS)],
    }


def _array(items: Json, max_items: int | None = None) -> Json:
    bound = {} if max_items is None else {"maxItems": max_items}
    return {"type": "array", "items": items, "minItems": 1, **bound}


def _schema(type: type[msgspec.Struct]) -> Json:
    return {"$ref": REF.format(name=type.__name__)}


def _json_content(type: type[msgspec.Struct]) -> Json:
    return {"application/json": {"schema": _schema(type)}}


def _response(description: str, content: Json, *, is_retryable: bool = False) -> Json:
    headers: Json = {"x-request-id": {"required": True, "schema": {"type": "string"}}}
    if is_retryable:
        headers["retry-after"] = {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}
    return {"description": description, "headers": headers, "content": content}


def _errors(*statuses: str) -> Json:
    return {
        status: _response(ERRORS[status], _json_content(ErrorBody), is_retryable=status in RETRYABLE)
        for status in statuses
    }


def _header(name: str, description: str, schema: Json) -> Json:
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def _request_headers() -> list[Json]:
    id_schema = {"type": "string", "minLength": 1, "maxLength": MAX_SESSION_ID_CHARS, "pattern": PRINTABLE}
    return [
        _header(REQUEST_ID_HEADER, "Echoed in the response, if printable", {"type": "string"}),
        _header(SESSION_HEADER, "Requests of one session go to where its KV is", id_schema),
        _header(
            DEADLINE_HEADER,
            "As `deadline_ms` in the body",
            {"type": "integer", "minimum": 1, "maximum": MAX_DEADLINE_MS},
        ),
        _header(
            CAMPAIGN_HEADER,
            "As `campaign` in the body",
            {**id_schema, "maxLength": MAX_CAMPAIGN_CHARS},
        ),
        _header(TIMELINE_HEADER, "`1`: the answer tells its stages and placement", {"type": "string"}),
        _header(
            HOP_HEADER,
            "Whether a prefill worker computes the prompt; `auto` lets placement decide",
            {"type": "string", "enum": [hop.value for hop in HopPolicy]},
        ),
    ]


def _completion_path(
    summary: str,
    operation_id: str,
    request: type[msgspec.Struct],
    body: type[msgspec.Struct],
    chunk: type[msgspec.Struct],
) -> Json:
    stream = {
        # No type: OpenAPI 3.1 has no word for a stream of events, and tools read it as text or as events.
        "schema": {"description": "Server-sent events; `data` is an x-event-schema or `[DONE]`."},
        "x-event-schema": _schema(chunk),
    }
    content = {**_json_content(body), "text/event-stream": stream}
    return {
        "post": {
            "summary": summary,
            "operationId": operation_id,
            "security": [{}, {"bearer": []}],
            "parameters": _request_headers(),
            "requestBody": {"required": True, "content": _json_content(request)},
            "responses": {
                "200": _response("The answer; with `stream`, server-sent events ended by [DONE]", content),
                **_errors("400", "404", "408", "409", "413", "415", "429", "503"),
            },
        }
    }


def _get_path(summary: str, operation_id: str, body: type[msgspec.Struct]) -> Json:
    responses = {"200": _response(summary, _json_content(body))}
    return {"get": {"summary": summary, "operationId": operation_id, "responses": responses}}


def _model_path(card: ModelCard) -> Json:
    path = _get_path("Describe a model", "retrieveModel", ModelBody)
    path["get"]["parameters"] = [
        {
            "name": "id",
            "in": "path",
            "required": True,
            "schema": {"type": "string", "minLength": 1},
            "example": card.name,
        }
    ]
    path["get"]["responses"] |= _errors("404")
    return path


def _ready_path() -> Json:
    path = _get_path("Whether requests can be served", "ready", ReadyBody)
    path["get"]["responses"]["503"] = _response("Not yet; `reason` says why", _json_content(ReadyBody))
    return path


def _text_path(summary: str, operation_id: str, content_type: str) -> Json:
    content = {content_type: {"schema": {"type": "string"}}}
    responses = {"200": _response(summary, content)}
    return {"get": {"summary": summary, "operationId": operation_id, "responses": responses}}


def _document_path() -> Json:
    content = {"application/json": {"schema": {"type": "object"}}}
    responses = {"200": _response("This document", content)}
    return {"get": {"summary": "This document", "operationId": "openapi", "responses": responses}}
