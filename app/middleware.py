"""What happens around every request, as pure ASGI.

Starlette's BaseHTTPMiddleware is not used anywhere: it ends a stream that failed half-way as if
it were complete. Order, outermost first: RootPath, RequestContext, Draining, BodyLimitProblem,
CancelOnDisconnect.
"""

import asyncio
import logging
import re
import secrets
from time import perf_counter
from traceback import format_tb

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import (
    DeadlineExceededError,
    InternalError,
    PayloadTooLargeError,
    ShuttingDownError,
)
from app.observability.logging import request_id
from app.problems import problem_response

logger = logging.getLogger("app.access")

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RootPath:
    """Serves under ROOT_PATH, whether the proxy in front strips it from the path or not."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request with its whole path, which is what Starlette's mounts look for."""
        if scope["type"] == "http" and self._root_path:
            path, root_path = scope["path"], self._root_path
            if path != root_path and not path.startswith(f"{root_path}/"):
                path = root_path + path
            scope = {**scope, "root_path": root_path, "path": path}
        await self._app(scope, receive, send)


class RequestContext:
    """Gives the request its id, logs it when it is over, and turns a surprise into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get("x-request-id", "")
        current = sent if _CLIENT_ID.fullmatch(sent) else secrets.token_hex(8)
        token = request_id.set(current)
        began = perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = current
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # Only uvicorn cancels here: the grace time is over.
            if status:
                raise
            late = ShuttingDownError("The server stopped too early.", retry_after_seconds=5)
            await problem_response(late, scope)(scope, receive, send_with_id)
        except Exception as surprise:
            # The last resort for what nobody foresaw. Once bytes have left, only breaking the
            # connection tells the client that they are not the whole answer. A library may quote
            # the text to be spoken in its message, so that stays out of the log.
            logger.error(  # noqa: TRY400
                "request failed",
                extra={
                    "error": type(surprise).__qualname__,
                    "traceback": "".join(format_tb(surprise.__traceback__)),
                },
            )
            if status:
                raise
            error = InternalError("Something went wrong. The request id finds it in the log.")
            await problem_response(error, scope)(scope, receive, send_with_id)
        finally:
            _log(scope, status, perf_counter() - began)
            request_id.reset(token)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line a request; status 0 means that the client left before there was an answer."""
    route = scope.get("route")
    logger.info(
        "request",
        extra={
            "method": scope["method"],
            "route": getattr(route, "path", "unmatched"),
            "status": status,
            "milliseconds": round(seconds * 1000, 1),
        },
    )


class InFlight:
    """Counts the requests being served, and says whether new ones are still taken."""

    def __init__(self) -> None:
        self.draining = False
        self._count = 0

    def enter(self) -> None:
        """A request has begun."""
        self._count += 1

    def leave(self) -> None:
        """A request is over."""
        self._count -= 1

    @property
    def is_idle(self) -> bool:
        """Whether no request is being served."""
        return not self._count


class Draining:
    """While the server stops: what has begun goes on, anything new is a 503. Liveness stays."""

    def __init__(self, app: ASGIApp, in_flight: InFlight) -> None:
        self._app = app
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run or refuse the request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._in_flight.draining and not scope["path"].endswith("/health/live"):
            error = ShuttingDownError("The server is shutting down.", retry_after_seconds=5)
            response = problem_response(error, scope)
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        self._in_flight.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight.leave()


class BodyLimitProblem:
    """FastAPI's body limit answers in plain text; this gives it the shape of every other error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, and replace the body limit's answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def send_problem(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and _is_plain_413(message):
                replaced = True
                limit = scope[MAX_BODY_SIZE_SCOPE_KEY]
                error = PayloadTooLargeError(f"body: must not exceed {limit} bytes.")
                response = problem_response(error, scope)
                response.headers["Connection"] = "close"  # the rest of the body is not read
                await response(scope, receive, send)
            elif not replaced:
                await send(message)

        await self._app(scope, receive, send_problem)


def _is_plain_413(message: Message) -> bool:
    plain = Headers(raw=message["headers"]).get("content-type", "").startswith("text/plain")
    return message["status"] == 413 and plain


class CancelOnDisconnect:
    """Cancels the request's work when the client hangs up, so that a model stops at once."""

    def __init__(self, app: ASGIApp, max_body_seconds: float) -> None:
        self._app = app
        self._max_body_seconds = max_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the request, watching the connection once the body has been read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = _Connection(receive, send, self._max_body_seconds)

        async def run() -> None:
            await self._app(scope, connection.receive, connection.send)

        work = asyncio.create_task(run())
        watcher = asyncio.create_task(connection.wait_until_client_left())
        try:
            await asyncio.wait({work, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not connection.answered:
                work.cancel("the client has gone")
            await asyncio.wait({work})  # after the answer it still tidies up
        finally:
            watcher.cancel()
            work.cancel()
        if not work.cancelled():
            work.result()


class _Connection:
    """One request's messages, seen on their way: when the body ends, and when the answer does."""

    def __init__(self, receive: Receive, send: Send, max_body_seconds: float) -> None:
        self._receive = receive
        self._send = send
        self._max_body_seconds = max_body_seconds
        self._give_up_at = asyncio.get_running_loop().time() + max_body_seconds
        self._body_read = asyncio.Event()
        self._client_left = asyncio.Event()
        self.answered = False

    async def receive(self) -> Message:
        """For the application: the body, then nothing until the client has left."""
        if self._body_read.is_set():
            await self._client_left.wait()
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._give_up_at):
                message = await self._receive()
        except TimeoutError:
            seconds = f"{self._max_body_seconds:g}"
            raise DeadlineExceededError(f"The body took over {seconds} seconds.") from None
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._body_read.set()
        return message

    async def send(self, message: Message) -> None:
        """For the application: its answer."""
        await self._send(message)
        self.answered = message["type"] == "http.response.body" and not message.get("more_body")

    async def wait_until_client_left(self) -> None:
        """Until the connection is closed; the application alone reads before the body's end."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._client_left.set()
