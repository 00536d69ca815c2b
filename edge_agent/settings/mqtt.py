"""The broker, `[mqtt]`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from edge_agent.settings.section import Seconds, Section
from edge_agent.topics import can_be_published


class MqttSettings(Section):
    """The broker."""

    host: str = Field(default="localhost", min_length=1, max_length=255)
    port: int = Field(default=1883, ge=1, le=65_535)
    username: str = Field(default="", max_length=1024)
    password_file: str = Field(default="", description="or the systemd credential mqtt-password")
    ca_file: str = Field(default="", description="PEM; set it to use TLS")
    cert_file: str = Field(default="", description="PEM, this device's certificate")
    key_file: str = Field(default="", description="PEM, its key")
    prefix: str = Field(default="edge", description="first part of every topic")
    protocol: Literal["auto", "5", "3.1.1"] = Field(default="auto", description="auto: 5, else 3.1.1")
    session_expiry_s: int = Field(default=86_400, ge=0, le=0xFFFF_FFFE)
    keepalive_s: int = Field(default=30, ge=5, le=3600)
    reply_prefixes: tuple[str, ...] = Field(default=("replies/",), description="where answers may go")
    answer_ttl_s: Seconds = Field(
        default=86_400, description="an answer that cannot be delivered is kept this long"
    )

    @field_validator("prefix")
    @classmethod
    def _plain_prefix(cls, prefix: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}(/[A-Za-z0-9_.-]{1,64}){0,2}", prefix):
            raise ValueError("must be one to three topic levels of letters, digits, '_', '.', '-'")
        return prefix

    @field_validator("reply_prefixes")
    @classmethod
    def _plain_reply_prefixes(cls, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in prefixes:
            if not can_be_published(prefix) or len(prefix) > 200:
                raise ValueError(
                    f"{prefix!r} must begin a topic, without wildcards and control characters, and not with '$'"
                )
        return prefixes

    @model_validator(mode="after")
    def _pairs(self) -> MqttSettings:
        if bool(self.cert_file) != bool(self.key_file):
            raise ValueError("cert_file and key_file go together")
        if self.cert_file and not self.ca_file:
            raise ValueError("cert_file needs ca_file")
        return self
