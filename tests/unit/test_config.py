"""Settings: where they come from, and which make no sense."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from app.config import SettingError, load_settings, unknown_env_keys
from app.services.catalog import Catalog
from tests.servers import make_settings


def test_the_environment_wins_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("TTS_MAX_QUEUE=3\nPORT=9\nMODEL_ALLOWED=a/b, c/d@v1\nPROT=1\n")
    monkeypatch.setenv("PORT", "10")
    monkeypatch.setenv("MODEL_DIRECTORIES", "one=/a, two/b=/c")
    monkeypatch.setenv("MODELS", "/somebody/elses")
    monkeypatch.setenv("MODEL_MEMORY_BUDGET_BYTES", "")
    settings = load_settings(env_file)
    assert settings.port == 10
    assert settings.tts.max_queue == 3
    assert settings.models.allowed == ("a/b", "c/d@v1")
    assert settings.models.directories == {"one": Path("/a"), "two/b": Path("/c")}
    assert settings.models.memory_budget_bytes is None
    assert unknown_env_keys(env_file) == ["PROT"]


@pytest.mark.parametrize(
    ("written", "root_path"), [("", ""), ("bawabah", "/bawabah"), ("/a/b/", "/a/b")]
)
def test_a_root_path_has_one_leading_slash(tmp_path: Path, written: str, root_path: str) -> None:
    assert make_settings(tmp_path, root_path=written).root_path == root_path


@pytest.mark.parametrize("written", ["/api", "health/x", "docs"])
def test_a_root_path_that_looks_like_ours_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(ValidationError, match="path of this server"):
        make_settings(tmp_path, root_path=written)


@pytest.mark.parametrize(
    ("tts", "models", "name"),
    [
        ({"model_name": "/no/such/directory"}, {}, "TTS_MODEL_NAME"),
        ({"model_name": "nothing"}, {}, "TTS_MODEL_NAME"),
        ({"model_name": "a/ü"}, {}, "TTS_MODEL_NAME"),
        ({"fallback_model_name": "openbmb/VoxCPM2"}, {}, "TTS_FALLBACK_MODEL_NAME"),
        ({}, {"preload": ("a/b",)}, "MODEL_PRELOAD"),
        ({}, {"allowed": ("ab",)}, "MODEL_ALLOWED"),
        ({}, {"directories": {"نموذج": Path("/")}}, "MODEL_DIRECTORIES"),
    ],
)
def test_a_name_that_can_be_no_model_is_refused_with_its_setting(
    tmp_path: Path, tts: dict[str, str], models: dict[str, object], name: str
) -> None:
    with pytest.raises(SettingError, match=name):
        Catalog(make_settings(tmp_path, tts=tts, models=models))
