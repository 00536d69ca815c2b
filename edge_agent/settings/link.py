"""When downloads may use the line, `[link]`."""

from __future__ import annotations

from pydantic import Field, field_validator

from edge_agent.host.daily_windows import Window, zone_of
from edge_agent.settings.section import Bytes, Section


class LinkSettings(Section):
    """When the line may be used for downloads, and when another version may take over."""

    bytes_per_day: Bytes = Field(default=0, description="of downloads; 0: no bound")
    windows: tuple[str, ...] = Field(
        default=(), max_length=32, description="HH:MM-HH:MM; downloads only then"
    )
    timezone: str = Field(default="", description="IANA name, or UTC; empty: the host's own")
    activate_windows: tuple[str, ...] = Field(
        default=(), max_length=32, description="another version takes over only then"
    )
    inhibit_file: str = Field(default="", description="while this file exists, no other version takes over")

    @field_validator("windows", "activate_windows")
    @classmethod
    def _times(cls, windows: tuple[str, ...]) -> tuple[str, ...]:
        for window in windows:
            Window.parse(window)
        return windows

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        zone_of(name)
        return name

    @field_validator("inhibit_file")
    @classmethod
    def _absolute(cls, file: str) -> str:
        if file and (not file.startswith("/") or "\0" in file):
            raise ValueError("must be an absolute path")
        return file
