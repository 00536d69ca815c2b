"""Whether this device shows itself in Home Assistant, `[homeassistant]`."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from edge_agent.settings.section import Section


class HomeAssistantSettings(Section):
    """MQTT discovery. The broker's rules must let the device write the topic: docs/home-assistant.md."""

    discovery: bool = Field(default=False, description="true: shown in Home Assistant, by its MQTT discovery")
    prefix: str = Field(default="homeassistant", description="the discovery prefix that is set there")

    @field_validator("prefix")
    @classmethod
    def _levels(cls, prefix: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}){0,3}", prefix):
            raise ValueError("must be one to four levels of letters, digits, _ and -, separated by /")
        return prefix
