"""Which models this server knows, by name. Anything else does not exist, for any route."""

from pathlib import Path

from app.config import MODEL_NAME, SettingError, Settings
from app.domain.models import DirectorySource, EmbeddedSource, HubSource, ModelSpec
from app.errors import ModelNotFoundError

HUB_NAMES = ("openbmb/VoxCPM-0.5B", "openbmb/VoxCPM1.5", "openbmb/VoxCPM2")
EMBEDDED_NAMES = {"hibari/heart": "hibari"}
# By TTS_ENGINE, the backend that runs VoxCPM.
VOXCPM_BACKENDS = {"batched": "voxcpm", "reference": "voxcpm-reference"}


class Catalog:
    """The known models and the two names that settings single out.

    Raises SettingError for settings that name no possible model.

    `default_name` is what a request without a model gets; `fallback_name` what answers while the
    default's weights are missing (None: nothing does).
    """

    def __init__(self, settings: Settings) -> None:
        self._specs: dict[str, ModelSpec] = {}
        self._voxcpm = VOXCPM_BACKENDS[settings.tts.engine]
        for name in HUB_NAMES + settings.models.allowed:
            self._add_hub(name, setting="MODEL_ALLOWED")
        for name, backend in EMBEDDED_NAMES.items():
            self._add(ModelSpec(name, backend, EmbeddedSource()))
        for name, directory in settings.models.directories.items():
            self._add_directory(name, directory, setting="MODEL_DIRECTORIES")
        self.default_name = self._add_default(settings.tts.model_name)
        self.fallback_name = settings.tts.fallback_model_name or None
        if self.fallback_name not in {None, *EMBEDDED_NAMES}:
            known = ", ".join(EMBEDDED_NAMES)
            raise SettingError("TTS_FALLBACK_MODEL_NAME", f"not an embedded model; choose {known}")
        for name in settings.models.preload:
            if name not in self._specs:
                raise SettingError("MODEL_PRELOAD", f"no model is named {name!r}")

    def spec(self, name: str) -> ModelSpec:
        """The model of exactly this name. Raises ModelNotFoundError."""
        known = self._specs.get(name)
        if known is None:
            raise ModelNotFoundError(
                "This server knows no model of this name; GET /api/v1/models lists those it knows."
            )
        return known

    def specs(self) -> list[ModelSpec]:
        """Every known model, the default first."""
        return sorted(self._specs.values(), key=lambda spec: spec.name != self.default_name)

    def _add(self, spec: ModelSpec) -> str:
        self._specs[spec.name] = spec
        return spec.name

    def _add_hub(self, name: str, *, setting: str) -> str:
        """A hub id; a revision may follow it, as in `openbmb/VoxCPM2@v1`."""
        repository, _, revision = name.partition("@")
        if not MODEL_NAME.fullmatch(name) or repository.count("/") != 1:
            raise SettingError(setting, "neither a known model, a hub id nor a directory")
        return self._add(ModelSpec(name, self._voxcpm, HubSource(repository, revision or "main")))

    def _add_directory(self, name: str, directory: Path, *, setting: str) -> str:
        if not MODEL_NAME.fullmatch(name):
            raise SettingError(setting, "a model's name is letters, digits and . _ - / only")
        return self._add(ModelSpec(name, self._voxcpm, DirectorySource(directory.expanduser())))

    def _add_default(self, name: str) -> str:
        """A hub id, a name known already, or a directory, which is served under `local/`."""
        if name in self._specs:
            return name
        setting = "TTS_MODEL_NAME"
        directory = Path(name).expanduser()
        if directory.is_dir():
            local_name = f"local/{directory.resolve().name}"
            return self._add_directory(local_name, directory, setting=setting)
        return self._add_hub(name, setting=setting)
