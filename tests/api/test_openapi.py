"""The OpenAPI document: complete, valid, and with examples that a reader can send."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from jsonschema_rs import Draft202012Validator

from tests.servers import Running

PROBLEM = "application/problem+json"
SHARED_ERRORS = {"500", "503"}
SPEECH_ERRORS = SHARED_ERRORS | {"400", "404", "413", "429", "504"}
# Every operation, with the errors that it may answer with.
ERRORS = {
    "welcome": SHARED_ERRORS,
    "live": {"500"},
    "ready": SHARED_ERRORS,
    "list_models": SHARED_ERRORS,
    "show_model": SHARED_ERRORS | {"404"},
    "load_model": SHARED_ERRORS | {"404"},
    "unload_model": SHARED_ERRORS | {"404"},
    "generate": SPEECH_ERRORS,
    "clone": SPEECH_ERRORS | {"415"},
}


@dataclass(frozen=True)
class Operation:
    """One operation of the document, and the document for what it refers to."""

    name: str
    path: str
    details: dict[str, Any]
    document: dict[str, Any]

    @property
    def request_media(self) -> dict[str, dict[str, Any]]:
        """The request's body by content type."""
        media: dict[str, dict[str, Any]] = self.details.get("requestBody", {}).get("content", {})
        return media

    @property
    def success_media(self) -> list[dict[str, Any]]:
        """The bodies of the answers that are no errors."""
        answers = self.details["responses"].items()
        return [
            media
            for status, answer in answers
            if status.startswith("2")
            for media in answer.get("content", {}).values()
        ]

    @property
    def errors(self) -> dict[str, dict[str, Any]]:
        """The answers that are errors, by status."""
        answers = self.details["responses"].items()
        return {status: answer for status, answer in answers if status[0] in "45"}

    def resolved(self, schema: dict[str, Any]) -> dict[str, Any]:
        """What a `$ref` refers to, or the schema itself."""
        while "$ref" in schema:
            name = schema["$ref"].removeprefix("#/components/schemas/")
            schema = self.document["components"]["schemas"][name]
        return schema

    def errors_of(self, value: Any, schema: dict[str, Any]) -> list[str]:
        """Why the value does not fit the schema."""
        whole = {"allOf": [schema], "components": self.document["components"]}
        return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


@pytest.fixture(scope="module")
def document(bare: Running) -> dict[str, Any]:
    """What /openapi.json says."""
    answer = bare.client.get("/openapi.json")
    assert answer.status_code == 200
    document: dict[str, Any] = answer.json()
    return document


@pytest.fixture(scope="module")
def operations(document: dict[str, Any]) -> dict[str, Operation]:
    """Every operation by its id."""
    found = [
        Operation(details["operationId"], path, details, document)
        for path, methods in document["paths"].items()
        for details in methods.values()
    ]
    names = [operation.name for operation in found]
    assert len(set(names)) == len(names), "operation ids are not unique"
    return {operation.name: operation for operation in found}


def examples_of(holder: dict[str, Any]) -> list[Any]:
    """The examples of a media type, a parameter or a schema, in each of the ways to give them."""
    given = holder.get("examples", [])
    several = [one["value"] for one in given.values()] if isinstance(given, dict) else given
    return [*several, *([holder["example"]] if "example" in holder else [])]


def pairs_of(operation: Operation, holder: dict[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each example of a media type or parameter, its schema's and its fields', with its schema."""
    schema = holder.get("schema", {})
    for example in examples_of(holder):
        yield example, schema
    yield from _pairs_in(operation, schema, seen=())


def _pairs_in(
    operation: Operation, schema: dict[str, Any], *, seen: tuple[str, ...]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    if schema.get("$ref") in seen:
        return
    seen = (*seen, schema.get("$ref", ""))
    found = operation.resolved(schema)
    for example in examples_of(found):
        yield example, found
    inner = [*found.get("properties", {}).values(), *found.get("anyOf", [])]
    for one in [*inner, *([found["items"]] if "items" in found else [])]:
        yield from _pairs_in(operation, one, seen=seen)


def request_holders(operation: Operation) -> list[dict[str, Any]]:
    """What of the request may carry an example: its parameters and its body."""
    return [*operation.details.get("parameters", []), *operation.request_media.values()]


def test_the_document_is_valid_openapi(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document).validate()


def test_the_document_lists_the_operations_that_we_know(operations: dict[str, Operation]) -> None:
    assert set(operations) == set(ERRORS)


@pytest.mark.parametrize("name", ERRORS)
def test_an_operation_says_what_it_does(operations: dict[str, Operation], name: str) -> None:
    details = operations[name].details
    assert details["summary"].strip()
    assert len(details["description"]) > len(details["summary"])
    assert details["tags"]


@pytest.mark.parametrize("name", ERRORS)
def test_an_operation_has_an_example(operations: dict[str, Operation], name: str) -> None:
    """Of what to send; where there is nothing to send, of what comes back."""
    operation = operations[name]
    holders = request_holders(operation) or operation.success_media
    assert [example for holder in holders for example, _ in pairs_of(operation, holder)]


@pytest.mark.parametrize("name", ERRORS)
def test_every_example_fits_its_schema(operations: dict[str, Operation], name: str) -> None:
    operation = operations[name]
    answers = operation.details["responses"].values()
    media = [one for answer in answers for one in answer.get("content", {}).values()]
    for holder in [*request_holders(operation), *media]:
        for example, schema in pairs_of(operation, holder):
            assert not operation.errors_of(example, schema), (name, example)


@pytest.mark.parametrize("name", ERRORS)
def test_an_operation_documents_its_errors(operations: dict[str, Operation], name: str) -> None:
    assert set(operations[name].errors) == ERRORS[name]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_documented_as_a_problem(
    operations: dict[str, Operation], name: str
) -> None:
    """With its schema. `ready` alone also says 503 in the shape of its 200."""
    for status, answer in operations[name].errors.items():
        others = {"application/json"} if (name, status) == ("ready", "503") else set()
        assert set(answer["content"]) == {PROBLEM} | others, (name, status)
        schema = answer["content"][PROBLEM].get("schema")
        assert schema == {"$ref": "#/components/schemas/Problem"}, (name, status)
        for example in examples_of(answer["content"][PROBLEM]):
            assert example["status"] == int(status)
            assert f"`{example['type']}`" in answer["description"]


def test_the_frameworks_own_error_is_nowhere(document: dict[str, Any]) -> None:
    """FastAPI's 422, which this server answers as 400."""
    text = json.dumps(document)
    assert '"422"' not in text
    assert "HTTPValidationError" not in text


def test_a_path_parameter_says_what_it_is(operations: dict[str, Operation]) -> None:
    for operation in operations.values():
        for parameter in operation.details.get("parameters", []):
            assert parameter["description"], (operation.name, parameter["name"])


def test_every_field_of_a_request_is_described(operations: dict[str, Operation]) -> None:
    for name in ("generate", "clone"):
        for media in operations[name].request_media.values():
            fields = operations[name].resolved(media["schema"])["properties"]
            assert all(field.get("description") for field in fields.values()), name


def test_generate_takes_json_and_clone_takes_a_multipart_form(
    operations: dict[str, Operation],
) -> None:
    assert set(operations["generate"].request_media) == {"application/json"}
    assert set(operations["clone"].request_media) == {"multipart/form-data"}


def test_a_form_offers_no_null(operations: dict[str, Operation]) -> None:
    """A form can send text and files, nothing else; a field left empty counts as not sent."""
    (media,) = operations["clone"].request_media.values()
    fields = operations["clone"].resolved(media["schema"])["properties"]
    nullable = [
        name for name, field in fields.items() if {"type": "null"} in field.get("anyOf", [])
    ]
    assert not nullable


@pytest.mark.parametrize("name", ["generate", "clone"])
def test_speech_is_documented_as_wav_with_its_headers(
    operations: dict[str, Operation], name: str
) -> None:
    answer = operations[name].details["responses"]["200"]
    assert set(answer["content"]) == {"audio/wav"}
    assert {"X-Request-Id", "X-Model", "X-Seed", "X-Sample-Rate", "X-Audio-Duration"} <= set(
        answer["headers"]
    )


def test_every_schema_is_used(document: dict[str, Any]) -> None:
    """Schemas that nothing refers to are left over from something."""
    text = json.dumps(document)
    names = document["components"]["schemas"]
    assert [name for name in names if f'"#/components/schemas/{name}"' not in text] == []
