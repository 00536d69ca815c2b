"""One model, `[models.NAME]`, and what its process may reach."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from edge_agent.errors import SettingsError
from edge_agent.package.reference import ModelRef
from edge_agent.settings.section import Section


class SandboxSettings(Section):
    """What a model may do beyond what every model may: see docs/security.md."""

    network: bool = Field(default=False, description="true: its code may connect to anything")
    read: tuple[Path, ...] = Field(
        default=(), max_length=256, description="files and folders that its code may read, absolute"
    )

    @field_validator("read")
    @classmethod
    def _plain_paths(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        for path in paths:
            if not path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{str(path)!r} must be absolute, without '..'")
        return paths


class ModelSettings(Section):
    """One model that this device serves."""

    uri: str = Field(description="models:/NAME@ALIAS or models:/NAME/VERSION")
    fallback: str = Field(default="", description="models:/…, served while no version of `uri` can run here")
    context_tokens: int = Field(
        default=2048, ge=16, le=1 << 20, description="tokens of prompt and answer together"
    )
    max_tokens: int = Field(
        default=256,
        ge=1,
        le=1 << 20,
        description="tokens of an answer, for requests without max_tokens; not set: the package's own comes first",
    )
    repetition_penalty: float = Field(
        default=1,
        ge=0.01,
        le=100,
        description="for requests without one; 1 is off; not set: the package's own comes first",
    )
    system: str = Field(default="", max_length=32_768, description="system prompt for requests without one")
    preload: bool = Field(default=True, description="load at start; READY waits for it")
    min_tokens_per_s: float = Field(
        default=0, ge=0, le=1e6, description="slower new versions are reported; 0: none"
    )
    idle_unload_s: float = Field(
        default=0, ge=0, le=10 * 365 * 86_400, description="unload when idle; 0: never"
    )
    sandbox: SandboxSettings = SandboxSettings()

    @field_validator("uri", "fallback")
    @classmethod
    def _reference(cls, uri: str) -> str:
        if uri:
            try:
                ModelRef.parse(uri)
            except SettingsError as error:
                raise ValueError(str(error)) from error
        return uri

    @property
    def generation(self) -> dict[str, float]:
        """What the settings themselves say of `max_tokens` and `repetition_penalty`. What they leave out, the
        package may say."""
        return {
            name: getattr(self, name)
            for name in ("max_tokens", "repetition_penalty")
            if name in self.model_fields_set
        }

    @model_validator(mode="after")
    def _has_uri(self) -> ModelSettings:
        if not self.uri:
            raise ValueError("uri is empty")
        if self.fallback == self.uri:
            raise ValueError("fallback is the same as uri")
        return self

    @cached_property
    def ref(self) -> ModelRef:
        """What the device follows, unless MQTT or an operator says otherwise."""
        return ModelRef.parse(self.uri)

    @cached_property
    def fallback_ref(self) -> ModelRef | None:
        """What it serves while no version of `ref` can run here; None for nothing."""
        return ModelRef.parse(self.fallback) if self.fallback else None
