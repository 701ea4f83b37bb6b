"""The paths of targeting and its catalogues in the OpenAPI document."""

from collections.abc import Callable
from typing import Any

import msgspec

from router.catalogue_names import MAX_NAME_CHARS, NAME_PATTERN
from router.targeting_api import (
    CatalogueBody,
    CatalogueDeletedBody,
    CatalogueListBody,
    CatalogueUploadBody,
    CatalogueUploadErrorBody,
    TargetingBody,
    TargetingRequest,
)

Json = dict[str, Any]

TARGETING_SCHEMAS = (
    TargetingRequest,
    TargetingBody,
    CatalogueBody,
    CatalogueListBody,
    CatalogueUploadBody,
    CatalogueUploadErrorBody,
    CatalogueDeletedBody,
)
UPLOAD_TYPES = ("application/x-ndjson", "application/jsonl", "text/csv")

Content = Callable[[type[msgspec.Struct]], Json]
Response = Callable[[str, Json], Json]
Errors = Callable[..., Json]


def targeting_paths(content: Content, response: Response, errors: Errors, headers: list[Json]) -> Json:
    """By path; the arguments are how the rest of the document writes a schema, an answer and errors."""
    security: list[Json] = [{}, {"bearer": []}]
    targeting = {
        "summary": "The items of a catalogue that are likeliest after a context",
        "operationId": "createTargeting",
        "security": security,
        "parameters": headers,
        "requestBody": {"required": True, "content": content(TargetingRequest)},
        "responses": {
            "200": response("The items, the likeliest first", content(TargetingBody)),
            **errors("400", "404", "408", "409", "413", "415", "429", "503"),
        },
    }
    many = {
        "summary": "List catalogues",
        "operationId": "listCatalogues",
        "security": security,
        "responses": {
            "200": response("All of the caller's", content(CatalogueListBody)),
            **errors("503"),
        },
    }
    name = {
        "name": "name",
        "in": "path",
        "required": True,
        "schema": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_NAME_CHARS,
            "pattern": NAME_PATTERN,
        },
    }
    skip_bad = {
        "name": "skip_bad",
        "in": "query",
        "required": False,
        "description": "Leave lines that are wrong out, instead of refusing the upload for them",
        "schema": {"type": "boolean"},
    }
    lines = {"schema": {"type": "string"}}
    one = {
        "get": {
            "summary": "Describe a catalogue, and an upload of it that is under way",
            "operationId": "retrieveCatalogue",
            "security": security,
            "parameters": [name],
            "responses": {
                "200": response("The version that serves", content(CatalogueBody)),
                **errors("400", "404", "503"),
            },
        },
        "put": {
            "summary": "Upload a catalogue's items, JSON lines or CSV, and compile them",
            "description": "Answered when the new version serves. Each item has a `text`, and may have an "
            "`id`, a `bid` and attributes to filter by.",
            "operationId": "putCatalogue",
            "security": security,
            "parameters": [name, skip_bad],
            "requestBody": {"required": True, "content": dict.fromkeys(UPLOAD_TYPES, lines)},
            "responses": {
                "200": response("The new version", content(CatalogueUploadBody)),
                "400": response("Nothing was changed; `faults` says why", content(CatalogueUploadErrorBody)),
                **errors("408", "409", "413", "415", "429", "503"),
            },
        },
        "delete": {
            "summary": "Remove a catalogue",
            "operationId": "deleteCatalogue",
            "security": security,
            "parameters": [name],
            "responses": {
                "200": response("It is gone", content(CatalogueDeletedBody)),
                **errors("400", "404", "409", "503"),
            },
        },
    }
    return {
        "/v1/targeting": {"post": targeting},
        "/v1/catalogues": {"get": many},
        "/v1/catalogues/{name}": one,
    }
