"""The documentation says what the code does: its tables equal the code, its links lead somewhere.

Where a test fails because the code changed, the message holds the row that the page needs.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from app import errors
from app.backends.tts.hibari import HibariBackend
from app.backends.tts.voxcpm.layout import PUBLISHED
from app.config import ModelSettings, Settings, SpeechSettings, environment_names, load_settings
from app.domain.models import Capabilities, EmbeddedSource, ModelSpec
from app.main import create_app
from app.schemas.models import CapabilitiesOut, ModelOut, Ready
from app.schemas.problem import Problem
from app.schemas.tts import CloneForm, GenerateBody, SpeechFields
from app.services.catalog import EMBEDDED_NAMES, HUB_NAMES

ROOT = Path(__file__).parents[2]
GENERATE = "/api/v1/text-to-speech/generate"
CLONE = "/api/v1/text-to-speech/clone"


def _documents() -> list[Path]:
    """Every Markdown file of the project, outside of folders of tools and of weights."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(
            part.startswith(".") or part == "models" for part in path.relative_to(ROOT).parts
        )
    )


DOCUMENTS = _documents()
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS]
)


# --- Reading Markdown -----------------------------------------------------------------------------


def _page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    lines = text.splitlines()
    start = lines.index(heading)
    level = len(heading) - len(heading.lstrip("#"))
    ending = re.compile(rf"#{{1,{level}}} ")
    end = next((i for i in range(start + 1, len(lines)) if ending.match(lines[i])), len(lines))
    return "\n".join(lines[start + 1 : end])


def _rows(text: str) -> list[list[str]]:
    """The cells of every table row whose first cell is code, so no headings and no rulers."""
    tables = [line for line in text.splitlines() if line.startswith("| `")]
    return [
        [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in tables
    ]


def _bare(cell: str) -> str:
    return cell.strip("`")


def _without_code(text: str) -> str:
    """The text without its code blocks and spans."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def _slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- Settings -------------------------------------------------------------------------------------


def _default(name: str) -> str:
    """The default of a setting as it is written in the environment; empty for none."""
    group, field = environment_names()[name]
    value = group.model_fields[field].get_default(call_default_factory=True)
    match value:
        case None | () | {}:
            return ""
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)


def _setting_row(name: str) -> list[str]:
    group, field = environment_names()[name]
    default = f"`{_default(name)}`" if _default(name) else "none"
    return [f"`{name}`", default, group.model_fields[field].description or ""]


def test_the_table_of_settings_equals_the_code() -> None:
    documented = {row[0]: row for row in _rows(_page("docs/reference/settings.md"))}
    expected = {row[0]: row for row in map(_setting_row, environment_names())}
    assert documented == expected


def test_the_example_of_env_holds_every_setting_at_its_default() -> None:
    lines = _page(".env.example").splitlines()
    assignment = re.compile(r"# ([A-Z][A-Z_]*)=(.*)")
    found = {match[1]: match[2] for line in lines if (match := assignment.fullmatch(line))}
    assert found == {name: _default(name) for name in environment_names()}
    for above, line in pairwise(lines):
        if assignment.fullmatch(line):
            assert above.startswith("# "), f"no comment above {line!r}"
            assert not assignment.fullmatch(above), f"no comment above {line!r}"


def test_the_example_of_env_can_be_uncommented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in environment_names():
        monkeypatch.delenv(name, raising=False)
    values = [f"{name}={_default(name)}" for name in environment_names() if _default(name)]
    env_file = tmp_path / ".env"
    env_file.write_text("\n".join(values), encoding="utf-8")
    assert load_settings(env_file) == load_settings(None)


def test_every_setting_that_a_page_names_exists() -> None:
    names = re.compile(r"\b(?:TTS|MODEL)_[A-Z][A-Z_]*[A-Z]\b")
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        settings = re.sub(r"^```python.*?^```", "", text, flags=re.M | re.S)
        unknown = set(names.findall(settings)) - set(environment_names())
        assert not unknown, f"{document.relative_to(ROOT)} names {unknown}"


# --- Errors ---------------------------------------------------------------------------------------


def _subclasses(base: type[errors.AppError]) -> Iterator[type[errors.AppError]]:
    for one in base.__subclasses__():
        if one.__module__ == errors.__name__:
            yield one
            yield from _subclasses(one)


def test_the_table_of_errors_equals_the_code() -> None:
    rows = _rows(_section(_page("docs/reference/errors.md"), "## The errors"))
    documented = {_bare(row[0]): int(row[1]) for row in rows}
    assert documented == {one.type_name(): one.status for one in _subclasses(errors.AppError)}
    assert all(len(row) == 4 and all(row) for row in rows)


def test_the_fields_of_a_problem_equal_the_code() -> None:
    rows = _rows(_section(_page("docs/reference/errors.md"), "## The body"))
    assert [_bare(row[0]) for row in rows] == list(Problem.model_fields)


# --- The API --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document of the application as it is by default."""
    models = ModelSettings(cache_dir=tmp_path_factory.mktemp("docs"))
    app: FastAPI = create_app(Settings(tts=SpeechSettings(), models=models))
    return app.openapi()


def test_the_table_of_endpoints_equals_the_openapi_document(openapi: dict[str, Any]) -> None:
    rows = _rows(_section(_page("docs/reference/api.md"), "## Endpoints"))
    documented = {(_bare(row[0]), _bare(row[1])): row[2] for row in rows}
    assert documented == {
        (method.upper(), path): ", ".join(sorted(operation["responses"]))
        for path, operations in openapi["paths"].items()
        for method, operation in operations.items()
    }


@pytest.mark.parametrize("path", [GENERATE, CLONE])
def test_the_headers_of_an_audio_answer_are_documented(openapi: dict[str, Any], path: str) -> None:
    rows = _rows(_section(_page("docs/reference/api.md"), "## The audio answer"))
    headers = openapi["paths"][path]["post"]["responses"]["200"]["headers"]
    assert {_bare(row[0]): row[1] for row in rows} == {
        name: header["description"] for name, header in headers.items()
    }


def _field_rows(body: type[BaseModel]) -> dict[str, list[str]]:
    """Each request field: name, type, default, bounds, meaning."""
    schema = body.model_json_schema()
    required = schema.get("required", [])
    rows = {}
    for name, field in schema["properties"].items():
        # Beside the value itself a field may be null, or in a form empty.
        choices = [one for one in field.get("anyOf", []) if one.get("type", "null") != "null"]
        value = choices[0] if choices else field
        is_file = value.get("format") == "binary" or "contentMediaType" in value
        rows[name] = [
            f"`{name}`",
            "file" if is_file else value["type"],
            "required" if name in required else _json(field.get("default")),
            _bounds(value),
            field["description"],
        ]
    return rows


def _json(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
    return str(value)


def _bounds(schema: dict[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None:
        return f"{least:,g} to {most:,}" if isinstance(most, int) else f"{least:g} to {most:g}"
    if least is not None:
        return f"at least {least:g}"
    if (above := schema.get("exclusiveMinimum")) is not None:
        return f"above {above:g}"
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    if longest is not None:
        return f"{shortest} to {longest} characters"
    return f"at least {shortest} character" if shortest is not None else "none"


def test_the_fields_of_generate_equal_the_code() -> None:
    rows = _rows(_section(_page("docs/reference/api.md"), "## Fields of generate"))
    assert {_bare(row[0]): row for row in rows} == _field_rows(GenerateBody)


def test_the_fields_of_clone_equal_the_code() -> None:
    rows = _rows(_section(_page("docs/reference/api.md"), "## Fields of clone"))
    shared = SpeechFields.model_fields
    own = {name: row for name, row in _field_rows(CloneForm).items() if name not in shared}
    assert {_bare(row[0]): row for row in rows} == own


@pytest.mark.parametrize(
    ("heading", "model"),
    [
        ("### A model", ModelOut),
        ("### Capabilities", CapabilitiesOut),
        ("### Readiness", Ready),
    ],
)
def test_the_fields_of_an_answer_equal_the_code(heading: str, model: type[BaseModel]) -> None:
    rows = _rows(_section(_page("docs/reference/api.md"), heading))
    assert [_bare(row[0]) for row in rows] == list(model.model_fields)


# --- Models ---------------------------------------------------------------------------------------


def _known_models() -> dict[str, Capabilities]:
    embedded = {
        name: HibariBackend.describe(ModelSpec(name, backend, EmbeddedSource()), None)
        for name, backend in EMBEDDED_NAMES.items()
    }
    return {name: PUBLISHED[name].capabilities() for name in HUB_NAMES} | embedded


def _cloning(capabilities: Capabilities) -> str:
    by_prompt = "prompt_text" in capabilities.parameters
    by_reference = "reference_wav" in capabilities.parameters
    return {
        (False, False): "none",
        (True, False): "with a transcript",
        (True, True): "with or without a transcript",
    }[by_prompt, by_reference]


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/choose-a-model.md"])
def test_the_table_of_models_equals_the_code(page: str) -> None:
    rows = _rows(_section(_page(page), "## Models"))
    assert {_bare(row[0]): row[1:3] for row in rows} == {
        name: [f"{one.sample_rate_hz:,} Hz", _cloning(one)] for name, one in _known_models().items()
    }


# --- Every page -----------------------------------------------------------------------------------


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    text = _without_code(document.read_text(encoding="utf-8"))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), f"no such file: {target}"
        if anchor:
            assert anchor in _slugs(page.read_text(encoding="utf-8")), f"no such heading: {target}"


@each_document
def test_a_page_names_nothing_of_the_machine_it_was_written_on(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in (f"{ROOT}/", f"{Path.home()}/"):
        assert path not in text


@each_document
def test_a_page_has_no_placeholder_left(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for placeholder in ("SETUP_TIME", "SETUP_DISK", "BENCH_TABLE"):
        assert placeholder not in text


@each_document
def test_files_and_commands_that_a_page_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:app|bench|docs|requirements|tests)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z-]+):", _page("Makefile"), flags=re.M)
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.M):
        assert target in targets, f"make {target}"


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/index.md"
    targets = re.findall(r"\]\(([^)\s#]+)", index.read_text(encoding="utf-8"))
    linked = {(index.parent / target).resolve() for target in targets}
    assert set((ROOT / "docs").rglob("*.md")) - linked - {index} == set()


def test_the_code_map_names_every_part() -> None:
    text = _page("docs/architecture.md")
    parts = [
        path.relative_to(ROOT)
        for path in (ROOT / "app").rglob("*")
        if path.suffix == ".py" and path.name != "__init__.py"
    ]
    packages = {part.parent for part in parts} - {Path("app")}
    top_level = {part for part in parts if part.parent == Path("app")}
    missing = [str(one) for one in sorted(packages | top_level) if f"`{one}" not in text]
    assert not missing
