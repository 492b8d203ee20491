"""Runs the application: the process environment before torch, uvicorn, and an orderly end.

On SIGTERM or SIGINT the server refuses new requests with 503, finishes those that it has begun
within `SHUTDOWN_GRACE_SECONDS`, and exits with status 0. uvicorn alone would close idle
connections without an answer, and exit with the signal's status. A second signal ends it at once.
"""

import logging
import os
import socket
import sys
from math import ceil
from pathlib import Path
from time import monotonic
from types import FrameType

import uvicorn
from pydantic import ValidationError

from app.config import GROUPS, SettingError, Settings, load_settings, unknown_env_keys
from app.observability.logging import configure_logging
from app.services.catalog import Catalog

logger = logging.getLogger(__name__)

# Set unless the operator has set them; they must be there before torch is imported.
# GOMP_SPINCOUNT: OpenMP threads that spin for long while they wait make torch collapse as soon as
# another process wants a core (docs/explanation/openmp.md has the measurements).
PROCESS_DEFAULTS = {
    "GOMP_SPINCOUNT": "20000",
    "TQDM_DISABLE": "1",  # the library draws a progress bar for every request
    "TOKENIZERS_PARALLELISM": "false",
}

_EXAMPLE = """\
Bawabah AI is up: {address}/docs

  curl -s -X POST {address}/api/v1/text-to-speech/generate \\
    -H 'Content-Type: application/json' \\
    -d '{{"text":"The quick brown fox jumps over the lazy dog."}}' -o speech.wav

"""


# Python code of a model's thread gives way to the event loop after this long; by default 5 ms.
_SWITCH_INTERVAL_SECONDS = 0.001


def set_process_defaults() -> None:
    """Fill in what the environment leaves open."""
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    for name, value in PROCESS_DEFAULTS.items():
        os.environ.setdefault(name, value)


class DrainingServer(uvicorn.Server):
    """uvicorn that stops in order: refuse, finish, exit 0."""

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self._settings = settings
        self._in_flight = config.app.state.in_flight  # type: ignore[union-attr]
        self._give_up_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """First signal: drain. Second: leave now."""
        if self._in_flight.draining:
            logging.shutdown()
            os._exit(0)  # at once, whatever a model's thread is doing
        self._in_flight.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether it is time to stop."""
        if self._in_flight.draining and not self.should_exit:
            if self._give_up_at is None:
                logger.info("draining")
                self._give_up_at = monotonic() + self._settings.shutdown_grace_seconds
            self.should_exit = self._in_flight.is_idle or monotonic() >= self._give_up_at
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop; answers that are made but not yet sent have the rest of the grace time."""
        left_seconds = (self._give_up_at or 0.0) - monotonic()
        self.config.timeout_graceful_shutdown = max(1, ceil(left_seconds))
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            reachable = "127.0.0.1" if host in {"0.0.0.0", "::"} else host
            host_in_url = f"[{reachable}]" if ":" in reachable else reachable
            address = f"http://{host_in_url}:{port}{self._settings.root_path}"
            sys.stdout.write(_EXAMPLE.format(address=address))
            sys.stdout.flush()


def serve(sockets: list[socket.socket] | None = None) -> None:
    """Serve until told to stop."""
    set_process_defaults()
    from app.main import app  # builds the application; after the environment is set

    settings: Settings = app.state.settings
    configure_logging("DEBUG" if settings.debug else settings.log_level)
    for key in unknown_env_keys():
        logger.warning("unknown key in .env", extra={"key": key})
    DrainingServer(_uvicorn_config(settings, app), settings).run(sockets)


def _uvicorn_config(settings: Settings, app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        host=settings.host,
        port=settings.port,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def _settings_or_exit() -> Settings:
    """The settings; wrong ones are named on stderr and end the process with status 2."""
    try:
        settings = load_settings()
        Catalog(settings)
    except ValidationError as error:
        prefixes = {group.__name__: group.model_config.get("env_prefix") or "" for group in GROUPS}
        for one in error.errors():
            name = f"{prefixes[error.title]}{one['loc'][0]}".upper()
            sys.stderr.write(f"Wrong setting {name}: {one['msg']}\n")
        raise SystemExit(2) from None
    except SettingError as error:
        sys.stderr.write(f"Wrong setting {error}\n")
        raise SystemExit(2) from None
    return settings


def main() -> None:
    """`python -m app.server`."""
    settings = _settings_or_exit()
    if settings.debug:
        from uvicorn.supervisors import ChangeReload

        config = uvicorn.Config(
            "app.main:app",
            host=settings.host,
            port=settings.port,
            reload=True,
            reload_dirs=[str(Path(__file__).parent)],
        )
        ChangeReload(config, target=serve, sockets=[config.bind_socket()]).run()
    else:
        status: object = 0
        try:
            serve()
        except SystemExit as end:
            status = end.code
        # Not by the interpreter's own end: it aborts while a model's thread is inside C++.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
