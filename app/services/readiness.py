"""Whether the server can do its main job yet."""

from dataclasses import dataclass

from app.services.model_loader import ModelLoader


@dataclass(frozen=True, slots=True)
class Readiness:
    """`degraded`: ready, but another model stands in for the default. `reason` says what lacks."""

    ready: bool
    degraded: bool = False
    reason: str | None = None


def readiness(models: ModelLoader, *, preload: tuple[str, ...]) -> Readiness:
    """Not ready while the default model is on its way to disk or a preload into memory.

    Once a download has failed the server no longer waits for it: it is ready, and degraded.
    """
    default = models.catalog.spec(models.catalog.default_name)
    for name in preload:
        spec = models.catalog.spec(name)
        if models.is_preparing(name) and not models.downloads.of(spec).has_failed:
            return Readiness(ready=False, reason=f"{name} is being prepared")
    if models.downloads.on_disk(default):
        return Readiness(ready=True)
    if models.downloads.of(default).has_failed:
        return Readiness(ready=True, degraded=True, reason=f"{default.name} is out of reach")
    return Readiness(ready=False, reason=f"{default.name} is being downloaded")
