"""Rules of the code that neither a linter nor an import contract holds."""

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.backends.base import TTSBackend
from app.backends.registry import TTS_BACKENDS, tts_backend
from app.services.catalog import EMBEDDED_NAMES

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "app").rglob("*.py"))
MOST_LINES = 400
# Slow to import, or absent where a part is not installed: nobody pays for them before first use.
ON_FIRST_USE = (
    "av",
    "hibari",
    "huggingface_hub",
    "onnxruntime",
    "soundfile",
    "soxr",
    "torch",
    "torchaudio",
    "transformers",
    "voxcpm",
)

each_module = pytest.mark.parametrize(
    "module", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES]
)


def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"), filename=str(module))


# --- Backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TTS_BACKENDS)
def test_a_registered_backend_has_the_members_of_its_protocol(name: str) -> None:
    backend = tts_backend(name)
    for member, promised in vars(TTSBackend).items():
        if member.startswith("_") or not callable(getattr(TTSBackend, member)):
            continue
        given = inspect.getattr_static(backend, member)
        assert type(given) is type(promised), member
        promised_call, given_call = getattr(TTSBackend, member), getattr(backend, member)
        is_coroutine = inspect.iscoroutinefunction
        assert is_coroutine(given_call) == is_coroutine(promised_call), member
        parameters = inspect.signature(given_call).parameters
        assert len(parameters) == len(inspect.signature(promised_call).parameters), member


@pytest.mark.parametrize("name", TTS_BACKENDS)
def test_a_registered_backend_has_the_attributes_of_its_protocol(name: str) -> None:
    backend = tts_backend(name)
    assert set(TTSBackend.__annotations__) == {"required_files", "memory_bytes"}
    assert all(isinstance(group, tuple) and group for group in backend.required_files)
    set_by_constructor = backend.__init__.__code__.co_names  # type: ignore[misc]
    assert hasattr(backend, "memory_bytes") or "memory_bytes" in set_by_constructor


def test_every_embedded_model_names_a_registered_backend() -> None:
    assert set(EMBEDDED_NAMES.values()) <= set(TTS_BACKENDS)


# --- What is imported, and when -------------------------------------------------------------------


def test_building_the_application_loads_no_model_library(tmp_path: Path) -> None:
    code = "import sys, app.main; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # whose .env is not ours
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = set(result.stdout.split())
    assert "app.routers.tts" in loaded
    assert loaded.isdisjoint(ON_FIRST_USE)


# --- Middleware -----------------------------------------------------------------------------------


@each_module
def test_middleware_is_pure_asgi(module: Path) -> None:
    """BaseHTTPMiddleware ends a stream that failed half-way as if it were complete."""
    for node in ast.walk(_tree(module)):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                assert name != "BaseHTTPMiddleware", f"line {node.lineno}"
                assert name != "starlette.middleware.base", f"line {node.lineno}"
            case ast.ImportFrom(module="starlette.middleware.base"):
                pytest.fail(f"line {node.lineno}: {ast.unparse(node)}")
            case ast.Call(func=ast.Attribute(attr="middleware")):
                pytest.fail(f"line {node.lineno}: {ast.unparse(node)}")


# --- Shape ----------------------------------------------------------------------------------------


@each_module
def test_a_module_is_short_and_says_what_it_is(module: Path) -> None:
    assert ast.get_docstring(_tree(module)), "no docstring"
    lines = module.read_text(encoding="utf-8").count("\n")
    assert lines <= MOST_LINES, f"{lines} lines"


def test_nothing_reads_outside_of_the_repository() -> None:
    outside = "../" + "shared"
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        assert outside not in path.read_text(encoding="utf-8"), path.relative_to(ROOT)
