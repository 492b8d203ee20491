"""Puts the application together. The only module that builds something when it is imported."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_redoc_html
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline

from app import __version__, problems
from app.config import Settings, load_settings
from app.middleware import (
    BodyLimitProblem,
    CancelOnDisconnect,
    Draining,
    InFlight,
    RequestContext,
    RootPath,
)
from app.resources import Resources, open_resources
from app.routers import health, models, tts

_DESCRIPTION = """\
A self-hosted server for speech models. Give it text, get speech: `generate` speaks, `clone` speaks
in the voice of a recording. Errors are `application/problem+json`.
"""


class State(TypedDict):
    """What the lifespan hands to every request as `request.state`."""

    resources: Resources


def create_app(settings: Settings) -> FastAPI:
    """Build the application. Nothing is opened before its lifespan begins."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with open_resources(settings) as resources:
            yield {"resources": resources}

    app = FastAPIOffline(
        title="Bawabah AI",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.settings = settings
    app.state.in_flight = InFlight()
    problems.install(app)
    app.add_route("/redoc", _redoc, include_in_schema=False)
    app.include_router(health.router)
    app.include_router(models.router)
    app.include_router(tts.create_router(settings.tts))
    # Each is wrapped around those before it: the last one is the outermost.
    app.add_middleware(CancelOnDisconnect, max_body_seconds=settings.tts.request_timeout_seconds)
    app.add_middleware(BodyLimitProblem)
    app.add_middleware(Draining, in_flight=app.state.in_flight)
    app.add_middleware(RequestContext)
    app.add_middleware(RootPath, root_path=settings.root_path)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


async def _redoc(request: Request) -> HTMLResponse:
    """ReDoc, kept from fetching its maker's logo from a CDN."""
    root_path = request.scope.get("root_path", "")
    page = get_redoc_html(
        openapi_url=f"{root_path}/openapi.json",
        title="Bawabah AI - ReDoc",
        redoc_js_url=f"{root_path}/static-offline-docs/redoc.standalone.js",
        redoc_favicon_url=f"{root_path}/static-offline-docs/favicon.png",
        with_google_fonts=False,
    )
    page.headers["Content-Security-Policy"] = "img-src 'self' data:"
    return page


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with our problems, less the 422 that this server never sends."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = schema["components"]["schemas"]
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas |= problems.openapi_schemas()
    return app.openapi_schema or {}


app = create_app(load_settings())
