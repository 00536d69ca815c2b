"""The cache on the disk and the mirrors that fill it, `[cache]`."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from edge_agent.settings.section import Bytes, Section

_MIRROR = re.compile(r"(https?://[A-Za-z0-9.\[\]:_-]+(/[^?#@\\\s]*)?|file:///[^?#\\\s]*)")


class CacheSettings(Section):
    """Limits of the cache."""

    quota_bytes: Bytes = Field(default=20_000_000_000, ge=1, description="all blobs together")
    min_free_bytes: Bytes = Field(default=500_000_000, description="left free on the file system")
    max_bytes_per_s: Bytes = Field(default=0, description="download cap; 0: none")
    verify_on_load: bool = Field(default=True, description="check every digest before each load")
    mirrors: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="places to try first: http(s)://…/ or file:///…/ with sha256/ in it",
    )
    mirror_patience_s: float = Field(
        default=0, ge=0, le=86_400, description="wait so long for mirrors to get what they do not have"
    )
    mirror_ca_file: str = Field(
        default="", description="PEM; authorities of https mirrors beside the public ones"
    )

    @field_validator("mirrors")
    @classmethod
    def _plain_mirrors(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not _MIRROR.fullmatch(url) or not url.isascii() or "/../" in f"{url}/":
                shown = re.sub(r"[^/]*@", "", url.partition("?")[0])  # what it leaves out may be a password
                raise ValueError(
                    f"{shown[:200]!r} must be http(s)://HOST/… or file:///…, without user, query and '..'"
                )
        return tuple(dict.fromkeys(url.rstrip("/") + "/" for url in urls))
