"""Every error becomes a response here, and nowhere else: `application/problem+json` (RFC 9457)."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from app.errors import (
    AppError,
    FieldError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    ValidationError,
)
from app.observability.logging import request_id
from app.schemas.problem import FieldProblem, Problem

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

# What the framework raises by itself -> our error and its detail.
_FRAMEWORK: dict[int, AppError] = {
    400: ValidationError.of_field("body", "could not be read"),
    404: NotFoundError("There is nothing at this address."),
    405: MethodNotAllowedError("This address does not take this method."),
    413: PayloadTooLargeError("The body is larger than this route takes."),
    415: UnsupportedMediaTypeError("This route does not read this content type."),
}
# `openapi_schemas` puts what this refers to into the document.
_SCHEMA = {"$ref": "#/components/schemas/Problem"}
_MOST_ERRORS = 20
_LIMITS = ("max_length", "min_length", "ge", "gt", "le", "lt", "max_digits")


def problem_response(error: AppError, scope: Scope) -> JSONResponse:
    """Render one error for the request of `scope`."""
    problem = Problem(
        type=error.type_name(),
        title=error.title,
        status=error.status,
        detail=error.detail,
        instance=scope.get("path", ""),
        request_id=request_id.get() or "",
        errors=[
            FieldProblem(field=one.field, message=one.message, limit=one.limit)
            for one in error.errors
        ],
        progress=error.progress,
    )
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    body = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(body, error.status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Have every error that leaves a route rendered as a problem."""
    app.add_exception_handler(AppError, _on_app_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


def responses_for(*errors: type[AppError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that may answer with these errors (and with a 500)."""
    by_status: dict[int, list[type[AppError]]] = {}
    kinds_of_error: tuple[type[AppError], ...] = (*errors, InternalError)
    for error in kinds_of_error:
        by_status.setdefault(error.status, []).append(error)
    return {
        status: {
            "description": ", ".join(f"{one.title} (`{one.type_name()}`)" for one in kinds),
            "content": {MEDIA_TYPE: {"schema": _SCHEMA, "example": _example(kinds[0])}},
        }
        for status, kinds in by_status.items()
    }


def openapi_schemas() -> dict[str, Any]:
    """The schemas of problems, for the OpenAPI document's components."""
    schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs"), "Problem": schema}


def _example(error: type[AppError]) -> dict[str, Any]:
    return {
        "type": error.type_name(),
        "title": error.title,
        "status": error.status,
        "detail": (error.__doc__ or "").split(";")[0].strip().removesuffix(".") + ".",
        "instance": "/api/v1/text-to-speech/generate",
        "request_id": "0f8e2c9d4b7a4d21",
        "errors": [],
    }


async def _on_app_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AppError)
    if error.status == 500:
        logger.error("internal error", extra={"detail": error.detail})
    return problem_response(error, request.scope)


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    fields = tuple(_field_error(one) for one in error.errors()[:_MOST_ERRORS])
    detail = "; ".join(f"{one.field}: {one.message}" for one in fields)
    return problem_response(ValidationError(detail, errors=fields), request.scope)


def _field_error(error: Mapping[str, Any]) -> FieldError:
    """One of pydantic's errors, without the input that it was about."""
    place = [str(part) for part in error["loc"]]
    field = ".".join(place[1:]) or place[0]
    context = error.get("ctx", {})
    limits = [context[name] for name in _LIMITS if isinstance(context.get(name), int | float)]
    if error["type"] == "json_invalid":
        return FieldError("body", "is not valid JSON")
    if error["type"] == "extra_forbidden":
        return FieldError(field, "is not a field of this request")
    message = str(error["msg"]).removeprefix("Value error, ")
    return FieldError(field, message[:1].lower() + message[1:], limits[0] if limits else None)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, AppError):  # raised by a middleware while the body was read
        return problem_response(error.__cause__, request.scope)
    known = _FRAMEWORK.get(error.status_code)
    if known is None:
        logger.error("no error class for status", extra={"status": error.status_code})
        known = InternalError("The request could not be answered.")
    response = problem_response(known, request.scope)
    response.headers.update(error.headers or {})
    return response
