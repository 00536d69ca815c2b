"""Where versions come from, `[registry]`."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from edge_agent.package import registry_uri
from edge_agent.settings.section import Seconds, Section


class RegistrySettings(Section):
    """The MLflow registry. Without a `uri` the agent uses its cache only."""

    uri: str = Field(default="", description="MLflow registry: http(s)://… or sqlite:///…; empty for none")
    poll_interval_s: Seconds = Field(default=300, ge=1, description="seconds between two checks, jittered")
    timeout_s: Seconds = Field(default=30, description="seconds for one request, or for one stalled read")
    ca_file: str = Field(
        default="", description="PEM; the authorities of an https registry that is not public"
    )
    cert_file: str = Field(default="", description="PEM, this device's certificate")
    key_file: str = Field(default="", description="PEM, its key")

    @field_validator("uri")
    @classmethod
    def _address(cls, uri: str) -> str:
        if registry_uri.has_credentials(uri):
            raise ValueError(
                "must not contain credentials; use MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        if uri and (problem := registry_uri.problem_of(uri)):
            raise ValueError(problem)
        return uri

    @model_validator(mode="after")
    def _tls(self) -> RegistrySettings:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        if (self.ca_file or self.cert_file) and not self.uri.lower().startswith("https://"):
            raise ValueError("ca_file and cert_file need an https uri")
        return self
