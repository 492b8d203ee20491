"""Wire shapes of models and of the welcome and health answers."""

from pydantic import BaseModel, Field

from app.domain.models import Capabilities, ModelState, ModelStatus


class CapabilitiesOut(BaseModel):
    """What a model can do."""

    prompt_cloning: bool = Field(description="Continues a recording with its transcript.")
    reference_cloning: bool = Field(description="Takes a voice from a recording alone.")
    streaming: bool = Field(description="Sends audio while it is made.")
    seed: bool = Field(description="The same seed gives the same audio.")
    cfg: bool = Field(description="Takes `cfg_value`.")
    steps: bool = Field(description="Takes `inference_timesteps`.")
    style: bool = Field(description="Takes `style`.")
    languages: list[str] = Field(description="Languages it was made for.")
    voices: list[str] = Field(description="Voices of its own.")
    sample_rate_hz: int = Field(description="Rate of its audio.")
    prompt_sample_rate_hz: int | None = Field(description="Rate at which it hears a recording.")
    max_chars: int | None = Field(description="Longest text, if it has a limit in characters.")
    max_seconds: float | None = Field(description="Longest audio of one request.")
    parameters: list[str] = Field(description="Request fields that it honours.")

    @classmethod
    def of(cls, capabilities: Capabilities) -> "CapabilitiesOut":
        """From the domain value."""
        has = capabilities.parameters.__contains__
        return cls(
            prompt_cloning=has("prompt_wav"),
            reference_cloning=has("reference_wav"),
            streaming=has("stream"),
            seed=has("seed"),
            cfg=has("cfg_value"),
            steps=has("inference_timesteps"),
            style=has("style"),
            languages=list(capabilities.languages),
            voices=list(capabilities.voices),
            sample_rate_hz=capabilities.sample_rate_hz,
            prompt_sample_rate_hz=capabilities.prompt_sample_rate_hz,
            max_chars=capabilities.max_chars,
            max_seconds=capabilities.max_seconds,
            parameters=sorted(capabilities.parameters),
        )


class ModelOut(BaseModel):
    """One model at this moment."""

    name: str = Field(examples=["openbmb/VoxCPM-0.5B"])
    kind: str = Field(examples=["text-to-speech"])
    state: ModelState = Field(
        description="absent: not in memory (see on_disk); downloading; loading; ready; unloading; "
        "failed: see reason."
    )
    on_disk: bool = Field(description="Its weights are complete on the server's disk.")
    progress: float | None = Field(description="Share of its download that is done, 0 to 1.")
    reason: str | None = Field(description="Why it failed.")
    default: bool = Field(description="Answers requests that name no model.")
    sample_rate_hz: int | None = Field(description="Rate of its audio, once known.")
    capabilities: CapabilitiesOut | None = Field(description="What it can do, once known.")

    @classmethod
    def of(cls, status: ModelStatus, *, default_name: str) -> "ModelOut":
        """From the domain value."""
        capabilities = status.capabilities
        return cls(
            name=status.spec.name,
            kind=status.spec.kind,
            state=status.state,
            on_disk=status.on_disk,
            progress=status.progress,
            reason=status.reason,
            default=status.spec.name == default_name,
            sample_rate_hz=capabilities.sample_rate_hz if capabilities else None,
            capabilities=CapabilitiesOut.of(capabilities) if capabilities else None,
        )


class ModelList(BaseModel):
    """Every model that this server knows."""

    models: list[ModelOut]


class Welcome(BaseModel):
    """The answer at the root."""

    message: str = Field(examples=["Welcome to Bawabah AI"])
    version: str
    docs: str = Field(description="Path of the interactive documentation.")


class Live(BaseModel):
    """The process is up."""

    live: bool = Field(examples=[True])


class Ready(BaseModel):
    """Whether the server can do its main job."""

    ready: bool = Field(examples=[True])
    degraded: bool = Field(
        examples=[False],
        description="True while the default model is out of reach and its stand-in answers.",
    )
    reason: str | None = Field(description="What is missing, in one sentence.", examples=[None])
